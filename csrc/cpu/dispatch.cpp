// Takes the widest instruction set that both the build and the machine have. BIDORA_HAS_X86_LEVELS says which the build has.
#include "kernels.h"

namespace bidora {

#define BIDORA_TABLES(isa)               \
  namespace isa {                        \
  const Kernels<float>& table_f32();     \
  const Kernels<double>& table_f64();    \
  }

BIDORA_TABLES(baseline)
#ifdef BIDORA_HAS_X86_LEVELS
BIDORA_TABLES(avx2)
BIDORA_TABLES(avx512)
#endif

namespace {

enum class Level { baseline, avx2, avx512 };

Level detect() {
#ifdef BIDORA_HAS_X86_LEVELS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? Level::avx512 : Level::avx2;
  }
#endif
  return Level::baseline;
}

const Level level = detect();

}  // namespace

#ifdef BIDORA_HAS_X86_LEVELS
#define BIDORA_PICK(table) \
  (level == Level::avx512 ? avx512::table() : level == Level::avx2 ? avx2::table() : baseline::table())
#else
#define BIDORA_PICK(table) baseline::table()
#endif

template <>
const Kernels<float>& kernels<float>() {
  return BIDORA_PICK(table_f32);
}

template <>
const Kernels<double>& kernels<double>() {
  return BIDORA_PICK(table_f64);
}

bool made_by_intel() {
#ifdef BIDORA_HAS_X86_LEVELS
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const char* instruction_set() {
  return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "baseline";
}

}  // namespace bidora
