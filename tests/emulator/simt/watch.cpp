// What a compiler calls at every access under -fsanitize=thread, in place of its own library; and what is told of a
// race.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>

#include "simt/internals.h"
#include "simt/races.h"

namespace rnn::simt {

std::string Races::who(const Stamp& stamp) const {
  const auto threads = uint32_t(threads_.size());
  const auto named = [&](uint32_t thread) {
    return "thread " + std::to_string(thread % uint32_t(grid_.threads)) + " of block " +
           std::to_string(thread / uint32_t(grid_.threads));
  };
  std::string name = stamp.agent < threads       ? named(stamp.agent)
                     : stamp.agent < 2 * threads ? "a copy of " + named(stamp.agent - threads)
                                                 : "a message in phase " + std::to_string(stamp.clock - 1);
  return name + stamp.origin.text();
}

// The array, and how far in it.
std::string Races::where(const void* p) const {
  const auto at = reinterpret_cast<uintptr_t>(p);
  const auto in = [at](const Area& area, uintptr_t base) {
    const uintptr_t begin = base + uintptr_t(area.begin);
    return at >= begin && at < begin + uintptr_t(area.bytes) ? area.name + " + " + std::to_string(at - begin)
                                                             : std::string();
  };
  for (size_t block = 0; block < shared_.size(); ++block) {
    const auto base = reinterpret_cast<uintptr_t>(shared_[block]);
    if (at < base || at >= base + uintptr_t(grid_.shared_bytes)) continue;
    std::string text;
    for (const Area& area : grid_.shared_areas)
      if (text.empty()) text = in(area, base);
    return (text.empty() ? "byte " + std::to_string(at - base) : text) + " in shared memory of block " +
           std::to_string(block);
  }
  for (const Area& area : grid_.global_areas)
    if (const std::string text = in(area, 0); !text.empty()) return text + " in global memory";
  return "global memory";
}

std::string Races::report() const {
  std::string text = "race in " + (grid_.name.empty() ? "a kernel" : grid_.name);
  for (const Pair& pair : pairs_)
    text += "\n  " + where(pair.p) + " " + pair.what + ", in no order:\n    " + who(pair.before) + "\n    " +
            who(pair.after);
  return text;
}

std::string Origin::text() const {
  if (!bits_) return "";
  if (bits_ & kPrimitive) return ", " + reinterpret_cast<const Site*>(bits_ & ~kPrimitive)->name;
  Dl_info info;
  const auto* const call = reinterpret_cast<const char*>(bits_) - 1;
  if (!dladdr(call, &info)) return ", somewhere";
  const auto offset = call - static_cast<const char*>(info.dli_fbase);
  std::array<char, 512> line{};
  std::snprintf(line.data(), line.size(), "addr2line -Cspe '%s' %#tx 2>/dev/null", info.dli_fname, offset);
  const std::unique_ptr<FILE, int (*)(FILE*)> lines(popen(line.data(), "r"), pclose);
  if (!lines || !std::fgets(line.data(), line.size(), lines.get())) return ", at " + std::to_string(offset);
  std::string found = line.data();
  found.erase(std::min(found.find_first_of(" \n"), found.size()));
  return ", " + found;
}

#if defined(RNN_SIMT_WATCHES)
namespace {

// One thread of the system runs all threads of a launch.
__attribute__((tls_model("initial-exec"))) thread_local bool watched = false;

}  // namespace

RNN_UNWATCHED Unwatched::Unwatched() : before_(watched) { watched = false; }
RNN_UNWATCHED Unwatched::~Unwatched() { watched = before_; }
RNN_UNWATCHED Watched::Watched() { watched = true; }
RNN_UNWATCHED Watched::~Watched() { watched = false; }

namespace {

RNN_UNWATCHED inline void seen(const void* p, size_t bytes, bool writes, const void* from) {
  if (!watched) return;
  watched = false;
  Machine::seen(p, bytes, writes, from);
  watched = true;
}

}  // namespace
#endif

}  // namespace rnn::simt

