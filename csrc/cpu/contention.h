// When a process gives up its threads: the policy, as arithmetic on times that it is told. Compiled once, for all
// instruction sets.
#pragma once

#include <cstdint>

namespace rnn::cpu {

// How many threads a call gets that wants so many. A call that is alone takes all it wants; beside others, whose
// threads are at work, it takes the cores that are left, and one thread at least.
int threads_granted(int wanted, int at_work, int cores);

// A call that ran in several threads. All times are in nanoseconds.
struct FinishedCall {
  int64_t took;
  int64_t waited;  // of this, each thread but one on the average: for the others to begin, at barriers, and at the end
  int threads;
};

// What the calls of a process have learnt about other processes that want the same cores. Where these keep threads from
// their cores, the threads of a call wait for each other, and may lose more time than they gain over one thread.
//
// When waiting has cost more than threads gained, calls run in one thread for 20 ms; then threads are tried again.
// Where they lose once more soon after, the next pause is twice as long, up to 160 ms.
struct Contention {
  int64_t gained = 0;  // by the last calls over one thread, less what they lost; at most kMostGained, so that
                       // a long time without neighbours does not hide their coming
  int64_t pause = 0;   // length of the last pause
  int64_t until = 0;   // its end; 0: there was none

  static constexpr int64_t kMostGained = 20'000'000;
  static constexpr int64_t kShortestPause = 20'000'000, kLongestPause = 160'000'000;
  static constexpr int64_t kLongCall = 5'000'000;  // lasts many time slices, and gets more of them with more threads

  // Do calls run in one thread now?
  bool paused(int64_t now) const { return now < until; }

  // What is known after a call in several threads that has ended now.
  Contention after(const FinishedCall& call, int64_t now) const;
};

}  // namespace rnn::cpu
