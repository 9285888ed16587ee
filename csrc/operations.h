// The operations that are defined in one file and used in another.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace bidora {

using torch::stable::Tensor;

void weight_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling, const Tensor& norm);

void merged_weight(
    const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, std::optional<Tensor> magnitude, double scaling,
    const Tensor& norm, bool norm_known, bool minus_weight, const Tensor& out, bool dither);

int64_t adapter_gradients(
    const Tensor& x, const Tensor& g, std::optional<Tensor> y, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, std::optional<Tensor> bias, double scaling, std::optional<Tensor> grad_A,
    std::optional<Tensor> grad_B, std::optional<Tensor> grad_magnitude, std::optional<Tensor> doubtful, double doubtful_ratio,
    bool from_updated);

void compose(
    const Tensor& base, std::optional<Tensor> base_dropped, const Tensor& hidden, const Tensor& lora_B, const Tensor& scale,
    std::optional<Tensor> bias, double scaling, const Tensor& out);

// The indices of the rows of t [..., columns] that hold anything but zeros, int64, ascending, and as many of the first others as
// make their number a multiple of `multiple`, or all rows
Tensor nonzero_rows(const Tensor& t, int64_t multiple);

// x weight^T + bias [..., out] of tensors of one dtype; oneDNN takes fp32
Tensor product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool onednn);

// (y [..., out], the norms unless they were given) of x [..., in]: with `merged` by one product with the merged weight, which is
// written there, x being of the same dtype; without it by the frozen weight, both being of the norms' dtype. To be called below
// autograd and without autocast, as its backward is.
std::tuple<Tensor, std::optional<Tensor>> dora_linear(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
    std::optional<Tensor> bias, double scaling, std::optional<Tensor> merged, std::optional<Tensor> norm_given, bool onednn);

// (grad_x, grad_A, grad_B, grad_magnitude, doubtful rows where there are some), absent where they are not asked for: grad_x by
// `merged`, memory for the merged weight, or by the frozen one; the magnitude's by y. grad_x is of g's dimensions with `merged` and
// a contiguous g, else a matrix.
std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>
dora_linear_backward(
    const Tensor& g, const Tensor& x, std::optional<Tensor> y, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, std::optional<Tensor> bias, double scaling, std::optional<Tensor> merged,
    bool needs_direction, bool needs_x, double doubtful_ratio, bool onednn);

}  // namespace bidora
