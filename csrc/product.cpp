// The matrix products, which are torch's: by the library that it takes by itself, or by oneDNN.
#include <array>
#include <string>

#include "operations.h"

namespace bidora {

Tensor product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool onednn) {
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  if (onednn) {  // nothing is fused behind it: "none", no numbers and no algorithm
    stack[3] = torch::stable::detail::from(std::string("none"));
    stack[4] = torch::stable::detail::from(std::vector<double>());
    stack[5] = torch::stable::detail::from(std::nullopt);
  }
  const char* name = onednn ? "mkldnn::_linear_pointwise" : "aten::linear";
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace bidora
