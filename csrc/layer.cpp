// A layer's output, by its merged weight or the frozen one, and its gradients; the operators that a training step calls.
#include <array>
#include <atomic>

#include "operations.h"
#include "tensors.h"

namespace bidora {
namespace {

constexpr int64_t kBlockElements = 98304;            // of x and g that a core's cache holds beside the factors and their sums
constexpr int64_t kTile = 16;                        // rows that a transposition takes together
constexpr int64_t kPartialBytes = int64_t(4) << 20;  // of a backward's partial sums, at most

// magnitude / norm; a row without a length keeps its values
template <typename T>
T row_scale(T magnitude, T norm) {
  return norm >= T(kNormFloor) ? magnitude / norm : T(1);
}

template <typename T>
int64_t adapter_gradients_of(
    const Tensor& x, const Tensor& g, const std::optional<Tensor>& y, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, const std::optional<Tensor>& bias, double scaling,
    const std::optional<Tensor>& grad_A, const std::optional<Tensor>& grad_B, const std::optional<Tensor>& grad_magnitude,
    const std::optional<Tensor>& doubtful, double doubtful_ratio, bool from_updated) {
  const auto& k = kernels<T>();
  STD_TORCH_CHECK(g.dim() >= 2 && lora_A.dim() == 2, "g must be [..., out] and lora_A a matrix");
  const int64_t n = g.size(g.dim() - 1), tokens = rows_of(g), r = lora_A.size(0), in = lora_A.size(1);
  STD_TORCH_CHECK(grad_A.has_value() == grad_B.has_value(), "grad_A and grad_B are computed together");
  STD_TORCH_CHECK(grad_magnitude.has_value() == y.has_value() && grad_magnitude.has_value() == doubtful.has_value(),
                  "grad_magnitude, doubtful and y go together");
  const bool direction = grad_A.has_value(), with_magnitude = grad_magnitude.has_value();
  const T* b = values<T>(lora_B, "lora_B", n * r);
  const T* m = values<T>(magnitude, "magnitude", n);
  const T* norms = values<T>(norm, "norm", n);
  GradientArgs<T> args{};
  args.g = matrix(g, "g", tokens, n);
  args.lora_A = values<T>(lora_A, "lora_A", r * in);
  const T* offset = values<T>(bias, "bias", n);
  args.in_features = in, args.out_features = n, args.r = r;
  T *to_A = values<T>(grad_A, "grad_A", r * in), *to_B = values<T>(grad_B, "grad_B", n * r);
  T* to_m = values<T>(grad_magnitude, "grad_magnitude", n);
  bool* flags = nullptr;
  if (with_magnitude) {
    args.y = matrix(*y, "y", tokens, n);
    STD_TORCH_CHECK(doubtful->scalar_type() == ScalarType::Bool && doubtful->numel() == n && doubtful->is_contiguous(),
                    "doubtful must be bool [", n, "]");
    flags = static_cast<bool*>(doubtful->mutable_data_ptr());
  }
  if (direction) args.x = matrix(x, "x", tokens, in);
  // what full precision of y reaches down to; where that and the bias are 0, no sum is doubtful for its size
  const double smallest = with_magnitude && args.y.dtype == Dtype::f16 ? 0x1p-14 : 0.0;
  args.direction = direction, args.with_magnitude = with_magnitude, args.sizes = !from_updated && (offset != nullptr || smallest > 0);
  auto scale = buffer<T>(std::max<int64_t>(1, n));
  for (int64_t i = 0; i < n; ++i) scale[i] = row_scale(m[i], norms[i]);
  const int64_t padded_in = panel_count<T>(in) * k.panel, padded_out = panel_count<T>(n) * k.panel;
  Buffer<T> scaled_B, padded_bias;
  if (direction) {
    scaled_B = buffer<T>(std::max<int64_t>(1, r * n));
    for (int64_t start = 0; start < n; start += kTile)
      for (int64_t j = 0; j < r; ++j)
        for (int64_t i = start, stop = std::min(n, start + kTile); i < stop; ++i) scaled_B[j * n + i] = scale[i] * b[i * r + j];
    args.scaled_B = scaled_B.get();
  }
  if (offset != nullptr) {
    padded_bias = buffer<T>(std::max<int64_t>(1, padded_out));
    std::fill(std::copy(offset, offset + n, padded_bias.get()), padded_bias.get() + padded_out, T(0));
    args.bias = padded_bias.get();
  }
  // a block of x and g stays in a core's cache between its projection and its sums; partial sums in 4 MiB, by the shape alone
  args.block = std::clamp<int64_t>(kBlockElements / std::max<int64_t>(1, padded_in + padded_out) / 8 * 8, 16, kBlock);
  const int64_t size = (direction ? r * (padded_in + padded_out) : 0) + 3 * padded_out;
  const int64_t room = std::max<int64_t>(1, kPartialBytes / int64_t(sizeof(T)) / std::max<int64_t>(1, size));
  const int64_t wanted = std::max(tokens / (8 * kBlock), std::min<int64_t>(4, tokens / (2 * kBlock)));
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(16, room));
  auto partial = buffer<T>(std::max<int64_t>(1, parts * size));
  const int64_t cost = tokens / parts * (direction ? (2 * r + 2) * (in + n) : 4 * n);
  torch::stable::parallel_for(0, parts, grain(cost), [&](int64_t begin, int64_t end) {
    auto own = buffer<T>(kBlock * (padded_in + 2 * padded_out + 2 * r) + 3 * padded_out + 1);
    for (int64_t part = begin; part < end; ++part) {
      T* to = partial.get() + part * size;
      std::fill(to, to + size, T(0));
      k.gradient_tokens(args, tokens * part / parts, tokens * (part + 1) / parts, to, own.get());
    }
  });
  // the parts are summed in their order, and from there to the results, a tile at a time
  const auto sum = [&](int64_t at, int64_t count, T* to) {
    std::copy(partial.get() + at, partial.get() + at + count, to);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < count; ++i) to[i] += partial[part * size + at + i];
  };
  if (direction) {
    torch::stable::parallel_for(0, in, grain(r * parts), [&](int64_t begin, int64_t end) {
      for (int64_t j = 0; j < r; ++j) {
        sum(j * padded_in + begin, end - begin, to_A + j * in + begin);
        for (int64_t c = begin; c < end; ++c) to_A[j * in + c] *= T(scaling);
      }
    });
  }
  const int64_t after_A = direction ? r * padded_in : 0, after_B = after_A + (direction ? r * padded_out : 0);
  std::atomic<int64_t> doubtful_count{0};
  torch::stable::parallel_for(0, n, grain(((direction ? r : 0) + 2) * parts), [&](int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t count = std::min(end - start, kTile);
      T tile[kTile], sizes[kTile], weights[kTile];
      for (int64_t j = 0; direction && j < r; ++j) {
        sum(after_A + j * padded_out + start, count, tile);
        for (int64_t i = 0; i < count; ++i) to_B[(start + i) * r + j] = T(scaling) * scale[start + i] * tile[i];
      }
      if (!with_magnitude) continue;
      sum(after_B + start, count, tile);
      sum(after_B + padded_out + start, count, sizes);
      sum(after_B + 2 * padded_out + start, count, weights);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t i = start + c;
        const bool fixed = !(norms[i] >= T(kNormFloor));
        if (from_updated) {  // y is V x itself
          flags[i] = false;
          to_m[i] = fixed ? T(0) : tile[c] / norms[i];
          continue;
        }
        // y - bias lost the digits of c u where the bias is the larger part in the tokens that have a gradient, or where c u is
        // below y's normal numbers; near m = 0 it is not divisible by m
        const double shift = (offset ? std::abs(double(offset[i])) : 0.0) + smallest;
        const bool lost = shift * double(weights[c]) > doubtful_ratio * double(sizes[c]);
        const bool tiny = !(std::abs(double(m[i])) >= kNormFloor * std::max(1.0, double(norms[i])));
        flags[i] = !fixed && (tiny || lost);
        to_m[i] = fixed || tiny ? T(0) : tile[c] / m[i];
        if (flags[i]) ++doubtful_count;
      }
    }
  });
  return doubtful_count.load();
}

