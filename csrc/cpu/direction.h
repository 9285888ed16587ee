// Gradients of n = ||V||, V / n and magnitude * V / n with respect to the low-rank factors: dV row by row, folded at once.
#pragma once

#include "merged_weight.h"

namespace bidora {
namespace BIDORA_ISA {

template <typename T>
BIDORA_INLINE double row_dot(const T* a, const T* b, int64_t count) {
  double total = 0;
  int64_t k = 0;
  while (k + kLanes<T> <= count) {
    Vector<T> sum = {};
    const int64_t stop = k + 64 * kLanes<T>;
    for (; k + kLanes<T> <= count && k < stop; k += kLanes<T>) sum += load(a + k) * load(b + k);
    total += lane_sum<T>(sum);
  }
  for (; k < count; ++k) total += a[k] * b[k];
  return total;
}

template <typename T, int ROWS>
BIDORA_INLINE void updated_rows(const DirectionArgs<T>& a, int64_t row, int64_t padded, T* converted, T* updated) {
  WeightArgs<T> w{};
  w.weight = a.weight, w.panels = a.panels, w.in_features = a.in_features, w.r = a.r;
  const T* in[ROWS];
  for (int i = 0; i < ROWS; ++i) in[i] = row_as(a.weight, row + i, a.in_features, converted + i * padded);
  const Left<T, ROWS, 0> left(a.lora_B + row * a.r, a.r);
  each_panel<T, ROWS, 0>(w, row, in, nullptr, left, [&](int64_t p, Vector<T>(&acc)[ROWS][2]) {
    for (int i = 0; i < ROWS; ++i) {
      store(updated + i * padded + p * kPanel<T>, acc[i][0]);
      store(updated + i * padded + p * kPanel<T> + kLanes<T>, acc[i][1]);
    }
  });
}

// Turns the row of V in `v` into dV = alpha G + beta V
template <typename T>
BIDORA_INLINE void row_gradient(const DirectionArgs<T>& a, int64_t row, T* grad, T* v) {
  const T n = a.norm[row];
  const bool fixed = !(n >= a.floor);
  double alpha = 0, beta = 0;
  if (a.grad.data) {
    const T* g = row_as(a.grad, row, a.in_features, grad);
    if (fixed) {
      alpha = a.magnitude ? 1 : 0;
      if (a.grad_magnitude) a.grad_magnitude[row] = T(0);
    } else {
      const double along = row_dot(g, v, a.in_features);
      alpha = (a.magnitude ? double(a.magnitude[row]) : 1.0) / n;
      beta = -alpha * along / row_dot(v, v, a.in_features);
      if (a.grad_magnitude) a.grad_magnitude[row] = T(along / n);
    }
    if (a.grad_norm && !fixed) beta += double(a.grad_norm[row]) / n;
    for (int64_t k = 0; k < a.in_features; ++k) v[k] = T(alpha * g[k] + beta * v[k]);  // the terms may cancel: in double
    return;
  }
  const T factor = fixed ? T(0) : T(double(a.grad_norm[row]) / n);
  for (int64_t k = 0; k < a.in_features; ++k) v[k] *= factor;
}

// Rows [begin, end): grad_B of these rows, and their part of grad_A added to partial_A [r, padded in_features].
template <typename T>
static void direction_rows(const DirectionArgs<T>& a, int64_t begin, int64_t end, T* partial_A, T* scratch) {
  constexpr int64_t kGroup = 8;
  const int64_t panels = panels_of<T>(a.in_features), padded = panels * kPanel<T>;
  T *updated = scratch, *converted = updated + kGroup * padded, *left = converted + 4 * padded, *dot = left + kGroup * a.r;
  for (int64_t start = begin; start < end; start += kGroup) {
    const int64_t count = end - start < kGroup ? end - start : kGroup;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) updated_rows<T, 4>(a, start + i, padded, converted, updated + i * padded);
    for (; i < count; ++i) updated_rows<T, 1>(a, start + i, padded, converted, updated + i * padded);
    for (i = 0; i < count; ++i) {
      row_gradient(a, start + i, converted, updated + i * padded);
      const T* one_row[1] = {updated + i * padded};
      dots<T, 1>(one_row, a.lora_A, a.in_features, a.r, a.in_features, dot, 1);
      for (int64_t j = 0; j < a.r; ++j) a.grad_B[(start + i) * a.r + j] = a.scaling * dot[j];
      for (int64_t k = a.in_features; k < padded; ++k) updated[i * padded + k] = T(0);
      for (int64_t j = 0; j < a.r; ++j) left[j * kGroup + i] = a.lora_B[(start + i) * a.r + j];
    }
    for (int64_t p = 0; p < panels; ++p) {
      const T* right = updated + p * kPanel<T>;
      int64_t j = 0;
      auto add = [&](T* to, Vector<T> v0, Vector<T> v1) {
        store(to, load(to) + v0);
        store(to + kLanes<T>, load(to + kLanes<T>) + v1);
      };
      for (; j + 4 <= a.r; j += 4) {
        Vector<T> acc[4][2];
        panel_product<T, 4>(nullptr, nullptr, left + j * kGroup, kGroup, right, padded, count, acc);
        for (int k = 0; k < 4; ++k) add(partial_A + (j + k) * padded + p * kPanel<T>, acc[k][0], acc[k][1]);
      }
      for (; j < a.r; ++j) {
        Vector<T> acc[1][2];
        panel_product<T, 1>(nullptr, nullptr, left + j * kGroup, kGroup, right, padded, count, acc);
        add(partial_A + j * padded + p * kPanel<T>, acc[0][0], acc[0][1]);
      }
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