#if defined(RNN_SIMT_WATCHES)
#define RNN_HOOK extern "C" RNN_UNWATCHED __attribute__((visibility("hidden")))
#define RNN_ACCESS(name, bytes, writes) \
  RNN_HOOK void __tsan_##name(void* p) { rnn::simt::seen(p, bytes, writes, __builtin_return_address(0)); }
#define RNN_ACCESSES(bytes)                       \
  RNN_ACCESS(read##bytes, bytes, false)           \
  RNN_ACCESS(write##bytes, bytes, true)           \
  RNN_ACCESS(unaligned_read##bytes, bytes, false) \
  RNN_ACCESS(unaligned_write##bytes, bytes, true)
RNN_ACCESSES(1)
RNN_ACCESSES(2)
RNN_ACCESSES(4)
RNN_ACCESSES(8)
RNN_ACCESSES(16)
RNN_HOOK void __tsan_read_range(void* p, size_t n) { rnn::simt::seen(p, n, false, __builtin_return_address(0)); }
RNN_HOOK void __tsan_write_range(void* p, size_t n) { rnn::simt::seen(p, n, true, __builtin_return_address(0)); }

// Of the host's code, which is not watched: kernels have no virtual functions and no atomic operations of C++.
RNN_HOOK void __tsan_init() {}
RNN_HOOK void __tsan_func_entry(void*) {}
RNN_HOOK void __tsan_func_exit() {}
RNN_HOOK void __tsan_vptr_update(void*, void*) {}
RNN_HOOK void __tsan_vptr_read(void*) {}
RNN_HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
RNN_HOOK void __tsan_atomic_signal_fence(int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
#define RNN_ATOMIC_RMW(bits, Int, op)                                         \
  RNN_HOOK Int __tsan_atomic##bits##_##op(volatile void* p, Int x, int) {     \
    return __atomic_##op(static_cast<volatile Int*>(p), x, __ATOMIC_SEQ_CST); \
  }
#define RNN_ATOMIC_EXCHANGE(bits, Int, name, weak)                                                                \
  RNN_HOOK int __tsan_atomic##bits##_compare_exchange_##name(volatile void* p, void* expected, Int x, int, int) { \
    return __atomic_compare_exchange_n(static_cast<volatile Int*>(p), static_cast<Int*>(expected), x, weak,       \
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                       \
  }
#define RNN_ATOMIC(bits, Int)                                                       \
  RNN_HOOK Int __tsan_atomic##bits##_load(const volatile void* p, int) {            \
    return __atomic_load_n(static_cast<const volatile Int*>(p), __ATOMIC_SEQ_CST);  \
  }                                                                                 \
  RNN_HOOK void __tsan_atomic##bits##_store(volatile void* p, Int x, int) {         \
    __atomic_store_n(static_cast<volatile Int*>(p), x, __ATOMIC_SEQ_CST);           \
  }                                                                                 \
  RNN_HOOK Int __tsan_atomic##bits##_exchange(volatile void* p, Int x, int) {       \
    return __atomic_exchange_n(static_cast<volatile Int*>(p), x, __ATOMIC_SEQ_CST); \
  }                                                                                 \
  RNN_ATOMIC_RMW(bits, Int, fetch_add)                                              \
  RNN_ATOMIC_RMW(bits, Int, fetch_sub)                                              \
  RNN_ATOMIC_RMW(bits, Int, fetch_and)                                              \
  RNN_ATOMIC_RMW(bits, Int, fetch_or)                                               \
  RNN_ATOMIC_RMW(bits, Int, fetch_xor)                                              \
  RNN_ATOMIC_EXCHANGE(bits, Int, strong, false)                                     \
  RNN_ATOMIC_EXCHANGE(bits, Int, weak, true)
RNN_ATOMIC(8, uint8_t)
RNN_ATOMIC(16, uint16_t)
RNN_ATOMIC(32, uint32_t)
RNN_ATOMIC(64, uint64_t)
#endif