// The tensor contiguous and in a dtype: itself where it is so already
Tensor constant(const Tensor& t, ScalarType dtype) {
  Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

ScalarType accumulating(const Tensor& weight) { return is_double(weight) ? ScalarType::Double : ScalarType::Float; }

// A tensor [..., columns] as the kernels read it: itself where it is contiguous, else a matrix whose rows are
Tensor with_rows(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const std::array<int64_t, 2> flat{rows_of(t), t.size(t.dim() - 1)};
  const Tensor matrix = t.dim() == 2 ? t : torch::stable::reshape(t, flat);
  return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1) ? matrix : torch::stable::contiguous(matrix);
}

// The same values in another shape, not counted as a view: an operator's output may then be overwritten in place
Tensor unsafe_view(const Tensor& t, const std::vector<int64_t>& sizes) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(t), torch::stable::detail::from(sizes)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_unsafe_view", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename T>
Tensor row_scales(const Tensor& magnitude, const Tensor& norm) {
  const Tensor scale = torch::stable::empty_like(magnitude);
  const int64_t n = magnitude.numel();
  const T *m = values<T>(magnitude, "magnitude", n), *norms = values<T>(norm, "norm", n);
  T* to = values<T>(scale, "scale", n);
  for (int64_t i = 0; i < n; ++i) to[i] = row_scale(m[i], norms[i]);
  return scale;
}

