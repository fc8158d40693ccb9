// Chooses the instruction set at run time.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace amx {
extern const Entry<BFloat16> kBFloat16;
}

// Has this processor AMX-BF16 and AVX512-BF16, and does the system grant this process the memory of the tiles, which it
// does not save for whoever has not asked?
static bool has_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;              // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmx = 1u << 22 | 1u << 24, kConversions = 1u << 5;  // AMX-BF16, AMX-TILE; AVX512-BF16
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmx) != kAmx) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kConversions)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;  // fails, too, where the system knows no tiles
#else
  return false;
#endif
}
#endif

static const Kernels* choose() {
  const char* wanted = std::getenv("RNNKERNELS_CPU_CAPABILITY");
  const auto allowed = [&](const Kernels& k) { return !wanted || std::strcmp(wanted, k.name) == 0; };
#if defined(__x86_64__)
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const Kernels tiles{"amx", avx512::kTable.float32, avx512::kTable.float64, amx::kBFloat16,
                             avx512::kTable.float16};
  if (wide && allowed(tiles) && has_tiles()) return &tiles;
  if (wide && allowed(avx512::kTable)) return &avx512::kTable;
#endif
#if defined(RNNKERNELS_ONLY_AVX512)
  return nullptr;
#else
#if defined(__x86_64__)
  if (fma && allowed(avx2::kTable)) return &avx2::kTable;
#endif
  return allowed(baseline::kTable) ? &baseline::kTable : nullptr;
#endif
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace rnn::cpu
