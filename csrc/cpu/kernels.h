// What the instruction-set-specific code offers to the rest: plain structs and one table of functions per element type.
// This header names no torch type, so that nothing from torch's or the standard library's headers is ever compiled for an
// instruction set that the machine may lack.
#pragma once

#include <stdint.h>

namespace bidora {

enum class Dtype : int { f64, f32, bf16, f16 };

// A matrix with contiguous rows; `stride` is the distance of two rows in elements.
struct Matrix {
  void* data;
  int64_t stride;
  Dtype dtype;
};

// V = weight + lora_B @ (scaling * lora_A), its row norms, and a scaled copy of it.
template <typename T>
struct WeightArgs {
  Matrix weight;     // [out, in], or [in, out] for the columns kernel
  Matrix out;        // same layout; data == nullptr: norms only
  const T* panels;   // the right factor in panels (see pack_panels): scaling * lora_A, or scaling * lora_B^T for columns
  const T* left;     // the left factor, contiguous: lora_B [out, r], or lora_A^T [in, r] for columns
  const T* magnitude;  // [out]; nullptr: unit rows
  T* norm;           // [out]; read where norm_known, else written
  int64_t out_features, in_features, r;
  bool norm_known;
  bool minus_weight;  // store (c - 1) weight + c scaling BA: the merged weight less the weight (norm_known only)
  T floor;            // rows below it keep the scale 1 (unit rows: 0)
  const uint32_t* noise;  // [stored columns]: round a bf16 `out` with a fixed dither; nullptr: to nearest
};

// The sums of one backward pass with an input x [tokens, in] and a gradient g [tokens, out]:
//   hidden = x lora_A^T, projected = g (c lora_B)
//   grad_A = projected^T x, grad_B^T = hidden^T g, sum_t g u, sum_t |g u| and sum_t |g| of u = y - bias
template <typename T>
struct GradientArgs {
  Matrix x, g, y;
  // which sums are wanted: those that x is needed for, that of g u, and those of its size; x and y are read where they are needed
  bool direction, with_magnitude, sizes;
  const T* lora_A;     // [r, in]
  const T* scaled_B;   // (c lora_B)^T, [r, out]
  const T* bias;       // [padded out] or nullptr
  int64_t in_features, out_features, r;
  int64_t block;       // tokens that are projected and folded together, at most kBlock
};

constexpr int64_t kBlock = 32;

// 32 well mixed bits of an index, with the constants of A. Appleby's MurmurHash3 finalizer (public domain)
static inline uint32_t mixed(uint32_t index) {
  index = (index ^ (index >> 16)) * 0x85ebca6bu;
  index = (index ^ (index >> 13)) * 0xc2b2ae35u;
  return index ^ (index >> 16);
}

// y = c (base + hidden @ (scaling lora_B)^T) + bias, or with a second base
// y = base + c u - base_dropped + bias, u = base_dropped + hidden @ (scaling lora_B)^T, u being written over base_dropped.
template <typename T>
struct ComposeArgs {
  Matrix base;          // [tokens, out] in T
  Matrix base_dropped;  // data == nullptr: none
  Matrix out;           // [tokens, out]
  const T* hidden;      // [tokens, r]
  const T* panels;      // scaling * lora_B^T in panels
  const T* scale;       // [out]
  const T* bias;        // [out] or nullptr
  int64_t tokens, out_features, r;
};

// dV = alpha * G + beta * V row by row (G may be absent), folded into the factors:
//   grad_B = scaling dV lora_A^T, grad_A = scaling lora_B^T dV
template <typename T>
struct DirectionArgs {
  Matrix weight;        // [out, in]
  Matrix grad;          // G [out, in]; data == nullptr: none
  const T* panels;      // scaling * lora_A in panels
  const T* lora_A;      // [r, in]
  const T* lora_B;      // [out, r]
  const T* magnitude;   // [out] or nullptr (unit rows); used with G
  const T* norm;        // [out]
  const T* grad_norm;   // [out] or nullptr: the gradient of the norms
  T* grad_B;            // [out, r]
  T* grad_magnitude;    // [out] or nullptr
  int64_t out_features, in_features, r;
  T scaling, floor;
};

// y = c (x weight^T + hidden lora_B^T) + bias, hidden = scaling x lora_A^T; x and y in T with contiguous rows
template <typename T>
struct FewTokensArgs {
  Matrix weight;    // [out, in]
  const T* x;       // [tokens, in]
  int64_t x_stride;
  const T* hidden;  // [tokens, r]
  const T* lora_B;  // [out, r]
  const T* scale;   // [out]
  const T* bias;    // [out] or nullptr
  T* y;             // [tokens, out]
  int64_t tokens, in_features, out_features, r;
};

template <typename T>
struct Kernels {
  int64_t panel;  // columns in one panel
  // panels[p][j][c] = scale * matrix[j * row_stride + (p * panel + c) * column_stride], zero beyond `columns`
  void (*pack_panels)(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, T scale, T* panels);
  // rows [begin, end); scratch: 8 * padded(in_features) + 4 * r elements, or for norms alone 128 * panel
  void (*weight_rows)(const WeightArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // panels of output features [begin, end); scratch: (in_features + 8) * panel elements
  void (*weight_columns)(const WeightArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // tokens [begin, end) added to `partial`: grad_A [r, padded in] and grad_B^T [r, padded out] where there is an x, then
  // sums of g u, |g u| and |g| [padded out] with u = y - bias;
  // scratch: kBlock * (padded in + 2 * padded out + 2 * r) + 3 * padded out elements
  void (*gradient_tokens)(const GradientArgs<T>&, int64_t begin, int64_t end, T* partial, T* scratch);
  // rows [begin, end); partial_A: r * padded(in_features); scratch: 12 * padded(in_features) + 9 * r elements
  void (*direction_rows)(const DirectionArgs<T>&, int64_t begin, int64_t end, T* partial_A, T* scratch);
  void (*compose_tokens)(const ComposeArgs<T>&, int64_t begin, int64_t end);
  // rows of the weight [begin, end); scratch: 4 * (in_features + 2 * tokens) elements
  void (*few_tokens_rows)(const FewTokensArgs<T>&, int64_t begin, int64_t end, T* scratch);
};

template <typename T>
const Kernels<T>& kernels();  // the widest instruction set that this machine has
const char* instruction_set();  // its name
bool made_by_intel();           // the processor, by its own word

}  // namespace bidora
