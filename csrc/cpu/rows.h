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

 public:
  RowsLoop(const Rows<IO>& p, void* workspace, int threads) : Base(workspace), p_(p) {
    weights_ = {{p.K, p.units, 1, kMaxVectors}};
    weights_.data = arena_.template take<F>(weights_.size());
    if (kConverts) converted_ = arena_.template take<F>(kBlockRows * padded_factors(p.K) * threads);
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
      const F* a;
      int64_t stride;
      if constexpr (kConverts) {
        stride = padded_factors(p_.K);
        F* converted = converted_ + share.thread * kBlockRows * stride;
        for (int64_t r = 0; r < n; ++r)
          Base::copy_factors(p_.a + (first + r) * p_.a_stride, p_.K, converted + r * stride);
        a = converted;
      } else {
        a = p_.a + first * p_.a_stride;
        stride = p_.a_stride;
      }
      Base::for_tiles(weights_, a, stride, n, share, pass++, product, nullptr, [&](int64_t j, const T* out) {
        for (int64_t r = 0; r < n; ++r) write(first + r, j, out + r * weights_.width());
      });
    }
  }

 private:
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
  F* converted_ = nullptr;  // [threads, kBlockRows, K]: rows as products take them
};

}  // namespace rnn::cpu::RNN_ISA
