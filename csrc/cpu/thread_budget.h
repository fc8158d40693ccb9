// The threads of this process that are at work in our loops, whoever called: how many a call may take, and how one of
// them sleeps. Compiled once, for all instruction sets.
#pragma once

#include <cstdint>

#include "cpu/contention.h"

namespace rnn::cpu {

// Threads at work, and the cores that they share.
struct Process {
  alignas(64) int at_work;
  int cores;
  Contention contention;  // read and written number by number: calls that end together may lose one's gain

  int working() const { return __atomic_load_n(&at_work, __ATOMIC_RELAXED); }
  // More threads than cores: whoever spins keeps somebody from working.
  bool crowded() const { return working() > __atomic_load_n(&cores, __ATOMIC_RELAXED); }
};
extern Process process;

// The threads that one call may use, from its start to its end; contention.h says how many.
class ThreadBudget {
 public:
  explicit ThreadBudget(int wanted);
  ~ThreadBudget() { keep(0); }
  ThreadBudget(const ThreadBudget&) = delete;
  ThreadBudget& operator=(const ThreadBudget&) = delete;

  int size() const { return size_; }
  void keep(int size);  // gives back all above this number

  // After a call in all of these threads that took so long, each of which but one waited so long.
  void report(int64_t took, int64_t waited) const;

 private:
  int size_;
};

int64_t nanoseconds();  // since some moment in the past

// Sleeps until somebody calls wake_all, unless *word is no longer `value`; may also return early.
void sleep_while(const uint32_t* word, uint32_t value);
void wake_all(const uint32_t* word);

}  // namespace rnn::cpu
