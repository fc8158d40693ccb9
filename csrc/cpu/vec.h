// A SIMD vector of T with the operators and functions that cells.h asks for, and its loads and stores.
// Built on the vector extension of GCC and Clang, so the same text serves AVX-512, AVX2, SSE2 and NEON.
// Included once per instruction set, inside a namespace of its own (isa.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "common/storage.h"

namespace rnn::cpu::RNN_ISA {

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float Data __attribute__((vector_size(RNN_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(RNN_VECTOR_BYTES)));
};
template <>
struct Native<double> {
  typedef double Data __attribute__((vector_size(RNN_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(RNN_VECTOR_BYTES)));
};

template <class T>
struct Vec {
  static constexpr int kLanes = RNN_VECTOR_BYTES / sizeof(T);
  using Data = typename Native<T>::Data;
  using Bits = typename Native<T>::Bits;
  Data v;

  RNN_HD Vec() = default;
  RNN_HD Vec(T x) : v(x - Data{}) {}
  RNN_HD explicit Vec(int x) : Vec(static_cast<T>(x)) {}
  RNN_HD Vec(Data x) : v(x) {}

  friend RNN_HD Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend RNN_HD Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend RNN_HD Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend RNN_HD Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend RNN_HD Vec operator-(Vec a) { return -a.v; }
  RNN_HD Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }
  RNN_HD Bits bits() const {
    Bits b;
    std::memcpy(&b, &v, sizeof b);
    return b;
  }
  static RNN_HD Vec from_bits(Bits b) {
    Vec x;
    std::memcpy(&x.v, &b, sizeof b);
    return x;
  }
};

template <class T>
RNN_HD Vec<T> where_positive(Vec<T> condition, Vec<T> a, Vec<T> b) {
  return Vec<T>(condition.v > Vec<T>(0).v ? a.v : b.v);
}

// e^x to within 2 units in the last place, saturating outside [-87, 88]. Argument reduction after Cody and Waite
// 1980; coefficients of expf in the Cephes library (S. Moshier).
RNN_HD Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x.v = x.v < V(-87.0f).v ? V(-87.0f).v : x.v;
  x.v = x.v > V(88.0f).v ? V(88.0f).v : x.v;
  const V shift(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
  const V shifted = x * V(1.44269504088896341f) + shift;
  const V n = shifted - shift;
  const V r = x - n * V(0.693359375f) - n * V(-2.12194440e-4f);
  V p = V(1.9875691500e-4f) * r + V(1.3981999507e-3f);
  p = p * r + V(8.3334519073e-3f);
  p = p * r + V(4.1665795894e-2f);
  p = p * r + V(1.6666665459e-1f);
  p = p * r + V(5.0000001201e-1f);
  p = p * (r * r) + r + V(1);
  return p * V::from_bits((shifted.bits() << 23) + (127 << 23));
}

RNN_HD Vec<float> sigmoid(Vec<float> x) { return Vec<float>(1) / (Vec<float>(1) + exp(-x)); }

// tanh to within 4 units in the last place: the polynomial of tanhf in Cephes below 0.625, by e^2x above.
RNN_HD Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V large = V(1) - V(2) / (exp(x + x) + V(1));
  const V s = x * x;
  V p = V(-5.70498872745e-3f) * s + V(2.06390887954e-2f);
  p = p * s + V(-5.37397155531e-2f);
  p = p * s + V(1.33314422036e-1f);
  p = p * s + V(-3.33332819422e-1f);
  const V small = p * s * x + x;
  return where_positive(V(0.625f * 0.625f) - s, small, large);
}

// float64 serves gradient checks more than speed: the C library's functions, lane by lane.
RNN_HD Vec<double> sigmoid(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = 1.0 / (1.0 + std::exp(-x.v[i]));
  return x;
}
RNN_HD Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = std::tanh(x.v[i]);
  return x;
}

// Loads and stores of n <= kLanes values, converting between storage and arithmetic type.
template <class T>
  requires(sizeof(T) > 2)
RNN_HD Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x.v, p, sizeof x.v);
  return x;
}
template <class T>
RNN_HD void store(T* p, Vec<T> x) {
  std::memcpy(p, &x.v, sizeof x.v);
}

typedef uint16_t Half16 __attribute__((vector_size(RNN_VECTOR_BYTES / 2)));

RNN_HD Vec<float> widen(Half16 h, BFloat16) {
  using Bits = Vec<float>::Bits;
  return Vec<float>::from_bits(__builtin_convertvector(h, Bits) << 16);
}
RNN_HD Half16 narrow(Vec<float> x, BFloat16) {
  using Bits = Vec<float>::Bits;
  const Bits b = x.bits();
  const Bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Bits nan = ((b >> 16) & 0xffff) | 0x40;
  return __builtin_convertvector((b & 0x7fffffff) > 0x7f800000 ? nan : rounded, Half16);
}
RNN_HD Vec<float> widen(Half16 h, Float16) {
  using V = Vec<float>;
  using Bits = V::Bits;
  const Bits b = __builtin_convertvector(h, Bits) & 0xffff;
  const Bits sign = (b & 0x8000) << 16;
  const Bits magnitude = (b & 0x7fff) << 13;
  // Shifting the exponent by a product treats subnormals right; infinity and NaN need their exponent filled up.
  const Bits finite = (V::from_bits(magnitude) * V::from_bits(Bits{} + ((254 - 15) << 23))).bits();
  const Bits special = magnitude | 0x7f800000;
  return V::from_bits(sign | ((b & 0x7c00) == 0x7c00 ? special : finite));
}
RNN_HD Half16 narrow(Vec<float> x, Float16) {
  using V = Vec<float>;
  using Bits = V::Bits;
  const Bits b = x.bits();
  const Bits sign = (b >> 16) & 0x8000;
  const Bits magnitude = b & 0x7fffffff;
  const Bits normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 aligns a subnormal's last bit with the last bit of the float, which then rounds for us.
  const Bits subnormal = (V::from_bits(magnitude) + V(0.5f)).bits() - 0x3f000000;
  Bits h = magnitude < ((127 - 14) << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : h;  // 65520 and above round to infinity
  h = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : h;
  return __builtin_convertvector(sign | h, Half16);
}

template <class IO>
  requires(sizeof(IO) == 2)
RNN_HD Vec<float> load(const IO* p) {
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, IO{});
}
template <class IO>
  requires(sizeof(IO) == 2)
RNN_HD void store(IO* p, Vec<float> x) {
  const Half16 h = narrow(x, IO{});
  std::memcpy(p, &h, sizeof h);
}

template <class IO>
RNN_HD Vec<Arithmetic<IO>> load(const IO* p, int n) {
  if (n >= Vec<Arithmetic<IO>>::kLanes) return load(p);
  IO part[Vec<Arithmetic<IO>>::kLanes] = {};
  std::memcpy(part, p, n * sizeof(IO));
  return load(static_cast<const IO*>(part));
}
template <class IO>
RNN_HD void store(IO* p, Vec<Arithmetic<IO>> x, int n) {
  if (n >= Vec<Arithmetic<IO>>::kLanes) return store(p, x);
  IO part[Vec<Arithmetic<IO>>::kLanes];
  store(part, x);
  std::memcpy(p, part, n * sizeof(IO));
}

}  // namespace rnn::cpu::RNN_ISA
