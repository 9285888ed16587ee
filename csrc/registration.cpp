// The library's operators as torch sees them: schemas, checks before any memory is touched, and the parallel loops.
// Everything goes through LibTorch's stable ABI, so one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>

#include "cpu/kernels.h"

namespace bidora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kNormFloor = 1e-18;
constexpr int64_t kBlockElements = 98304;       // of x and g that a core's cache holds beside the factors and their sums
constexpr int64_t kTile = 16;                   // rows that a transposition takes together
constexpr int64_t kPartialBytes = int64_t(4) << 20;  // of a backward's partial sums, at most

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be fp64, fp32, bf16 or fp16");
  return Dtype::f32;
}

void check_cpu(const Tensor& t, const char* name) { STD_TORCH_CHECK(t.is_cpu(), name, " must be on cpu"); }

// [rows, columns] with contiguous rows
Matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_cpu(t, name);
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be [", rows, ", ", columns, "], got a tensor of ",
      t.dim(), " dimensions and ", t.numel(), " elements");
  STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, name, " must have contiguous rows, got stride ", t.stride(1));
  STD_TORCH_CHECK(rows <= 1 || t.stride(0) >= columns, name, " must have rows that do not overlap, got stride ", t.stride(0));
  return {const_cast<void*>(t.const_data_ptr()), rows <= 1 ? columns : t.stride(0), dtype_of(t, name)};
}

// A contiguous tensor of the accumulating type with this many elements
template <typename T>
T* values(const Tensor& t, const char* name, int64_t count) {
  check_cpu(t, name);
  STD_TORCH_CHECK(dtype_of(t, name) == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32), name, " must be ", sizeof(T) == 8 ? "fp64" : "fp32");
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <typename T>
T* values(const std::optional<Tensor>& t, const char* name, int64_t count) {
  return t.has_value() ? values<T>(*t, name, count) : nullptr;
}

// Uninitialized memory on the boundary of a cache line: a vector as long as a line would else touch two
constexpr std::align_val_t kLine{64};
struct Free {
  void operator()(void* p) const { ::operator delete(p, kLine); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kLine)));
}

template <typename T>
int64_t panel_count(int64_t columns) {
  return (columns + kernels<T>().panel - 1) / kernels<T>().panel;
}

// How many items of `cost` multiply-adds make a piece of work worth a thread
int64_t grain(int64_t cost) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cost)); }

