// The loop over time as one kernel: a group of blocks holds the recurrent weights of one direction on the chip and
// takes some rows of the batch, in tiles, through the whole sequence. Per round and tile: receive what all blocks of
// the group have sent, multiply, compute the block's own units, send them on. With several tiles, one is on its way
// while another is computed.
//
// The layers of a stack run at the same time, as stages of a pipeline: before a stage receives what its own blocks have
// sent, it multiplies what its upstream, the stage before it, has left in global memory for the same round.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/passes.h"
#include "cuda/product.cuh"
#include "cuda/upstream.cuh"

namespace rnn::cuda {

static_assert(sizeof(Slot) == kSlotBytes && sizeof(TransactionBarrier) == kBarrierBytes &&
              sizeof(Vec16) == kVec16Bytes);

// A thread has up to so many pairs of a unit and a row of a tile.
template <int kBatch>
constexpr int kPairs = kMostUnits * kBatch * kColumns / kThreads;

template <class Pass>
struct Persistent {
  Pass stages[kMostStages];  // of which layout.stages are there
  Layout layout;
  char* global;       // [D or stages, groups, layout.global_bytes], zeros
  int64_t first_row;  // of the launch
};

// The parameter of a kernel that runs these stages.
template <class Pass, class Call>
Persistent<Pass> parameter(int cell, const std::vector<Call>& stages, const Plan& plan, const Part& part) {
  Persistent<Pass> p{{}, plan.layout, part.global, part.first_row};
  p.layout.stages = int(stages.size());
  for (size_t s = 0; s < stages.size(); ++s) p.stages[s] = {stages[s], cell};
  return p;
}

template <class Pass, class P, class Exchange, int kBatch>
class PersistentBlock {
  using V = Scalar<float>;
  using IO = typename Pass::IO;
  using Bits = typename Operand<P>::Bits;
  using WarpProduct = Product<P, warp_tiles(Pass::kOut), kBatch>;
  using Upstream = cuda::Upstream<Pass, P, kBatch>;
  static constexpr int kRows = kBatch * kColumns, kMost = kPairs<kBatch>;

 public:
  static constexpr bool kCluster = Exchange::kCluster;

  RNN_DEVICE explicit PersistentBlock(const Persistent<Pass>& p)
      : l_(p.layout),
        first_row_(p.first_row),
        group_(block_index() / l_.message.blocks),
        stage_(l_.stages > 1 ? group_ / l_.groups : 0),
        pass_(p.stages[stage_]),
        exchange_(l_.message, l_.tiles, shared_memory() + l_.exchange, p.global + group_ * l_.global_bytes),
        partial_(reinterpret_cast<float*>(shared_memory() + l_.partial)),
        staging_(reinterpret_cast<Bits*>(shared_memory() + l_.staging)),
        state_(reinterpret_cast<float*>(shared_memory() + l_.state)),
        contributions_(reinterpret_cast<double*>(shared_memory() + l_.squares)),
        factors_(contributions_ + l_.units * kRows),
        values_(Pass::kState + (l_.message.sum_bytes ? Pass::kKept : 0)),
        slots_(reinterpret_cast<Slot*>(shared_memory() + l_.slots)),
        d_(l_.stages > 1 ? 0 : group_ / l_.groups),
        first_unit_(int64_t(exchange_.rank()) * l_.units),
        upstream_(l_, p.global, group_, stage_) {}

  RNN_DEVICE void run() {
    begin();
    const int64_t rounds = pass_.rounds();
    for (int64_t round = 0; round < rounds; ++round)
      for (int tile = 0; tile < l_.tiles; ++tile) run_round(round, tile, round + 1 < rounds);
  }

 private:
  struct Pair {
    int unit, row;
    bool valid;
  };

  RNN_DEVICE Pair pair(int n) const {
    const int i = thread_index() + n * kThreads;
    return {i % l_.units, i / l_.units, i < l_.units * kRows};
  }
  RNN_DEVICE bool exists(const Slot& slot, int unit) const {
    return slot.n >= 0 && first_unit_ + unit < pass_.sequence().H;
  }
  RNN_DEVICE float* state(int tile, int k, const Pair& at) const {
    return state_ + ((tile * values_ + k) * kRows + at.row) * l_.units + at.unit;
  }

