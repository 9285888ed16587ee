// Compiled once per instruction set with -DBIDORA_ISA=<name> -DBIDORA_VECTOR_BYTES=<width>; see setup.py.
#include "compose.h"
#include "direction.h"
#include "dora_linear.h"
#include "few_tokens.h"
#include "merged_weight.h"

namespace bidora {
namespace BIDORA_ISA {

template <typename T>
static Kernels<T> make() {
  return {
      kPanel<T>,          pack_panels<T>,    weight_rows<T>,    weight_columns<T>,
      gradient_tokens<T>, direction_rows<T>, compose_tokens<T>, few_tokens_rows<T>,
  };
}

const Kernels<float>& table_f32() {
  static const Kernels<float> table = make<float>();
  return table;
}

const Kernels<double>& table_f64() {
  static const Kernels<double> table = make<double>();
  return table;
}

}  // namespace BIDORA_ISA
}  // namespace bidora
