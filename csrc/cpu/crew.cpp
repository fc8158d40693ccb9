#include "cpu/crew.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

namespace rnn::cpu {

Process process{0, 1, 0};

namespace {

// Cores that this thread may run on: a process may be moved at any time, and asking costs 0.1 us.
int count_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, int(sysconf(_SC_NPROCESSORS_ONLN)));  // more cores than cpu_set_t holds
#else
  return 1;
#endif
}

// In the child of a fork only the thread that forked lives on. OpenMP still counts on the threads that this one had
// before, and would wait for them forever.
thread_local bool forked = false;

[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  process.at_work = 0;
});

bool stalled() {
  const int64_t until = __atomic_load_n(&process.stalled_until, __ATOMIC_RELAXED);
  return until && nanoseconds() < until;
}

}  // namespace

int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t(1000000000) + t.tv_nsec;
}

Crew::Crew(int wanted) : size_(1) {
  if (forked || (wanted > 1 && stalled())) wanted = 1;
  if (wanted > 1) __atomic_store_n(&process.cores, count_cores(), __ATOMIC_RELAXED);
  int at_work = process.working();
  do {
    const int left = __atomic_load_n(&process.cores, __ATOMIC_RELAXED) - at_work;
    size_ = at_work == 0 ? wanted : std::max(1, std::min(wanted, left));
  } while (!__atomic_compare_exchange_n(&process.at_work, &at_work, at_work + size_, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
}

void Crew::keep(int size) {
  if (size >= size_) return;
  __atomic_fetch_sub(&process.at_work, size_ - size, __ATOMIC_RELAXED);
  size_ = size;
}

void Crew::judge(int64_t took, int64_t waited) const {
  constexpr int64_t kLongCall = 5'000'000, kMostGained = 20'000'000;
  constexpr int64_t kShortest = 20'000'000, kLongest = 160'000'000;
  static int64_t gained = 0, pause = 0;
  const int64_t now = nanoseconds(), until = __atomic_load_n(&process.stalled_until, __ATOMIC_RELAXED);
  if (process.crowded() || now < until) return;  // the latter: another call has noticed before
  if (took - waited > kLongCall) return;         // lasts many time slices, and gets more of them with more threads
  const int64_t alone = (took - waited) * size_;
  const int64_t sum = std::min(__atomic_load_n(&gained, __ATOMIC_RELAXED) + alone - took, kMostGained);
  __atomic_store_n(&gained, std::max<int64_t>(sum, 0), __ATOMIC_RELAXED);
  if (sum >= 0) return;
  const int64_t before = __atomic_load_n(&pause, __ATOMIC_RELAXED);
  const int64_t next = now - until < before ? std::min(2 * before, kLongest) : kShortest;
  __atomic_store_n(&pause, next, __ATOMIC_RELAXED);
  __atomic_store_n(&process.stalled_until, now + next, __ATOMIC_RELAXED);
}

#if defined(__linux__)
void sleep_while(const uint32_t* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(const uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
void sleep_while(const uint32_t*, uint32_t) { sched_yield(); }
void wake_all(const uint32_t*) {}
#endif

}  // namespace rnn::cpu