  RNN_DEVICE void begin() {
    const Sequence& q = pass_.sequence();
    const int64_t rows = q.rows(), first = first_row_ + int64_t(group_ % l_.groups) * l_.tiles * kRows;
    for (int i = thread_index(); i < l_.tiles * kRows; i += kThreads) {
      Slot slot;
      slot.n = -1;
      if (first + i < rows) slot = Slot(q, d_ * rows + first + i);
      slots_[i] = slot;
    }
    sync_block();
    const IO *const own = pass_.matrix(d_), *const from_upstream = pass_.upstream_matrix();
    product_.place(l_.product, shared_memory());
    product_.load(l_.product, upstream_.begin(), [&](int which, int m, int k) {
      const int out = m / l_.units, in = k / l_.units % Pass::kSent;
      const int64_t i = first_unit_ + m % l_.units;
      const int64_t j = int64_t(k / (l_.units * Pass::kSent)) * l_.units + k % l_.units;
      const bool inside = out < Pass::kOut && i < q.H && j < q.H && k < l_.message.blocks * l_.units * Pass::kSent;
      return Operand<P>::of(inside ? pass_.weight(which ? from_upstream : own, out, i, in, j).v : 0.0f);
    });
    for (int tile = 0; tile < l_.tiles; ++tile)
      for (int n = 0; n < kMost; ++n) {
        const Pair at = pair(n);
        if (!at.valid) break;
        const Slot& slot = slots_[tile * kRows + at.row];
        V values[Pass::kState];
        for (V& x : values) x = V(0);
        if (exists(slot, at.unit)) pass_.begin(slot, first_unit_ + at.unit, values);
        for (int k = 0; k < Pass::kState; ++k) *state(tile, k, at) = values[k].v;
      }
  }

  // What the first round multiplies: the block reads it all by itself.
  RNN_DEVICE void fill_first(int tile) {
    const int width = l_.message.blocks * l_.units;
    for (int i = thread_index(); i < width * kRows; i += kThreads) {
      const int row = i / width, j = i % width;
      const Slot& slot = slots_[tile * kRows + row];
      const bool inside = slot.n >= 0 && j < pass_.sequence().H;
      const float x = inside ? pass_.first(slot, j).v : 0.0f;
      reinterpret_cast<Bits*>(exchange_.first(tile) + int64_t(row) * l_.message.pitch)[j] = Operand<P>::of(x);
    }
    sync_block();
  }

  RNN_DEVICE void run_round(int64_t round, int tile, bool sends) {
    typename Pass::Unit units[kMost];
#pragma unroll
    for (int n = 0; n < kMost; ++n) {  // asked for early: memory answers while the others are waited for
      const Pair at = pair(n);
      if (!at.valid) break;
      const Slot& slot = slots_[tile * kRows + at.row];
      if (exists(slot, at.unit)) units[n] = pass_.fetch(slot, round, first_unit_ + at.unit);
    }
    const bool joins = upstream_.exists() && pass_.has_upstream(round);
    if (joins) upstream_.receive(pass_, slots_ + tile * kRows, tile, round);
    const bool multiplies = Pass::kFirst || round > 0;
    if (multiplies) {
      if constexpr (Pass::kFirst) {
        if (round == 0) fill_first(tile);
      }
      const char* received = exchange_.receive(tile, round);
      if (bounds()) receive_sums(received);
      product_.run(l_.product, received, l_.message.pitch, partial_);
    }
    sync_block();  // the product is whole, and the slice of the round before has been read
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const Pair at = pair(n);
      if (!at.valid) break;
      const Slot& slot = slots_[tile * kRows + at.row];
      V product[Pass::kOut], sent[Pass::kSent], values[Pass::kState], kept[Pass::kKept + 1];
      for (V& x : sent) x = V(0);
      for (V& x : kept) x = V(0);
      if (exists(slot, at.unit)) {
        if (joins) {
          for (int g = 0; g < Pass::kOut; ++g) product[g] = sum(upstream_.partial(), g, at);
          pass_.add_upstream(units[n], first_unit_ + at.unit, product);
        }
        for (int g = 0; g < Pass::kOut; ++g) product[g] = multiplies ? sum(partial_, g, at) : V(0);
        for (int k = 0; k < Pass::kState; ++k) values[k] = V(*state(tile, k, at));
        if (bounds() && multiplies) bound(round - 1, tile, at, slot, product);
        pass_.run(units[n], slot, round, first_unit_ + at.unit, product, values, sent, kept);
        for (int k = 0; k < Pass::kState; ++k) *state(tile, k, at) = values[k].v;
      }
      Bits* row = staging_ + at.row * (l_.message.bytes + l_.message.sum_bytes) / int(sizeof(Bits));
      for (int v = 0; v < Pass::kSent; ++v) row[v * l_.units + at.unit] = Operand<P>::of(sent[v].v);
      if (bounds()) keep(tile, at, kept);
    }
    sync_block();
    if (bounds()) {
      leave_sums();
      sync_block();
    }
    if (sends) exchange_.send(tile, round + 1, reinterpret_cast<const char*>(staging_));
    upstream_.announce(tile, round, exchange_.rank());
  }

