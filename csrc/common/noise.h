// Noise: numbers of each unit at each step that a cell reads, 1 with a probability and else 0; where nothing is drawn,
// as outside of training, the probability itself. They are never stored: every pass draws them again.
//
// A draw is a function of where it is asked for, the same for any backend, thread, window and padding: the word of
// Philox4x32-10 (philox.h) with
//
//   counter[0]  unit
//   counter[1]  the step's position in time
//   counter[2]  the row of the batch as the user has it, whatever its place among packed rows
//   counter[3]  (layer * D + direction) << 8 | leaf / 4, where the cell's leaves are counted
//   key         the seed: its low half in key[0], its high half in key[1]
//   word        leaf % 4
//
// of all of which the low 32 bits are taken. Row, position and stream (layer * D + direction) are told for each row of
// a call, [B, kDraws], since a row may stand for another: a window of it, a lane of torch.vmap, its reverse.
#pragma once

#include <cstdint>

#include "macros.h"
#include "philox.h"

namespace rnn {

// The columns of draws: seed; row; the position of the call's step at t is first + step * t; stream of direction 0 of
// the call's first layer.
enum Draw { kSeed, kRow, kFirst, kStep, kStream, kDraws };

struct Noise {
  const double* probabilities;  // [E] or null: the cell has none
  const int64_t* draws;         // [B, kDraws] or null: nothing is drawn
  int64_t layer;                // the layer's number times D

  // What the words of row b at position t in direction d have but for their unit and leaf.
  struct Counter {
    uint64_t key;
    uint32_t position, row, stream;
  };
  RNN_HD Counter counter(int64_t b, int64_t t, int64_t d) const {
    const int64_t* of = draws + b * kDraws;
    return {uint64_t(of[kSeed]), uint32_t(of[kFirst] + of[kStep] * t), uint32_t(of[kRow]),
            uint32_t(of[kStream] + layer + d) << 8};
  }
  // A word below this is a 1.
  RNN_HD int64_t threshold(int leaf) const { return int64_t(probabilities[leaf] * 4294967296.0); }
};

}  // namespace rnn
