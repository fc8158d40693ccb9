#include "cpu/contention.h"

#include <algorithm>

namespace rnn::cpu {

int threads_granted(int wanted, int at_work, int cores) {
  return at_work == 0 ? wanted : std::max(1, std::min(wanted, cores - at_work));
}

Contention Contention::after(const FinishedCall& call, int64_t now) const {
  const int64_t worked = call.took - call.waited;
  if (paused(now) || worked > kLongCall) return *this;  // the former: another call has begun a pause meanwhile
  const int64_t alone = worked * call.threads;          // what one thread would have taken
  const int64_t sum = std::min(gained + alone - call.took, kMostGained);
  if (sum >= 0) return {sum, pause, until};
  const bool soon = now - until < pause;
  const int64_t next = soon ? std::min(2 * pause, kLongestPause) : kShortestPause;
  return {0, next, now + next};
}

}  // namespace rnn::cpu