  // Bounds by norm: is there a row statistic? It is added up twice, over the units of each block before it sends, and
  // over the blocks where it is received. The barriers between are those of a round, and one more.
  RNN_DEVICE bool bounds() const { return Pass::kKept > 0 && l_.message.sum_bytes > 0; }

  RNN_DEVICE RowStatistic own_sums() const { return RowStatistic::dense(contributions_, l_.units); }

  RNN_DEVICE void keep(int tile, const Pair& at, const V* kept) const {
    if constexpr (Pass::kKept > 0) {
      for (int k = 0; k < Pass::kKept; ++k) *state(tile, Pass::kState + k, at) = kept[k].v;
      own_sums().part(at.row, at.unit) = pass_.contribution(kept);
    }
  }
  RNN_DEVICE void leave_sums() const {
    const int row = thread_index();
    if (row < kRows) sent_sums(l_.message, reinterpret_cast<char*>(staging_)).part(row, 0) = own_sums().sum(row);
  }
  RNN_DEVICE void receive_sums(const char* received) const {
    const int row = thread_index();
    if constexpr (Pass::kKept > 0) {
      if (row < kRows) factors_[row] = pass_.factor(received_sums(l_.message, received).sum(row));
    }
  }
  RNN_DEVICE void bound(int64_t round, int tile, const Pair& at, const Slot& slot, V* product) const {
    if constexpr (Pass::kKept > 0) {
      V kept[Pass::kKept];
      for (int k = 0; k < Pass::kKept; ++k) kept[k] = V(*state(tile, Pass::kState + k, at));
      pass_.bound(slot, round, first_unit_ + at.unit, factors_[at.row], kept);
      product[0] = product[0] * V(float(factors_[at.row]));
    }
  }

  RNN_DEVICE V sum(const float* partial, int out, const Pair& at) const {
    const int m = out * l_.units + at.unit, rows = l_.product.groups * warp_tiles(Pass::kOut) * kFragment;
    float total = 0;
    for (int part = 0; part < l_.product.parts; ++part)
      total += partial[(int64_t(part) * rows + m) * WarpProduct::kPitch + at.row];
    return V(total);
  }

  const Layout& l_;
  const int64_t first_row_;
  const int group_, stage_;
  const Pass& pass_;
  Exchange exchange_;
  WarpProduct product_;
  float* partial_;         // [parts, rows of the product, kPitch]
  Bits* staging_;          // [kRows, kSent, units]
  float* state_;           // [tiles, values_, kRows, units]
  double* contributions_;  // [kRows, units]: of a round, to the row statistic
  double* factors_;        // [kRows]: of the round before
  const int values_;
  Slot* slots_;  // [tiles, kRows]; n < 0 where there is no row
  const int64_t d_;
  const int64_t first_unit_;
  Upstream upstream_;
};

// Calls f with the type of the block that a kernel of a plan is made of; false where there is none.
template <class Pass, class P, class F>
bool dispatch_block(const Kernel& k, F&& f) {
  const auto with = [&]<class Exchange>(Exchange*) {
    if (k.batch == 1) return f(static_cast<PersistentBlock<Pass, P, Exchange, 1>*>(nullptr)), true;
    if constexpr (!std::is_same_v<P, float>) {
      if (k.batch == 2) return f(static_cast<PersistentBlock<Pass, P, Exchange, 2>*>(nullptr)), true;
    }
    return false;
  };
  return k.cluster ? with(static_cast<ClusterExchange*>(nullptr)) : with(static_cast<GridExchange*>(nullptr));
}
template <class Pass, class F>
bool dispatch_block(const Kernel& k, F&& f) {
  using IO = typename Pass::IO;
  if constexpr (std::is_same_v<IO, float>) {
    return k.exact ? dispatch_block<Pass, float>(k, f) : dispatch_block<Pass, TF32>(k, f);
  } else {
    return dispatch_block<Pass, IO>(k, f);
  }
}

}  // namespace rnn::cuda
