// Which kernels may run on a device: those that Python has found to be right there, by running small cases of them
// (rnnkernels/_backends/vetting). Asked wherever a call is planned, so that no way to the kernels leads past it.
#pragma once

#include <array>
#include <atomic>
#include <functional>

#include "cuda/plan.h"

namespace rnn::cuda {

// A family in one precision, on one device; both are bits of words.
class Vetted {
 public:
  // Runs small cases of kernels and calls settle() with what it finds; false where that cannot be done now.
  using Inspector = std::function<bool(int device, Kernels kernels, Precision precision)>;

  void settle(int device, Kernels kernels, Precision precision, bool right) {
    if (!has(device)) return;
    if (!right) refused_[device] |= bit(kernels);
    settled_[device] |= bit(kernels, precision);
  }
  void forget() {
    for (auto& word : settled_) word = 0;
    for (auto& word : refused_) word = 0;
  }
  unsigned refused(int device) const { return has(device) ? refused_[device].load() : 0; }
  bool allows(int device, Kernels kernels) const { return !(refused(device) & bit(kernels)); }

  // The plan of a call in this precision, of kernels that are vetted, as far as that can be done now; planned(limits)
  // makes one. Where a choice of kernels is forced, those are to be seen as they are.
  template <class Planned>
  Stack plan(Precision precision, Device limits, int device, const Planned& planned) const {
    const bool free = choice().free();
    for (size_t round = 0;; ++round) {  // each leaves out one family more, or ends
      limits.refused = free ? refused(device) : 0;
      Stack stack = planned(limits);
      const Kernels kernels = kernels_of(stack);
      const bool known =
          !free || !has(device) || !limits.allows(kernels) || (settled_[device] & bit(kernels, precision));
      if (known || !inspector_ || round == kKernelsNames.size()) return stack;
      if (!inspector_(device, kernels, precision)) return stack;
    }
  }

  void set_inspector(Inspector inspector) { inspector_ = std::move(inspector); }

 private:
  // Kernels of further devices are not vetted.
  static bool has(int device) { return device >= 0 && device < kMostDevices; }
  static unsigned bit(Kernels kernels) { return 1u << int(kernels); }
  static unsigned bit(Kernels kernels, Precision precision) { return 1u << (int(kernels) * 5 + int(precision)); }

  std::array<std::atomic<unsigned>, kMostDevices> settled_{}, refused_{};
  Inspector inspector_;
};

inline Vetted vetted;

}  // namespace rnn::cuda
