// A layer's output for few tokens: the frozen weight is streamed once, everything else is in the cache.
#pragma once

#include "products.h"

namespace bidora {
namespace BIDORA_ISA {

template <typename T, int ROWS>
BIDORA_INLINE void few_tokens_group(const FewTokensArgs<T>& a, int64_t row, T* scratch) {
  const T *rows[ROWS], *updates[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    rows[i] = row_as(a.weight, row + i, a.in_features, scratch + i * a.in_features);
    updates[i] = a.lora_B + (row + i) * a.r;
  }
  T *products = scratch + ROWS * a.in_features, *low_rank = products + ROWS * a.tokens;  // [tokens, ROWS] each
  // the processor's own requests for memory keep up with four rows at once
  dots<T, ROWS, (ROWS < 4)>(rows, a.x, a.x_stride, a.tokens, a.in_features, products, ROWS);
  dots<T, ROWS, false>(updates, a.hidden, a.r, a.tokens, a.r, low_rank, ROWS);
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int i = 0; i < ROWS; ++i) {
      T u = products[t * ROWS + i] + low_rank[t * ROWS + i];
      a.y[t * a.out_features + row + i] = a.scale[row + i] * u + (a.bias ? a.bias[row + i] : T(0));
    }
}

template <typename T>
static void few_tokens_rows(const FewTokensArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  int64_t row = begin;
  // several streams at once for one token, several tokens per loaded weight otherwise
  if (a.tokens < 4)
    for (; row + 4 <= end; row += 4) few_tokens_group<T, 4>(a, row, scratch);
  for (; row + 2 <= end; row += 2) few_tokens_group<T, 2>(a, row, scratch);
  for (; row < end; ++row) few_tokens_group<T, 1>(a, row, scratch);
}

}  // namespace BIDORA_ISA
}  // namespace bidora
