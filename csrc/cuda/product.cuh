// The product inside the loop: one block's rows of a weight matrix, which it holds on the chip for the whole sequence,
// times what all blocks have sent. Knows sizes and the layout of a warp's operands, no gate and no cell.
//
// The sum over k of weight(m, k) * row(n)[k] for the block's m and a tile of n: eight rows at a time, so that the batch
// is the short side of the tensor cores' shape. Warps share the work by m and then by k; what they leave in `partial`
// is added up by whoever reads it, in the order of the parts, whatever the batch.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/plan.h"
#include "cuda/scalar.cuh"

namespace rnn::cuda {

// How numbers lie in shared memory for a product of type P: a 16-bit type as itself, TF32 and float as 32 bits.
template <class P>
struct Operand {
  using Bits = uint16_t;
  static RNN_HD Bits of(float x) { return Storage<P>::write(x).bits; }
};
template <>
struct Operand<TF32> {
  using Bits = uint32_t;
  static RNN_DEVICE Bits of(float x) { return round_to_tf32(x); }
};
template <>
struct Operand<float> {  // IEEE arithmetic
  using Bits = uint32_t;
  static RNN_DEVICE Bits of(float x) { return float_bits(x); }
};

// A product of type P with kTiles * 16 rows of the weights and kBatch * 8 of the batch per warp, which holds the
// weights of kInRegisters pairs of steps in registers and the others in shared memory.
template <class P, int kTiles, int kBatch,
          int kInRegisters = pairs_in_registers(kTiles, kBatch, std::is_same_v<P, float>)>
class Product {
  using Bits = typename Operand<P>::Bits;
  static constexpr bool kExact = std::is_same_v<P, float>;
  static constexpr int kSums = kExact ? 2 * kColumns : 4;  // of a thread, per tile
  // An instruction waits for the one before it in the same sum. Where there is one sum, the two steps of a pair have
  // sums of their own, which are added up in the end.
  static constexpr int kChains = !kExact && kTiles * kBatch == 1 ? 2 : 1;
  using Sums = float[kChains][kTiles][kBatch][kSums];

 public:
  static constexpr int kStep = kStepBytes / int(sizeof(Bits));
  static constexpr int kPitch = kBatch * kColumns + 1;  // of partial; odd, for the banks

  // Where a thread's part of the product lies, and in shared memory what it does not hold in registers.
  RNN_DEVICE void place(const ProductShape& s, char* shared) {
    const int warp = thread_index() / kWarp;
    lane_ = thread_index() % kWarp;
    group_ = warp % s.groups;
    part_ = warp / s.groups;
    first_ = part_ * s.pairs;
    in_shared_ = reinterpret_cast<Vec16*>(shared) + int64_t(warp) * pairs_in_shared(s) * 2 * kTiles * kWarp;
  }

  // What a warp keeps in shared memory.
  RNN_DEVICE Vec16* in_shared() const { return in_shared_; }

  // weight(which, m, k) gives the bits of an operand; zero outside of the matrix. Of two matrices, the second is that
  // of a product of the same shape which holds nothing in registers, if there is one: `second` is its in_shared().
  template <class F>
  RNN_DEVICE void load(const ProductShape& s, Vec16* second, F&& weight) {
    if (part_ >= s.parts) return;
    // One text for all fragments: it is much of a kernel. Selecting a register for one happens once.
    constexpr int kOfPair = 2 * kTiles, in_registers = kInRegisters * kOfPair;
    const int own = in_registers + pairs_in_shared(s) * kOfPair, all = own + (second ? s.pairs * kOfPair : 0);
#pragma unroll 1
    for (int f = 0; f < all; ++f) {
      const bool of_second = f >= own;
      const int at = of_second ? f - own : f;
      const Vec16 vector =
          at < s.pairs * kOfPair ? fragment(of_second, at % kTiles, 2 * first_ + at / kTiles, weight) : Vec16{};
      if (f >= in_registers) {
        (of_second ? second : in_shared_)[(of_second ? at : at - in_registers) * kWarp + lane_] = vector;
        continue;
      }
#pragma unroll
      for (int g = 0; g < in_registers; ++g)
#pragma unroll
        for (int w = 0; w < 4; ++w)
          if (g == f) in_registers_[g / kOfPair][g / kTiles % 2][g % kTiles][w] = vector.words[w];
    }
  }

