// Row norms of V = weight + lora_B @ (scaling * lora_A) and rows of V scaled by c = magnitude / norm, the weight read once.
#pragma once

#include "products.h"

namespace bidora {
namespace BIDORA_ISA {

constexpr int64_t kAhead = 16;  // panels between a request for memory and its use
constexpr int64_t kFlush = 32;  // panels summed in T before the sum moves to double

template <typename T>
BIDORA_INLINE T scale_of(const WeightArgs<T>& a, int64_t row) {
  T norm = a.norm[row];
  if (!(norm >= a.floor)) return T(a.magnitude ? 1 : 0);
  return (a.magnitude ? a.magnitude[row] : T(1)) / norm;
}

template <typename T>
BIDORA_INLINE void write_merged(const WeightArgs<T>& a, int64_t row, int64_t offset, int64_t count, const T* from) {
  if (a.noise)
    write_dithered(a.out, row, offset, count, from, a.noise);
  else
    write_row(a.out, row, offset, count, from);
}

// Runs `use(panel, acc)` over the panels of ROWS rows; the columns beyond the last full panel pass through a padded buffer.
template <typename T, int ROWS, typename Use>
BIDORA_INLINE void each_panel(
    const WeightArgs<T>& a, const T* const (&in)[ROWS], const T* in_scale, const T* left, int64_t left_stride, const Use& use) {
  Vector<T> acc[ROWS][2];
  const T* at[ROWS];
  int64_t full = a.in_features / kPanel<T>, rest = a.in_features % kPanel<T>;
  for (int64_t p = 0; p < full; ++p) {
    for (int i = 0; i < ROWS; ++i) at[i] = in[i] + p * kPanel<T>;
    // memory and arithmetic overlap badly without it: four rows are too many streams for the processor to foresee
    for (int i = 0; i < ROWS; ++i) prefetch(at[i] + kAhead * kPanel<T>, kPanel<T> * int64_t(sizeof(T)));
    panel_product<T, ROWS>(at, in_scale, left, left_stride, a.panels + p * a.r * kPanel<T>, kPanel<T>, a.r, acc);
    use(p, acc);
  }
  if (rest) {
    T padded[ROWS][kPanel<T>] = {};
    for (int i = 0; i < ROWS; ++i) {
      for (int64_t c = 0; c < rest; ++c) padded[i][c] = in[i][full * kPanel<T> + c];
      at[i] = padded[i];
    }
    panel_product<T, ROWS>(at, in_scale, left, left_stride, a.panels + full * a.r * kPanel<T>, kPanel<T>, a.r, acc);
    use(full, acc);
  }
}

template <typename T, int ROWS>
static void weight_row_group(const WeightArgs<T>& a, int64_t row, T* scratch) {
  const int64_t padded = panels_of<T>(a.in_features) * kPanel<T>;
  T *converted = scratch, *updated = scratch + 4 * padded, *left_scaled = scratch + 8 * padded;
  const T* in[ROWS];
  T in_scale[ROWS], scale[ROWS];
  const T* left = a.left + row * a.r;
  for (int i = 0; i < ROWS; ++i) in[i] = row_as(a.weight, row + i, a.in_features, converted + i * padded);
  if (a.norm_known) {
    for (int i = 0; i < ROWS; ++i) {
      scale[i] = scale_of(a, row + i);
      in_scale[i] = a.minus_weight ? scale[i] - T(1) : scale[i];
      for (int64_t j = 0; j < a.r; ++j) left_scaled[i * a.r + j] = scale[i] * left[i * a.r + j];
    }
    const bool direct = a.out.dtype == kOwnDtype<T>;
    const int64_t full = a.in_features / kPanel<T>;
    T* out[ROWS];
    for (int i = 0; i < ROWS; ++i)
      out[i] = direct ? static_cast<T*>(a.out.data) + (row + i) * a.out.stride : updated + i * padded;
    each_panel<T, ROWS>(a, in, in_scale, left_scaled, a.r, [&](int64_t p, Vector<T>(&acc)[ROWS][2]) {
      for (int i = 0; i < ROWS; ++i) {
        if (p < full || !direct) {
          store(out[i] + p * kPanel<T>, acc[i][0]);
          store(out[i] + p * kPanel<T> + kLanes<T>, acc[i][1]);
        } else {
          T last[kPanel<T>];
          store(last, acc[i][0]);
          store(last + kLanes<T>, acc[i][1]);
          for (int64_t c = p * kPanel<T>; c < a.in_features; ++c) out[i][c] = last[c - p * kPanel<T>];
        }
      }
    });
    if (!direct)
      for (int i = 0; i < ROWS; ++i) write_merged(a, row + i, 0, a.in_features, out[i]);
    return;
  }
  Vector<T> sums[ROWS] = {};
  double total[ROWS] = {};
  each_panel<T, ROWS>(a, in, nullptr, left, a.r, [&](int64_t p, Vector<T>(&acc)[ROWS][2]) {
    for (int i = 0; i < ROWS; ++i) {
      store(updated + i * padded + p * kPanel<T>, acc[i][0]);
      store(updated + i * padded + p * kPanel<T> + kLanes<T>, acc[i][1]);
      sums[i] += acc[i][0] * acc[i][0];
      sums[i] += acc[i][1] * acc[i][1];
      if ((p + 1) % kFlush == 0) {
        total[i] += lane_sum<T>(sums[i]);
        sums[i] = Vector<T>{};
      }
    }
  });
  for (int i = 0; i < ROWS; ++i) {
    a.norm[row + i] = T(__builtin_sqrt(total[i] + lane_sum<T>(sums[i])));
    T c = scale_of(a, row + i);
    T* v = updated + i * padded;
    if (a.out.dtype == kOwnDtype<T>) {
      T* out = static_cast<T*>(a.out.data) + (row + i) * a.out.stride;
      for (int64_t k = 0; k < a.in_features; ++k) out[k] = c * v[k];
    } else {
      for (int64_t k = 0; k < a.in_features; ++k) v[k] *= c;
      write_merged(a, row + i, 0, a.in_features, v);
    }
  }
}

// The squares of one block of columns, panels [first, last), of ROWS rows of V, added to `total`. The weight is read in place where
// it holds T and full panels, else from a copy. `next`: the memory that these rows' successors begin with.
template <typename T, int ROWS>
static void block_squares(
    const WeightArgs<T>& a, int64_t row, int64_t first, int64_t last, const char* next, T* converted, double* total) {
  const int64_t count = last - first, width = count * kPanel<T>, rest = a.in_features - first * kPanel<T>;
  const bool in_place = a.weight.dtype == kOwnDtype<T> && rest >= width;
  const T *in[ROWS], *at[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    in[i] = static_cast<const T*>(a.weight.data) + (row + i) * a.weight.stride + first * kPanel<T>;
    if (in_place) continue;
    T* copy = converted + i * width;
    read_row(a.weight, row + i, first * kPanel<T>, rest < width ? rest : width, copy);
    for (int64_t c = rest; c < width; ++c) copy[c] = T(0);
    in[i] = copy;
  }
  // memory is requested kAhead panels ahead, beyond panel `turn` in what comes next; where these are copies only that is
  const int64_t stride = a.weight.stride * bytes_of(a.weight.dtype), panel_bytes = kPanel<T> * bytes_of(a.weight.dtype);
  const int64_t turn = in_place && count > kAhead ? count - kAhead : 0;
  const char *here = reinterpret_cast<const char*>(in[0] + kAhead * kPanel<T>), *then = next - turn * panel_bytes;
  const T* left = a.left + row * a.r;
  Vector<T> acc[ROWS][2], sums[ROWS] = {};
  for (int64_t p = 0; p < count; ++p) {
    const char* ahead = p < turn ? here : then;
    for (int i = 0; i < ROWS; ++i) {
      at[i] = in[i] + p * kPanel<T>;
      prefetch(ahead + i * stride + p * panel_bytes, panel_bytes);
    }
    panel_product<T, ROWS>(at, nullptr, left, a.r, a.panels + (first + p) * a.r * kPanel<T>, kPanel<T>, a.r, acc);
    for (int i = 0; i < ROWS; ++i) {
      sums[i] += acc[i][0] * acc[i][0];
      sums[i] += acc[i][1] * acc[i][1];
    }
  }
  for (int i = 0; i < ROWS; ++i) total[i] += lane_sum<T>(sums[i]);
}

// Norms alone: 16 rows share a block of columns, whose right factor then stays in the L1 cache. Four rows at a time would fetch all
// of it from the L2 cache for every four rows, which is as well only where all of it fits.
template <typename T>
static void norm_rows(const WeightArgs<T>& a, int64_t begin, int64_t end, T* converted) {
  constexpr int64_t kMost = 16, kFits = 16 << 10;  // rows; bytes
  const int64_t panels = panels_of<T>(a.in_features);
  const int64_t together = panels * kPanel<T> * a.r * int64_t(sizeof(T)) <= kFits ? 4 : kMost;
  for (int64_t start = begin; start < end; start += together) {
    const int64_t stop = end - start < together ? end : start + together;
    double total[kMost] = {};
    for (int64_t first = 0; first < panels; first += kFlush) {
      const int64_t last = panels - first < kFlush ? panels : first + kFlush;
      int64_t row = start;
      auto next = [&](int64_t count) {  // after these rows: the rows below, at the end the first ones' next block or other rows
        const bool below = row + count < stop, end_of_rows = !below && last == panels;
        const int64_t next_row = below || end_of_rows ? row + count : start, column = (below ? first : last) * kPanel<T>;
        const int64_t offset = next_row * a.weight.stride + (end_of_rows ? 0 : column);
        return static_cast<const char*>(a.weight.data) + offset * bytes_of(a.weight.dtype);
      };
      for (; row + 4 <= stop; row += 4) block_squares<T, 4>(a, row, first, last, next(4), converted, total + row - start);
      for (; row < stop; ++row) block_squares<T, 1>(a, row, first, last, next(1), converted, total + row - start);
    }
    for (int64_t row = start; row < stop; ++row) a.norm[row] = T(__builtin_sqrt(total[row - start]));
  }
}

template <typename T>
static void weight_rows(const WeightArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  if (a.out.data == nullptr) return norm_rows(a, begin, end, scratch);
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) weight_row_group<T, 4>(a, row, scratch);
  for (; row < end; ++row) weight_row_group<T, 1>(a, row, scratch);
}

// The same for a weight stored [in, out]: a panel holds output features, whose sums run down the stored rows.
template <typename T>
static void weight_columns(const WeightArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  T *updated = scratch, *rows = scratch + a.in_features * kPanel<T>;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPanel<T>;
    const int64_t width = a.out_features - first < kPanel<T> ? a.out_features - first : kPanel<T>;
    const T one[4] = {T(1), T(1), T(1), T(1)};
    const T* panel = a.panels + p * a.r * kPanel<T>;
    Vector<T> sums[2] = {};
    double total[kPanel<T>] = {};
    for (int64_t i = 0; i < 4 * kPanel<T>; ++i) rows[i] = T(0);
    auto flush = [&] {
      T lanes[kPanel<T>];
      store(lanes, sums[0]);
      store(lanes + kLanes<T>, sums[1]);
      for (int64_t c = 0; c < kPanel<T>; ++c) total[c] += lanes[c];
      sums[0] = sums[1] = Vector<T>{};
    };
    for (int64_t k = 0; k < a.in_features; k += 4) {
      const int64_t count = a.in_features - k < 4 ? a.in_features - k : 4;
      const T* in[4];
      for (int64_t i = 0; i < 4; ++i) {
        in[i] = rows + i * kPanel<T>;
        if (i < count) read_row(a.weight, k + i, first, width, rows + i * kPanel<T>);
      }
      auto add = [&](Vector<T>(&acc)[1][2], int64_t i) {
        store(updated + (k + i) * kPanel<T>, acc[0][0]);
        store(updated + (k + i) * kPanel<T> + kLanes<T>, acc[0][1]);
        sums[0] += acc[0][0] * acc[0][0];
        sums[1] += acc[0][1] * acc[0][1];
      };
      if (count == 4) {
        Vector<T> acc[4][2];
        panel_product<T, 4>(in, one, a.left + k * a.r, a.r, panel, kPanel<T>, a.r, acc);
        for (int i = 0; i < 4; ++i) {
          Vector<T> single[1][2] = {{acc[i][0], acc[i][1]}};
          add(single, i);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          Vector<T> acc[1][2];
          panel_product<T, 1>(in + i, one, a.left + (k + i) * a.r, a.r, panel, kPanel<T>, a.r, acc);
          add(acc, i);
        }
      }
      if ((k / 4 + 1) % (4 * kFlush) == 0) flush();
    }
    flush();
    T scale[kPanel<T>];
    for (int64_t c = 0; c < width; ++c) {
      if (!a.norm_known) a.norm[first + c] = T(__builtin_sqrt(total[c]));
      scale[c] = scale_of(a, first + c);
    }
    if (a.out.data == nullptr) continue;
    for (int64_t k = 0; k < a.in_features; ++k) {
      T* v = updated + k * kPanel<T>;
      if (a.minus_weight) {
        T* w = rows;
        read_row(a.weight, k, first, width, w);
        for (int64_t c = 0; c < width; ++c) v[c] = (scale[c] - T(1)) * w[c] + scale[c] * (v[c] - w[c]);
      } else {
        for (int64_t c = 0; c < width; ++c) v[c] *= scale[c];
      }
      write_merged(a, k, first, width, v);
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
