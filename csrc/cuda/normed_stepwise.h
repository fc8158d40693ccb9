// What the stepwise loops launch behind a product of a cell whose products are normalised, in place of its one step.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>

#include "cuda/normed_backward.h"
#include "ops/pointers.h"

namespace rnn::cuda {

// Memory of row statistics, all with `rows` rows.
class RowPairs {
 public:
  RowPairs(int64_t rows, const at::TensorOptions& options) : rows_(rows), options_(options.dtype(at::kDouble)) {}

  RowNorms take(const CellInfo& cell) {
    RowNorms norms{};
    for (int k = 0; k < cell.groups(); ++k) norms.hidden[k] = take();
    if (cell.emits) norms.state = take();
    return norms;
  }

 private:
  RowPair take() {
    memory_.push_back(at::empty({rows_, RowPair::kDoubles}, options_));
    return {pointer<double>(memory_.back())};
  }

  int64_t rows_;
  at::TensorOptions options_;
  c10::SmallVector<Tensor, 10> memory_;
};

// Forward of a layer.
template <class IO>
class NormedForwardSteps {
 public:
  // Pointers are those of ForwardCell.
  NormedForwardSteps(const ForwardLayer& a, const Forward<IO>& call, const IO* gh, IO* h, IO* masked, const Tensor& c,
                     IO* raw)
      : cell_(a.cell), call_(call), pairs_(a.n.D * a.n.B, a.x.options()) {
    slot_0_ = at::empty({a.cell.emits ? a.n.D * a.n.B * a.n.H : 0}, c.options());
    of_ = {gh, h, masked, pointer<Arithmetic<IO>>(c), raw, pointer<Arithmetic<IO>>(slot_0_), pairs_.take(a.cell)};
  }

  template <class Launcher>
  void launch(int64_t s, const Launcher& launcher) const {
    launcher(HiddenMoments<IO>{call_, s, of_});
    launcher(NormedForwardCell<IO>{call_, s, of_});
    if (!cell_.emits) return;
    launcher(StateMoments<IO>{call_, s, of_});
    launcher(ForwardEmit<IO>{call_, s, of_});
  }

 private:
  const CellInfo& cell_;
  const Forward<IO>& call_;
  RowPairs pairs_;
  Tensor slot_0_;
  NormedForward<IO> of_;
};

// Backward of a layer.
template <class IO>
class NormedBackwardSteps {
 public:
  // norms [D, rows] of the gradients of the gates, if they are bounded by it.
  NormedBackwardSteps(const BackwardLayer& a, const Backward<IO>& call, const Carried<IO>& carried, Tensor norms)
      : cell_(a.cell), call_(call), norms_(std::move(norms)), pairs_(a.n.D * call.seq.rows(), a.y.options()) {
    const int64_t D = a.n.D, rows = call.seq.rows(), gates = a.cell.G * a.n.H;
    const auto options = a.flow.options();
    gates_ = at::empty({D, rows, 2 * gates}, options);
    dgx_ = gates_.narrow(2, 0, gates);
    emitted_ = at::empty({a.cell.emits ? D * rows * 2 * a.n.H : 0}, options);
    using Wide = Arithmetic<IO>;
    of_ = {carried,
           pointer<Wide>(gates_),
           pointer<Wide>(emitted_),
           {pairs_.take(cell_), pairs_.take(cell_)},
           pairs_.take(cell_)};
  }

  // Before the first of `steps` steps, which is the last in time.
  template <class Launcher>
  void begin(int64_t steps, const Launcher& launcher) const {
    launcher(HiddenMeans<IO>{call_, steps, of_});
  }
  template <class Launcher>
  void launch(int64_t s, const Launcher& launcher) {
    if (cell_.emits) {
      launcher(BackwardEmit<IO>{call_, s, of_});
      launcher(StateMeans<IO>{call_, s, of_});
    }
    launcher(NormedBackwardCell<IO>{call_, s, of_});
    // In float64, where the squares of all that float32 holds are numbers.
    if (call_.clip.kind == Clip::kNorm) at::linalg_vector_norm_out(norms_, dgx_, 2, {2}, false, at::kDouble);
    launcher(HiddenMeans<IO>{call_, s, of_});
    launcher(HandOnGates<IO>{call_, s, of_});
  }

 private:
  const CellInfo& cell_;
  const Backward<IO>& call_;
  Tensor norms_;
  RowPairs pairs_;
  Tensor gates_, dgx_, emitted_;
  NormedBackward<IO> of_;
};

}  // namespace rnn::cuda
