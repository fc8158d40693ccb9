// Chooses the instruction set at run time.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
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
namespace avx512_bf16 {
extern const Entry<BFloat16> kBFloat16;
}
namespace amx {
extern const Entry<BFloat16> kBFloat16;
}

// The registers of leaf 7 of cpuid; zeros where there is none.
struct Leaf7 {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Leaf7(int subleaf) {
    if (!__get_cpuid_count(7, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

// Has this processor AMX-BF16 and AVX512-BF16, and does the system grant this process the memory of the tiles, which it
// does not save for whoever has not asked?
[[maybe_unused]] static bool has_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;              // AMX-BF16, AMX-TILE
  if ((Leaf7(0).d & kAmx) != kAmx || !multiplies_bfloat16()) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;  // fails, too, where the system knows no tiles
#else
  return false;
#endif
}

// F16C; not every compiler knows its name.
static bool converts_float16() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool multiplies_bfloat16() { return Leaf7(1).a >> 5 & 1; }  // AVX512-BF16
bool multiplies_float16() { return Leaf7(0).d >> 23 & 1; }  // AVX512-FP16
#else
bool multiplies_bfloat16() { return true; }  // not known
bool multiplies_float16() { return true; }
#endif

// A build for its machine alone leaves out what that does not run: RNNKERNELS_WITHOUT_...
static const Kernels* choose() {
  const char* wanted = std::getenv("RNNKERNELS_CPU_CAPABILITY");
  const auto allowed = [&](const Kernels& k) { return !wanted || std::strcmp(wanted, k.name) == 0; };
#if defined(__x86_64__)
  [[maybe_unused]] const bool fma =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_float16();
#if !defined(RNNKERNELS_WITHOUT_AVX512)
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if !defined(RNNKERNELS_WITHOUT_AMX)
  static const Kernels tiles{"amx", avx512::kTable.float32, avx512::kTable.float64, amx::kBFloat16,
                             avx512::kTable.float16};
  if (wide && allowed(tiles) && has_tiles()) return &tiles;
#endif
#if !defined(RNNKERNELS_WITHOUT_AVX512_BF16)
  static const Kernels pairs{"avx512_bf16", avx512::kTable.float32, avx512::kTable.float64, avx512_bf16::kBFloat16,
                             avx512::kTable.float16};
  if (wide && allowed(pairs) && multiplies_bfloat16()) return &pairs;
#endif
  if (wide && allowed(avx512::kTable)) return &avx512::kTable;
#endif
#if !defined(RNNKERNELS_WITHOUT_AVX2)
  if (fma && allowed(avx2::kTable)) return &avx2::kTable;
#endif
#endif
#if defined(RNNKERNELS_WITHOUT_DEFAULT)
  return nullptr;
#else
  return allowed(baseline::kTable) ? &baseline::kTable : nullptr;
#endif
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

const char* kernels_built() {
  static constexpr char kNames[] =
#if !defined(RNNKERNELS_WITHOUT_DEFAULT)
      ", default"
#endif
#if defined(__x86_64__)
#if !defined(RNNKERNELS_WITHOUT_AVX2)
      ", avx2"
#endif
#if !defined(RNNKERNELS_WITHOUT_AVX512)
      ", avx512"
#if !defined(RNNKERNELS_WITHOUT_AVX512_BF16)
      ", avx512_bf16"
#endif
#if !defined(RNNKERNELS_WITHOUT_AMX)
      ", amx"
#endif
#endif
#endif
      "";
  return kNames + 2;  // after the first comma
}

const char* kernels_name(bool bfloat16) {
  const Kernels* chosen = kernels();
  if (!chosen) return "none";
#if defined(__x86_64__) && !defined(RNNKERNELS_WITHOUT_AVX512)
  if (!bfloat16 && chosen->float32.cells == avx512::kTable.float32.cells) return avx512::kTable.name;
#endif
  return chosen->name;
}

}  // namespace rnn::cpu
