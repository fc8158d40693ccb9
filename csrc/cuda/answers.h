// What devices have said of kernels and layouts, so that nobody asks twice.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/plan.h"

namespace rnn::cuda {

struct Answer {
  int at_once;         // groups of blocks that run at the same time
  std::string reason;  // why none can
};

class Answers {
 public:
  // A kernel, a device, blocks of a cluster or of the whole launch, bytes of shared memory.
  using Question = std::tuple<const void*, int, int64_t, int64_t>;

  // `ask` is called where the answer is not known.
  template <class Ask>
  Answer find(const Question& question, Ask&& ask) {
    const std::lock_guard lock(mutex_);
    const auto found = answers_.find(question);
    return found != answers_.end() ? found->second : answers_.emplace(question, ask()).first->second;
  }
  void refuse(const Question& question, std::string reason) {
    const std::lock_guard lock(mutex_);
    answers_[question] = {0, std::move(reason)};
  }

 private:
  std::mutex mutex_;
  std::map<Question, Answer> answers_;
};

// Of this process.
inline Answers answers;

// Why a plan cannot be launched, or nothing: all groups of a launch have to run at the same time, or one at least.
inline std::string refusal(const Plan& plan, int D, const Answer& answer) {
  const Layout& l = plan.layout;
  const int needed = l.stages > 1 || plan.cooperates() ? D * l.stages * l.groups : 1;
  if (answer.at_once >= needed) return "";
  const std::string blocks = std::to_string(l.message.blocks);
  const std::string what = l.message.alone()    ? "single blocks"
                           : plan.in_clusters() ? "clusters of " + blocks + " blocks"
                                                : "groups of " + blocks + " blocks";
  return what + ": " +
         (answer.reason.empty() ? "the device runs " + std::to_string(answer.at_once) + " of the " +
                                      std::to_string(needed) + " at the same time"
                                : answer.reason);
}

}  // namespace rnn::cuda
