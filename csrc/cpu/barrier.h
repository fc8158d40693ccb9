// How the threads of one call wait for each other.
#pragma once

#include <sched.h>

#include <cstdint>

#include "cpu/thread_budget.h"

namespace rnn::cpu::RNN_ISA {

// A barrier cheap enough for every step: arrivals count up in one word, waiters spin on another. A thread that has to
// wait for longer than a step takes is waiting for one that has lost its core to another process. It sleeps then: its
// core is free for whoever has work, and when it is woken the system lets it run at once. If it spun or yielded
// instead, the system would switch between the threads and the other process once per time slice, which is milliseconds
// a step.
class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const uint32_t generation = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
    const uint32_t last = (generation + 1) * uint32_t(count);  // the arrival that lets everybody pass
    const uint64_t state = __atomic_add_fetch(&state_, kArrival, __ATOMIC_ACQ_REL);
    if (arrivals(state) == last) {
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
      if (sleepers(state)) wake_all(&generation_);
    } else if (!spin(generation)) {
      sleep(generation, last);
    }
  }

  // Nanoseconds that threads have slept here, added up; to be read when nobody waits any more.
  int64_t slept() const { return slept_; }

 private:
  static constexpr int64_t kSpinNanoseconds = 50000;  // about what it costs to sleep and to be woken
  static constexpr int kSpinsPerLook = 64;            // at the clock and at the other calls
  static constexpr uint64_t kArrival = uint64_t(1) << 32;
  static uint32_t arrivals(uint64_t state) { return uint32_t(state >> 32); }
  static uint32_t sleepers(uint64_t state) { return uint32_t(state); }

  bool passed(uint32_t generation) const { return __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) != generation; }

  bool spin(uint32_t generation) const {
    int64_t end = 0;
    for (;;) {
      for (int i = 0; i < kSpinsPerLook; ++i) {
        if (passed(generation)) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      if (process.crowded()) return false;
      const int64_t now = nanoseconds();
      if (!end) end = now + kSpinNanoseconds;
      if (now > end) return false;
    }
  }

  // One word counts arrivals and sleepers, so that either the last to arrive sees the sleeper, or the sleeper sees that
  // everybody has arrived and does not sleep.
  void sleep(uint32_t generation, uint32_t last) {
    const uint64_t state = __atomic_add_fetch(&state_, 1, __ATOMIC_ACQ_REL);
    const bool complete = int32_t(arrivals(state) - last) >= 0;
    const int64_t start = nanoseconds();
    while (!passed(generation)) {
      if (complete) {
        sched_yield();
      } else {
        sleep_while(&generation_, generation);
      }
    }
    __atomic_sub_fetch(&state_, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&slept_, nanoseconds() - start, __ATOMIC_RELAXED);
  }

  alignas(64) uint64_t state_ = 0;
  alignas(64) uint32_t generation_ = 0;
  int64_t slept_ = 0;
};

}  // namespace rnn::cpu::RNN_ISA
