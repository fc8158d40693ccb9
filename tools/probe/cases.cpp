#include "cases.h"

namespace rnn::probe {
namespace {

using enum Shape::Way;

// A group of one block has nobody to exchange with, whichever way: it is there once, as a grid.

constexpr Shape kShapes[] = {
    {"stepwise", "", kStepwise, "lstm", 1, 1, 1, 1},
    {"stepwise-gru-norm", "stepwise", kStepwise, "gru", 1, 1, 1, 1, true},
    {"grid-1", "", kGrid, "lstm", 1, 1, 1, 1},
    {"grid-2", "grid-1", kGrid, "lstm", 2, 1, 1, 1},
    {"grid-8", "grid-2", kGrid, "lstm", 8, 1, 1, 1},
    {"grid-64", "grid-8", kGrid, "lstm", 64, 1, 1, 1, false, 1, false, true},
    {"grid-128", "grid-64", kGrid, "rnn_tanh", 128, 1, 1, 1, false, 1, false, true},
    {"grid-2-tiles", "grid-2", kGrid, "lstm", 2, 2, 2, 2},
    {"grid-64-tiles", "grid-2-tiles", kGrid, "gru", 64, 3, 1, 2, false, 1, false, true},
    {"cluster-2", "", kCluster, "lstm", 2, 1, 1, 1},
    {"cluster-4", "cluster-2", kCluster, "lstm", 4, 1, 1, 1},
    {"cluster-8", "cluster-4", kCluster, "lstm", 8, 1, 1, 1},
    {"cluster-16", "cluster-8", kCluster, "lstm", 16, 1, 1, 1},
    {"cluster-2-tiles", "cluster-2", kCluster, "lstm", 2, 2, 2, 2},
    {"cluster-16-tiles", "cluster-2-tiles", kCluster, "gru", 16, 3, 2, 2, false, 1, false, true},
    {"grid-2-gru", "grid-2", kGrid, "gru", 2, 1, 1, 1},
    {"cluster-2-gru", "cluster-2", kCluster, "gru", 2, 1, 1, 1},
    {"grid-4-norm", "grid-2-tiles", kGrid, "gru", 4, 2, 1, 1, true},
    {"cluster-4-norm", "cluster-2-tiles", kCluster, "lstm", 4, 2, 1, 1, true},
    {"grid-2-wavefront", "grid-2-tiles", kGrid, "lstm", 2, 2, 1, 1, false, 3},
    {"cluster-2-wavefront", "cluster-2-tiles", kCluster, "lstm", 2, 2, 1, 1, false, 3},
    {"grid-2-options", "grid-2", kGrid, "lstm", 2, 1, 2, 1, false, 1, true},
    {"cluster-2-options", "cluster-2", kCluster, "gru", 2, 1, 2, 1, true, 1, true},
};

std::string full_name(const std::string& family, bool backward, cuda::Precision precision) {
  return family + (backward ? "/backward/" : "/forward/") + name_of(precision);
}

}  // namespace

const char* name_of(cuda::Precision precision) {
  return precision == cuda::Precision::kBFloat16 ? "bfloat16"
         : precision == cuda::Precision::kTF32   ? "tf32"
                                                 : "float32";
}

std::string Case::name() const { return full_name(shape.family, backward, precision); }
std::string Case::needs() const { return *shape.needs ? full_name(shape.needs, backward, precision) : ""; }

std::vector<Case> all_cases() {
  std::vector<Case> all;
  for (const Shape& shape : kShapes)
    for (const bool backward : {false, true})
      for (const auto precision : {cuda::Precision::kBFloat16, cuda::Precision::kTF32, cuda::Precision::kFloat32}) {
        if (shape.norm && !backward && !shape.options) continue;  // forward has no norm: the case was there before
        const bool exact = precision == cuda::Precision::kFloat32;
        if (shape.way == kStepwise && precision == cuda::Precision::kTF32) continue;  // without tensor cores
        if (exact && shape.large) continue;                                           // whose weights may not fit
        Case each{shape, backward, precision};
        if (exact) each.shape.batch = 1;  // which is all that there is
        all.push_back(each);
      }
  return all;
}

std::string Measured::name() const { return "B" + std::to_string(rows) + "-H" + std::to_string(H); }

std::vector<Measured> all_measured() {
  return {{1, 64, 1024}, {16, 256, 512}, {64, 512, 128}, {16, 1024, 128}, {64, 1024, 64}, {128, 256, 128}};
}

}  // namespace rnn::probe
