#include "ops/tables.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/cell_list.h"

namespace rnn {
namespace {

constexpr std::pair<std::string_view, Clip::Kind> kClips[] = {
    {"none", Clip::kNone}, {"value", Clip::kValue}, {"norm", Clip::kNorm}, {"tanh", Clip::kTanh}};
constexpr std::pair<std::string_view, Merge> kMerges[] = {
    {"concat", Merge::kConcat}, {"sum", Merge::kSum}, {"mean", Merge::kMean}, {"mul", Merge::kMul}};

// The entry with this name, else an error that lists all.
template <class Table>
const auto& find(const Table& table, std::string_view name, const char* argument) {
  for (const auto& entry : table)
    if (entry.first == name) return entry;
  std::string known;
  for (const auto& entry : table) known += (known.empty() ? "" : ", ") + std::string(entry.first);
  TORCH_CHECK_VALUE(false, argument, ": expected one of ", known, ", got '", name, "'");
}

template <class Table, class Value>
std::string_view name_of(const Table& table, Value value) {
  for (const auto& entry : table)
    if (entry.second == value) return entry.first;
  TORCH_INTERNAL_ASSERT(false, "no such entry: ", int(value));
}

// Cells that were registered while the process runs. Nodes of a map stay where they are, and with them the texts.
struct Registered {
  struct Entry {
    std::string gates, params;
    CellInfo info;
  };
  std::shared_mutex mutex;
  std::map<std::string, Entry, std::less<>> cells;
};
Registered& registered() {
  static Registered all;
  return all;
}

const CellInfo* find_registered(std::string_view name) {
  const std::shared_lock lock(registered().mutex);
  const auto found = registered().cells.find(name);
  return found == registered().cells.end() ? nullptr : &found->second.info;
}

// Set before anything runs.
CellFinder& finder() {
  static CellFinder found;
  return found;
}

}  // namespace

void set_cell_finder(CellFinder asked) { finder() = std::move(asked); }

const CellInfo& register_cell(const std::string& name, const std::string& gates, const std::string& params,
                              const CellSizes& sizes, bool reads_h) {
  const std::unique_lock lock(registered().mutex);
  auto& cells = registered().cells;
  const auto [place, added] = cells.try_emplace(name);
  auto& [own_name, entry] = *place;
  if (added) {
    entry.gates = gates;
    entry.params = params;
    entry.info = {sizes, int(cells.size()) - 1 + kBuiltIn, own_name, entry.gates, reads_h, entry.params};
  }
  return entry.info;
}

const CellInfo& find_cell(std::string_view name) {
  static const auto table = [] {
    std::vector<std::pair<std::string_view, CellInfo>> t;
    for_each_cell([&](auto cell) {
      t.push_back({cell.kName, {CellSizes::of(cell), int(t.size()), cell.kName, cell.kGates, cell.kReadsH}});
    });
    for_each_cell(
        [&](auto cell) {
          const CellSizes sizes = CellSizes::of(cell);
          t.push_back({cell.kName, {sizes, int(t.size()), cell.kName, cell.kGates, cell.kReadsH, cell.kParams}});
        },
        NormedCells{});
    return t;
  }();
  for (const auto& entry : table)
    if (entry.first == name) return entry.second;
  if (const CellInfo* found = find_registered(name)) return *found;
  const bool written = name.find('-') != std::string_view::npos;
  if (written && finder()) {
    finder()(std::string(name));
    if (const CellInfo* found = find_registered(name)) return *found;
  }
  TORCH_CHECK_VALUE(!written, "cell: '", name,
                    "' is not known in this process. It was written with rnnkernels.cell: import the module that "
                    "defines it first.");
  return find(table, name, "cell").second;
}

Merge find_merge(std::string_view name) { return find(kMerges, name, "merge_mode").second; }
std::string_view merge_name(Merge merge) { return name_of(kMerges, merge); }

Clip find_clip(std::string_view kind, double bound) {
  const Clip::Kind found = find(kClips, kind, "clip").second;
  TORCH_CHECK_VALUE(found == Clip::kNone || (bound > 0 && std::isfinite(bound)),
                    "bound: expected a finite number above zero, got ", bound);
  return {found, bound};
}
std::string_view clip_name(Clip::Kind kind) { return name_of(kClips, kind); }

}  // namespace rnn
