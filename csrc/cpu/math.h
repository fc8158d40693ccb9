// sigmoid and tanh of SIMD vectors, which all cells here take: float32 without a branch, float64 lane by lane.
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

// A NaN stays a NaN in both: of two operands of which one is NaN, the instructions return the second.
RNN_HD Vec<float> at_most(Vec<float> x, float high) {
  using V = Vec<float>;
#if RNN_VECTOR_BYTES == 64
  const auto bound = reinterpret_cast<__m512>(V(high).v);
  return V(reinterpret_cast<V::Data>(_mm512_maskz_min_ps(0xffff, bound, reinterpret_cast<__m512>(x.v))));
#else
  return x.v > V(high).v ? V(high).v : x.v;
#endif
}
RNN_HD Vec<float> at_least(Vec<float> x, float low) {
  using V = Vec<float>;
#if RNN_VECTOR_BYTES == 64
  const auto bound = reinterpret_cast<__m512>(V(low).v);
  return V(reinterpret_cast<V::Data>(_mm512_maskz_max_ps(0xffff, bound, reinterpret_cast<__m512>(x.v))));
#else
  return x.v < V(low).v ? V(low).v : x.v;
#endif
}

// e^x * 2^Raised = scale * (1 + rest) where scale is a normal number. Argument reduction after Cody and Waite 1980:
// rest = e^r - 1 with |r| <= ln(2)/2, by a polynomial whose relative error is 2^-26.
// Its coefficients are a minimax fit of (e^r - 1 - r) / r^2.
template <int Raised = 0>
struct Exponential {
  Vec<float> shifted, scale, rest;  // shifted: n + Raised + 127 in its low bits
  RNN_HD explicit Exponential(Vec<float> x) {
    using V = Vec<float>;
    const V shift(12582912.0f + 127 + Raised);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    shifted = x * V(1.44269504088896341f) + shift;
    const V n = shifted - shift;
    const V r = x - n * V(0.693359375f) + n * V(2.12194440e-4f);  // ln(2) in two parts: n times the first is exact
    V p = V(1.3882516650e-3f) * r + V(8.3665475249e-3f);
    p = p * r + V(4.1667200625e-2f);
    p = p * r + V(1.6666543484e-1f);
    p = p * r + V(4.9999997020e-1f);
    rest = p * (r * r) + r;
    scale = V::from_bits(shifted.bits() << 23);  // 2^(n + Raised)
  }
};

// To within 3 units in the last place; exactly 0 from where e^-x overflows, for any other number would let a huge state
// through a gate that is shut. A quarter of 1 + e^-x is inverted, whose reciprocal is never subnormal. Above 20 all
// that is left is 1; what a large -x makes of the exponential is replaced in the end.
RNN_HD Vec<float> sigmoid(Vec<float> x) {
  using V = Vec<float>;
  const Exponential<-2> e(-at_most(x, 20));
  const V y = reciprocal(e.scale * e.rest + (e.scale + V(0.25f))) * V(0.25f);
  return x.v < V(-88.7228394f).v ? V(0).v : y.v;
}

// To within 4 units in the last place: (e^2x - 1) / (e^2x + 1), which roundings would take beyond 1 but never below -1.
RNN_HD Vec<float> tanh(Vec<float> x) {
  x = at_least(at_most(x, 10), -10);
  const Exponential<> e(x + x);
  const Vec<float> d = e.scale * e.rest + (e.scale - Vec<float>(1));
  return at_most(d * reciprocal(d + Vec<float>(2)), 1);
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
