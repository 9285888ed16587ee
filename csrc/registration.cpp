// The library's operators as torch sees them: schemas, and the parallel loops of those that are no layer's.
// Everything goes through LibTorch's stable ABI, so one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>
#include <thread>

#include "operations.h"
#include "tensors.h"

namespace bidora {
namespace {

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

}  // namespace

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

namespace {

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

}  // namespace

void compose(
    const Tensor& base, std::optional<Tensor> base_dropped, const Tensor& hidden, const Tensor& lora_B, const Tensor& scale,
    std::optional<Tensor> bias, double scaling, const Tensor& out) {
  auto run = is_double(scale) ? compose_of<double> : compose_of<float>;
  run(base, base_dropped, hidden, lora_B, scale, bias, scaling, out);
}

namespace {

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

bool processor_made_by_intel() { return made_by_intel(); }

}  // namespace
}  // namespace bidora

STABLE_TORCH_LIBRARY(bidora_native, m) {
  m.def("instruction_set() -> str");
  m.def("made_by_intel() -> bool");
  m.def("weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor(a!) norm) -> ()");
  m.def(
      "merged_weight(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? magnitude, float scaling, Tensor(a!) norm, "
      "bool norm_known, bool minus_weight, Tensor(b!) out, bool dither) -> ()");
  m.def(
      "adapter_gradients(Tensor x, Tensor g, Tensor? y, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor norm, "
      "Tensor? bias, float scaling, Tensor(a!)? grad_A, Tensor(b!)? grad_B, Tensor(c!)? grad_magnitude, "
      "Tensor(d!)? doubtful, float doubtful_ratio, bool from_updated) -> int");
  m.def(
      "dora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, float scaling, "
      "Tensor(a!)? merged, Tensor? norm_given, bool onednn) -> (Tensor, Tensor?)");
  m.def(
      "dora_linear_backward(Tensor g, Tensor x, Tensor? y, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
      "Tensor norm, Tensor? bias, float scaling, Tensor(a!)? merged, bool needs_direction, bool needs_x, "
      "float doubtful_ratio, bool onednn) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def(
      "direction_backward(Tensor weight, Tensor? grad, Tensor lora_A, Tensor lora_B, Tensor? magnitude, float scaling, "
      "Tensor norm, Tensor? grad_norm, Tensor(a!) grad_A, Tensor(b!) grad_B, Tensor(c!)? grad_magnitude) -> ()");
  m.def(
      "compose(Tensor base, Tensor? base_dropped, Tensor hidden, Tensor lora_B, Tensor scale, Tensor? bias, float scaling, "
      "Tensor(a!) out) -> ()");
  m.def(
      "few_tokens(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scale, Tensor? bias, float scaling, "
      "Tensor(a!) out) -> ()");
  m.def("nonzero_rows(Tensor t, int multiple) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bidora_native, CompositeExplicitAutograd, m) {  // no tensor says which device
  m.impl("instruction_set", TORCH_BOX(&bidora::kernels_instruction_set));
  m.impl("made_by_intel", TORCH_BOX(&bidora::processor_made_by_intel));
}

STABLE_TORCH_LIBRARY_IMPL(bidora_native, CPU, m) {
  m.impl("weight_norm", TORCH_BOX(&bidora::weight_norm));
  m.impl("merged_weight", TORCH_BOX(&bidora::merged_weight));
  m.impl("adapter_gradients", TORCH_BOX(&bidora::adapter_gradients));
  m.impl("dora_linear", TORCH_BOX(&bidora::dora_linear));
  m.impl("dora_linear_backward", TORCH_BOX(&bidora::dora_linear_backward));
  m.impl("direction_backward", TORCH_BOX(&bidora::direction_backward));
  m.impl("compose", TORCH_BOX(&bidora::compose));
  m.impl("few_tokens", TORCH_BOX(&bidora::few_tokens));
  m.impl("nonzero_rows", TORCH_BOX(&bidora::nonzero_rows));
}
