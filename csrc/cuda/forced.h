// Layouts that tests ask for: without them, no call of a test is large enough to need several blocks and tiles.
#pragma once

#include <cstdint>

namespace rnn::cuda {

// What plans are to have, where not 0; they are chosen among what fits with it.
struct alignas(8) Forced {  // as wide as what is set at once, without a lock
  int16_t units;            // of a block: a multiple of 8, of which follows the number of blocks
  int16_t tiles;            // of a group
  int16_t batch;            // eights of rows in a tile
};
// A setting of the process.
void force_layout(const Forced& forced);

}  // namespace rnn::cuda
