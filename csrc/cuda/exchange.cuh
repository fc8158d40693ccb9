// How the blocks that share the weights of a direction hand each other the state of a step, in buffers that plan.h lays
// out (MessageLayout). Every block sends its slice, the numbers of its own units, to all of them; a block that has
// received a round has the slices of all, one after the other, in each row of a tile of the batch.
//
// Two buffers take turns. A block sends round n + 1 only after it has received round n of all others, which they send
// after they have read round n - 1: nothing that is still read is overwritten.
#pragma once

#include "common/row_statistic.h"
#include "cuda/device.cuh"
#include "cuda/product.cuh"

namespace rnn::cuda {

// Where, in a row of a buffer, a byte of a block's slice goes.
RNN_DEVICE int place(const MessageLayout& m, int rank, int at) {
  return at < m.bytes ? rank * m.bytes + at : m.sums + rank * m.sum_bytes + at - m.bytes;
}

// The row statistic as it is sent: a slice has a block's own sums, one of each row; a buffer has those of all blocks.
RNN_DEVICE RowStatistic sent_sums(const MessageLayout& m, char* slice) {
  return {slice + m.bytes, m.bytes + m.sum_bytes, m.sum_bytes, 1};
}
RNN_DEVICE RowStatistic received_sums(const MessageLayout& m, const char* buffer) {
  return {const_cast<char*>(buffer) + m.sums, m.pitch, m.sum_bytes, m.blocks};
}

// Zeros in shared memory, since what pads a row is multiplied too; for the block after its next barrier.
RNN_DEVICE void clear(char* memory, int64_t bytes) {
  for (int64_t i = thread_index(); i < bytes / kVec16Bytes; i += kThreads)
    reinterpret_cast<Vec16*>(memory)[i] = Vec16{};
}

// Within a cluster, from shared memory to shared memory.
class ClusterExchange {
 public:
  static constexpr bool kCluster = true;

  RNN_DEVICE ClusterExchange(const MessageLayout& m, int tiles, char* shared, char*)
      : m_(m),
        rank_(cluster_rank()),
        buffers_(shared),
        barriers_(reinterpret_cast<TransactionBarrier*>(shared + tiles * 2 * m.buffer())) {
    clear(buffers_, tiles * 2 * m.buffer());
    if (thread_index() < tiles * 2) barriers_[thread_index()].open();
    sync_cluster();
  }

  RNN_DEVICE int rank() const { return rank_; }

  // Where the first round of a tile is to be written by the block itself; followed by a sync_block().
  RNN_DEVICE char* first(int tile) const { return buffer(tile, 0); }

  // Every thread waits for itself.
  RNN_DEVICE const char* receive(int tile, int64_t round) const {
    if (round > 0) barriers_[tile * 2 + round % 2].await(int((round - 1) / 2));
    return buffer(tile, round);
  }

  // Sends a tile's slice [rows, bytes], which all threads have left in shared memory, as a part of this round.
  RNN_DEVICE void send(int tile, int64_t round, const char* slice) const {
    TransactionBarrier* barrier = barriers_ + tile * 2 + round % 2;
    if (thread_index() == 0) barrier->expect(int(m_.blocks * m_.slice()));
    const int vectors = (m_.bytes + m_.sum_bytes) / 16, all = m_.rows * vectors;
    for (int i = thread_index(); i < all * m_.blocks; i += kThreads) {
      const int block = (i / all + rank_) % m_.blocks, row = i % all / vectors, at = i % vectors * 16;
      ::rnn::cuda::send(buffer(tile, round) + row * m_.pitch + place(m_, rank_, at), barrier, block,
                        *reinterpret_cast<const Vec16*>(slice + row * vectors * 16 + at));
    }
  }

 private:
  RNN_DEVICE char* buffer(int tile, int64_t round) const { return buffers_ + (tile * 2 + round % 2) * m_.buffer(); }

  MessageLayout m_;
  int rank_;
  char* buffers_;                 // [tiles, 2]
  TransactionBarrier* barriers_;  // [tiles, 2]
};

// Anywhere on the device, through global memory, with one flag per block and tile.
class GridExchange {
 public:
  static constexpr bool kCluster = false;

  // global: of this group of blocks, zeros at first.
  RNN_DEVICE GridExchange(const MessageLayout& m, int tiles, char* shared, char* global)
      : m_(m),
        rank_(block_index() % m.blocks),
        landing_(shared),
        buffers_(global),
        flags_(reinterpret_cast<uint32_t*>(buffers_ + tiles * 2 * m.buffer())) {
    clear(landing_, m.buffer());
  }

  RNN_DEVICE int rank() const { return rank_; }
  RNN_DEVICE char* first(int) const { return landing_; }

  RNN_DEVICE const char* receive(int tile, int64_t round) const {
    if (round > 0) {
      if (thread_index() < m_.blocks) await(flag(tile, thread_index()), uint32_t(round));
      sync_block();
      const char* from = buffer(tile, round);
      for (int64_t i = thread_index(); i < m_.buffer() / 16; i += kThreads)
        copy_async(landing_ + i * 16, from + i * 16);
      copies_arrive();
      sync_block();
    }
    return landing_;
  }

  RNN_DEVICE void send(int tile, int64_t round, const char* slice) const {
    const int vectors = (m_.bytes + m_.sum_bytes) / 16;
    for (int i = thread_index(); i < m_.rows * vectors; i += kThreads) {
      const int row = i / vectors, at = i % vectors * 16;
      *reinterpret_cast<Vec16*>(buffer(tile, round) + int64_t(row) * m_.pitch + place(m_, rank_, at)) =
          *reinterpret_cast<const Vec16*>(slice + row * vectors * 16 + at);
    }
    sync_block();
    if (thread_index() == 0) publish(flag(tile, rank_), uint32_t(round));
  }

 private:
  RNN_DEVICE char* buffer(int tile, int64_t round) const { return buffers_ + (tile * 2 + round % 2) * m_.buffer(); }
  RNN_DEVICE uint32_t* flag(int tile, int block) const { return flags_ + (tile * m_.blocks + block) * 4; }

  MessageLayout m_;
  int rank_;
  char* landing_;
  char* buffers_;    // [tiles, 2]
  uint32_t* flags_;  // [tiles, blocks], 16 bytes apart: the last round that the block has sent
};

}  // namespace rnn::cuda
