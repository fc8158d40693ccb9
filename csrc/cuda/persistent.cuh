// The loop over time as one kernel: a group of blocks holds the recurrent weights of one direction on the chip and
// takes some rows of the batch, in tiles, through the whole sequence. Per round and tile: receive what all blocks of
// the group have sent, multiply, compute the block's own units, send them on. With several tiles, one is on its way
// while another is computed.
//
// The layers of a stack run at the same time, as stages of a pipeline: before a stage receives what its own blocks have
// sent, it multiplies what its upstream, the stage before it, has left in global memory for the same round.
#pragma once

#include <type_traits>

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
  char* global;       // [D or stages, groups, layout.global_bytes], all bits set
  int64_t first_row;  // of the launch
  uint64_t* fault;    // see fault.h; or null
};

// The parameter of a kernel that runs these stages.
template <class Pass, class Call>
Persistent<Pass> parameter(int cell, const std::vector<Call>& stages, const Plan& plan, const Part& part) {
  Persistent<Pass> p{{}, plan.layout, part.global, part.first_row, part.fault};
  p.layout.stages = int(stages.size());
  for (size_t s = 0; s < stages.size(); ++s) p.stages[s] = {stages[s], cell};
  return p;
}

template <class Pass, class P, class Exchange, int kBatch>
class PersistentBlock {
  using V = Scalar<float>;
  using IO = typename Pass::IO;
  using Bits = typename Operand<P>::Bits;
  using Constants = typename Pass::Constants;
  using WarpProduct = Product<P, warp_tiles(Pass::kOut), kBatch>;
  using Upstream = cuda::Upstream<Pass, P, kBatch>;
  static constexpr int kRows = kBatch * kColumns, kMost = kPairs<kBatch>;
  // Results are written once the others have been sent what they wait for. With tiles of 16 rows a thread has too many
  // to hold them in registers so long; such layouts have other tiles under way meanwhile.
  static constexpr bool kWritesLate = kBatch == 1;
  // Vectors of a message that a thread has on their way to it, and later ones, as registers allow: L2 gives a block as
  // many bytes in the time that one takes as all of its threads ask for with four.
  static constexpr bool kFew = kBatch > 1 && Pass::kBackward;
  static constexpr int kAtOnce = kFew ? 2 : 4, kLater = kFew ? 1 : 4;

 public:
  static constexpr bool kCluster = Exchange::kCluster;

