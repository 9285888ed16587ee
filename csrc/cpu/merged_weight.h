// Row norms of V = weight + lora_B @ (scaling * lora_A) and rows of V scaled by c = magnitude / norm, the weight read once.
#pragma once

#include "products.h"

namespace bidora {
namespace BIDORA_ISA {

template <typename T>
constexpr int64_t kAhead = kAheadBytes / (kPanel<T> * sizeof(T));  // the same in panels
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

// The left factor of ROWS rows: where the rank is known (DEPTH) in registers, a vector of each number, else (DEPTH = 0) in memory.
template <typename T, int ROWS, int DEPTH>
struct Left {
  Vector<T> values[ROWS][DEPTH > 0 ? DEPTH : 1];
  const T* rows;
  int64_t r;

  BIDORA_INLINE_MEMBER Left(const T* left, int64_t r, const T* scale = nullptr) : rows(left), r(r) {
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < DEPTH; ++j) values[i][j] = Vector<T>{} + (scale ? scale[i] : T(1)) * left[i * r + j];
  }

  // acc[i] = in_scale[i] * in[i] + left[i] @ right over one panel
  BIDORA_INLINE_MEMBER void product(const T* const* in, const T* in_scale, const T* right, Vector<T> (&acc)[ROWS][2]) const {
    if (DEPTH == 0) return panel_product<T, ROWS>(in, in_scale, rows, r, right, kPanel<T>, r, acc);
    for (int i = 0; i < ROWS; ++i) {
      acc[i][0] = load(in[i]), acc[i][1] = load(in[i] + kLanes<T>);
      if (in_scale) acc[i][0] *= in_scale[i], acc[i][1] *= in_scale[i];
    }
    for (int j = 0; j < DEPTH; ++j) {
      const Vector<T> r0 = load(right + j * kPanel<T>), r1 = load(right + j * kPanel<T> + kLanes<T>);
      for (int i = 0; i < ROWS; ++i) acc[i][0] += r0 * values[i][j], acc[i][1] += r1 * values[i][j];
    }
  }
};

// Runs `use(panel, acc)` over the panels of ROWS rows; the columns beyond the last full panel pass through a padded buffer.
template <typename T, int ROWS, int DEPTH, typename Use>
BIDORA_INLINE void each_panel(
    const WeightArgs<T>& a, int64_t row, const T* const (&in)[ROWS], const T* in_scale, const Left<T, ROWS, DEPTH>& left, const Use& use) {
  Vector<T> acc[ROWS][2];
  const T* at[ROWS];
  const int64_t full = a.in_features / kPanel<T>, rest = a.in_features % kPanel<T>;
  // memory and arithmetic overlap badly unless it is requested ahead: in these rows, at their end in the rows after them
  const int64_t stride = a.weight.stride * bytes_of(a.weight.dtype), panel_bytes = kPanel<T> * bytes_of(a.weight.dtype);
  const bool in_place = a.weight.dtype == kOwnDtype<T>;
  const int64_t turn = in_place && full > kAhead<T> ? full - kAhead<T> : 0;
  const char* here = static_cast<const char*>(a.weight.data) + row * stride + kAhead<T> * panel_bytes;
  const char* then = static_cast<const char*>(a.weight.data) + (row + ROWS) * stride - turn * panel_bytes;
  for (int64_t p = 0; p < full; ++p) {
    const char* ahead = p < turn ? here : then;
    for (int i = 0; i < ROWS; ++i) {
      at[i] = in[i] + p * kPanel<T>;
      prefetch(ahead + i * stride + p * panel_bytes, panel_bytes);
    }
    left.product(at, in_scale, a.panels + p * a.r * kPanel<T>, acc);
    use(p, acc);
  }
  if (rest) {
    T padded[ROWS][kPanel<T>] = {};
    for (int i = 0; i < ROWS; ++i) {
      for (int64_t c = 0; c < rest; ++c) padded[i][c] = in[i][full * kPanel<T> + c];
      at[i] = padded[i];
    }
    left.product(at, in_scale, a.panels + full * a.r * kPanel<T>, acc);
    use(full, acc);
  }
}

template <typename T, int ROWS, int DEPTH>
static void weight_row_group(const WeightArgs<T>& a, int64_t row, T* scratch) {
  const int64_t padded = panels_of<T>(a.in_features) * kPanel<T>, full = a.in_features / kPanel<T>;
  T *converted = scratch, *updated = scratch + 4 * padded, *left_scaled = scratch + 8 * padded;
  const bool direct = a.out.dtype == kOwnDtype<T>;
  const T* in[ROWS];
  T in_scale[ROWS], scale[ROWS], *out[ROWS];
  const T* left = a.left + row * a.r;
  for (int i = 0; i < ROWS; ++i) {
    in[i] = row_as(a.weight, row + i, a.in_features, converted + i * padded);
    out[i] = direct ? static_cast<T*>(a.out.data) + (row + i) * a.out.stride : updated + i * padded;
  }
  auto put = [&](int64_t p, int i, const Vector<T>(&v)[2]) {
    if (p < full || !direct) {
      store(out[i] + p * kPanel<T>, v[0]);
      store(out[i] + p * kPanel<T> + kLanes<T>, v[1]);
    } else {
      T last[kPanel<T>];
      store(last, v[0]);
      store(last + kLanes<T>, v[1]);
      for (int64_t c = p * kPanel<T>; c < a.in_features; ++c) out[i][c] = last[c - p * kPanel<T>];
    }
  };
  if (a.norm_known) {
    for (int i = 0; i < ROWS; ++i) {
      scale[i] = scale_of(a, row + i);
      in_scale[i] = a.minus_weight ? scale[i] - T(1) : scale[i];
      if (DEPTH == 0)
        for (int64_t j = 0; j < a.r; ++j) left_scaled[i * a.r + j] = scale[i] * left[i * a.r + j];
    }
    const Left<T, ROWS, DEPTH> factor = DEPTH == 0 ? Left<T, ROWS, DEPTH>(left_scaled, a.r) : Left<T, ROWS, DEPTH>(left, a.r, scale);
    each_panel<T, ROWS, DEPTH>(a, row, in, in_scale, factor, [&](int64_t p, Vector<T>(&acc)[ROWS][2]) {
      for (int i = 0; i < ROWS; ++i) put(p, i, acc[i]);
    });
    if (!direct)
      for (int i = 0; i < ROWS; ++i) write_merged(a, row + i, 0, a.in_features, out[i]);
    return;
  }
  Vector<T> sums[ROWS] = {};
  double total[ROWS] = {};
  const Left<T, ROWS, DEPTH> factor(left, a.r);
  each_panel<T, ROWS, DEPTH>(a, row, in, nullptr, factor, [&](int64_t p, Vector<T>(&acc)[ROWS][2]) {
    for (int i = 0; i < ROWS; ++i) {
      put(p, i, acc[i]);
      sums[i] += acc[i][0] * acc[i][0];
      sums[i] += acc[i][1] * acc[i][1];
      if ((p + 1) % kFlush == 0) {
        total[i] += lane_sum<T>(sums[i]);
        sums[i] = Vector<T>{};
      }
    }
  });
  // V lies in the output, or beside it where that has another dtype, and still in a cache
  for (int i = 0; i < ROWS; ++i) {
    a.norm[row + i] = T(__builtin_sqrt(total[i] + lane_sum<T>(sums[i])));
    const T c = scale_of(a, row + i);
    T* v = out[i];
    for (int64_t k = 0; k < a.in_features; ++k) v[k] *= c;
    if (!direct) write_merged(a, row + i, 0, a.in_features, v);
  }
}

// The squares of one block of columns, panels [first, last), of ROWS rows of V, added to `total`. The weight is read in place where
// it holds T and full panels, else from a copy. `next`: the memory that these rows' successors begin with.
template <typename T, int ROWS, int DEPTH>
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
  const int64_t stride = a.weight.stride * bytes_of(a.weight.dtype), panel_bytes = kPanel<T> * bytes_of(a.weight.dtype);
  const Left<T, ROWS, DEPTH> left(a.left + row * a.r, a.r);
  Vector<T> acc[ROWS][2], sums[ROWS] = {};
  for (int64_t p = 0; p < count; ++p) {
    for (int i = 0; i < ROWS; ++i) {
      at[i] = in[i] + p * kPanel<T>;
      prefetch(next + i * stride + p * panel_bytes, panel_bytes);
    }
    left.product(at, nullptr, a.panels + (first + p) * a.r * kPanel<T>, acc);
    for (int i = 0; i < ROWS; ++i) {
      sums[i] += acc[i][0] * acc[i][0];
      sums[i] += acc[i][1] * acc[i][1];
    }
  }
  for (int i = 0; i < ROWS; ++i) total[i] += lane_sum<T>(sums[i]);
}

