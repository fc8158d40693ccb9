// The weights of all layers as one list, in the order of torch.nn's flat weights.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <string>

#include "ops/calls.h"
#include "ops/tables.h"

namespace rnn {

enum Weight { kWIh, kWHh, kBIh, kBHh, kWHr, kWeightKinds };

// For each layer, and in it for each direction: w_ih [G*H, I], w_hh [G*H, R], then b_ih [G*H], b_hh [G*H] and
// w_hr [R, H] as far as there are, and the parameters of the cell [H] in the order of its signature; one bias is b_ih.
class Weights {
 public:
  Weights(TensorList all, const Settings& settings) : all_(all), directions_(settings.directions) {
    const int64_t layers = settings.layers, directions = settings.directions;
    TORCH_CHECK_VALUE(layers > 0, "layers: expected 1 or more, got ", layers);
    TORCH_CHECK_VALUE(directions == 1 || directions == 2, "directions: expected 1 or 2, got ", directions);
    const int64_t count = int64_t(all.size()), groups = layers * directions;
    each_ = count / groups;
    params_ = find_cell(settings.cell).P;
    const int64_t biases = each_ - 2 - settings.projected - params_;
    TORCH_CHECK_VALUE(count == each_ * groups && biases >= 0 && biases <= 2,
                      "weights: expected [w_ih, w_hh, b_ih, b_hh, w_hr] as far as they exist for each of ", groups,
                      " layers and directions",
                      params_ ? ", and behind them the parameters of the cell, " + std::to_string(params_) : "",
                      ", got ", count, " tensors");
    places_ = {0, 1, biases > 0 ? 2 : -1, biases > 1 ? 3 : -1, settings.projected ? each_ - params_ - 1 : -1};
  }

  bool has(Weight kind) const { return places_[kind] >= 0; }
  int64_t index(Weight kind, int64_t layer, int64_t direction) const {
    return (layer * directions_ + direction) * each_ + places_[kind];
  }
  const Tensor& get(Weight kind, int64_t layer, int64_t direction) const { return all_[index(kind, layer, direction)]; }
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
  int64_t directions_, each_, params_;
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
