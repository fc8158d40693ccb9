// How the blocks that share the weights of a direction hand each other the state of a step. Every block sends its
// slice, the numbers of its own units, to all of them; a block that has received a round has the slices of all, one
// after the other, in each row of a tile of the batch.
//
// Two buffers take turns. A block sends round n + 1 only after it has received round n of all others, which they send
// after they have read round n - 1: nothing that is still read is overwritten.
#pragma once

#include "common/row_statistic.h"
#include "cuda/device.cuh"
#include "cuda/product.cuh"

namespace rnn::cuda {

// Where, in a row of a buffer, a byte of a block's slice goes.
RNN_DEVICE int place(const Slices& s, int rank, int at) {
  return at < s.bytes ? rank * s.bytes + at : s.tails + rank * s.tail + at - s.bytes;
}

// The sums over the rows' units in a block's slice; and in a buffer, one of each block.
RNN_DEVICE RowStatistic sent_sums(const Slices& s, char* slice) {
  return {slice + s.bytes, s.bytes + s.tail, s.tail, 1};
}
RNN_DEVICE RowStatistic received_sums(const Slices& s, const char* buffer) {
  return {const_cast<char*>(buffer) + s.tails, s.pitch, s.tail, s.blocks};
}

// Zeros in shared memory, since what pads a row is multiplied too; for the block after its next barrier.
RNN_DEVICE void clear(char* memory, int64_t bytes) {
  for (int64_t i = thread_index(); i < bytes / kChunkBytes; i += kThreads)
    reinterpret_cast<Chunk*>(memory)[i] = Chunk{};
}

// Within a cluster, from shared memory to shared memory.
class ClusterExchange {
 public:
  static constexpr bool kCluster = true;

  RNN_DEVICE ClusterExchange(const Slices& s, int tiles, char* shared, char*)
      : s_(s),
        rank_(cluster_rank()),
        buffers_(shared),
        boxes_(reinterpret_cast<Mailbox*>(shared + tiles * 2 * s.buffer())) {
    clear(buffers_, tiles * 2 * s.buffer());
    if (thread_index() < tiles * 2) boxes_[thread_index()].open();
    sync_cluster();
  }

  RNN_DEVICE int rank() const { return rank_; }

  // Where the first round of a tile is to be written by the block itself; followed by a sync_block().
  RNN_DEVICE char* first(int tile) const { return buffer(tile, 0); }

  // Every thread waits for itself.
  RNN_DEVICE const char* receive(int tile, int64_t round) const {
    if (round > 0) boxes_[tile * 2 + round % 2].await(int((round - 1) / 2));
    return buffer(tile, round);
  }

  // Sends a tile's slice [rows, bytes], which all threads have left in shared memory, as a part of this round.
  RNN_DEVICE void send(int tile, int64_t round, const char* slice) const {
    Mailbox* box = boxes_ + tile * 2 + round % 2;
    if (thread_index() == 0) box->expect(int(s_.blocks * s_.slice()));
    const int chunks = (s_.bytes + s_.tail) / 16, all = s_.rows * chunks;
    for (int i = thread_index(); i < all * s_.blocks; i += kThreads) {
      const int block = (i / all + rank_) % s_.blocks, row = i % all / chunks, at = i % chunks * 16;
      ::rnn::cuda::send(buffer(tile, round) + row * s_.pitch + place(s_, rank_, at), box, block,
                        *reinterpret_cast<const Chunk*>(slice + row * chunks * 16 + at));
    }
  }

 private:
  RNN_DEVICE char* buffer(int tile, int64_t round) const { return buffers_ + (tile * 2 + round % 2) * s_.buffer(); }

  Slices s_;
  int rank_;
  char* buffers_;   // [tiles, 2]
  Mailbox* boxes_;  // [tiles, 2]
};

// Anywhere on the device, through global memory, with one flag per block and tile.
class GridExchange {
 public:
  static constexpr bool kCluster = false;

  // global: of this group of blocks, zeros at first.
  RNN_DEVICE GridExchange(const Slices& s, int tiles, char* shared, char* global)
      : s_(s),
        rank_(block_index() % s.blocks),
        landing_(shared),
        buffers_(global),
        flags_(reinterpret_cast<uint32_t*>(buffers_ + tiles * 2 * s.buffer())) {
    clear(landing_, s.buffer());
  }

  RNN_DEVICE int rank() const { return rank_; }
  RNN_DEVICE char* first(int) const { return landing_; }

  RNN_DEVICE const char* receive(int tile, int64_t round) const {
    if (round > 0) {
      if (thread_index() < s_.blocks) await(flag(tile, thread_index()), uint32_t(round));
      sync_block();
      const char* from = buffer(tile, round);
      for (int64_t i = thread_index(); i < s_.buffer() / 16; i += kThreads)
        copy_async(landing_ + i * 16, from + i * 16);
      copies_arrive();
      sync_block();
    }
    return landing_;
  }

  RNN_DEVICE void send(int tile, int64_t round, const char* slice) const {
    const int chunks = (s_.bytes + s_.tail) / 16;
    for (int i = thread_index(); i < s_.rows * chunks; i += kThreads) {
      const int row = i / chunks, at = i % chunks * 16;
      *reinterpret_cast<Chunk*>(buffer(tile, round) + int64_t(row) * s_.pitch + place(s_, rank_, at)) =
          *reinterpret_cast<const Chunk*>(slice + row * chunks * 16 + at);
    }
    sync_block();
    if (thread_index() == 0) publish(flag(tile, rank_), uint32_t(round));
  }

 private:
  RNN_DEVICE char* buffer(int tile, int64_t round) const { return buffers_ + (tile * 2 + round % 2) * s_.buffer(); }
  RNN_DEVICE uint32_t* flag(int tile, int block) const { return flags_ + (tile * s_.blocks + block) * 4; }

  Slices s_;
  int rank_;
  char* landing_;
  char* buffers_;    // [tiles, 2]
  uint32_t* flags_;  // [tiles, blocks], 16 bytes apart: the last round that the block has sent
};

}  // namespace rnn::cuda
