// The persistent kernels of one storage type; included by the sources that say which.
#pragma once

#include <stdexcept>

#include "cuda/persistent.cuh"
#include "simt/fiber.h"
#include "simt/kernels/launch.h"
#include "simt/storage.h"

#if defined(RNN_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace rnn::simt {
namespace {

// The areas of a block's shared memory, apart from each other: a sanitizer knows the bytes in between as out of bounds.
// The end of the last area is that of its memory. What rounds an area up to 128 bytes counts as its own.
class Apart {
 public:
  explicit Apart(cuda::Layout& l) {
#if defined(RNN_SIMT_ASAN)
    int64_t* begins[kAreas] = {&l.exchange,         &l.partial,       &l.staging,         &l.state,
                               &l.constants,        &l.squares,       &l.slots,           &l.failed,
                               &l.upstream_weights, &l.upstream_rows, &l.upstream_partial};
    for (int i = 0; i < kAreas; ++i) begins_[i] = *begins[i] += (i + 1) * kGap;
    l.shared_bytes += kAreas * kGap;
#endif
  }

  // By every thread of a block, since any may be the first.
  void forbid() const {
#if defined(RNN_SIMT_ASAN)
    for (const int64_t begin : begins_) ASAN_POISON_MEMORY_REGION(cuda::shared_memory() + begin - kGap, kGap);
#endif
  }

 private:
  static constexpr int kAreas = 11, kGap = 128;
  int64_t begins_[kAreas];
};

// Names of memory, for what is told of a race in it.
inline std::vector<Area> shared_areas(const cuda::Layout& l, bool cluster) {
  std::vector<Area> areas;
  const int64_t buffer = l.message.buffer();
  for (int i = 0; i < (cluster ? l.tiles * 2 : 1); ++i) {
    const std::string which = " of tile " + std::to_string(i / 2) + " for rounds " + std::to_string(i % 2) + " of 2";
    areas.push_back({"buffer" + (cluster ? which : ""), l.exchange + i * buffer, buffer});
  }
  const std::pair<const char*, int64_t> others[] = {{"weights", 0},
                                                    {"exchange", l.exchange},
                                                    {"partial", l.partial},
                                                    {"staging", l.staging},
                                                    {"state", l.state},
                                                    {"constants", l.constants},
                                                    {"squares", l.squares},
                                                    {"slots", l.slots},
                                                    {"failed", l.failed},
                                                    {"upstream_weights", l.upstream_weights},
                                                    {"upstream_rows", l.upstream_rows},
                                                    {"upstream_partial", l.upstream_partial},
                                                    {"", l.shared_bytes}};
  for (size_t i = 0; i + 1 < std::size(others); ++i)
    areas.push_back({others[i].first, others[i].second, others[i + 1].second - others[i].second});
  return areas;
}

template <class T>
void name_array(std::vector<Area>& areas, const char* name, const T* p, int64_t count) {
  if (p) areas.push_back({name, int64_t(reinterpret_cast<uintptr_t>(p)), count * int64_t(sizeof(T))});
}
// Sizes as in common/layout.h, and for packed steps at most.
template <class Cell, class IO>
void name_arrays(std::vector<Area>& areas, const cuda::ForwardStage<IO>& c) {
  const Sequence& q = c.seq;
  const int64_t steps = q.T * q.B * q.D * q.H, states = q.D * q.B * q.H;
  name_array(areas, "y", c.y, steps);
  name_array(areas, "saved", c.saved, steps * Cell::K);
  name_array(areas, "gx", c.gx, steps * Cell::G);
  name_array(areas, "c", c.c, steps);
  name_array(areas, "h_n", c.h_n, states);
  name_array(areas, "c_n", c.c_n, states);
  name_array(areas, "h0", c.h0, states);
  name_array(areas, "c0", c.c0, states);
}
template <class Cell, class IO>
void name_arrays(std::vector<Area>& areas, const cuda::BackwardStage<IO>& c) {
  const Sequence& q = c.seq;
  const int64_t steps = q.T * q.B * q.D * q.H, states = q.D * q.B * q.H;
  name_array(areas, "dgates", c.dgates, steps * (Cell::G + Cell::A));
  name_array(areas, "saved", c.saved, steps * Cell::K);
  name_array(areas, "y", c.y, steps);
  name_array(areas, "c", c.c, steps);
  name_array(areas, "dy", c.dy, steps);
  name_array(areas, "dh0", c.dh0, states);
  name_array(areas, "dc0", c.dc0, states);
  name_array(areas, "all_dh", c.all_dh, steps);
}

template <class Pass, class Call>
Report run(int cell, const std::vector<Call>& stages, cuda::Plan plan, cuda::Part part, int device,
           const Schedule& schedule) {
  uint64_t fault = 0;
  part.fault = &fault;
  const Apart apart(plan.layout);
  const cuda::Persistent<Pass> persistent = cuda::parameter<Pass>(cell, stages, plan, part);
  const cuda::Layout& l = persistent.layout;
  const int blocks = l.message.blocks;
  Grid grid{int(stages[0].seq.D) * l.stages * l.groups * blocks, plan.in_clusters() ? blocks : 1, cuda::kThreads,
            int(l.shared_bytes)};
  grid.device = device;
  grid.cooperative = plan.cooperates();
  if (schedule.races) {
    grid.name = std::string(Pass::kFirst ? "forward" : "backward") + " of cell " + std::to_string(cell) + ", " +
                (plan.in_clusters() ? "cluster" : "grid");
    grid.shared_areas = shared_areas(l, plan.in_clusters());
    const int64_t groups = l.stages * stages[0].seq.D * l.groups;
    name_array(grid.global_areas, "the exchange of the grid", part.global, groups * l.global_bytes);
    for (const Call& stage : stages) name_arrays<typename Pass::Cell>(grid.global_areas, stage);
  }
  Report report;
  const bool found = cuda::dispatch_block<Pass>(plan, [&]<class Block>(Block*) {
    report = launch(grid, schedule, [&] {
      apart.forbid();
      Block(persistent).run();
    });
  });
  if (!found) throw std::invalid_argument("no such kernel");
  if (fault) throw Error(cuda::text_of(fault));
  return report;
}

template <template <class, class> class Pass, class IO, class Stages>
Report run_cell(int cell, const Stages& stages, const cuda::Plan& plan, const cuda::Part& part, int device,
                const Schedule& schedule) {
  Report report;
  dispatch_cell_or_group(
      cell, [&](auto of) { report = run<Pass<decltype(of), IO>>(cell, stages, plan, part, device, schedule); });
  return report;
}

// Has the ops find the kernels of this type.
template <class IO>
struct Compiled {
  Kernels<IO> kernels{run_cell<cuda::ForwardPass, IO, cuda::ForwardStages<IO>>,
                      run_cell<cuda::BackwardPass, IO, cuda::BackwardStages<IO>>};
  Compiled() { Kernels<IO>::compiled = &kernels; }
};

}  // namespace
}  // namespace rnn::simt
