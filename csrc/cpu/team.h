// How the threads of one call share its work, and how they wait for each other.
#pragma once

#include <sched.h>

#include <cstdint>

namespace rnn::cpu::RNN_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A barrier cheap enough for every step: arrivals count down in one word, waiters spin on another. After a while they
// give up their time slice, so that more threads than cores still make progress.
class Barrier {
 public:
  void wait(int count) {
    if (count == 1) return;
    const int generation = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == count) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
      if (spins > 20000) sched_yield();
#if defined(__x86_64__)
      else
        __builtin_ia32_pause();
#endif
    }
  }

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) int generation_ = 0;
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
