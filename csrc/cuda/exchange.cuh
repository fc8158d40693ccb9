// How the blocks that share the weights of a direction hand each other the state of a step, in buffers that plan.h lays
// out (MessageLayout). Every block sends its slice, the numbers of its own units, to all of them; a block that has
// received a round has the slices of all, one after the other, in each row of a tile of the batch. Rows of a tile that
// the batch does not fill are not sent: they hold numbers whose products nobody reads.
//
// In a cluster two buffers take turns. A block sends round n + 1 only after it has received round n of all others,
// which they send after they have read round n - 1: nothing that is still read is overwritten. A block by itself needs
// one buffer: its cells overwrite it once the whole block has multiplied it.
//
//   first(tile)                where the block itself writes the first round, followed by a sync_block()
//   await(tile, round, rows)   waits; false where that took too long; what follows it does not wait
//   receive(tile, round)       what was sent
//   outgoing(tile)             where cells leave what is sent, as a part of the next round, before a sync_block()
//   send(tile, round, rows)    sends it
//   end(round)                 after a round of all tiles
//   leave()                    before a block ends that has waited in vain
#pragma once

#include "common/row_statistic.h"
#include "cuda/device.cuh"
#include "cuda/product.cuh"

namespace rnn::cuda {

// Where, in a row of a buffer, a byte of a block's slice goes.
RNN_DEVICE int place(const MessageLayout& m, int rank, int at) {
  return at < m.bytes ? rank * m.bytes + at : m.sums + rank * m.sum_bytes + at - m.bytes;
}

// Rows of numbers and, at `sums` of each, of the row statistic, one part for each of so many blocks.
struct MessageRows {
  char* memory;
  int pitch, sums, sum_bytes, blocks;

  RNN_DEVICE RowStatistic statistic() const { return {memory + sums, pitch, sum_bytes, blocks}; }
};

// The vectors of some rows, `step` after `step`: where the next one is, without a division.
class Walk {
 public:
  Walk() = default;
  RNN_DEVICE Walk(int first, int width, int step)
      : row(first / width), at(first % width), rows_(step / width), rest_(step % width) {}
  RNN_DEVICE void next(int width) {
    row += rows_;
    at += rest_;
    if (at < width) return;
    at -= width;
    ++row;
  }

  int row, at;

 private:
  int rows_, rest_;
};

// Zeros in shared memory, since what pads a row is multiplied too; for the block after its next barrier.
RNN_DEVICE void clear(char* memory, int64_t bytes) {
  for (int64_t i = thread_index(); i < bytes / kVec16Bytes; i += kThreads)
    reinterpret_cast<Vec16*>(memory)[i] = Vec16{};
}

// The rows of a buffer, and those of a slice.
RNN_DEVICE MessageRows buffer_rows(const MessageLayout& m, char* memory) {
  return {memory, m.pitch, m.sums, m.sum_bytes, m.blocks};
}
RNN_DEVICE MessageRows slice_rows(const MessageLayout& m, char* memory) {
  return {memory, m.slice_pitch(), m.bytes, m.sum_bytes, 1};
}

// Within a cluster of several blocks, from shared memory to shared memory.
class ClusterExchange {
 public:
  static constexpr bool kCluster = true;

  RNN_DEVICE ClusterExchange(const MessageLayout& m, int tiles, char* shared, char* staging, char*)
      : m_(m),
        rank_(cluster_rank()),
        staging_(staging),
        buffers_(shared),
        barriers_(reinterpret_cast<TransactionBarrier*>(shared + tiles * 2 * m.buffer())) {
    clear(buffers_, tiles * 2 * m.buffer());
    if (thread_index() < tiles * 2) barriers_[thread_index()].open();
    // As many threads for each block, which begin with different ones.
    const int threads = kThreads / m.blocks, number = thread_index() / threads;
    receiver_ = number < m.blocks ? (number + rank_) % m.blocks : -1;
    walk_ = Walk(thread_index() % threads, m.slice_pitch() / kVec16Bytes, threads);
    sync_cluster();
  }

  RNN_DEVICE int rank() const { return rank_; }
  RNN_DEVICE char* first(int tile) const { return buffer(tile, 0); }
  RNN_DEVICE MessageRows outgoing(int) const { return slice_rows(m_, staging_); }

  // By every thread for itself.
  template <int, int>
  RNN_DEVICE bool await(int tile, int64_t round, int) const {
    return round == 0 || barriers_[tile * 2 + round % 2].await(int((round - 1) / 2));
  }
  RNN_DEVICE char* receive(int tile, int64_t round) const { return buffer(tile, round); }

  RNN_DEVICE void send(int tile, int64_t round, int rows) const {
    TransactionBarrier* barrier = barriers_ + tile * 2 + round % 2;
    if (thread_index() == 0) barrier->expect(m_.blocks * rows * m_.slice_pitch());
    if (receiver_ < 0) return;
    char* to = buffer(tile, round);
    for (Walk walk = walk_; walk.row < rows; walk.next(m_.slice_pitch() / kVec16Bytes)) {
      const int at = walk.at * kVec16Bytes;
      ::rnn::cuda::send(to + walk.row * m_.pitch + place(m_, rank_, at), barrier, receiver_,
                        *reinterpret_cast<const Vec16*>(staging_ + walk.row * m_.slice_pitch() + at));
    }
  }

  RNN_DEVICE void end(int64_t) const {}
  // A block that others still write to must be there.
  RNN_DEVICE void leave() const { sync_cluster(); }

 private:
  RNN_DEVICE char* buffer(int tile, int64_t round) const { return buffers_ + (tile * 2 + round % 2) * m_.buffer(); }

