// A SIMD vector of T with the operators and functions that cells.h asks for, and its loads and stores.
// Built on the vector extension of GCC and Clang, so the same text serves AVX-512, AVX2, SSE2 and NEON.
// Included once per instruction set, inside a namespace of its own, RNN_ISA (kernels.inc).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/macros.h"
#include "common/storage.h"

namespace rnn::cpu::RNN_ISA {

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float Data __attribute__((vector_size(RNN_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(RNN_VECTOR_BYTES)));
  typedef uint32_t Wrapping __attribute__((vector_size(RNN_VECTOR_BYTES)));
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
  template <class N>
    requires std::is_arithmetic_v<N>
  RNN_HD explicit Vec(N x) : Vec(static_cast<T>(x)) {}
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
RNN_HD Vec<T> where_at_most_zero(Vec<T> x, Vec<T> a, Vec<T> b) {
  return Vec<T>(x.v <= Vec<T>(0).v ? a.v : b.v);
}

// Rows to columns. Merging the first with the second half of all vectors, lane by lane, turns the bits of a value's
// place by one; after as many times as a lane has bits, rows and lanes have changed places.
template <class V, size_t... l>
RNN_HD void merge_halves(const V* from, V* to, std::index_sequence<l...>) {
  constexpr int n = V::kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < n / 2; ++i) {
    const auto a = from[i].v, b = from[i + n / 2].v;
    to[2 * i] = V(__builtin_shufflevector(a, b, int(l / 2 + (l % 2) * n)...));
    to[2 * i + 1] = V(__builtin_shufflevector(a, b, int(l / 2 + n / 2 + (l % 2) * n)...));
  }
}
template <class V>
RNN_HD void transpose(V (&rows)[V::kLanes]) {
  V other[V::kLanes];
  V *from = rows, *to = other;
#pragma GCC unroll 4
  for (int n = V::kLanes; n > 1; n /= 2) {
    merge_halves(from, to, std::make_index_sequence<V::kLanes>());
    V* done = to;
    to = from;
    from = done;
  }
  if (from != rows) {
#pragma GCC unroll 16
    for (int i = 0; i < V::kLanes; ++i) rows[i] = other[i];
  }
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
typedef int8_t Bytes __attribute__((vector_size(RNN_VECTOR_BYTES / 4)));

// To lanes of 32 bits. GCC does it in parts where an instruction does it at once.
RNN_HD Vec<float>::Bits lanes_of(Half16 h) {
  using Bits = Vec<float>::Bits;
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, Bits);
#endif
}

RNN_HD Vec<float>::Bits lanes_of(Bytes b) {
  using Bits = Vec<float>::Bits;
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  return reinterpret_cast<Bits>(_mm512_maskz_cvtepi8_epi32(0xffff, reinterpret_cast<__m128i>(b)));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  int64_t low;
  std::memcpy(&low, &b, sizeof low);
  return reinterpret_cast<Bits>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(low)));
#else
  return __builtin_convertvector(b, Bits);
#endif
}

RNN_HD Vec<float> widen(Half16 h, BFloat16) { return Vec<float>::from_bits(lanes_of(h) << 16); }
RNN_HD Half16 narrow(Vec<float> x, BFloat16) {
#if defined(RNN_BFLOAT16)
  return reinterpret_cast<Half16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x.v)));
#else
  using Bits = Vec<float>::Bits;
  using Wrapping = Native<float>::Wrapping;  // lanes that nobody asked for may hold any bits
  const Bits b = x.bits();
  const Bits rounded = Bits(Wrapping(b) + 0x7fff + Wrapping((b >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Bits nan = ((b >> 16) & 0xffff) | 0x40;
  return __builtin_convertvector((b & 0x7fffffff) > 0x7f800000 ? nan : rounded, Half16);
#endif
}
RNN_HD Vec<float> widen(Half16 h, Float16) {
  using V = Vec<float>;
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  // Without a mask GCC warns of a value that its own header leaves uninitialized.
  return V(reinterpret_cast<V::Data>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h))));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  return V(reinterpret_cast<V::Data>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h))));
#else
  using Bits = V::Bits;
  const Bits b = __builtin_convertvector(h, Bits) & 0xffff;
  const Bits sign = (b & 0x8000) << 16;
  const Bits magnitude = (b & 0x7fff) << 13;
  // Shifting the exponent by a product treats subnormals right; infinity and NaN need their exponent filled up.
  const Bits finite = (V::from_bits(magnitude) * V::from_bits(Bits{} + ((254 - 15) << 23))).bits();
  const Bits special = magnitude | 0x7f800000;
  return V::from_bits(sign | ((b & 0x7c00) == 0x7c00 ? special : finite));
#endif
}
RNN_HD Half16 narrow(Vec<float> x, Float16) {
  using V = Vec<float>;
  using Bits = V::Bits;
  const Bits b = x.bits();
  const Bits sign = (b >> 16) & 0x8000;
  const Bits magnitude = b & 0x7fffffff;
  // Lanes that nobody asked for may hold any bits: the sum of such, in whatever order compilers take it, wraps.
  using Wrapping = Native<float>::Wrapping;
  const Bits normal = Bits(Wrapping(magnitude) - ((127 - 15) << 23) + 0xfff + Wrapping((magnitude >> 13) & 1)) >> 13;
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

RNN_HD Vec<float> load(const Int8* p) {
  using V = Vec<float>;
  Bytes b;
  std::memcpy(&b, p, sizeof b);
  return V(__builtin_convertvector(lanes_of(b), V::Data));
}
// Of numbers between -127 and 127, to nearest, ties to even.
RNN_HD void store(Int8* p, Vec<float> x) {
  const Vec<float> shifted = x + Vec<float>(12582912.0f);  // 1.5 * 2^23: leaves an integer in the low bits
  const Bytes b = __builtin_convertvector(shifted.bits(), Bytes);
  std::memcpy(p, &b, sizeof b);
}

// Weights that are narrower than what products take: lane by lane, but for bfloat16, of which a lane holds two, since a
// shift or a mask takes less time than an instruction that widens.
template <class W>
constexpr int kInLane = std::is_same_v<W, BFloat16> ? 2 : 1;

// The j-th of each lane.
template <class W>
RNN_HD Vec<float> load_narrow(const W* p, int j) {
  if constexpr (kInLane<W> == 1) {
    return load(p);
  } else {
    using V = Vec<float>;
    V::Bits b;
    std::memcpy(&b, p, sizeof b);
    return V::from_bits(j == 0 ? b << 16 : b & int(0xffff0000));
  }
}
// Of x[0] and, where a lane holds two, x[1].
template <class W>
RNN_HD void store_narrow(W* p, const Vec<float>* x) {
  if constexpr (kInLane<W> == 1) {
    store(p, *x);
  } else {
    const auto b = lanes_of(narrow(x[0], W{})) | lanes_of(narrow(x[1], W{})) << 16;
    std::memcpy(p, &b, sizeof b);
  }
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
