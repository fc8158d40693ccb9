// The stepwise loops, each of whose launches the emulator runs. Their threads do not wait for each other: what there is
// to look for are races.
#pragma once

#include <c10/util/Type.h>

#include <string>
#include <typeinfo>

#include "cuda/device.cuh"
#include "cuda/pointwise.cuh"
#include "cuda/stepwise.h"
#include "simt/machine.h"
#include "simt/storage.h"

namespace rnn::simt {

// `note` is given the kind of each step, such as ForwardCell<float>, and the report of its launch.
template <class Note>
struct StepLauncher {
  int cell;
  int64_t max_y;      // of a grid
  std::string twice;  // the kind of step of which two threads take each unit, which is a race
  Schedule schedule;
  Note note;

  template <class Step>
  void operator()(const Step& step) const {
    using cuda::PointwiseGrid;
    const PointwiseGrid of = PointwiseGrid::of(step, max_y);
    const int blocks = int(of.x * of.y);
    if (blocks == 0) return;
    Grid grid{blocks, 1, PointwiseGrid::kUnits * PointwiseGrid::kRows};
    grid.name = c10::demangle(typeid(Step).name());
    grid.name.erase(0, grid.name.rfind(':', grid.name.find('<')) + 1);
    if (grid.name == twice) grid.blocks *= 2;
    cuda::dispatch_step<Step>(cell, [&](auto of_cell) {
      const auto kernel = [&] {
        const int block = cuda::block_index() % blocks, thread = cuda::thread_index();
        const int x = thread % PointwiseGrid::kUnits, y = thread / PointwiseGrid::kUnits;
        if constexpr (cuda::of_rows<Step>()) {
          cuda::run_rows<decltype(of_cell)>(step, of, block, x, y, [] { cuda::sync_block(); });
        } else {
          cuda::run_units<decltype(of_cell)>(step, of, block % of.x, block / of.x, x, y);
        }
      };
      note(grid.name, launch(grid, schedule, kernel));
    });
  }
};

}  // namespace rnn::simt
