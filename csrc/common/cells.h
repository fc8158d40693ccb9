// The arithmetic of every cell: one hidden unit, one step. Nothing here knows of memory, threads or storage types.
//
// A cell is a struct of constants and two static templates on the arithmetic type V, which is a scalar on a GPU and a
// SIMD vector on a CPU. V brings operators and, found by argument-dependent lookup, sigmoid(V), tanh(V) and
// where_at_most_zero(x, a, b): a where x <= 0, else b, which is what a NaN takes.
//
//   gx   [G]  input part of the gates, W_ih x + b_ih
//   gh   [G]  hidden part of the gates, W_hh h + b_hh
//   prev [S], next [S]  states before and after; slot 0 is h, slot 1 and those behind it are others, as c is
//   saved [K] what backward needs beyond prev and next
//   dgx, dgh [G]  gradients of gx and gh; equal but for the last A gates, the split ones
//   dprev [S]  gradient of prev along the paths around W_hh; the path through W_hh is the backend's
//
// Where K > 0, a third one, tangents(saved, gx', gh', saved'), has what small changes of both parts of the gates change
// saved by; how the next states change follows from backward (cpu/tangent_units.h).
//
// A cell is usable once it stands in cell_list.h. kReadsH says whether backward reads next h; a step whose backward
// does not has no need to keep it.
#pragma once

#include "macros.h"

namespace rnn {

struct Tanh {
  template <class V>
  static RNN_HD V value(V x) {
    return tanh(x);
  }
  template <class V>
  static RNN_HD V gradient(V y, V dy) {
    return dy * (V(1) - y * y);
  }
};

struct Relu {
  template <class V>
  static RNN_HD V value(V x) {
    return where_at_most_zero(x, V(0), x);  // a NaN stays a NaN
  }
  template <class V>
  static RNN_HD V gradient(V y, V dy) {
    return where_at_most_zero(y, V(0), dy);  // not hidden behind a zero where y is NaN
  }
};

struct Sigmoid {
  template <class V>
  static RNN_HD V value(V x) {
    return sigmoid(x);
  }
  template <class V>
  static RNN_HD V gradient(V y, V dy) {
    return dy * y * (V(1) - y);
  }
};

// Elman 1990: h' = f(gx + gh).
template <class Activation>
struct Elman {
  static constexpr const char* kGates = "h";
  static constexpr int G = 1, S = 1, K = 0, A = 0;
  static constexpr bool kReadsH = true;

  template <class V>
  static RNN_HD void forward(const V* gx, const V* gh, const V*, V* next, V*) {
    next[0] = Activation::value(gx[0] + gh[0]);
  }

  template <class V>
  static RNN_HD void backward(const V*, const V*, const V* next, const V* dnext, V* dgx, V* dgh, V* dprev) {
    dgx[0] = dgh[0] = Activation::gradient(next[0], dnext[0]);
    dprev[0] = V(0);
  }
};

struct RNNTanh : Elman<Tanh> {
  static constexpr const char* kName = "rnn_tanh";
};
struct RNNRelu : Elman<Relu> {
  static constexpr const char* kName = "rnn_relu";
};
struct RNNSigmoid : Elman<Sigmoid> {
  static constexpr const char* kName = "rnn_sigmoid";
};

// Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; gates i f g o as in torch.nn.LSTM.
struct LSTM {
  static constexpr const char* kName = "lstm";
  static constexpr const char* kGates = "ifgo";
  static constexpr int G = 4, S = 2, K = 4, A = 0;
  static constexpr bool kReadsH = false;

  template <class V>
  static RNN_HD void forward(const V* gx, const V* gh, const V* prev, V* next, V* saved) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]);
    const V o = sigmoid(gx[3] + gh[3]);
    const V c = f * prev[1] + i * g;
    next[0] = o * tanh(c);
    next[1] = c;
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  template <class V>
  static RNN_HD void backward(const V* saved, const V* prev, const V* next, const V* dnext, V* dgx, V* dgh, V* dprev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (V(1) - tanh_c * tanh_c);
    dgx[0] = dgh[0] = dc * g * i * (V(1) - i);
    dgx[1] = dgh[1] = dc * prev[1] * f * (V(1) - f);
    dgx[2] = dgh[2] = dc * i * (V(1) - g * g);
    dgx[3] = dgh[3] = dnext[0] * tanh_c * o * (V(1) - o);
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }

  template <class V>
  static RNN_HD void tangents(const V* saved, const V* gx_t, const V* gh_t, V* saved_t) {
    saved_t[0] = Sigmoid::gradient(saved[0], gx_t[0] + gh_t[0]);
    saved_t[1] = Sigmoid::gradient(saved[1], gx_t[1] + gh_t[1]);
    saved_t[2] = Tanh::gradient(saved[2], gx_t[2] + gh_t[2]);
    saved_t[3] = Sigmoid::gradient(saved[3], gx_t[3] + gh_t[3]);
  }
};

// Cho et al. 2014 with the reset gate applied after the recurrent product; gates r z n as in torch.nn.GRU.
// saved: r, z, n and the hidden part of n.
struct GRU {
  static constexpr const char* kName = "gru";
  static constexpr const char* kGates = "rzn";
  static constexpr int G = 3, S = 1, K = 4, A = 1;
  static constexpr bool kReadsH = false;

  template <class V>
  static RNN_HD void forward(const V* gx, const V* gh, const V* prev, V* next, V* saved) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    const V n = tanh(gx[2] + r * gh[2]);
    next[0] = n + z * (prev[0] - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = gh[2];
  }

  template <class V>
  static RNN_HD void backward(const V* saved, const V* prev, const V*, const V* dnext, V* dgx, V* dgh, V* dprev) {
    const V r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
    dgx[2] = dnext[0] * (V(1) - z) * (V(1) - n * n);
    dgh[2] = dgx[2] * r;
    dgx[0] = dgh[0] = dgx[2] * gh_n * r * (V(1) - r);
    dgx[1] = dgh[1] = dnext[0] * (prev[0] - n) * z * (V(1) - z);
    dprev[0] = dnext[0] * z;
  }

  template <class V>
  static RNN_HD void tangents(const V* saved, const V* gx_t, const V* gh_t, V* saved_t) {
    saved_t[0] = Sigmoid::gradient(saved[0], gx_t[0] + gh_t[0]);
    saved_t[1] = Sigmoid::gradient(saved[1], gx_t[1] + gh_t[1]);
    saved_t[2] = Tanh::gradient(saved[2], gx_t[2] + saved_t[0] * saved[3] + saved[0] * gh_t[2]);
    saved_t[3] = gh_t[2];
  }
};

}  // namespace rnn
