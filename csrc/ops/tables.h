// What names stand for: cells, ways to merge directions, bounds of gradients.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "common/cell_list.h"
#include "common/clip.h"

namespace rnn {

struct CellInfo : CellSizes {
  int number;  // in AllCells, then NormedCells; those that are registered are numbered on
  std::string_view name, gates;
  bool reads_h;
  std::string_view params = {};  // names, with a space between any two

  bool built_in() const { return number < kBuiltIn; }

  // Whether the gradients of the gates fit the memory of what forward saves.
  bool fits_over_saved() const { return K > 0 && K == columns(); }
};
const CellInfo& find_cell(std::string_view name);

// Asked once for a cell that is not known, which it may register.
using CellFinder = std::function<void(const std::string&)>;
void set_cell_finder(CellFinder finder);

// Adds a cell that is not in AllCells, for as long as the process runs. Its name says what it computes: one that is
// there already is the same cell.
const CellInfo& register_cell(const std::string& name, const std::string& gates, const std::string& params,
                              const CellSizes& sizes, bool reads_h);

// How both directions of a layer become one output.
enum class Merge { kConcat, kSum, kMean, kMul };
Merge find_merge(std::string_view name);
std::string_view merge_name(Merge merge);

Clip find_clip(std::string_view kind, double bound);
std::string_view clip_name(Clip::Kind kind);

}  // namespace rnn
