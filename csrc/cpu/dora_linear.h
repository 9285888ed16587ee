// The low-rank and magnitude gradients of a layer from x, g and y: two sweeps over tokens, no gradient of the full weight.
// Every output element is summed by one thread in a fixed order, so results do not depend on the number of threads.
#pragma once

#include "products.h"

namespace bidora {
namespace BIDORA_ISA {

constexpr int64_t kTokens = 32;  // tokens summed in registers before they join the total: blocked sums, and x stays in the cache

template <typename T, int ROWS>
BIDORA_INLINE void project_group(const GradientArgs<T>& a, int64_t token, T* scratch) {
  const T* rows[ROWS];
  for (int i = 0; i < ROWS; ++i) rows[i] = row_as(a.g, token + i, a.out_features, scratch + i * a.out_features);
  dots<T, ROWS>(rows, a.scaled_B, a.out_features, a.r, a.out_features, a.projected + token, a.tokens);
  for (int i = 0; i < ROWS; ++i) rows[i] = row_as(a.x, token + i, a.in_features, scratch + i * a.in_features);
  dots<T, ROWS>(rows, a.lora_A, a.in_features, a.r, a.in_features, a.hidden + token, a.tokens);
}

template <typename T>
static void project_tokens(const GradientArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  int64_t token = begin;
  for (; token + 2 <= end; token += 2) project_group<T, 2>(a, token, scratch);
  for (; token < end; ++token) project_group<T, 1>(a, token, scratch);
}

// grad[j][first:] += sum over a block of tokens of factor[j][token] * rows[token][first:]
template <typename T>
BIDORA_INLINE void add_block(
    const Matrix& m, int64_t columns, int64_t panel, int64_t token, int64_t count, const T* factor, int64_t tokens, int64_t r,
    T* grad) {
  const int64_t first = panel * kPanel<T>, width = columns - first < kPanel<T> ? columns - first : kPanel<T>;
  T packed[kTokens * kPanel<T>];
  const T* right = static_cast<const T*>(m.data) + token * m.stride + first;
  int64_t stride = m.stride;
  if (m.dtype != kOwnDtype<T> || width < kPanel<T> || r > 8) {
    if (width < kPanel<T>)
      for (int64_t i = 0; i < kTokens * kPanel<T>; ++i) packed[i] = T(0);
    for (int64_t t = 0; t < count; ++t) read_row(m, token + t, first, width, packed + t * kPanel<T>);
    right = packed;
    stride = kPanel<T>;
  }
  auto add = [&](T* to, Vector<T> v0, Vector<T> v1) {
    if (width == kPanel<T>) {
      store(to, load(to) + v0);
      store(to + kLanes<T>, load(to + kLanes<T>) + v1);
    } else {
      T values[kPanel<T>];
      store(values, v0);
      store(values + kLanes<T>, v1);
      for (int64_t c = 0; c < width; ++c) to[c] += values[c];
    }
  };
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) {
    Vector<T> acc[4][2];
    panel_product<T, 4>(nullptr, nullptr, factor + j * tokens + token, tokens, right, stride, count, acc);
    for (int i = 0; i < 4; ++i) add(grad + (j + i) * columns + first, acc[i][0], acc[i][1]);
  }
  for (; j < r; ++j) {
    Vector<T> acc[1][2];
    panel_product<T, 1>(nullptr, nullptr, factor + j * tokens + token, tokens, right, stride, count, acc);
    add(grad + j * columns + first, acc[0][0], acc[0][1]);
  }
}

template <typename T>
static void grad_A_panels(const GradientArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < a.tokens; token += kTokens) {
    const int64_t count = a.tokens - token < kTokens ? a.tokens - token : kTokens;
    for (int64_t p = begin; p < end; ++p)
      add_block(a.x, a.in_features, p, token, count, a.projected, a.tokens, a.r, a.grad_A);
  }
}

template <typename T>
BIDORA_INLINE void add_magnitude_block(const GradientArgs<T>& a, int64_t panel, int64_t token, int64_t count) {
  const int64_t first = panel * kPanel<T>, width = a.out_features - first < kPanel<T> ? a.out_features - first : kPanel<T>;
  T bias[kPanel<T>] = {}, g_row[kPanel<T>] = {}, y_row[kPanel<T>] = {};
  if (a.bias)
    for (int64_t c = 0; c < width; ++c) bias[c] = a.bias[first + c];
  const bool in_place = width == kPanel<T> && a.g.dtype == kOwnDtype<T> && a.y.dtype == kOwnDtype<T>;
  Vector<T> b0 = load(bias), b1 = load(bias + kLanes<T>), dot0 = {}, dot1 = {}, square0 = {}, square1 = {};
  for (int64_t t = 0; t < count; ++t) {
    const T *g = g_row, *y = y_row;
    if (in_place) {
      g = static_cast<const T*>(a.g.data) + (token + t) * a.g.stride + first;
      y = static_cast<const T*>(a.y.data) + (token + t) * a.y.stride + first;
    } else {
      read_row(a.g, token + t, first, width, g_row);
      read_row(a.y, token + t, first, width, y_row);
    }
    Vector<T> u0 = load(y) - b0, u1 = load(y + kLanes<T>) - b1;
    dot0 += load(g) * u0;
    dot1 += load(g + kLanes<T>) * u1;
    square0 += u0 * u0;
    square1 += u1 * u1;
  }
  T dot[kPanel<T>], square[kPanel<T>];
  store(dot, dot0);
  store(dot + kLanes<T>, dot1);
  store(square, square0);
  store(square + kLanes<T>, square1);
  for (int64_t c = 0; c < width; ++c) {
    a.grad_scale_sum[first + c] += dot[c];
    a.square_sum[first + c] += square[c];
  }
}

template <typename T>
static void grad_B_panels(const GradientArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < a.tokens; token += kTokens) {
    const int64_t count = a.tokens - token < kTokens ? a.tokens - token : kTokens;
    for (int64_t p = begin; p < end; ++p) {
      if (a.x.data) add_block(a.g, a.out_features, p, token, count, a.hidden, a.tokens, a.r, a.grad_B);
      if (a.y.data) add_magnitude_block(a, p, token, count);
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