template <typename T>
void weight_pass(
    const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& magnitude, double scaling,
    const Tensor& norm, bool norm_known, bool minus_weight, const std::optional<Tensor>& out, bool dither) {
  const auto& k = kernels<T>();
  STD_TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2, "weight and lora_A must be matrices");
  const int64_t n = weight.size(0), in = weight.size(1), r = lora_A.size(0);
  STD_TORCH_CHECK(!minus_weight || (norm_known && out.has_value()), "minus_weight needs the norm and an output");
  STD_TORCH_CHECK(!dither || (out.has_value() && out->scalar_type() == ScalarType::BFloat16), "dither needs an output in bf16");
  // a transposed view of a row-major matrix is read as that matrix
  const bool columns = weight.stride(0) == 1 && weight.stride(1) != 1 && n > 1;
  const T* a = values<T>(lora_A, "lora_A", r * in);
  const T* b = values<T>(lora_B, "lora_B", n * r);
  WeightArgs<T> args{};
  args.magnitude = values<T>(magnitude, "magnitude", n);
  args.norm = values<T>(norm, "norm", n);
  args.out_features = n, args.in_features = in, args.r = r;
  args.norm_known = norm_known, args.minus_weight = minus_weight, args.floor = T(kNormFloor);
  if (n == 0) return;
  Buffer<uint32_t> noise;
  if (dither) {
    const int64_t count = columns ? n : in;
    noise = buffer<uint32_t>(std::max<int64_t>(1, count));
    for (int64_t c = 0; c < count; ++c) noise[c] = mixed(uint32_t(c));
    args.noise = noise.get();
  }
  if (!columns) {
    args.weight = matrix(weight, "weight", n, in);
    if (out.has_value()) args.out = matrix(*out, "out", n, in);
    auto panels = buffer<T>(std::max<int64_t>(1, panel_count<T>(in) * k.panel * r));
    k.pack_panels(a, in, 1, r, in, T(scaling), panels.get());
    args.panels = panels.get(), args.left = b;
    const int64_t scratch = out.has_value() ? 8 * panel_count<T>(in) * k.panel + 4 * r : 128 * k.panel;
    const int64_t groups = (n + 3) / 4;
    torch::stable::parallel_for(0, groups, grain(4 * in * (r + 2)), [&](int64_t begin, int64_t end) {
      auto own = buffer<T>(scratch);
      k.weight_rows(args, 4 * begin, std::min(4 * end, n), own.get());
    });
    return;
  }
  Tensor stored = torch::stable::transpose(weight, 0, 1);
  args.weight = matrix(stored, "weight", in, n);
  if (out.has_value()) args.out = matrix(torch::stable::transpose(*out, 0, 1), "out", in, n);
  auto panels = buffer<T>(std::max<int64_t>(1, panel_count<T>(n) * k.panel * r));
  k.pack_panels(b, 1, r, r, n, T(scaling), panels.get());
  auto left = buffer<T>(std::max<int64_t>(1, in * r));
  for (int64_t j = 0; j < r; ++j)
    for (int64_t c = 0; c < in; ++c) left[c * r + j] = a[j * in + c];
  args.panels = panels.get(), args.left = left.get();
  torch::stable::parallel_for(0, panel_count<T>(n), grain(k.panel * in * (r + 2)), [&](int64_t begin, int64_t end) {
    auto own = buffer<T>((in + 8) * k.panel);
    k.weight_columns(args, begin, end, own.get());
  });
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void weight_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling, const Tensor& norm) {
  auto pass = is_double(norm) ? weight_pass<double> : weight_pass<float>;
  pass(weight, lora_A, lora_B, std::nullopt, scaling, norm, false, false, std::nullopt, false);
}

void merged_weight(
    const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, std::optional<Tensor> magnitude, double scaling,
    const Tensor& norm, bool norm_known, bool minus_weight, const Tensor& out, bool dither) {
  auto pass = is_double(norm) ? weight_pass<double> : weight_pass<float>;
  pass(weight, lora_A, lora_B, magnitude, scaling, norm, norm_known, minus_weight, out, dither);
}

template <typename T>
int64_t adapter_gradients_of(
    const Tensor& x, const Tensor& g, const std::optional<Tensor>& y, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, const std::optional<Tensor>& bias, double scaling,
    const std::optional<Tensor>& grad_A, const std::optional<Tensor>& grad_B, const std::optional<Tensor>& grad_magnitude,
    const std::optional<Tensor>& doubtful, double doubtful_ratio, bool from_updated) {
  const auto& k = kernels<T>();
  STD_TORCH_CHECK(g.dim() == 2 && lora_A.dim() == 2, "g and lora_A must be matrices");
  const int64_t tokens = g.size(0), n = g.size(1), r = lora_A.size(0), in = lora_A.size(1);
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
  auto scale = buffer<T>(std::max<int64_t>(1, n));
  for (int64_t i = 0; i < n; ++i) scale[i] = norms[i] >= T(kNormFloor) ? m[i] / norms[i] : T(1);
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
  const int64_t size = (direction ? r * (padded_in + padded_out) : 0) + 2 * padded_out;
  const int64_t room = std::max<int64_t>(1, kPartialBytes / int64_t(sizeof(T)) / std::max<int64_t>(1, size));
  const int64_t parts = std::clamp<int64_t>(tokens / (8 * kBlock), 1, std::min<int64_t>(16, room));
  auto partial = buffer<T>(std::max<int64_t>(1, parts * size));
  const int64_t cost = tokens / parts * (direction ? (2 * r + 2) * (in + n) : 4 * n);
  torch::stable::parallel_for(0, parts, grain(cost), [&](int64_t begin, int64_t end) {
    auto own = buffer<T>(kBlock * (padded_in + 2 * padded_out + 2 * r) + 2 * padded_out + 1);
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
      T tile[kTile], squares[kTile];
      for (int64_t j = 0; direction && j < r; ++j) {
        sum(after_A + j * padded_out + start, count, tile);
        for (int64_t i = 0; i < count; ++i) to_B[(start + i) * r + j] = T(scaling) * scale[start + i] * tile[i];
      }
      if (!with_magnitude) continue;
      sum(after_B + start, count, tile);
      sum(after_B + padded_out + start, count, squares);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t i = start + k;
        const bool fixed = !(norms[i] >= T(kNormFloor));
        if (from_updated) {  // y is V x itself
          flags[i] = false;
          to_m[i] = fixed ? T(0) : tile[k] / norms[i];
          continue;
        }
        // y - bias lost the digits of c u where the bias is the larger part; near m = 0 it is not divisible by m
        const double shift = offset ? double(offset[i]) : 0.0;
        const bool lost = shift * shift * double(tokens) > doubtful_ratio * doubtful_ratio * double(squares[k]);
        const bool tiny = !(std::abs(double(m[i])) >= kNormFloor * std::max(1.0, double(norms[i])));
        flags[i] = !fixed && (tiny || (shift != 0.0 && lost));
        to_m[i] = fixed || tiny ? T(0) : tile[k] / m[i];
        if (flags[i]) ++doubtful_count;
      }
    }
  });
  return doubtful_count.load();
}

