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
  explicit Apart(cuda::Layout& l) : begins_{l.exchange, l.partial, l.staging, l.state, l.squares, l.slots} {
#if defined(RNN_SIMT_ASAN)
    int64_t* moved[] = {&l.exchange, &l.partial, &l.staging, &l.state, &l.squares, &l.slots};
    for (int i = 0; i < kAreas; ++i) *moved[i] = begins_[i] += (i + 1) * kGap;
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
  static constexpr int kAreas = 6, kGap = 128;
  int64_t begins_[kAreas];
};

template <class Pass>
Report run(const Pass& pass, const cuda::Plan& plan, const Part& part) {
  cuda::Layout l = plan.layout;
  const Apart apart(l);
  const int blocks = l.slices.blocks;
  const Grid grid{int(pass.sequence().D) * l.groups * blocks, plan.kernel.cluster ? blocks : 1, cuda::kThreads,
                  int(l.shared_bytes)};
  const cuda::Persistent<Pass> persistent{pass, l, part.global, part.first_row};
  Report report;
  const bool found = cuda::dispatch_block<Pass>(plan.kernel, [&]<class Block>(Block*) {
    report = launch(grid, part.schedule, [&] {
      apart.forbid();
      Block(persistent).run();
    });
  });
  if (!found) throw std::invalid_argument("no such kernel");
  return report;
}

template <class IO>
Report forward(int cell, const Forward<IO>& call, const cuda::Plan& plan, const Part& part) {
  Report report;
  dispatch_cell_or_group(cell,
                         [&](auto of) { report = run(cuda::ForwardPass<decltype(of), IO>{call, cell}, plan, part); });
  return report;
}

template <class IO>
Report backward(int cell, const Backward<IO>& call, double* all_dh, const cuda::Plan& plan, const Part& part) {
  Report report;
  dispatch_cell_or_group(
      cell, [&](auto of) { report = run(cuda::BackwardPass<decltype(of), IO>{call, cell, all_dh}, plan, part); });
  return report;
}

// Has the ops find the kernels of this type.
template <class IO>
struct Compiled {
  Kernels<IO> kernels{forward<IO>, backward<IO>};
  Compiled() { Kernels<IO>::compiled = &kernels; }
};

}  // namespace
}  // namespace rnn::simt
