#include "cpu/thread_budget.h"

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

Process process{0, 1, {}};

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

Contention contention() {
  const Contention& c = process.contention;
  const auto get = [](const int64_t& x) { return __atomic_load_n(&x, __ATOMIC_RELAXED); };
  return {get(c.gained), get(c.pause), get(c.until)};
}

bool paused() {
  const Contention c = contention();
  return c.until && c.paused(nanoseconds());  // no look at the clock where there never was a pause
}

}  // namespace

int64_t nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t(1000000000) + t.tv_nsec;
}

ThreadBudget::ThreadBudget(int wanted) : size_(1) {
  if (forked || (wanted > 1 && paused())) wanted = 1;
  if (wanted > 1) __atomic_store_n(&process.cores, count_cores(), __ATOMIC_RELAXED);
  int at_work = process.working();
  do {
    size_ = threads_granted(wanted, at_work, __atomic_load_n(&process.cores, __ATOMIC_RELAXED));
  } while (!__atomic_compare_exchange_n(&process.at_work, &at_work, at_work + size_, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
}

void ThreadBudget::keep(int size) {
  if (size >= size_) return;
  __atomic_fetch_sub(&process.at_work, size_ - size, __ATOMIC_RELAXED);
  size_ = size;
}

void ThreadBudget::report(int64_t took, int64_t waited) const {
  if (process.crowded()) return;  // its threads waited for those of other calls of this process
  const Contention before = contention(), next = before.after({took, waited, size_}, nanoseconds());
  const auto set = [](int64_t& x, int64_t value) { __atomic_store_n(&x, value, __ATOMIC_RELAXED); };
  set(process.contention.gained, next.gained);
  if (next.until == before.until) return;  // or a pause that another call has just begun would end here
  set(process.contention.pause, next.pause);
  set(process.contention.until, next.until);
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
