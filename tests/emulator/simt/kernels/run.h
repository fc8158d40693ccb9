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

template <class Pass, class Call>
Report run(int cell, const std::vector<Call>& stages, cuda::Plan plan, cuda::Part part, const Schedule& schedule) {
  uint64_t fault = 0;
  part.fault = &fault;
  const Apart apart(plan.layout);
  const cuda::Persistent<Pass> persistent = cuda::parameter<Pass>(cell, stages, plan, part);
  const cuda::Layout& l = persistent.layout;
  const int blocks = l.message.blocks;
  const Grid grid{int(stages[0].seq.D) * l.stages * l.groups * blocks, plan.in_clusters() ? blocks : 1, cuda::kThreads,
                  int(l.shared_bytes)};
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
Report run_cell(int cell, const Stages& stages, const cuda::Plan& plan, const cuda::Part& part,
                const Schedule& schedule) {
  Report report;
  dispatch_cell_or_group(cell,
                         [&](auto of) { report = run<Pass<decltype(of), IO>>(cell, stages, plan, part, schedule); });
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