int64_t adapter_gradients(
    const Tensor& x, const Tensor& g, std::optional<Tensor> y, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const Tensor& norm, std::optional<Tensor> bias, double scaling, std::optional<Tensor> grad_A,
    std::optional<Tensor> grad_B, std::optional<Tensor> grad_magnitude, std::optional<Tensor> doubtful, double doubtful_ratio, bool from_updated) {
  auto run = is_double(norm) ? adapter_gradients_of<double> : adapter_gradients_of<float>;
  return run(
      x, g, y, lora_A, lora_B, magnitude, norm, bias, scaling, grad_A, grad_B, grad_magnitude, doubtful, doubtful_ratio, from_updated);
}

template <typename T>
void direction_backward_of(
    const Tensor& weight, const std::optional<Tensor>& grad, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& magnitude, double scaling, const Tensor& norm, const std::optional<Tensor>& grad_norm,
    const Tensor& grad_A, const Tensor& grad_B, const std::optional<Tensor>& grad_magnitude) {
  const auto& k = kernels<T>();
  STD_TORCH_CHECK(weight.dim() == 2 && lora_A.dim() == 2, "weight and lora_A must be matrices");
  STD_TORCH_CHECK(grad.has_value() || grad_norm.has_value(), "one of grad and grad_norm is needed");
  const int64_t n = weight.size(0), in = weight.size(1), r = lora_A.size(0);
  DirectionArgs<T> args{};
  args.weight = matrix(weight, "weight", n, in);
  if (grad.has_value()) args.grad = matrix(*grad, "grad", n, in);
  args.lora_A = values<T>(lora_A, "lora_A", r * in);
  args.lora_B = values<T>(lora_B, "lora_B", n * r);
  args.magnitude = values<T>(magnitude, "magnitude", n);
  args.norm = values<T>(norm, "norm", n);
  args.grad_norm = values<T>(grad_norm, "grad_norm", n);
  T* to_A = values<T>(grad_A, "grad_A", r * in);
  args.grad_B = values<T>(grad_B, "grad_B", n * r);
  args.grad_magnitude = values<T>(grad_magnitude, "grad_magnitude", n);
  args.out_features = n, args.in_features = in, args.r = r, args.scaling = T(scaling), args.floor = T(kNormFloor);
  const int64_t padded = panel_count<T>(in) * k.panel;
  auto panels = buffer<T>(std::max<int64_t>(1, padded * r));
  k.pack_panels(args.lora_A, in, 1, r, in, T(scaling), panels.get());
  args.panels = panels.get();
  // the number of partial sums depends on the shape alone, so the result does not depend on the number of threads
  const int64_t parts = std::clamp<int64_t>(n / 64, 1, 16);
  auto partial = buffer<T>(std::max<int64_t>(1, parts * padded * r));
  std::fill(partial.get(), partial.get() + parts * padded * r, T(0));
  torch::stable::parallel_for(0, parts, grain(n / parts * in * (3 * r + 2)), [&](int64_t begin, int64_t end) {
    auto own = buffer<T>(12 * padded + 9 * r + 1);
    for (int64_t part = begin; part < end; ++part)
      k.direction_rows(args, n * part / parts, n * (part + 1) / parts, partial.get() + part * padded * r, own.get());
  });
  for (int64_t j = 0; j < r; ++j)
    for (int64_t c = 0; c < in; ++c) {
      T sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[(part * r + j) * padded + c];
      to_A[j * in + c] = T(scaling) * sum;
    }
}