// g * scale, [tokens, out]
template <typename T>
Tensor scaled_rows(const Tensor& g, const Tensor& scale) {
  const int64_t tokens = rows_of(g), n = scale.numel();
  const Tensor result = torch::stable::new_empty(g, std::array<int64_t, 2>{tokens, n});
  const Matrix from = matrix(g, "g", tokens, n);
  const T *data = static_cast<const T*>(from.data), *factor = values<T>(scale, "scale", n);
  T* to = values<T>(result, "result", tokens * n);
  torch::stable::parallel_for(0, tokens, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < n; ++i) to[t * n + i] = data[t * from.stride + i] * factor[i];
  });
  return result;
}

// base [tokens, out] with a low-rank part: scale (base + scaling (x down^T) up^T) + bias, in place
Tensor composed(
    const Tensor& base, const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& scale, const std::optional<Tensor>& bias,
    double scaling) {
  compose(base, std::nullopt, product(x, down, std::nullopt, false), up, scale, bias, scaling, base);
  return base;
}

// x [tokens, in] by the frozen weight: c (x weight^T + scaling (x lora_A^T) lora_B^T) + bias
template <typename T>
Tensor by_frozen_weight(
    const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& magnitude, const Tensor& norm,
    const std::optional<Tensor>& bias, double scaling, bool onednn) {
  return composed(product(x, weight, std::nullopt, onednn), x, a, b, row_scales<T>(magnitude, norm), bias, scaling);
}

// The gradient of x from g: (c g) weight + scaling ((c g) lora_B) lora_A. That is the same form of the transposed factors without
// a scale of its own, which `compose` wants: a vector of ones.
template <typename T>
Tensor back_by_frozen_weight(
    const Tensor& g, const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& magnitude, const Tensor& norm,
    double scaling, bool onednn) {
  const Tensor scaled = scaled_rows<T>(g, row_scales<T>(magnitude, norm));
  const int64_t in = weight.size(1);
  const Tensor ones = torch::stable::new_empty(magnitude, std::array<int64_t, 1>{in});
  std::fill_n(values<T>(ones, "ones", in), in, T(1));
  const Tensor down = torch::stable::transpose(b, 0, 1), up = torch::stable::contiguous(torch::stable::transpose(a, 0, 1));
  const Tensor base = product(scaled, torch::stable::transpose(weight, 0, 1), std::nullopt, onednn);
  return composed(base, scaled, down, up, ones, std::nullopt, scaling);
}

// The merged weight, written to `merged`; a bf16 one is dithered
void merge(
    const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& magnitude, double scaling, const Tensor& norm,
    bool norm_known, const Tensor& merged) {
  merged_weight(weight, a, b, magnitude, scaling, norm, norm_known, false, merged, merged.scalar_type() == ScalarType::BFloat16);
}

// That the operands fit each other: rows [..., features] of the dtype that they are multiplied in, factors of the weight's shape
void check_operands(
    const char* name, const Tensor& rows, int64_t features, const Tensor& weight, const Tensor& a, const Tensor& b,
    const std::optional<Tensor>& merged) {
  STD_TORCH_CHECK(rows.dim() >= 2 && rows.size(rows.dim() - 1) == features, name, " must be [..., ", features, "]");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == weight.size(1) && b.size(0) == weight.size(0) && a.size(0) == b.size(1),
                  "lora_A and lora_B must be [r, ", weight.size(1), "] and [", weight.size(0), ", r]");
  const ScalarType dtype = accumulating(weight);
  STD_TORCH_CHECK(merged.has_value() || weight.scalar_type() == dtype, "without merged the weight must be fp32 or fp64");
  const ScalarType operands = merged.has_value() ? merged->scalar_type() : dtype;
  STD_TORCH_CHECK(rows.scalar_type() == operands, name, " must have the dtype that it is multiplied in");
}

}  // namespace

