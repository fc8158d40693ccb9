// Cells whose products are normalised (layer normalisation, Ba et al. 2016). Such a cell is handed the input part of
// its gates as it is, x [T, B, D*G*H], but for b_ih, and has no W_ih. The hidden part is
//
//   gh = scale * (W_hh h - mean) / deviation,   deviation = sqrt(variance + kNormEpsilon),
//
// over all gates and units of a row, but for gates that were split, which are normalised by themselves: two groups of
// gates then. There is a scale for each number and, of the split gates, a shift; that of others is in the input part.
// It is followed by a cell of the contract as any. Where that emits, its slot 0 is not h yet: h = emit(slot 0, n) with
// n the normalised slot 1, over H numbers, with a scale and a shift of its own.
//
// A row's mean and deviation are row statistics, so the loops take a step of such a cell in several parts, with a
// barrier between any two. They keep W_hh h itself as the last G of what is saved, and what the cell saves of the
// hidden parts of split gates, its last values, is not kept, as it follows. Parameters are, in this order, the scales
// of the gates, the shifts of the split ones, the scale and the shift of what is emitted.
#pragma once

#include "cells.h"

namespace rnn {

constexpr double kNormEpsilon = 1e-5;

// The LSTM up to its output gate and c; h = o tanh(n).
struct EmittingLSTM : LSTM {
  static constexpr int kEmitted = 3;  // slot 0 among what is saved

  template <class V>
  static RNN_HD void forward(const V* gx, const V* gh, const V* prev, V* next, V* saved) {
    LSTM::forward(gx, gh, prev, next, saved);
    next[0] = saved[kEmitted];  // the compiler leaves out what h would have been
  }

  template <class V>
  static RNN_HD void backward(const V* saved, const V* prev, const V*, const V* dnext, V* dgx, V* dgh, V* dprev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V dc = dnext[1];
    dgx[0] = dgh[0] = dc * g * i * (V(1) - i);
    dgx[1] = dgh[1] = dc * prev[1] * f * (V(1) - f);
    dgx[2] = dgh[2] = dc * i * (V(1) - g * g);
    dgx[3] = dgh[3] = dnext[0] * o * (V(1) - o);
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }

  template <class V>
  static RNN_HD V emit(V o, V n) {
    return o * tanh(n);
  }
  template <class V>
  static RNN_HD void emit_backward(V o, V n, V dh, V& d_o, V& dn) {
    const V tanh_n = tanh(n);
    d_o = dh * tanh_n;
    dn = dh * o * (V(1) - tanh_n * tanh_n);
  }
};

template <class Own_>
struct Normed : Own_ {
  using Own = Own_;
  static constexpr bool kNormed = true, kEmits = requires { Own::kEmitted; };
  static constexpr int kOwnA = Own::A, kOwnK = Own::K - kOwnA;
  static constexpr int kGroups = kOwnA > 0 ? 2 : 1;
  static constexpr int K = kOwnK + Own::G, A = Own::G, P = Own::G + kOwnA + 2 * kEmits;
};

struct NormedLSTM : Normed<EmittingLSTM> {
  static constexpr const char* kName = "layer_norm_lstm";
  static constexpr const char* kParams = "scale_i scale_f scale_g scale_o scale_c shift_c";
};
struct NormedGRU : Normed<GRU> {
  static constexpr const char* kName = "layer_norm_gru";
  static constexpr const char* kParams = "scale_r scale_z scale_n shift_n";
};

}  // namespace rnn
