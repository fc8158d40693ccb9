// Functions that run on stacks of their own and hand over to each other by name, within one thread of the system.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RNN_SIMT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define RNN_SIMT_ASAN 1
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define RNN_SIMT_UCONTEXT 1
#endif
#if defined(RNN_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace rnn::simt {

class Fiber {
 public:
  Fiber() = default;  // the stack that its first switch_to() is called on

  // `entry` begins with began(), ends with leave_for(), and lets no exception out.
  void prepare(char* stack, size_t bytes, void (*entry)());
  // To be called in `entry`; `root` is the fiber that nobody prepared, from which the first prepared one was reached.
  static void began(Fiber& root);

  void switch_to(Fiber& next);
  [[noreturn]] void leave_for(Fiber& next);

 private:
  void hand_over(Fiber& next);

#if defined(RNN_SIMT_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(RNN_SIMT_ASAN)
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
#endif
};

// Stacks of one size, with a page below each that must not be touched. They are kept for the next user.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(size_t count);
  char* stack(size_t i) const { return memory_ + i * (bytes() + page_) + page_; }
  static size_t bytes();

 private:
  void release();

  char* memory_ = nullptr;
  size_t count_ = 0, page_ = 0;
};

}  // namespace rnn::simt
