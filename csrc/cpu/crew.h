// The threads of this process that are at work in our loops, whoever called: how many a call may take, and how one of
// them sleeps. Compiled once, for all instruction sets.
#pragma once

#include <cstdint>

namespace rnn::cpu {

// Threads at work, and the cores that they share.
struct Process {
  alignas(64) int at_work;
  int cores;
  int64_t stalled_until;  // in nanoseconds()

  int working() const { return __atomic_load_n(&at_work, __ATOMIC_RELAXED); }
  // More threads than cores: whoever spins keeps somebody from working.
  bool crowded() const { return working() > __atomic_load_n(&cores, __ATOMIC_RELAXED); }
};
extern Process process;

// The threads of one call, from its start to its end. A call that is alone takes all it wants; beside others it takes
// the cores that are left, and one thread at least.
class Crew {
 public:
  explicit Crew(int wanted);
  ~Crew() { keep(0); }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  int size() const { return size_; }
  void keep(int size);  // gives back all above this number

  // After a call that took so long, each of whose threads but one waited so long. Once calls have lost by waiting what
  // the last ones gained over one thread, since other processes keep threads from their cores, the next calls of the
  // process run in one thread each, for a while that doubles as long as the machine stays as busy.
  void judge(int64_t nanoseconds, int64_t waited) const;

 private:
  int size_;
};

int64_t nanoseconds();  // since some moment in the past

// Sleeps until somebody calls wake_all, unless *word is no longer `value`; may also return early.
void sleep_while(const uint32_t* word, uint32_t value);
void wake_all(const uint32_t* word);

}  // namespace rnn::cpu
