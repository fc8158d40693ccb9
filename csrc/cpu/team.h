// How the threads of one call share its work, and how they wait for each other.
#pragma once

#include <sched.h>

#include <cstdint>

#include "cpu/thread_budget.h"

namespace rnn::cpu::RNN_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A barrier cheap enough for every step: arrivals count up in one word, waiters spin on another. Who waits for longer
// than a step takes waits for a thread without a core, and sleeps: the core goes to whoever has work, and a sleeper
// that is woken gets it back at once. Spinning or yielding on, threads that wait for each other would take turns with a
// busy neighbour, a whole time slice per step.
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

constexpr int kMaxThreads = 256;

// One thread's part of the loop. Threads of a group run the same rows and directions in step, each on its own units;
// groups never wait for each other.
struct Share {
  bool idle;
  int64_t first_direction, last_direction;
  int64_t first_row, last_row;
  int group, rank, size;  // size threads in the group
  int thread;

  // This thread's part of n things that the group shares.
  int64_t begin(int64_t n) const { return n * rank / size; }
  int64_t end(int64_t n) const { return n * (rank + 1) / size; }
};

// Splits D directions, then rows of the batch (no waiting at all), then units (one or two barriers per step).
struct Plan {
  int direction_parts;  // 1 or D
  int row_parts;
  int unit_parts;

  // panel_bytes: weights of one direction; step_work: multiply-adds of one step of one direction.
  static Plan make(int threads, int64_t T, int64_t D, int64_t B, int64_t tiles, int64_t panel_bytes,
                   int64_t step_work) {
    constexpr int64_t kCacheBytes = 1280 << 10;   // of weights that stay in a core's L2 beside the rest
    constexpr int64_t kWorkPerThread = 64 << 10;  // less is done before a second thread has woken up
    constexpr int64_t kWorkPerBarrier = 16 << 10;
    constexpr int64_t kFewestRows = 4;  // fewer rows reread the weights too often
    threads = int(least(threads, 1 + T * D * step_work / kWorkPerThread));
    Plan plan{1, 1, 1};
    if (D > 1 && threads >= D) plan.direction_parts = int(D);
    const int64_t each = threads / plan.direction_parts;
    const int64_t useful_units = least(least(each, tiles), most(1, step_work / kWorkPerBarrier));
    const int64_t useful_rows = least(each, most(1, B / kFewestRows));
    if (panel_bytes <= kCacheBytes && useful_rows * 2 > each) {
      plan.row_parts = int(useful_rows);
      plan.unit_parts = int(least(useful_units, each / useful_rows));
    } else {
      plan.unit_parts = int(useful_units);
      plan.row_parts = int(least(most(1, B), each / useful_units));
    }
    return plan;
  }

  int used() const { return direction_parts * row_parts * unit_parts; }

  Share share(int thread, int64_t D, int64_t B) const {
    const int unit = thread % unit_parts;
    const int row = thread / unit_parts % row_parts;
    const int direction = thread / (unit_parts * row_parts);
    Share s{};
    s.idle = direction >= direction_parts;
    s.first_direction = D * direction / direction_parts;
    s.last_direction = D * (direction + 1) / direction_parts;
    s.first_row = B * row / row_parts;
    s.last_row = B * (row + 1) / row_parts;
    s.group = thread / unit_parts;
    s.rank = unit;
    s.size = unit_parts;
    s.thread = thread;
    return s;
  }
};

// Hands out aligned parts of one workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace rnn::cpu::RNN_ISA
