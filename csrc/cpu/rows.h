// A product of many rows that takes each row by itself, for the gradient of the input where a row may not depend on its
// batch: torch's own products choose their kernel, and with it the order of additions, by the number of rows.
#pragma once

#include <type_traits>

#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

template <class IO>
class RowsLoop final : public LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::arena_, Base::kLanes, Base::left, Base::padded_factors;
  using typename Base::F, typename Base::T, typename Base::V;
  static constexpr bool kConverts = !std::is_same_v<IO, T>;
  static constexpr int64_t kBlockRows = 128;  // stay in L2 while all weights pass by
  static constexpr int64_t kSameSet = 4096;   // bytes apart, all rows fall into one set of L1, and drive each other out

 public:
  RowsLoop(const Rows<IO>& p, void* workspace, int threads) : Base(workspace), p_(p) {
    weights_ = {{p.K, p.units, 1, kMaxVectors}};
    weights_.data = arena_.template take<F>(weights_.size());
    if (copies()) copied_ = arena_.template take<F>(kBlockRows * copied_stride() * threads);
  }

  Partition partition(int threads) const override {
    constexpr int64_t kWorkPerThread = 64 << 10;
    const int64_t useful = least(threads, 1 + p_.rows * p_.units * p_.K / kWorkPerThread);
    const int64_t row_parts = most(1, least(useful, p_.rows / kMaxRows));
    return {1, int(row_parts), int(most(1, least(useful / row_parts, weights_.tiles())))};
  }

  void prepare(int thread, int threads) override {
    for (int64_t j = thread; j < weights_.tiles(); j += threads) weights_.pack(p_.w, j);
  }

  void run(const Partition&, const Share& share, Barrier&) override {
    alignas(64) T product[Base::products_of(kBlockRows, kMaxVectors * kLanes)];
    int64_t pass = 0;
    for (int64_t first = share.first_row; first < share.last_row; first += kBlockRows) {
      const int64_t n = least(kBlockRows, share.last_row - first);
      const F* a = nullptr;
      int64_t stride = p_.a_stride;
      if constexpr (!kConverts) a = p_.a + first * stride;
      if (copies()) {
        stride = copied_stride();
        F* copied = copied_ + share.thread * kBlockRows * stride;
        for (int64_t r = 0; r < n; ++r) Base::copy_factors(p_.a + (first + r) * p_.a_stride, p_.K, copied + r * stride);
        a = copied;
      }
      Base::for_tiles(weights_, a, stride, n, share, pass++, product, nullptr, [&](int64_t j, const T* out) {
        for (int64_t r = 0; r < n; ++r) write(first + r, j, out + r * weights_.width());
      });
    }
  }

 private:
  // Whether rows as they lie are not what products take, or slow to go through.
  bool copies() const { return kConverts || p_.a_stride * sizeof(IO) % kSameSet == 0; }
  int64_t copied_stride() const {
    const int64_t stride = padded_factors(p_.K);
    return stride * sizeof(F) % kSameSet == 0 ? stride + 64 / sizeof(F) : stride;
  }

  void write(int64_t r, int64_t j, const T* row) const {
    for (int u = 0; u < kMaxVectors; ++u) {
      const int64_t i = (j * kMaxVectors + u) * kLanes;
      if (i >= p_.units) break;
      const int n = left(p_.units, i);
      IO* out = p_.out + r * p_.units + i;
      const V sum = load(row + u * kLanes);
      store(out, p_.adds ? load(out, n) + sum : sum, n);
    }
  }

  const Rows<IO>& p_;
  Panels<F> weights_;
  F* copied_ = nullptr;  // [threads, kBlockRows, copied_stride()]: rows as products take them
};

}  // namespace rnn::cpu::RNN_ISA