int64_t adapter_gradients(
    const Tensor& x, const Tensor& g, std::optional<Tensor> y, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, std::optional<Tensor> bias, double scaling, std::optional<Tensor> grad_A,
    std::optional<Tensor> grad_B, std::optional<Tensor> grad_magnitude, std::optional<Tensor> doubtful, double doubtful_ratio, bool from_updated) {
  auto run = is_double(norm) ? adapter_gradients_of<double> : adapter_gradients_of<float>;
  return run(
      x, g, y, lora_A, lora_B, magnitude, norm, bias, scaling, grad_A, grad_B, grad_magnitude, doubtful, doubtful_ratio, from_updated);
}

std::tuple<Tensor, std::optional<Tensor>> dora_linear(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
    std::optional<Tensor> bias, double scaling, std::optional<Tensor> merged, std::optional<Tensor> norm_given, bool onednn) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  const ScalarType dtype = accumulating(weight);
  const Tensor a = constant(lora_A, dtype), b = constant(lora_B, dtype), m = constant(magnitude, dtype);
  check_operands("x", x, weight.size(1), weight, a, b, merged);
  const bool known = norm_given.has_value();
  const Tensor norm = known ? constant(*norm_given, dtype) : torch::stable::empty_like(m);
  if (bias.has_value()) bias = constant(*bias, x.scalar_type());
  const std::array<int64_t, 2> flat{rows_of(x), weight.size(1)};
  const Tensor matrix = x.dim() == 2 ? x : torch::stable::reshape(x, flat);
  if (merged.has_value()) {
    merge(weight, a, b, m, scaling, norm, known, *merged);
  } else if (!known) {
    weight_norm(weight, a, b, scaling, norm);
  }
  const auto by_frozen = dtype == ScalarType::Double ? by_frozen_weight<double> : by_frozen_weight<float>;
  const Tensor y = merged.has_value() ? product(matrix, *merged, bias, onednn)
                                      : by_frozen(matrix, weight, a, b, m, norm, bias, scaling, onednn);
  std::optional<Tensor> found;
  if (!known) found = norm;
  if (x.dim() == 2) return {y, found};
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(weight.size(0));
  return {unsafe_view(y, sizes), found};
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>
dora_linear_backward(
    const Tensor& g, const Tensor& x, std::optional<Tensor> y, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, std::optional<Tensor> bias, double scaling, std::optional<Tensor> merged,
    bool needs_direction, bool needs_x, double doubtful_ratio, bool onednn) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  const ScalarType dtype = accumulating(weight);
  const Tensor a = constant(lora_A, dtype), b = constant(lora_B, dtype), m = constant(magnitude, dtype), n = constant(norm, dtype);
  if (needs_x) check_operands("g", g, weight.size(0), weight, a, b, merged);
  const Tensor grad = with_rows(g);
  std::optional<Tensor> grad_x, grad_A, grad_B, grad_magnitude, doubtful;
  if (needs_direction) grad_A = torch::stable::empty_like(a), grad_B = torch::stable::empty_like(b);
  if (y.has_value()) {
    y = with_rows(*y);
    grad_magnitude = torch::stable::empty_like(m);
    doubtful = torch::stable::new_empty(m, std::array<int64_t, 1>{m.numel()}, ScalarType::Bool);
  }
  if (bias.has_value()) bias = constant(*bias, dtype);
  if (needs_direction || y.has_value()) {
    const int64_t count = adapter_gradients(
        needs_direction ? with_rows(x) : x, grad, y, a, b, m, n, bias, scaling, grad_A, grad_B, grad_magnitude, doubtful, doubtful_ratio, false);
    if (count == 0) doubtful = std::nullopt;
  }
  if (!needs_x) return {grad_x, grad_A, grad_B, grad_magnitude, doubtful};
  if (merged.has_value()) {
    merge(weight, a, b, m, scaling, n, true, *merged);
    grad_x = product(grad, torch::stable::transpose(*merged, 0, 1), std::nullopt, onednn);
  } else {
    const auto run = dtype == ScalarType::Double ? back_by_frozen_weight<double> : back_by_frozen_weight<float>;
    grad_x = run(grad, weight, a, b, m, n, scaling, onednn);
  }
  return {grad_x, grad_A, grad_B, grad_magnitude, doubtful};
}

}  // namespace bidora
