// What cells that users write may ask for beside sigmoid and tanh, of SIMD vectors. float32 without a branch, float64
// lane by lane, as in math.h. NaN and infinity go through as in torch.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/math.h"

namespace rnn::cpu::RNN_ISA {

template <class T>
RNN_HD Vec<T> where_less(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
  return Vec<T>(a.v < b.v ? x.v : y.v);
}
template <class T>
RNN_HD Vec<T> where_at_most(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
  return Vec<T>(a.v <= b.v ? x.v : y.v);
}
template <class T>
RNN_HD Vec<T> where_equal(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
  return Vec<T>(a.v == b.v ? x.v : y.v);
}

// NaN where either is.
template <class T>
RNN_HD Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return where_less(a, b, a, where_equal(a, a, b, a));
}
template <class T>
RNN_HD Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return where_less(b, a, a, where_equal(a, a, b, a));
}

template <class T>
RNN_HD Vec<T> abs(Vec<T> x) {
  using Bits = typename Vec<T>::Bits;
  using Whole = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return Vec<T>::from_bits(x.bits() & (Bits{} + std::numeric_limits<Whole>::max()));
}

// Correctly rounded.
RNN_HD Vec<float> sqrt(Vec<float> x) {
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<float>::Data>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(x.v)));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  return reinterpret_cast<Vec<float>::Data>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x.v)));
#else
  for (int i = 0; i < Vec<float>::kLanes; ++i) x.v[i] = std::sqrt(x.v[i]);
  return x;
#endif
}

// To within 2 units in the last place, subnormal results included, which come by a product with two powers of two: none
// of them alone is a number.
RNN_HD Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const Exponential<> e(at_least(at_most(x, 89), -104));
  const V::Bits n = e.shifted.bits() - 0x4b400000 - 127, half = n >> 1;
  const V first = V::from_bits((half + 127) << 23), second = V::from_bits((n - half + 127) << 23);
  return (first * e.rest + first) * second;
}

// To within 2 units in the last place. x = m 2^n with m between sqrt(1/2) and sqrt(2), and log m by the series of
// 2 artanh(s), s = (m - 1) / (m + 1).
RNN_HD Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  constexpr float kSmallest = std::numeric_limits<float>::min(), kInfinity = std::numeric_limits<float>::infinity();
  const V normal = where_less(x, V(kSmallest), x * V(8388608.0f), x);
  const V::Bits bits = normal.bits(), exponent = (bits - 0x3f3504f3) >> 23;
  const V m = V::from_bits(bits - (exponent << 23));
  const V n = V(__builtin_convertvector(exponent, V::Data)) - where_less(x, V(kSmallest), V(23), V(0));
  const V s = (m - V(1)) / (m + V(1)), z = s * s;
  const V p = ((V(2.0f / 9) * z + V(2.0f / 7)) * z + V(2.0f / 5)) * z + V(2.0f / 3);
  V y = n * V(0.693359375f) + (s * z * p + (s + s) - n * V(2.12194440e-4f));
  y = where_equal(x, V(0), V(-kInfinity), y);
  y = where_less(x, V(0), V(std::numeric_limits<float>::quiet_NaN()), y);
  return where_less(x, V(kInfinity), y, x);  // infinity and NaN stay
}

// log(1 + e^x), and x above 20, as torch has it, to within 3 units in the last place. What 1 + e^x loses by rounding is
// added in the end.
RNN_HD Vec<float> softplus(Vec<float> x) {
  using V = Vec<float>;
  const V e = exp(at_most(x, 21)), u = V(1) + e;
  return where_less(V(20), x, x, log(u) + (e - (u - V(1))) / u);
}

RNN_HD Vec<double> sqrt(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = std::sqrt(x.v[i]);
  return x;
}
RNN_HD Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = std::exp(x.v[i]);
  return x;
}
RNN_HD Vec<double> log(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = std::log(x.v[i]);
  return x;
}
RNN_HD Vec<double> softplus(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = x.v[i] > 20 ? x.v[i] : std::log1p(std::exp(x.v[i]));
  return x;
}

// x^exponent, lane by lane: a constant that is a whole number is written as products, and hardly any is another.
template <class T>
RNN_HD Vec<T> power(Vec<T> x, double exponent) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.v[i] = std::pow(x.v[i], T(exponent));
  return x;
}

}  // namespace rnn::cpu::RNN_ISA