// Norms alone: 16 rows share a block of columns, whose right factor then stays in the L1 cache. Four rows at a time would fetch all
// of it from the L2 cache for every four rows, which is as well only where all of it fits.
template <typename T, int ROWS, int DEPTH>
static void norm_rows(const WeightArgs<T>& a, int64_t begin, int64_t end, T* converted) {
  constexpr int64_t kMost = 16, kFits = 128 << 10;  // rows; bytes
  const int64_t panels = panels_of<T>(a.in_features);
  const int64_t together = panels * kPanel<T> * a.r * int64_t(sizeof(T)) <= kFits ? ROWS : kMost;
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
      for (; row + ROWS <= stop; row += ROWS) block_squares<T, ROWS, DEPTH>(a, row, first, last, next(ROWS), converted, total + row - start);
      for (; row < stop; ++row) block_squares<T, 1, DEPTH>(a, row, first, last, next(1), converted, total + row - start);
    }
    for (int64_t row = start; row < stop; ++row) a.norm[row] = T(__builtin_sqrt(total[row - start]));
  }
}

template <typename T, int ROWS, int DEPTH>
static void rows_of_depth(const WeightArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  if (a.out.data == nullptr) return norm_rows<T, ROWS, DEPTH>(a, begin, end, scratch);
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) weight_row_group<T, ROWS, DEPTH>(a, row, scratch);
  for (; row < end; ++row) weight_row_group<T, 1, DEPTH>(a, row, scratch);
}

template <typename T>
static void weight_rows(const WeightArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  switch (a.r) {
    case 1: return rows_of_depth<T, 4, 1>(a, begin, end, scratch);
    case 2: return rows_of_depth<T, 4, 2>(a, begin, end, scratch);
    case 3: return rows_of_depth<T, 4, 3>(a, begin, end, scratch);
    case 4: return rows_of_depth<T, 4, 4>(a, begin, end, scratch);
    default: return rows_of_depth<T, 4, 0>(a, begin, end, scratch);
  }
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
        T *w = rows, *low_rank = rows + kPanel<T>;  // V - W0 would have lost the digits of a small update
        Vector<T> acc[1][2];
        panel_product<T, 1>(nullptr, nullptr, a.left + k * a.r, a.r, panel, kPanel<T>, a.r, acc);
        store(low_rank, acc[0][0]);
        store(low_rank + kLanes<T>, acc[0][1]);
        read_row(a.weight, k, first, width, w);
        for (int64_t c = 0; c < width; ++c) v[c] = (scale[c] - T(1)) * w[c] + scale[c] * low_rank[c];
      } else {
        for (int64_t c = 0; c < width; ++c) v[c] *= scale[c];
      }
      write_merged(a, k, first, width, v);
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
