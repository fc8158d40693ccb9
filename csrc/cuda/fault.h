// What a kernel records when it has waited in vain: every wait of a kernel has a bound, and a block that reaches it
// records where that was and leaves, with all of its threads. The record is one word of memory that the host can read
// at any time: a word is written as a whole, whoever else writes it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/macros.h"

namespace rnn::cuda {

constexpr int kPatienceSeconds = 4;  // a message takes microseconds

enum class Awaited : int { kNothing, kGroup, kUpstream };  // the blocks of its own group, the stage before it

struct Fault {
  Awaited awaited;
  bool backward, cluster;  // else the grid family
  int block, tile;         // of the launch, of the block's group
  int64_t round;

  // Not 0. Numbers that are too large for their bits come out as the largest.
  RNN_HD uint64_t packed() const {
    return uint64_t(awaited) << 62 | uint64_t(backward) << 61 | uint64_t(cluster) << 60 | bits(block, 20) << 40 |
           bits(tile, 16) << 24 | bits(round, 24);
  }
  static Fault of(uint64_t word) {
    return {Awaited(word >> 62),       bool(word >> 61 & 1),     bool(word >> 60 & 1),
            int(word >> 40 & 0xfffff), int(word >> 24 & 0xffff), int64_t(word & 0xffffff)};
  }

 private:
  static RNN_HD uint64_t bits(int64_t n, int count) {
    const int64_t most = (int64_t(1) << count) - 1;
    return uint64_t(n < most ? n : most);
  }
};

// What became of it and what to do, in words; nothing where no fault was recorded.
inline std::string text_of(uint64_t word) {
  if (!word) return "";
  const Fault f = Fault::of(word);
  const std::string from =
      f.awaited == Awaited::kUpstream ? "the layer before it in a stack" : "the other blocks that share the weights";
  return std::string("rnnkernels::") + (f.backward ? "sequence_backward" : "sequence_forward") + ": a kernel of the " +
         (f.cluster ? "cluster" : "grid") + " family gave up: block " + std::to_string(f.block) + " waited " +
         std::to_string(kPatienceSeconds) + " s for what " + from + " send, at tile " + std::to_string(f.tile) +
         ", round " + std::to_string(f.round) +
         ". What that call returned is not valid, nor what was computed from it. This is a fault of the kernel or of "
         "the device, not of the call: choose another backend (backend='triton' or 'torch'), and please report it.";
}

}  // namespace rnn::cuda
