#include "cuda_host/written.h"

#include "cuda_host/in_turn.h"
#include "emulator_written_cells.h"  // by the tests: structs as rnnkernels.cell writes them, and a list of them

namespace rnn::cuda {

template <class Step>
bool run_written(std::string_view cell, const Step& step) {
  bool found = false;
  const auto run = [&]<class Cell>(Cell) {
    if (cell != Cell::kName) return;
    in_turn<Cell>(step);
    found = true;
  };
  for_each_cell(run, WrittenCells{});
  return found;
}

#define RNN_WRITTEN(IO)                                                 \
  template bool run_written(std::string_view, const ForwardCell<IO>&);  \
  template bool run_written(std::string_view, const BackwardCell<IO>&); \
  template bool run_written(std::string_view, const BackwardBound<IO>&);
RNN_WRITTEN(double)
RNN_WRITTEN(BFloat16)
#undef RNN_WRITTEN

}  // namespace rnn::cuda
