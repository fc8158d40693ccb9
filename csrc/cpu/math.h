// sigmoid and tanh of SIMD vectors: float32 without a branch, float64 lane by lane.
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace rnn::cpu::RNN_ISA {

// 1/x to within 1 unit in the last place, for x in [2^-120, 2^120].
RNN_HD Vec<float> reciprocal(Vec<float> x) {
#if RNN_VECTOR_BYTES == 64
  const Vec<float> r(reinterpret_cast<Vec<float>::Data>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x.v))));
  return r * (Vec<float>(2) - x * r);  // one step of Newton's method doubles the 14 bits
#else
  return Vec<float>(1) / x;
#endif
}

RNN_HD Vec<float> clamp(Vec<float> x, float low, float high) {  // a NaN stays a NaN
  using V = Vec<float>;
  x.v = x.v < V(low).v ? V(low).v : x.v;
  return x.v > V(high).v ? V(high).v : x.v;
}

// e^x = scale * (1 + rest) for |x| <= 87. Argument reduction after Cody and Waite 1980: rest = e^r - 1 with
// |r| <= ln(2)/2, by a polynomial whose relative error is 2^-26 (coefficients: minimax fit of (e^r - 1 - r) / r^2).
struct Exponential {
  Vec<float> scale, rest;
  RNN_HD explicit Exponential(Vec<float> x) {
    using V = Vec<float>;
    const V shift(12582912.0f + 127);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const V shifted = x * V(1.44269504088896341f) + shift;
    const V n = shifted - shift;
    const V r = x - n * V(0.693359375f) + n * V(2.12194440e-4f);  // ln(2) in two parts: n times the first is exact
    V p = V(1.3882516650e-3f) * r + V(8.3665475249e-3f);
    p = p * r + V(4.1667200625e-2f);
    p = p * r + V(1.6666543484e-1f);
    p = p * r + V(4.9999997020e-1f);
    rest = p * (r * r) + r;
    scale = V::from_bits(shifted.bits() << 23);  // 2^n
  }
};

// To within 3 units in the last place; stays at e^-87 below -87.
RNN_HD Vec<float> sigmoid(Vec<float> x) {
  const Exponential e(-clamp(x, -87, 87));
  return reciprocal(e.scale * e.rest + (e.scale + Vec<float>(1)));
}

// To within 4 units in the last place: (e^2x - 1) / (e^2x + 1).
RNN_HD Vec<float> tanh(Vec<float> x) {
  x = clamp(x, -10, 10);
  const Exponential e(x + x);
  const Vec<float> d = e.scale * e.rest + (e.scale - Vec<float>(1));
  return d * reciprocal(d + Vec<float>(2));
}

// float64 serves gradient checks more than speed: the C library's functions.
RNN_HD Vec<double> sigmoid(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = 1.0 / (1.0 + std::exp(-x.v[i]));
  return x;
}
RNN_HD Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = std::tanh(x.v[i]);
  return x;
}

}  // namespace rnn::cpu::RNN_ISA
