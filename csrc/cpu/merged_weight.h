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
    for (int i = 0; i < ROWS; ++i) __builtin_prefetch(at[i] + kAhead * kPanel<T>);
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
  for (int i = 0; i < ROWS; ++i) {
    in[i] = row_as(a.weight, row + i, a.in_features, converted + i * padded);
    in_scale[i] = T(1);
  }
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
      for (int i = 0; i < ROWS; ++i) write_row(a.out, row + i, 0, a.in_features, out[i]);
    return;
  }
  Vector<T> sums[ROWS] = {};
  double total[ROWS] = {};
  const bool keep = a.out.data != nullptr;
  each_panel<T, ROWS>(a, in, in_scale, left, a.r, [&](int64_t p, Vector<T>(&acc)[ROWS][2]) {
    for (int i = 0; i < ROWS; ++i) {
      if (keep) {
        store(updated + i * padded + p * kPanel<T>, acc[i][0]);
        store(updated + i * padded + p * kPanel<T> + kLanes<T>, acc[i][1]);
      }
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
    if (!keep) continue;
    T c = scale_of(a, row + i);
    T* v = updated + i * padded;
    if (a.out.dtype == kOwnDtype<T>) {
      T* out = static_cast<T*>(a.out.data) + (row + i) * a.out.stride;
      for (int64_t k = 0; k < a.in_features; ++k) out[k] = c * v[k];
    } else {
      for (int64_t k = 0; k < a.in_features; ++k) v[k] *= c;
      write_row(a.out, row + i, 0, a.in_features, v);
    }
  }
}

template <typename T>
static void weight_rows(const WeightArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
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
      write_row(a.out, k, first, width, v);
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