  // rows: kBatch * 8 rows of operands, `pitch` bytes apart. partial [parts, groups * kTiles * 16, kPitch].
  RNN_DEVICE void run(const ProductShape& s, const char* rows, int pitch, float* partial) const {
    if (part_ >= s.parts) return;
    Sums sums;
#pragma unroll
    for (int i = 0; i < kChains * kTiles * kBatch * kSums; ++i) (&sums[0][0][0][0])[i] = 0;
    rows += first_ * 2 * kStepBytes;
#pragma unroll
    for (int q = 0; q < kInRegisters; ++q)
      if (q < s.pairs) multiply_pair(in_registers_[q], rows + q * 2 * kStepBytes, pitch, sums);
    for (int q = kInRegisters; q < s.pairs; ++q) {
      uint32_t a[2][kTiles][4];
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const Vec16 vector = in_shared_[((q - kInRegisters) * 2 + step) * kTiles * kWarp + m * kWarp + lane_];
#pragma unroll
          for (int w = 0; w < 4; ++w) a[step][m][w] = vector.words[w];
        }
      multiply_pair(a, rows + q * 2 * kStepBytes, pitch, sums);
    }
    partial += (int64_t(part_) * s.groups + group_) * kTiles * kFragment * kPitch;
    if constexpr (kExact) add_lanes(sums);
    if constexpr (kChains > 1) {
#pragma unroll
      for (int i = 0; i < kBatch * kSums; ++i) (&sums[0][0][0][0])[i] += (&sums[1][0][0][0])[i];
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kBatch; ++n) leave(partial + m * kFragment * kPitch + n * kColumns, sums[0][m][n]);
  }

 private:
  static RNN_DEVICE int pairs_in_shared(const ProductShape& s) {
    return s.pairs > kInRegisters ? s.pairs - kInRegisters : 0;
  }

  // What this lane holds of one tile and step: see multiply() in device.cuh. The exact product keeps the same words.
  template <class F>
  RNN_DEVICE Vec16 fragment(int which, int m, int step, F&& weight) const {
    constexpr int kPerWord = 4 / int(sizeof(Bits));
    Vec16 vector;
    for (int w = 0; w < 4; ++w) {
      const int row = (group_ * kTiles + m) * kFragment + lane_ / 4 + w % 2 * 8;
      const int k = step * kStep + (w / 2 * 4 + lane_ % 4) * kPerWord;
      uint32_t word = weight(which, row, k);
      if constexpr (kPerWord == 2) word |= uint32_t(weight(which, row, k + 1)) << 16;
      vector.words[w] = word;
    }
    return vector;
  }

  RNN_DEVICE void multiply_pair(const uint32_t (&a)[2][kTiles][4], const char* rows, int pitch, Sums& sums) const {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if constexpr (kExact) {
        multiply_exactly(a, rows + n * kColumns * pitch, pitch, n, sums);
      } else {
        uint32_t b[4];
        load_matrices(b, rows + (n * kColumns + lane_ % 8) * pitch + lane_ / 8 * 16);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
            multiply(sums[kChains > 1 ? step : 0][m][n], a[step][m], b[2 * step], b[2 * step + 1], P{});
      }
    }
  }

  // A lane multiplies its words of the weights, two rows of them, with all columns; lanes of the same rows are added up
  // in the end.
  RNN_DEVICE void multiply_exactly(const uint32_t (&a)[2][kTiles][4], const char* rows, int pitch, int n,
                                   Sums& sums) const {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float x =
              *reinterpret_cast<const float*>(rows + j * pitch + step * kStepBytes + half * 16 + lane_ % 4 * 4);
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int row = 0; row < 2; ++row)
              sums[0][m][n][row * kColumns + j] += bits_float(a[step][m][half * 2 + row]) * x;
        }
  }
  static RNN_DEVICE void add_lanes(Sums& sums) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          sums[0][m][n][i] += shuffle_xor(sums[0][m][n][i], 1);
          sums[0][m][n][i] += shuffle_xor(sums[0][m][n][i], 2);
        }
  }

  RNN_DEVICE void leave(float* to, const float (&sums)[kSums]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float* out = to + (lane_ / 4 + row * 8) * kPitch;
      if constexpr (kExact) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (j / 2 == lane_ % 4) out[j] = sums[row * kColumns + j];
      } else {
        out[lane_ % 4 * 2] = sums[row * 2];
        out[lane_ % 4 * 2 + 1] = sums[row * 2 + 1];
      }
    }
  }

  int lane_, group_, part_, first_;
  uint32_t in_registers_[kInRegisters > 0 ? kInRegisters : 1][2][kTiles][4];
  Vec16* in_shared_;  // [pairs - kInRegisters, 2, kTiles, lanes]
};

}  // namespace rnn::cuda
