// The pipeline of the layers of a stack: what a stage takes of the stage before it, its upstream, which runs at the
// same time. That one leaves its results of a step in global memory, the numbers of all its blocks; this one multiplies
// them by the weights that lead from there. A block tells how far it is by a flag for each of its tiles. Nobody waits
// for a stage that comes later, and results are written once: nothing is overwritten.
//
// Blocks begin in the order of their numbers, so that those a stage waits for have begun before it; a plan has them all
// run at the same time.
#pragma once

#include "cuda/device.cuh"
#include "cuda/passes.h"
#include "cuda/product.cuh"

namespace rnn::cuda {

template <class Pass, class P, int kBatch>
class Upstream {
  using IO = typename Pass::IO;
  using Bits = typename Operand<P>::Bits;
  static constexpr int kRows = kBatch * kColumns;
  static constexpr int kPerVec16 = kVec16Bytes / int(sizeof(IO));

 public:
  RNN_DEVICE Upstream(const Layout& l, char* global, int group, int stage)
      : l_(l), global_(global), group_(group), stage_(stage), rows_(shared_memory() + l.upstream_rows) {}

  // Has this stage an upstream?
  RNN_DEVICE bool exists() const { return stage_ > 0; }
  RNN_DEVICE const float* partial() const {
    return reinterpret_cast<const float*>(shared_memory() + l_.upstream_partial);
  }

  // Where the weights are to be loaded, or null. Followed by a sync_block().
  RNN_DEVICE Vec16* begin() {
    if (!exists()) return nullptr;
    product_.place(l_.product, shared_memory() + l_.upstream_weights);
    for (int64_t i = thread_index(); i < l_.upstream_bytes() / kVec16Bytes; i += kThreads)
      reinterpret_cast<Vec16*>(rows_)[i] = Vec16{};
    return product_.in_shared();
  }

  // Waits for the upstream's results of a round of a tile; false where that took too long.
  RNN_DEVICE bool await(const Pass& pass, int tile, int64_t round) const {
    return thread_index() >= l_.message.blocks ||
           ::rnn::cuda::await(flag(group_ - l_.groups, tile, thread_index()), uint32_t(round + 1 + pass.late()));
  }

  // Takes them, and leaves the product in partial(), for the block after its next barrier.
  RNN_DEVICE void receive(const Pass& pass, const Slot* slots, int rows, int tile, int64_t round) const {
    sync_block();
    const auto row = [&](int n) { return pass.upstream_row(slots[n], round); };
    const int warp = thread_index() / kWarp;
    const int64_t H = pass.sequence().H;
    for (int n = warp; n < rows; n += kWarps) copy(row(n).numbers, H, operands(n));
    copies_arrive();
    sync_block();
    if (std::is_same_v<P, TF32> || pass.masked()) {  // the numbers are no operands yet
      for (int n = warp; n < rows; n += kWarps) convert(row(n).mask, H, operands(n));
      sync_block();
    }
    product_.run(l_.product, rows_, l_.upstream_pitch(),
                 reinterpret_cast<float*>(shared_memory() + l_.upstream_partial));
  }

  // Tells the stage after this one, if there is one, of a round whose results all threads of the block have written.
  RNN_DEVICE void announce(int tile, int64_t round, int rank) const {
    if (stage_ + 1 >= l_.stages) return;
    sync_block();
    if (thread_index() == kThreads - 1) publish(flag(group_, tile, rank), uint32_t(round + 1));
  }

 private:
  RNN_DEVICE Bits* operands(int row) const { return reinterpret_cast<Bits*>(rows_ + row * l_.upstream_pitch()); }

  // A row [kSent, H] to where a product finds it, like the slices of all blocks one after the other. By a warp.
  RNN_DEVICE void copy(const IO* from, int64_t H, Bits* to) const {
    static_assert(sizeof(IO) == sizeof(Bits));
    const bool vectors = from && H % kPerVec16 == 0 && reinterpret_cast<uintptr_t>(from) % kVec16Bytes == 0;
    const int step = vectors ? kPerVec16 : 1;
    for (int in = 0; in < Pass::kSent; ++in)
      for (int j = thread_index() % kWarp * step; j < H; j += kWarp * step) {
        const int block = Pass::kSent > 1 ? j / l_.units : 0;
        Bits* at = to + (block * (Pass::kSent - 1) + in) * l_.units + j;
        if (vectors) {
          copy_async(at, from + in * H + j);
        } else {
          *at = from ? reinterpret_cast<const Bits*>(from)[in * H + j] : Bits(0);
        }
      }
  }
  // In place, by a warp.
  RNN_DEVICE void convert(const IO* mask, int64_t H, Bits* row) const {
    for (int k = thread_index() % kWarp; k < l_.message.blocks * l_.units * Pass::kSent; k += kWarp) {
      Scalar<float> x = load(reinterpret_cast<const IO*>(row) + k);
      if (mask && k < H) x = stored<IO>(x * load(mask + k));
      row[k] = Operand<P>::of(x.v);
    }
  }
  RNN_DEVICE uint32_t* flag(int group, int tile, int block) const {
    char* flags = global_ + group * l_.global_bytes + l_.flags;
    return reinterpret_cast<uint32_t*>(flags + (tile * l_.message.blocks + block) * kFlagBytes);
  }

  const Layout& l_;
  char* global_;
  const int group_, stage_;
  Product<P, warp_tiles(Pass::kOut), kBatch, 0> product_;
  char* rows_;  // [kRows, upstream_pitch()]
};

}  // namespace rnn::cuda
