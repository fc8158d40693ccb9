// Parts of the one allocation that a call makes.
#pragma once

#include <cstdint>

namespace rnn::cpu::RNN_ISA {

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
