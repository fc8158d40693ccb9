// What names stand for: cells, ways to merge directions, bounds of gradients.
#pragma once

#include <string_view>

#include "common/cell_list.h"
#include "common/clip.h"

namespace rnn {

struct CellInfo : CellSizes {
  int number;  // in AllCells
  std::string_view name, gates;
  bool reads_h;

  // Whether the gradients of the gates fit the memory of what forward saves.
  bool fits_over_saved() const { return K > 0 && K == G + A; }
};
const CellInfo& find_cell(std::string_view name);

// How both directions of a layer become one output.
enum class Merge { kConcat, kSum, kMean, kMul };
Merge find_merge(std::string_view name);
std::string_view merge_name(Merge merge);

Clip find_clip(std::string_view kind, double bound);
std::string_view clip_name(Clip::Kind kind);

}  // namespace rnn
