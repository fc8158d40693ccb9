// The tensors of a case, twice: in the host's memory and in the machine's, at the same offsets, with bytes in between
// that nobody may touch. What kernels are to write starts as NaN, and what they only read has to stay as it is.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "machine.h"

namespace rnn::probe {

class Arena {
 public:
  enum class Role { kInput, kOutput, kScratch };

  template <class T>
  struct Tensor {
    size_t region;
    int64_t size;
  };

  // No tensor where it has no numbers, and then null is where it lies.
  template <class T>
  Tensor<T> add(const char* name, int64_t size, Role role) {
    const int64_t begin = (end_ + kGuard + 255) / 256 * 256;
    regions_.push_back({name, begin, size * int64_t(sizeof(T)), role});
    end_ = begin + regions_.back().bytes;
    return {regions_.size() - 1, size};
  }

  // Once all are there: guards, poison, and zeros in what is scratch.
  void allocate() {
    host_.assign(size_t(end_ + kGuard), kGuardByte);
    for (const Region& r : regions_)
      std::memset(host_.data() + r.begin, r.role == Role::kOutput ? kPoison : 0, size_t(r.bytes));
    device_ = Machine::allocate(int64_t(host_.size()));
  }

  template <class T>
  T* host(const Tensor<T>& t) {
    return t.size ? reinterpret_cast<T*>(host_.data() + regions_[t.region].begin) : nullptr;
  }
  template <class T>
  T* device(const Tensor<T>& t) const {
    return t.size ? reinterpret_cast<T*>(device_ + regions_[t.region].begin) : nullptr;
  }
  // Where the host keeps what the machine has there.
  template <class T>
  T* host_of(T* on_device) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(host_.data() + (reinterpret_cast<Byte*>(on_device) - device_));
  }

  void upload() {
    Machine::upload(device_, host_.data(), int64_t(host_.size()));
    if (sent_.empty()) sent_ = host_;
  }
  void download() { Machine::download(host_.data(), device_, int64_t(host_.size())); }

  // What has changed since the first upload that should not have, in words.
  std::optional<std::string> stray() const {
    int64_t free_from = 0;
    for (const Region& r : regions_) {
      for (int64_t i = free_from; i < r.begin; ++i) {
        if (host_[size_t(i)] != kGuardByte) return "byte " + std::to_string(i - r.begin) + " before " + r.name;
      }
      free_from = r.begin + r.bytes;
      if (r.role != Role::kInput) continue;
      if (std::memcmp(host_.data() + r.begin, sent_.data() + r.begin, size_t(r.bytes)))
        return std::string("in ") + r.name + ", which is only to be read";
    }
    for (size_t i = size_t(free_from); i < host_.size(); ++i) {
      if (host_[i] != kGuardByte) return "byte " + std::to_string(i - size_t(free_from)) + " past the last tensor";
    }
    return {};
  }

  template <class T>
  bool poisoned(const Tensor<T>& t, int64_t i) {
    const char* at = reinterpret_cast<const char*>(host(t) + i);
    for (size_t b = 0; b < sizeof(T); ++b) {
      if (at[b] != char(kPoison)) return false;
    }
    return true;
  }
  template <class T>
  const char* name(const Tensor<T>& t) const {
    return regions_[t.region].name;
  }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr char kGuardByte = 0x5a;
  static constexpr int kPoison = 0xff;  // a NaN of every type

  struct Region {
    const char* name;
    int64_t begin, bytes;
    Role role;
  };
  std::vector<Region> regions_;
  int64_t end_ = 0;
  std::vector<char> host_, sent_;
  char* device_ = nullptr;
};

}  // namespace rnn::probe
