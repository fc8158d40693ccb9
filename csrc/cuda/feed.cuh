// How a layer of a stack is fed by another one that runs at the same time: what that one leaves in its results for a
// step, the numbers of all its blocks, times the weights that lead from it. A block tells how far it is by a flag for
// each of its tiles. Nobody waits for a stage that comes later, and results are written once: nothing is overwritten.
//
// Blocks begin in the order of their numbers, so that those a stage waits for have begun before it; a plan has them all
// run at the same time.
#pragma once

#include "cuda/device.cuh"
#include "cuda/passes.h"
#include "cuda/product.cuh"

namespace rnn::cuda {

template <class Pass, class P, int kBatch>
class Feed {
  using IO = typename Pass::IO;
  using Bits = typename Operand<P>::Bits;
  static constexpr int kRows = kBatch * kColumns;
  static constexpr int kPerChunk = kChunkBytes / int(sizeof(IO));

 public:
  RNN_DEVICE Feed(const Layout& l, char* global, int group, int stage)
      : l_(l), global_(global), group_(group), stage_(stage), rows_(shared_memory() + l.fed_rows) {}

  // Is this stage fed by another?
  RNN_DEVICE bool exists() const { return stage_ > 0; }
  RNN_DEVICE const float* partial() const { return reinterpret_cast<const float*>(shared_memory() + l_.fed_partial); }

  // Followed by a sync_block().
  RNN_DEVICE void begin(const Pass& pass, int64_t first_unit) {
    const int64_t H = pass.sequence().H;
    product_.load(l_.product, shared_memory() + l_.fed_weights, [&](int m, int k) {
      const int out = m / l_.units;
      const int64_t i = first_unit + m % l_.units;
      const bool inside = out < Pass::kOut && i < H && k < Pass::kSent * H;
      return Operand<P>::of(inside ? pass.fed_weight(out, i, k).v : 0.0f);
    });
    for (int64_t i = thread_index(); i < l_.fed_bytes() / kChunkBytes; i += kThreads)
      reinterpret_cast<Chunk*>(rows_)[i] = Chunk{};
  }

  // Waits for what feeds a round of a tile, and leaves the product in partial(), for the block after its next barrier.
  RNN_DEVICE void receive(const Pass& pass, const Slot* slots, int tile, int64_t round) const {
    if (thread_index() < l_.slices.blocks)
      await(flag(group_ - l_.groups, tile, thread_index()), uint32_t(round + 1 + pass.late()));
    sync_block();
    for (int row = thread_index() / kWarp; row < kRows; row += kWarps)
      copy(slots[row].n >= 0 ? pass.fed(slots[row], round) : FedRow<IO>{}, rows_ + row * l_.fed_pitch(),
           Pass::kSent * pass.sequence().H);
    copies_arrive();
    sync_block();
    product_.run(l_.product, rows_, l_.fed_pitch(), reinterpret_cast<float*>(shared_memory() + l_.fed_partial));
  }

  // Tells the stage that follows, if there is one, of a round whose results all threads of the block have written
  // before a barrier. The last warp has the least to send.
  RNN_DEVICE void leave(int tile, int64_t round, int rank) const {
    if (stage_ + 1 < l_.stages && thread_index() == kThreads - 1)
      publish(flag(group_, tile, rank), uint32_t(round + 1));
  }

 private:
  // By a warp.
  static RNN_DEVICE void copy(const FedRow<IO>& row, char* to, int64_t width) {
    const int lane = thread_index() % kWarp;
    const bool chunks = row.numbers && width % kPerChunk == 0 && in_chunks(row.numbers) && in_chunks(row.mask);
    if (!std::is_same_v<P, TF32> && chunks && !row.mask) {  // the numbers are operands as they are
      for (int64_t i = lane * kPerChunk; i < width; i += kWarp * kPerChunk)
        copy_async(to + i * int64_t(sizeof(Bits)), row.numbers + i);
    } else if (chunks) {
      for (int64_t i = lane * kPerChunk; i < width; i += kWarp * kPerChunk) convert<kPerChunk>(row, to, i);
    } else {
      for (int64_t i = lane; i < width; i += kWarp) convert<1>(row, to, i);
    }
  }
  static RNN_DEVICE bool in_chunks(const IO* p) { return reinterpret_cast<uintptr_t>(p) % kChunkBytes == 0; }

  template <class T, int kNumbers>
  struct alignas(kNumbers * sizeof(T)) Pack {
    T values[kNumbers];
  };
  template <int kNumbers>
  static RNN_DEVICE void convert(const FedRow<IO>& row, char* to, int64_t at) {
    Pack<IO, kNumbers> numbers{}, mask{};
    if (row.numbers) numbers = *reinterpret_cast<const Pack<IO, kNumbers>*>(row.numbers + at);
    if (row.mask) mask = *reinterpret_cast<const Pack<IO, kNumbers>*>(row.mask + at);
    Pack<Bits, kNumbers> operands;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      Scalar<float> x = load(&numbers.values[i]);
      if (row.mask) x = stored<IO>(x * load(&mask.values[i]));
      operands.values[i] = Operand<P>::of(x.v);
    }
    *reinterpret_cast<Pack<Bits, kNumbers>*>(to + at * int64_t(sizeof(Bits))) = operands;
  }
  RNN_DEVICE uint32_t* flag(int group, int tile, int block) const {
    char* flags = global_ + group * l_.global_bytes + l_.flags;
    return reinterpret_cast<uint32_t*>(flags + (tile * l_.slices.blocks + block) * kFlagBytes);
  }

  const Layout& l_;
  char* global_;
  const int group_, stage_;
  Product<P, warp_tiles(Pass::kOut), kBatch, 0> product_;
  char* rows_;  // [kRows, fed_pitch()]
};

}  // namespace rnn::cuda
