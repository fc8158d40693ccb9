// Chooses the instruction set at run time.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

namespace rnn::cpu {

namespace baseline {
extern const Kernels kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif

static const Kernels* choose() {
  const char* wanted = std::getenv("RNNKERNELS_CPU_CAPABILITY");
  const auto allowed = [&](const Kernels& k) { return !wanted || std::strcmp(wanted, k.name) == 0; };
#if defined(__x86_64__)
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && allowed(avx512::kTable)) return &avx512::kTable;
  if (fma && allowed(avx2::kTable)) return &avx2::kTable;
#endif
  return allowed(baseline::kTable) ? &baseline::kTable : nullptr;
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace rnn::cpu