void direction_backward(
    const Tensor& weight, std::optional<Tensor> grad, const Tensor& lora_A, const Tensor& lora_B, std::optional<Tensor> magnitude,
    double scaling, const Tensor& norm, std::optional<Tensor> grad_norm, const Tensor& grad_A, const Tensor& grad_B,
    std::optional<Tensor> grad_magnitude) {
  auto run = is_double(norm) ? direction_backward_of<double> : direction_backward_of<float>;
  run(weight, grad, lora_A, lora_B, magnitude, scaling, norm, grad_norm, grad_A, grad_B, grad_magnitude);
}

template <typename T>
void compose_of(
    const Tensor& base, const std::optional<Tensor>& base_dropped, const Tensor& hidden, const Tensor& lora_B, const Tensor& scale,
    const std::optional<Tensor>& bias, double scaling, const Tensor& out) {
  const auto& k = kernels<T>();
  STD_TORCH_CHECK(base.dim() == 2 && hidden.dim() == 2, "base and hidden must be matrices");
  ComposeArgs<T> args{};
  args.tokens = base.size(0), args.out_features = base.size(1), args.r = hidden.size(1);
  args.base = matrix(base, "base", args.tokens, args.out_features);
  if (base_dropped.has_value()) args.base_dropped = matrix(*base_dropped, "base_dropped", args.tokens, args.out_features);
  args.out = matrix(out, "out", args.tokens, args.out_features);
  args.hidden = values<T>(hidden, "hidden", args.tokens * args.r);
  const T* b = values<T>(lora_B, "lora_B", args.out_features * args.r);
  args.scale = values<T>(scale, "scale", args.out_features);
  args.bias = values<T>(bias, "bias", args.out_features);
  auto panels = buffer<T>(std::max<int64_t>(1, panel_count<T>(args.out_features) * k.panel * args.r));
  k.pack_panels(b, 1, args.r, args.r, args.out_features, T(scaling), panels.get());
  args.panels = panels.get();
  const int64_t groups = (args.tokens + 3) / 4;
  torch::stable::parallel_for(0, groups, grain(4 * args.out_features * (args.r + 2)), [&](int64_t begin, int64_t end) {
    k.compose_tokens(args, 4 * begin, std::min(4 * end, args.tokens));
  });
}

void compose(
    const Tensor& base, std::optional<Tensor> base_dropped, const Tensor& hidden, const Tensor& lora_B, const Tensor& scale,
    std::optional<Tensor> bias, double scaling, const Tensor& out) {
  auto run = is_double(scale) ? compose_of<double> : compose_of<float>;
  run(base, base_dropped, hidden, lora_B, scale, bias, scaling, out);
}

