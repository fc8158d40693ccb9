// The weights of all layers as one list, in the order of torch.nn's flat weights.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <string>

#include "ops/calls.h"
#include "ops/tables.h"

namespace rnn {

enum Weight { kWIh, kWHh, kBIh, kBHh, kWHr, kWeightKinds };

// For each layer, and in it for each direction: w_ih [G*H, I], w_hh [G*H, R], then b_ih [G*H], b_hh [G*H] and
// w_hr [R, H] as far as there are, and the parameters of the cell [H] in the order of its signature; one bias is b_ih.
// A cell whose gates have no hidden part has neither w_hh nor b_hh, one that is normalised no b_hh. Each tensor has the
// rows of all heads, head by head.
class Weights {
 public:
  Weights(TensorList all, const Settings& settings)
      : all_(all), directions_(settings.directions), heads_(settings.heads) {
    const int64_t layers = settings.layers, directions = settings.directions;
    TORCH_CHECK_VALUE(layers > 0, "layers: expected 1 or more, got ", layers);
    TORCH_CHECK_VALUE(directions == 1 || directions == 2, "directions: expected 1 or 2, got ", directions);
    const int64_t count = int64_t(all.size());
    const int64_t groups = std::min(layers, count + 1) * directions;  // each has one at least: it fits 64 bits
    each_ = count / groups;
    TORCH_CHECK_VALUE(heads_ > 0, "heads: expected 1 or more, got ", heads_);
    const CellInfo& cell = find_cell(settings.cell);
    params_ = cell.P;
    const int64_t matrices = 1 + cell.recurrent;
    const int64_t biases = each_ - matrices - settings.projected - params_;
    const bool two = cell.recurrent && !cell.normed;  // norms have shifts of their own
    TORCH_CHECK_VALUE(count == each_ * groups && biases >= 0 && biases <= 1 + two, "weights: expected ",
                      two              ? "[w_ih, w_hh, b_ih, b_hh, w_hr]"
                      : cell.recurrent ? "[w_ih, w_hh, b_ih, w_hr]"
                                       : "[w_ih, b_ih, w_hr]",
                      " as far as they exist for each of ", groups, " layers and directions",
                      params_ ? ", and behind them the parameters of the cell, " + std::to_string(params_) : "",
                      ", got ", count, " tensors");
    places_ = {0, cell.recurrent ? 1 : -1, biases > 0 ? matrices : -1, biases > 1 ? matrices + 1 : -1,
               settings.projected ? each_ - params_ - 1 : -1};
  }

  bool has(Weight kind) const { return places_[kind] >= 0; }
  int64_t each() const { return each_; }  // how many a direction has
  int64_t dim(int64_t index) const { return all_[index].dim(); }
  int64_t index(Weight kind, int64_t layer, int64_t direction) const {
    return (layer * directions_ + direction) * each_ + places_[kind];
  }
  // With the rows of all heads.
  const Tensor& get(Weight kind, int64_t layer, int64_t direction) const { return all_[index(kind, layer, direction)]; }
  // Those of a head, which counts as a direction.
  Tensor of_head(Weight kind, int64_t layer, int64_t d) const {
    const Tensor& all = get(kind, layer, d / heads_);
    if (heads_ == 1) return all;
    const c10::SymInt rows = all.sym_size(0) / heads_;
    return all.narrow_symint(0, rows * (d % heads_), rows);
  }
  // Parameter k of the cell.
  int64_t params() const { return params_; }
  int64_t param_index(int64_t k, int64_t layer, int64_t direction) const {
    return (layer * directions_ + direction + 1) * each_ - params_ + k;
  }
  const Tensor& param(int64_t k, int64_t layer, int64_t direction) const {
    return all_[param_index(k, layer, direction)];
  }
  // Of all layers from this one on.
  TensorList from(int64_t layer) const { return all_.slice(layer * directions_ * each_); }

 private:
  TensorList all_;
  int64_t directions_, heads_, each_, params_;
  std::array<int64_t, kWeightKinds> places_;  // in a group; -1: there is none
};

// As torch.nn's state_dict has them; `step`: of a cell, whose parameters have the bare names.
inline std::string parameter_name(const std::string& base, int64_t layer, int64_t direction, bool step) {
  return step ? base : base + "_l" + std::to_string(layer) + (direction ? "_reverse" : "");
}
inline std::string parameter_name(Weight kind, int64_t layer, int64_t direction, bool step) {
  static constexpr const char* names[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  return parameter_name(names[kind], layer, direction, step);
}
// The same of parameter k of a cell.
inline std::string parameter_name(const CellInfo& cell, int64_t k, int64_t layer, int64_t direction, bool step) {
  std::string_view names = cell.params;
  for (; k > 0; --k) names.remove_prefix(names.find(' ') + 1);
  return parameter_name("weight_" + std::string(names.substr(0, names.find(' '))), layer, direction, step);
}

}  // namespace rnn
