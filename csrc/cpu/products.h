// The two small matrix products everything is made of, for factors of low rank. Included once per instruction set.
#pragma once

#include "vec.h"

namespace bidora {
namespace BIDORA_ISA {

// acc[i][:] = in_scale[i] * in[i][:] + sum_j left[i * left_stride + j] * right[j * right_stride + :]   over one panel of columns
// (in == nullptr: without the first term; in_scale == nullptr: ones)
template <typename T, int ROWS>
BIDORA_INLINE void panel_product(
    const T* const* in, const T* in_scale, const T* left, int64_t left_stride, const T* right, int64_t right_stride, int64_t depth,
    Vector<T> (&acc)[ROWS][2]) {
  for (int i = 0; i < ROWS; ++i) {
    if (in == nullptr) {
      acc[i][0] = acc[i][1] = Vector<T>{};
    } else if (in_scale == nullptr) {
      acc[i][0] = load(in[i]);
      acc[i][1] = load(in[i] + kLanes<T>);
    } else {
      acc[i][0] = load(in[i]) * in_scale[i];
      acc[i][1] = load(in[i] + kLanes<T>) * in_scale[i];
    }
  }
#pragma GCC unroll 2  // one step alone is bound by the loop's own instructions
  for (int64_t j = 0; j < depth; ++j) {
    Vector<T> r0 = load(right + j * right_stride), r1 = load(right + j * right_stride + kLanes<T>);
    for (int i = 0; i < ROWS; ++i) {
      T factor = left[i * left_stride + j];
      acc[i][0] += r0 * factor;
      acc[i][1] += r1 * factor;
    }
  }
}

// out[j * out_stride + i] = <rows[i], right[j * right_stride + :]>; FIRST: nothing has read these rows yet
template <typename T, int ROWS, int COLS, bool FIRST>
BIDORA_INLINE void dot_tile(
    const T* const* rows, const T* right, int64_t right_stride, int64_t length, T* out, int64_t out_stride) {
  Vector<T> acc[ROWS][COLS] = {};
  int64_t c = 0;
  for (; c + kLanes<T> <= length; c += kLanes<T>) {
    Vector<T> x[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      x[i] = load(rows[i] + c);
      if (FIRST) __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + c) + kAheadBytes, 0, 2);
    }
    for (int j = 0; j < COLS; ++j) {
      Vector<T> m = load(right + j * right_stride + c);
      for (int i = 0; i < ROWS; ++i) acc[i][j] += x[i] * m;
    }
  }
  for (int j = 0; j < COLS; ++j)
    for (int i = 0; i < ROWS; ++i) {
      T sum = lane_sum<T>(acc[i][j]);
      for (int64_t k = c; k < length; ++k) sum += rows[i][k] * right[j * right_stride + k];
      out[j * out_stride + i] = sum;
    }
}

template <typename T, int ROWS, bool FROM_MEMORY = true>
BIDORA_INLINE void dots(
    const T* const* rows, const T* right, int64_t right_stride, int64_t columns, int64_t length, T* out, int64_t out_stride) {
  if (columns <= 0) return;
  int64_t j = columns < 4 ? 1 : 4;
  if (columns < 4)
    dot_tile<T, ROWS, 1, FROM_MEMORY>(rows, right, right_stride, length, out, out_stride);
  else
    dot_tile<T, ROWS, 4, FROM_MEMORY>(rows, right, right_stride, length, out, out_stride);
  for (; j + 4 <= columns; j += 4)
    dot_tile<T, ROWS, 4, false>(rows, right + j * right_stride, right_stride, length, out + j * out_stride, out_stride);
  for (; j < columns; ++j)
    dot_tile<T, ROWS, 1, false>(rows, right + j * right_stride, right_stride, length, out + j * out_stride, out_stride);
}

template <typename T>
BIDORA_INLINE int64_t panels_of(int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T>;
}

template <typename T>
static void pack_panels(
    const T* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T scale, T* panels) {
  for (int64_t p = 0; p < panels_of<T>(columns); ++p) {
    int64_t first = p * kPanel<T>, width = columns - first < kPanel<T> ? columns - first : kPanel<T>;
    for (int64_t j = 0; j < rows; ++j, panels += kPanel<T>) {
      const T* source = matrix + j * row_stride + first * column_stride;
      for (int64_t c = 0; c < width; ++c) panels[c] = scale * source[c * column_stride];
      for (int64_t c = width; c < kPanel<T>; ++c) panels[c] = T(0);
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