template <typename T>
void few_tokens_of(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
    const std::optional<Tensor>& bias, double scaling, const Tensor& out) {
  const auto& k = kernels<T>();
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && lora_A.dim() == 2, "x, weight and lora_A must be matrices");
  const int64_t tokens = x.size(0), n = weight.size(0), in = weight.size(1), r = lora_A.size(0);
  const Matrix inputs = matrix(x, "x", tokens, in);
  STD_TORCH_CHECK(inputs.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32), "x must be ", sizeof(T) == 8 ? "fp64" : "fp32");
  FewTokensArgs<T> args{};
  args.weight = matrix(weight, "weight", n, in);
  args.x = static_cast<const T*>(inputs.data), args.x_stride = inputs.stride;
  args.lora_B = values<T>(lora_B, "lora_B", n * r);
  args.scale = values<T>(scale, "scale", n);
  args.bias = values<T>(bias, "bias", n);
  args.y = values<T>(out, "out", tokens * n);
  args.tokens = tokens, args.in_features = in, args.out_features = n, args.r = r;
  T* a = values<T>(lora_A, "lora_A", r * in);
  auto hidden = buffer<T>(std::max<int64_t>(1, tokens * r)), factor = buffer<T>(std::max<int64_t>(1, r));
  // hidden is such an output itself: the weight is lora_A, every scale is scaling
  std::fill(factor.get(), factor.get() + r, T(scaling));
  FewTokensArgs<T> down = args;
  down.weight = {a, in, inputs.dtype};
  down.scale = factor.get(), down.bias = nullptr, down.y = hidden.get(), down.out_features = r, down.r = 0;
  args.hidden = hidden.get();
  // a thread that wakes late finds less left to do; rows begin when hidden is complete
  const int64_t groups = (n + 3) / 4, down_groups = (r + 3) / 4, least = grain(4 * tokens * in);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), groups / least));
  const int64_t piece = threads == 1 ? groups : std::max(least, groups / (16 * threads));
  std::atomic<int64_t> next_down{0}, finished_down{0}, next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto own = buffer<T>(4 * (in + 2 * tokens) + 1);
    for (int64_t i; (i = next_down.fetch_add(1)) < down_groups; finished_down.fetch_add(1))
      k.few_tokens_rows(down, 4 * i, std::min(4 * i + 4, r), own.get());
    while (finished_down.load() < down_groups) std::this_thread::yield();
    for (int64_t i; (i = next.fetch_add(piece)) < groups;)
      k.few_tokens_rows(args, 4 * i, std::min(4 * (i + piece), n), own.get());
  });
}

void few_tokens(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& scale,
    std::optional<Tensor> bias, double scaling, const Tensor& out) {
  auto run = is_double(scale) ? few_tokens_of<double> : few_tokens_of<float>;
  run(x, weight, lora_A, lora_B, scale, bias, scaling, out);
}

std::string kernels_instruction_set() { return instruction_set(); }

}  // namespace
}  // namespace bidora

STABLE_TORCH_LIBRARY(bidora_native, m) {
  m.def("instruction_set() -> str");
  m.def("weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor(a!) norm) -> ()");
  m.def(
      "merged_weight(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude, float scaling, Tensor(a!) norm, "
      "bool norm_known, bool minus_weight, Tensor(b!) out, bool dither) -> ()");
  m.def(
      "adapter_gradients(Tensor x, Tensor g, Tensor? y, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor norm, "
      "Tensor? bias, float scaling, Tensor(a!)? grad_A, Tensor(b!)? grad_B, Tensor(c!)? grad_magnitude, "
      "Tensor(d!)? doubtful, float doubtful_ratio, bool from_updated) -> int");
  m.def(
      "direction_backward(Tensor weight, Tensor? grad, Tensor lora_A, Tensor lora_B, Tensor? magnitude, float scaling, "
      "Tensor norm, Tensor? grad_norm, Tensor(a!) grad_A, Tensor(b!) grad_B, Tensor(c!)? grad_magnitude) -> ()");
  m.def(
      "compose(Tensor base, Tensor? base_dropped, Tensor hidden, Tensor lora_B, Tensor scale, Tensor? bias, float scaling, "
      "Tensor(a!) out) -> ()");
  m.def(
      "few_tokens(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scale, Tensor? bias, float scaling, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bidora_native, CompositeExplicitAutograd, m) {  // no tensor says which device
  m.impl("instruction_set", TORCH_BOX(&bidora::kernels_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(bidora_native, CPU, m) {
  m.impl("weight_norm", TORCH_BOX(&bidora::weight_norm));
  m.impl("merged_weight", TORCH_BOX(&bidora::merged_weight));
  m.impl("adapter_gradients", TORCH_BOX(&bidora::adapter_gradients));
  m.impl("direction_backward", TORCH_BOX(&bidora::direction_backward));
  m.impl("compose", TORCH_BOX(&bidora::compose));
  m.impl("few_tokens", TORCH_BOX(&bidora::few_tokens));
}
