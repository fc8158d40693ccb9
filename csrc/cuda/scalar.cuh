// One value as a thread sees it: the arithmetic type that cells.h asks for, and its loads and stores.
// A type of its own, because float and double have no namespace in which a cell's sigmoid and tanh would be looked up.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/macros.h"
#include "common/storage.h"
#include "cuda/activation.h"

namespace rnn::cuda {

template <class T>
struct Scalar {
  T v;

  Scalar() = default;
  RNN_HD Scalar(T x) : v(x) {}
  template <class N>
    requires std::is_arithmetic_v<N>
  RNN_HD explicit Scalar(N x) : v(T(x)) {}

  friend RNN_HD Scalar operator+(Scalar a, Scalar b) { return a.v + b.v; }
  friend RNN_HD Scalar operator-(Scalar a, Scalar b) { return a.v - b.v; }
  friend RNN_HD Scalar operator*(Scalar a, Scalar b) { return a.v * b.v; }
  friend RNN_HD Scalar operator/(Scalar a, Scalar b) { return a.v / b.v; }
  friend RNN_HD Scalar operator-(Scalar a) { return -a.v; }
  RNN_HD Scalar& operator+=(Scalar b) {
    v += b.v;
    return *this;
  }

  // float64 serves gradient checks more than speed. e^-x overflows to infinity and underflows to zero, so that sigmoid
  // saturates at 0 and 1; a NaN stays a NaN.
  friend RNN_HD Scalar sigmoid(Scalar x) {
    if constexpr (std::is_same_v<T, float>) {
      return fast_sigmoid(x.v);
    } else {
      return T(1) / (T(1) + std::exp(-x.v));
    }
  }
  friend RNN_HD Scalar tanh(Scalar x) {
    if constexpr (std::is_same_v<T, float>) {
      return fast_tanh(x.v);
    } else {
      return std::tanh(x.v);
    }
  }
  friend RNN_HD Scalar where_at_most_zero(Scalar x, Scalar a, Scalar b) { return x.v <= T(0) ? a : b; }

  // What cells that users write may ask for: CUDA's own functions.
  friend RNN_HD Scalar where_less(Scalar a, Scalar b, Scalar x, Scalar y) { return a.v < b.v ? x : y; }
  friend RNN_HD Scalar where_at_most(Scalar a, Scalar b, Scalar x, Scalar y) { return a.v <= b.v ? x : y; }
  friend RNN_HD Scalar where_equal(Scalar a, Scalar b, Scalar x, Scalar y) { return a.v == b.v ? x : y; }
  friend RNN_HD Scalar minimum(Scalar a, Scalar b) { return a.v < b.v || a.v != a.v ? a : b; }  // NaN where either is
  friend RNN_HD Scalar maximum(Scalar a, Scalar b) { return a.v > b.v || a.v != a.v ? a : b; }
  friend RNN_HD Scalar abs(Scalar x) { return std::fabs(x.v); }
  friend RNN_HD Scalar sqrt(Scalar x) { return std::sqrt(x.v); }
  friend RNN_HD Scalar exp(Scalar x) { return std::exp(x.v); }
  friend RNN_HD Scalar log(Scalar x) { return std::log(x.v); }
  friend RNN_HD Scalar softplus(Scalar x) { return x.v > T(20) ? x.v : std::log1p(std::exp(x.v)); }
  friend RNN_HD Scalar power(Scalar x, double exponent) { return std::pow(x.v, T(exponent)); }
};

// How a storage type is read and written; specialised for the types of 16 bits, whose conversions are the GPU's own.
template <class IO>
struct Storage {
  static RNN_HD IO read(IO x) { return x; }
  static RNN_HD IO write(IO x) { return x; }
};

template <class IO>
RNN_HD Scalar<Arithmetic<IO>> load(const IO* p) {
  return Storage<IO>::read(*p);
}
template <class IO>
RNN_HD Scalar<Arithmetic<IO>> load_or_zero(const IO* p, int64_t offset) {
  return p ? load(p + offset) : Scalar<Arithmetic<IO>>(0);
}

// A number as it lies in memory, or zero. It is converted where it is used: a thread that converts what it has asked
// for stands still until it is there. One of 16 bits has a register by itself: moving it to half of one is work, too.
template <class IO>
struct Raw {
  std::conditional_t<sizeof(IO) == 2, uint32_t, IO> bits;

  Raw() = default;
  RNN_HD explicit Raw(IO x) {
    if constexpr (sizeof(IO) == 2) {
      bits = x.bits;
    } else {
      bits = x;
    }
  }
  static RNN_HD Raw zero() {
    Raw raw;
    raw.bits = 0;
    return raw;
  }
  static RNN_HD Raw or_zero(const IO* p, int64_t offset) { return p ? Raw(p[offset]) : zero(); }

  RNN_HD Scalar<Arithmetic<IO>> value() const {
    if constexpr (sizeof(IO) == 2) {
      return Storage<IO>::read(IO{uint16_t(bits)});
    } else {
      return bits;
    }
  }
};

template <class IO>
RNN_HD void store(IO* p, Scalar<Arithmetic<IO>> x) {
  *p = Storage<IO>::write(x.v);
}

}  // namespace rnn::cuda
