// The low-rank and magnitude gradients of a layer from x, g and y: one sweep over tokens, no gradient of the full weight.
// A block of tokens is projected on the factors and folded into the gradients while it is in the cache. Blocks add to a partial
// sum per range of tokens; the ranges depend on the shape alone, so results do not depend on the number of threads.
#pragma once

#include "products.h"

namespace bidora {
namespace BIDORA_ISA {

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* at(int64_t token, int64_t column) const { return data + token * stride + column; }
};

// `count` rows of a matrix from `token` on, a multiple of the panel wide: in place, or copied and filled up with zeros
template <typename T>
BIDORA_INLINE Rows<T> block_of(const Matrix& m, int64_t token, int64_t count, int64_t columns, T* scratch) {
  const int64_t padded = panels_of<T>(columns) * kPanel<T>;
  if (m.dtype == kOwnDtype<T> && padded == columns) return {static_cast<const T*>(m.data) + token * m.stride, m.stride};
  for (int64_t t = 0; t < count; ++t) {
    read_row(m, token + t, 0, columns, scratch + t * padded);
    for (int64_t c = columns; c < padded; ++c) scratch[t * padded + c] = T(0);
  }
  return {scratch, padded};
}

// out[j][t] = <block[t], right[j]>
template <typename T>
BIDORA_INLINE void project(const Rows<T>& block, int64_t count, const T* right, int64_t columns, int64_t r, T* out) {
  constexpr int kRows = BIDORA_VECTOR_BYTES == 64 ? 4 : 2;  // 16 registers hold the sums of two rows and four columns, 32 of four
  int64_t t = 0;
  for (; t + kRows <= count; t += kRows) {
    const T* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = block.at(t + i, 0);
    dots<T, kRows>(rows, right, columns, r, columns, out + t, kBlock);
  }
  for (; t < count; ++t) {
    const T* rows[1] = {block.at(t, 0)};
    dots<T, 1>(rows, right, columns, r, columns, out + t, kBlock);
  }
}

// Requests one panel of the `count` rows from `token` on of a matrix that is about to be read, for the L2 cache
template <typename T>
BIDORA_INLINE void request_panel(const Matrix& m, int64_t token, int64_t count, int64_t column) {
  const int64_t size = bytes_of(m.dtype), step = m.stride * size;
  const char* at = static_cast<const char*>(m.data) + token * step + column * size;
  for (int64_t t = 0; t < count; ++t, at += step) {
    __builtin_prefetch(at, 0, 2);
    if (BIDORA_VECTOR_BYTES == 64 && m.dtype == kOwnDtype<T>) __builtin_prefetch(at + 64, 0, 2);
  }
}

// to[j] += sum_t factor[j][t] * rows[t] over one panel
template <typename T, int RANKS>
BIDORA_INLINE void add_panel(const T* rows, int64_t row_stride, int64_t count, const T* factor, T* to, int64_t stride) {
  Vector<T> acc[RANKS][2];
  panel_product<T, RANKS>(nullptr, nullptr, factor, kBlock, rows, row_stride, count, acc);
  for (int j = 0; j < RANKS; ++j) {
    T* at = to + j * stride;
    store(at, load(at) + acc[j][0]);
    store(at + kLanes<T>, load(at + kLanes<T>) + acc[j][1]);
  }
}

template <typename T>
BIDORA_INLINE void add_ranks(const T* rows, int64_t row_stride, int64_t count, const T* factor, int64_t r, T* to, int64_t stride) {
  T packed[kBlock * kPanel<T>];
  if (r > 4) {  // read several times: rows whose distance is a multiple of the page would evict each other
    for (int64_t t = 0; t < count; ++t) {
      store(packed + t * kPanel<T>, load(rows + t * row_stride));
      store(packed + t * kPanel<T> + kLanes<T>, load(rows + t * row_stride + kLanes<T>));
    }
    rows = packed, row_stride = kPanel<T>;
  }
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) add_panel<T, 4>(rows, row_stride, count, factor + j * kBlock, to + j * stride, stride);
  for (; j < r; ++j) add_panel<T, 1>(rows, row_stride, count, factor + j * kBlock, to + j * stride, stride);
}

