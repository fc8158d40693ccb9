// sigmoid and tanh of float32 as a GPU computes them: no branch, no division, and nothing that waits for anything but
// two of the approximate instructions.
//
// NVIDIA states their errors: 2 units in the last place for ex2.approx, 1 for rcp.approx. Were they always at their
// worst, sigmoid would be off by at most 8 units in the last place and tanh by 4, over all of float32; where they round
// to the nearest, it is 3 and 2. A result below 2^-126 is 0, as the instructions have it. A NaN stays a NaN. sigmoid is
// exactly 0 where e^-x overflows, since any other number would let a huge state through a gate that is shut, and
// exactly 1 where nothing else is left; tanh is exactly 1 and -1 there.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace rnn::cuda {

// The instructions; on a CPU what they approximate, rounded to the nearest.
struct Approximate {
  static RNN_HD float exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return flushed(std::exp2(x));
#endif
  }
  static RNN_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return flushed(1 / x);
#endif
  }

 private:
  static RNN_HD float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }
};

// A NaN stays one.
RNN_HD float at_most(float x, float high) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(high));
  return y;
#else
  return x > high ? high : x;
#endif
}

// What is lost of -x / ln(2) by rounding it is added in the end: else the error would grow with x.
template <class Unit = Approximate>
RNN_HD float fast_sigmoid(float x) {
  constexpr float kHigh = -1.44269502f, kLow = -1.92596303e-8f, kLn2 = 0.693147182f;  // -1 / ln(2) in two parts
  x = -at_most(-at_most(x, 88), 88);
  const float power = x * kHigh;
  const float rest = std::fma(x, kLow, std::fma(x, kHigh, -power));
  const float e = Unit::exp2(power);
  return Unit::reciprocal(1 + std::fma(e, rest * kLn2, e));
}

// Near zero x times a minimax polynomial of x^2, whose relative error is 2^-24.7; farther away 1 - 2 / (1 + e^2x).
template <class Unit = Approximate>
RNN_HD float fast_tanh(float x) {
  constexpr float kNear = 0.55f;
  const float size = std::fabs(x), square = x * x;
  float p = std::fma(1.64375808e-2f, square, -5.26718125e-2f);
  p = std::fma(p, square, 0.133207247f);
  p = std::fma(p, square, -0.333329469f);
  const float near_zero = std::fma(x * square, p, x);
  const float e = Unit::exp2(at_most(size, 44) * 2.88539004f);  // 2 / ln(2)
  const float far = std::fma(-2.0f, Unit::reciprocal(1 + e), 1.0f);
  return size < kNear ? near_zero : std::copysign(far, x);
}

}  // namespace rnn::cuda
