// The layer's output from the frozen product and the low-rank one, in one pass.
#pragma once

#include "products.h"

namespace bidora {
namespace BIDORA_ISA {

template <typename T, int ROWS>
BIDORA_INLINE void compose_group(const ComposeArgs<T>& a, int64_t token, int64_t panel) {
  const int64_t first = panel * kPanel<T>, width = a.out_features - first < kPanel<T> ? a.out_features - first : kPanel<T>;
  const bool whole = width == kPanel<T>, dropped = a.base_dropped.data != nullptr;
  const Matrix& inner = dropped ? a.base_dropped : a.base;
  T padded[ROWS][kPanel<T>] = {}, other[kPanel<T>] = {}, scale[kPanel<T>] = {}, bias[kPanel<T>] = {}, result[kPanel<T>];
  const T* in[ROWS];
  T one[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    one[i] = T(1);
    if (whole && inner.dtype == kOwnDtype<T>) {
      in[i] = static_cast<const T*>(inner.data) + (token + i) * inner.stride + first;
    } else {
      read_row(inner, token + i, first, width, padded[i]);
      in[i] = padded[i];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    scale[c] = a.scale[first + c];
    bias[c] = a.bias ? a.bias[first + c] : T(0);
  }
  Vector<T> acc[ROWS][2];
  panel_product<T, ROWS>(in, one, a.hidden + token * a.r, a.r, a.panels + panel * a.r * kPanel<T>, kPanel<T>, a.r, acc);
  for (int i = 0; i < ROWS; ++i) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = half * kLanes<T>;
      Vector<T> y = acc[i][half] * load(scale + at);
      if (dropped) {
        // y = base + (c u - base_dropped): near c = 1 the difference is the small term
        if (half == 0) read_row(a.base, token + i, first, width, other);
        y = y - load(in[i] + at) + load(other + at);
      }
      store(result + at, y + load(bias + at));
    }
    if (dropped) {
      T u[kPanel<T>];
      store(u, acc[i][0]);
      store(u + kLanes<T>, acc[i][1]);
      write_row(a.base_dropped, token + i, first, width, u);
    }
    write_row(a.out, token + i, first, width, result);
  }
}

template <typename T>
static void compose_tokens(const ComposeArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t panels = panels_of<T>(a.out_features);
  int64_t token = begin;
  for (; token + 4 <= end; token += 4)
    for (int64_t p = 0; p < panels; ++p) compose_group<T, 4>(a, token, p);
  for (; token < end; ++token)
    for (int64_t p = 0; p < panels; ++p) compose_group<T, 1>(a, token, p);
}

}  // namespace BIDORA_ISA
}  // namespace bidora