// dot += sum_t g u, and with SIZES size += sum_t |g u|, weight += sum_t |g| over TOKENS rows, u = y - bias, read along the rows
template <typename T, int TOKENS, bool SIZES>
BIDORA_INLINE void add_magnitude(
    const Rows<T>& g, const Rows<T>& y, int64_t token, int64_t columns, const T* bias, T* dot, T* size, T* weight) {
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    Vector<T> b = {}, dots = load(dot + c), sizes = {}, weights = {};
    if (bias) b = load(bias + c);
    if (SIZES) sizes = load(size + c), weights = load(weight + c);
    for (int64_t t = 0; t < TOKENS; ++t) {
      Vector<T> dy = load(g.at(token + t, c)), product = dy * (load(y.at(token + t, c)) - b);
      dots += product;
      if (!SIZES) continue;
      sizes += product < T(0) ? -product : product;
      weights += dy < T(0) ? -dy : dy;
    }
    store(dot + c, dots);
    if (!SIZES) continue;
    store(size + c, sizes);
    store(weight + c, weights);
  }
}

template <typename T, bool SIZES>
BIDORA_INLINE void add_magnitudes(const Rows<T>& g, const Rows<T>& y, int64_t count, int64_t columns, const T* bias, T* sums) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) add_magnitude<T, 4, SIZES>(g, y, t, columns, bias, sums, sums + columns, sums + 2 * columns);
  for (; t < count; ++t) add_magnitude<T, 1, SIZES>(g, y, t, columns, bias, sums, sums + columns, sums + 2 * columns);
}

// Tokens [begin, end) added to a partial sum: grad_A [r, padded in], grad_B^T [r, padded out], then the three magnitude
// sums [padded out] each.
template <typename T>
static void gradient_tokens(const GradientArgs<T>& a, int64_t begin, int64_t end, T* partial, T* scratch) {
  const int64_t in = panels_of<T>(a.in_features) * kPanel<T>, out = panels_of<T>(a.out_features) * kPanel<T>;
  const bool direction = a.direction;
  T *grad_A = partial, *grad_B = grad_A + (direction ? a.r * in : 0), *dot = grad_B + (direction ? a.r * out : 0);
  T *own_g = scratch, *own_y = own_g + kBlock * out, *own_x = own_y + kBlock * out, *hidden = own_x + kBlock * in,
    *projected = hidden + a.r * kBlock, *sums = projected + a.r * kBlock;
  for (int64_t token = begin; token < end; token += a.block) {
    const int64_t count = end - token < a.block ? end - token : a.block;
    const Rows<T> g = block_of(a.g, token, count, a.out_features, own_g);
    if (direction) {
      const Rows<T> x = block_of(a.x, token, count, a.in_features, own_x);
      project(x, count, a.lora_A, a.in_features, a.r, hidden);
      project(g, count, a.scaled_B, a.out_features, a.r, projected);
      // memory works while these sums are formed: on the next block of x and of g, and on this block's y
      const int64_t after = token + count, more = end - after < count ? end - after : count;
      for (int64_t first = 0; first < in; first += kPanel<T>) {
        request_panel<T>(a.x, after, more, first);
        add_ranks(x.at(0, first), x.stride, count, projected, a.r, grad_A + first, in);
      }
      for (int64_t first = 0; first < out; first += kPanel<T>) {
        if (a.with_magnitude) request_panel<T>(a.y, token, count, first);
        request_panel<T>(a.g, after, more, first);
        add_ranks(g.at(0, first), g.stride, count, hidden, a.r, grad_B + first, out);
      }
    }
    if (a.with_magnitude) {
      const Rows<T> y = block_of(a.y, token, count, a.out_features, own_y);
      const int64_t length = (a.sizes ? 3 : 1) * out;
      for (int64_t c = 0; c < length; ++c) sums[c] = T(0);
      if (a.sizes)
        add_magnitudes<T, true>(g, y, count, out, a.bias, sums);
      else
        add_magnitudes<T, false>(g, y, count, out, a.bias, sums);
      for (int64_t c = 0; c < length; ++c) dot[c] += sums[c];
    }
  }
}

}  // namespace BIDORA_ISA
}  // namespace bidora
