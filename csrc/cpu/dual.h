// A number and its tangent, by the rules of forward mode: what a cell's arithmetic is called with to have its
// derivative in a direction (Griewank and Walther, Evaluating Derivatives, 2008).
#pragma once

#include "cpu/math.h"

namespace rnn::cpu::RNN_ISA {

template <class V>
struct Dual {
  V v, t;

  RNN_HD Dual() = default;
  RNN_HD Dual(V value, V tangent) : v(value), t(tangent) {}
  template <class N>
    requires std::is_arithmetic_v<N>
  RNN_HD explicit Dual(N constant) : v(constant), t(0) {}

  friend RNN_HD Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.t + b.t}; }
  friend RNN_HD Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.t - b.t}; }
  friend RNN_HD Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.t * b.v + a.v * b.t}; }
  friend RNN_HD Dual operator-(Dual a) { return {-a.v, -a.t}; }
};

template <class V>
RNN_HD Dual<V> tanh(Dual<V> x) {
  const V y = tanh(x.v);
  return {y, x.t * (V(1) - y * y)};
}
template <class V>
RNN_HD Dual<V> sigmoid(Dual<V> x) {
  const V y = sigmoid(x.v);
  return {y, x.t * y * (V(1) - y)};
}
template <class V>
RNN_HD Dual<V> where_at_most_zero(Dual<V> x, Dual<V> a, Dual<V> b) {
  return {where_at_most_zero(x.v, a.v, b.v), where_at_most_zero(x.v, a.t, b.t)};
}

}  // namespace rnn::cpu::RNN_ISA