  const MessageLayout& m_;
  int rank_, receiver_;
  Walk walk_;  // over the vectors of a slice
  char* staging_;
  char* buffers_;                 // [tiles, 2]
  TransactionBarrier* barriers_;  // [tiles, 2]
};

// Anywhere on the device, through global memory; and within a block by itself, which passes nothing on.
//
// Nothing says that a slice is there but its own vectors (device.cuh): who waits for them looks at them until they are,
// and no fence or flag stands between a cell and those that wait for it. A vector is emptied before it is used again,
// and both are put in order behind the messages, by fences that all threads pass at the end of every second round. Of
// rounds 0, 1, 2, ... the odd ones end with a fence, and of a vector that is put for round n,
//
//   who has read it passes a fence at the end of round n or n + 1, then sends,
//   who has put it has received that by round n + 3, passes a fence there, and empties it in round n + 4,
//   passes a fence again by round n + 5, then sends;
//   who reads has received that by round n + 7, passes a fence there, and looks for round n + 8 in the same vector.
//
// So kGridBuffers are enough, and no fewer are. tests/emulator/hand_off_model.py goes through all executions.
class GridExchange {
 public:
  static constexpr bool kCluster = false;

  // global: of this group of blocks, all bits set at first.
  RNN_DEVICE GridExchange(const MessageLayout& m, int tiles, char* shared, char* staging, char* global)
      : m_(m), rank_(block_index() % m.blocks), staging_(staging), landing_(shared), buffers_(global) {
    clear(landing_, (m.alone() ? tiles : 1) * m.buffer());
  }

  RNN_DEVICE int rank() const { return rank_; }
  RNN_DEVICE char* first(int tile) const { return landing(tile); }
  RNN_DEVICE MessageRows outgoing(int tile) const {
    return m_.alone() ? buffer_rows(m_, landing(tile)) : slice_rows(m_, staging_);
  }

  // By every thread for what it takes to shared memory, where the whole block has multiplied the round before. So many
  // vectors are on their way to it at once, and so many later ones.
  template <int kAtOnce, int kLater>
  RNN_DEVICE bool await(int tile, int64_t round, int rows) const {
    if (round == 0 || m_.alone()) return true;
    const char* from = buffer(tile, round);
    Vectors all(rows, m_.received);
    int at[kAtOnce], at_later[kLater];
    Vec16 found[kAtOnce], later[kLater];
    ask(all, from, at, found);
    ask(all, from, at_later, later);
    const auto take = [&](auto& at, auto& found, auto& at_later, auto& later) {
      if (!::rnn::cuda::await(from, at, found, at_later, later)) return false;
      land(at, found);
      ask(all, from, at, found);
      return true;
    };
    while (at[0] >= 0)
      if (!take(at, found, at_later, later) || !take(at_later, later, at, found)) return false;
    return true;
  }
  RNN_DEVICE char* receive(int tile, int64_t round) const {
    if (round == 0 || m_.alone()) return landing(tile);
    sync_block();
    return landing_;
  }

  RNN_DEVICE void send(int tile, int64_t round, int rows) const {
    if (m_.alone()) return;
    char *to = buffer(tile, round), *old = buffer(tile, round + kGridBuffers / 2 - 1);  // of the round before, less 4
    Vectors own(rows, m_.slice_pitch());
    while (own.more()) {
      const int at = own.row() * m_.pitch + place(m_, rank_, own.at());
      put(to + at, *reinterpret_cast<const Vec16*>(staging_ + own.row() * m_.slice_pitch() + own.at()));
      empty(old + at);
      own.next(m_.slice_pitch());
    }
  }

  RNN_DEVICE void end(int64_t round) const {
    if (!m_.alone() && round % 2) settle();
  }
  RNN_DEVICE void leave() const {}

 private:
  // Those of some rows that are a thread's, each row by a warp.
  class Vectors {
   public:
    RNN_DEVICE Vectors(int rows, int bytes) : rows_(rows), row_(thread_index() / kWarp), at_(first()) {
      if (at_ >= bytes) row_ = rows;
    }
    RNN_DEVICE bool more() const { return row_ < rows_; }
    RNN_DEVICE int row() const { return row_; }
    RNN_DEVICE int at() const { return at_; }
    RNN_DEVICE void next(int bytes) {
      at_ += kWarp * kVec16Bytes;
      if (at_ < bytes) return;
      at_ = first();
      row_ += kWarps;
    }

   private:
    static RNN_DEVICE int first() { return thread_index() % kWarp * kVec16Bytes; }
    const int rows_;
    int row_, at_;
  };

  // Looks at the next vectors.
  template <int n>
  RNN_DEVICE void ask(Vectors& all, const char* from, int (&at)[n], Vec16 (&found)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      at[i] = -1;
      found[i] = Vec16{};
      if (!all.more()) continue;
      at[i] = all.row() * m_.pitch + (all.at() < m_.numbers ? all.at() : m_.sums + all.at() - m_.numbers);
      found[i] = look(from + at[i]);
      all.next(m_.received);
    }
  }
  template <int n>
  RNN_DEVICE void land(const int (&at)[n], const Vec16 (&found)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (at[i] >= 0) *reinterpret_cast<Vec16*>(landing_ + at[i]) = found[i];
  }

  RNN_DEVICE char* landing(int tile) const { return landing_ + (m_.alone() ? tile * m_.buffer() : 0); }
  RNN_DEVICE char* buffer(int tile, int64_t round) const {
    return buffers_ + (tile * kGridBuffers + round % kGridBuffers) * m_.buffer();
  }

  const MessageLayout& m_;
  int rank_;
  char* staging_;
  char* landing_;  // of a block by itself, one for each tile
  char* buffers_;  // [tiles, kGridBuffers]
};

}  // namespace rnn::cuda