  RNN_DEVICE explicit PersistentBlock(const Persistent<Pass>& p)
      : l_(p.layout),
        fault_(p.fault),
        group_(block_index() / l_.message.blocks),
        stage_(l_.stages > 1 ? group_ / l_.groups : 0),
        pass_(p.stages[stage_]),
        exchange_(l_.message, l_.tiles, shared_memory() + l_.exchange, shared_memory() + l_.staging,
                  p.global + group_ * l_.global_bytes),
        partial_(reinterpret_cast<float*>(shared_memory() + l_.partial)),
        state_(reinterpret_cast<float*>(shared_memory() + l_.state)),
        constants_(reinterpret_cast<Constants*>(shared_memory() + l_.constants)),
        contributions_(reinterpret_cast<double*>(shared_memory() + l_.squares)),
        factors_(contributions_ + l_.units * kRows),
        values_(Pass::kState + (l_.message.sum_bytes ? Pass::kKept : 0) + l_.masked),
        slots_(reinterpret_cast<Slot*>(shared_memory() + l_.slots)),
        failed_(reinterpret_cast<int*>(shared_memory() + l_.failed)),
        d_(l_.stages > 1 ? 0 : group_ / l_.groups),
        first_unit_(int64_t(exchange_.rank()) * l_.units),
        upstream_(l_, p.global, group_, stage_) {
    const int64_t most = int64_t(l_.tiles) * l_.rows, first = p.first_row + (group_ % l_.groups) * most;
    const int64_t left = pass_.sequence().rows() - first;
    first_row_ = first;
    rows_ = int(left < 0 ? 0 : (left < most ? left : most));
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int i = thread_index() + n * kThreads;
      const int unit = i % l_.units;
      pairs_[n] = i / l_.units << 8 | (exists(unit) ? kExists : 0) | unit;
    }
  }

  RNN_DEVICE void run() {
    begin();
    const int64_t rounds = pass_.rounds();
    for (int64_t round = 0; round < rounds; ++round) {
      for (int tile = 0; tile * l_.rows < rows_; ++tile)
        if (!run_round(round, tile, round + 1 < rounds)) return exchange_.leave();
      exchange_.end(round);
    }
  }

 private:
  struct Pair {
    int unit, row;  // beyond a tile's last row where there is none
    bool exists;    // the unit; what lies beyond the last is zero
  };
  static constexpr int kExists = 128;
  RNN_DEVICE Pair pair(int n) const { return {pairs_[n] & (kExists - 1), pairs_[n] >> 8, bool(pairs_[n] & kExists)}; }

  // Of a tile, those that are there.
  RNN_DEVICE int rows_of(int tile) const {
    const int left = rows_ - tile * l_.rows;
    return left < l_.rows ? left : l_.rows;
  }
  RNN_DEVICE bool exists(int unit) const { return first_unit_ + unit < pass_.sequence().H; }
  RNN_DEVICE float* state(int tile, int k, const Pair& at) const {
    return state_ + ((tile * values_ + k) * kRows + at.row) * l_.units + at.unit;
  }

  // The factor of recurrent dropout, if there is one, of h on its way to W_hh: the h that is sent has it already, and
  // what comes back through W_hh gets it where it is received. So nobody needs another block's.
  RNN_DEVICE float& mask(int tile, const Pair& at) const { return *state(tile, values_ - 1, at); }
  // What waits for the norm of its row.
  RNN_DEVICE float* waiting(int tile, int k, const Pair& at) const { return state(tile, Pass::kState + k, at); }

  RNN_DEVICE void begin() {
    const Sequence& q = pass_.sequence();
    if (thread_index() == 0) *failed_ = 0;
    for (int i = thread_index(); i < rows_; i += kThreads) slots_[i] = Slot(q, d_ * q.rows() + first_row_ + i, d_);
    if constexpr (!std::is_empty_v<Constants>) {
      for (int unit = thread_index(); unit < l_.units; unit += kThreads)
        if (exists(unit)) constants_[unit] = pass_.constants(d_, first_unit_ + unit);
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
    for (int tile = 0; tile * l_.rows < rows_; ++tile)
      for (int n = 0; n < kMost; ++n) {
        const Pair at = pair(n);
        if (at.row >= rows_of(tile) || !at.exists) continue;
        V values[Pass::kState];
        pass_.begin(slots_[tile * l_.rows + at.row], first_unit_ + at.unit, values);
        for (int k = 0; k < Pass::kState; ++k) *state(tile, k, at) = values[k].v;
        if (l_.masked) mask(tile, at) = mask_of(pass_.call, slots_[tile * l_.rows + at.row], first_unit_ + at.unit).v;
      }
  }

  // What the first round multiplies: the block reads it all by itself.
  RNN_DEVICE void fill_first(int tile) {
    const int width = l_.message.blocks * l_.units;
    for (int i = thread_index(); i < width * rows_of(tile); i += kThreads) {
      const int row = i / width, j = i % width;
      const float x = j < pass_.sequence().H ? pass_.first(slots_[tile * l_.rows + row], j).v : 0.0f;
      reinterpret_cast<Bits*>(exchange_.first(tile) + int64_t(row) * l_.message.pitch)[j] = Operand<P>::of(x);
    }
    sync_block();
  }

  // False where the block cannot go on: it has waited in vain.
  RNN_DEVICE bool run_round(int64_t round, int tile, bool sends) {
    const int rows = rows_of(tile);
    const Slot* slots = slots_ + tile * l_.rows;
    const typename Pass::Conditions now = pass_.conditions(round);
    typename Pass::Unit units[kMost];
#pragma unroll
    for (int n = 0; n < kMost; ++n) {  // asked for early: memory answers while the others are waited for
      const Pair at = pair(n);
      if (at.row < rows && at.exists) units[n] = pass_.fetch(slots[at.row], round, first_unit_ + at.unit);
    }
    const bool joins = upstream_.exists() && pass_.has_upstream(round);
    if (joins) {
      if (!upstream_.await(pass_, tile, round)) fail(Awaited::kUpstream, tile, round);
      upstream_.receive(pass_, slots, rows, tile, round);
    }
    const bool multiplies = Pass::kFirst || round > 0;
    if (multiplies) {
      if constexpr (Pass::kFirst) {
        if (round == 0) fill_first(tile);
      }
      if (!exchange_.template await<kAtOnce, kLater>(tile, round, rows)) fail(Awaited::kGroup, tile, round);
      const char* received = exchange_.receive(tile, round);
      if (bounds()) receive_sums(const_cast<char*>(received), rows);
      product_.run(l_.product, received, l_.message.pitch, partial_);
    }
    sync_block();  // the product is whole, and what was sent in the round before has been read
    const int failed = *failed_;
    const MessageRows outgoing = exchange_.outgoing(tile);
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const Pair at = pair(n);
      if (at.row >= rows) break;
      V sent[Pass::kSent];
      for (V& x : sent) x = V(0);
      if (at.exists) {
        run_pair(units[n], slots[at.row], round, now, tile, at, joins, multiplies, sent);
        if (!kWritesLate) pass_.write(units[n], round, first_unit_ + at.unit);
      } else if (bounds()) {
        own_sums().part(at.row, at.unit) = 0;
      }
      Bits* row = reinterpret_cast<Bits*>(outgoing.memory + at.row * outgoing.pitch);
      for (int v = 0; v < Pass::kSent; ++v) row[v * l_.units + at.unit] = Operand<P>::of(sent[v].v);
    }
    sync_block();
    if (failed) return false;
    if (bounds()) {
      if (thread_index() < rows) outgoing.statistic().part(thread_index(), 0) = own_sums().sum(thread_index());
      sync_block();
    }
    if (sends) exchange_.send(tile, round + 1, rows);
#pragma unroll
    for (int n = 0; kWritesLate && n < kMost; ++n) {
      const Pair at = pair(n);
      if (at.row < rows && at.exists) pass_.write(units[n], round, first_unit_ + at.unit);
    }
    upstream_.announce(tile, round, exchange_.rank());
    return true;
  }

  // The step of one unit and row.
  RNN_DEVICE void run_pair(typename Pass::Unit& unit, const Slot& slot, int64_t round, typename Pass::Conditions now,
                           int tile, const Pair& at, bool joins, bool multiplies, V* sent) const {
    const int64_t i = first_unit_ + at.unit;
    V product[Pass::kOut], values[Pass::kState];
    Constants added{};
    if constexpr (!std::is_empty_v<Constants>) added = constants_[at.unit];
    for (int k = 0; k < Pass::kState; ++k) values[k] = V(*state(tile, k, at));
    if (joins) {
      sum(upstream_.partial(), at, product);
      pass_.add_upstream(unit, i, product, added, values);
    }
    if (multiplies) {
      sum(partial_, at, product);
      if (bounds()) bound(round - 1, tile, at, slot, product);
      if (Pass::kBackward && l_.masked) product[0] = product[0] * V(mask(tile, at));
    } else {
      for (V& x : product) x = V(0);
    }
    pass_.run(unit, slot, now, i, added, product, values, sent);
    if (!Pass::kBackward && l_.masked) sent[0] = sent[0] * V(mask(tile, at));
    for (int k = 0; k < Pass::kState; ++k) *state(tile, k, at) = values[k].v;
    if (bounds()) keep(tile, at, unit);
  }

  // The block leaves once all of its threads know.
  RNN_DEVICE void fail(Awaited awaited, int tile, int64_t round) const {
    *failed_ = 1;
    if (fault_) record(fault_, {awaited, Pass::kBackward, kCluster, block_index(), tile, round});
  }

  // Bounds by norm: is there a row statistic? It is added up twice, over the units of each block before it sends, and
  // over the blocks where it is received. The barriers between are those of a round, and one more.
  RNN_DEVICE bool bounds() const { return Pass::kKept > 0 && l_.message.sum_bytes > 0; }

  RNN_DEVICE RowStatistic own_sums() const { return RowStatistic::dense(contributions_, l_.units); }

  RNN_DEVICE void keep(int tile, const Pair& at, const typename Pass::Unit& unit) const {
    if constexpr (Pass::kKept > 0) {
      for (int k = 0; k < Pass::kKept; ++k) *waiting(tile, k, at) = unit.dgates[k].v;
      own_sums().part(at.row, at.unit) = pass_.contribution(unit.dgates);
    }
  }
  RNN_DEVICE void receive_sums(char* received, int rows) const {
    const int row = thread_index();
    if constexpr (Pass::kKept > 0) {
      if (row < rows) factors_[row] = pass_.factor(buffer_rows(l_.message, received).statistic().sum(row));
    }
  }
  RNN_DEVICE void bound(int64_t round, int tile, const Pair& at, const Slot& slot, V* product) const {
    if constexpr (Pass::kKept > 0) {
      V kept[Pass::kKept];
      for (int k = 0; k < Pass::kKept; ++k) kept[k] = V(*waiting(tile, k, at));
      pass_.bound(slot, round, first_unit_ + at.unit, factors_[at.row], kept);
      product[0] = product[0] * V(float(factors_[at.row]));
    }
  }

  // Of all parts, in their order. How many there are is decided first, so that all reads are on their way at once.
  RNN_DEVICE void sum(const float* partial, const Pair& at, V* product) const {
    switch (l_.product.parts) {
      case 1:
        return sum_parts<1>(partial, at, product);
      case 2:
        return sum_parts<2>(partial, at, product);
      case 4:
        return sum_parts<4>(partial, at, product);
      default:
        return sum_parts<kWarps>(partial, at, product);
    }
  }
  template <int kParts>
  RNN_DEVICE void sum_parts(const float* partial, const Pair& at, V* product) const {
    const int rows = l_.product.groups * warp_tiles(Pass::kOut) * kFragment;
    float parts[Pass::kOut][kParts];
#pragma unroll
    for (int out = 0; out < Pass::kOut; ++out)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        parts[out][part] = partial[(part * rows + out * l_.units + at.unit) * WarpProduct::kPitch + at.row];
#pragma unroll
    for (int out = 0; out < Pass::kOut; ++out) {
      float total = parts[out][0];
#pragma unroll
      for (int part = 1; part < kParts; ++part) total += parts[out][part];
      product[out] = V(total);
    }
  }

  const Layout& l_;
  uint64_t* fault_;
  const int group_, stage_;
  const Pass& pass_;
  Exchange exchange_;
  WarpProduct product_;
  float* partial_;         // [parts, rows of the product, kPitch]
  float* state_;           // [tiles, values_, kRows, units]
  Constants* constants_;   // [units]
  double* contributions_;  // [kRows, units]: of a round, to the row statistic
  double* factors_;        // [kRows]: of the round before
  const int values_;       // of a unit and row: states, what waits for the norm, the factor
  Slot* slots_;            // [tiles, rows of a tile]
  int* failed_;            // has a thread of the block waited in vain?
  const int64_t d_;
  const int64_t first_unit_;
  Upstream upstream_;
  int64_t first_row_;
  int rows_;          // of the group's tiles, those that are there
  int pairs_[kMost];  // packed: registers are few
};

// Calls f with the type of the block that a kernel of a plan is made of; false where there is none.
template <class Pass, class P, class F>
bool dispatch_block(const Plan& plan, F&& f) {
  const Kernel& k = plan.kernel;
  const auto with = [&]<class Exchange>(Exchange*) {
    if (k.batch == 1) return f(static_cast<PersistentBlock<Pass, P, Exchange, 1>*>(nullptr)), true;
    if constexpr (!std::is_same_v<P, float>) {
      if (k.batch == 2) return f(static_cast<PersistentBlock<Pass, P, Exchange, 2>*>(nullptr)), true;
    }
    return false;
  };
  return plan.in_clusters() ? with(static_cast<ClusterExchange*>(nullptr)) : with(static_cast<GridExchange*>(nullptr));
}
template <class Pass, class F>
bool dispatch_block(const Plan& plan, F&& f) {
  using IO = typename Pass::IO;
  if constexpr (std::is_same_v<IO, float>) {
    return plan.kernel.exact ? dispatch_block<Pass, float>(plan, f) : dispatch_block<Pass, TF32>(plan, f);
  } else {
    return dispatch_block<Pass, IO>(plan, f);
  }
}

}  // namespace rnn::cuda
