// The loops over time, step by step (cuda/step.h), without torch: in double on the host they are the reference, and on
// the machine they are the kernels that follow the products, which the host computes in between.
//
// An executor launches a step and, for the products, says where the host has what the machine's pointers mean.
#pragma once

#include <bit>
#include <cmath>

#include "arena.h"

namespace rnn::probe {

inline double widen(double x) { return x; }
inline double widen(float x) { return x; }
inline double widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = float(x); }
inline void narrow(double x, BFloat16& to) {  // to the nearest, ties to even; x is no NaN
  const auto bits = std::bit_cast<uint32_t>(float(x));
  to.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// y [rows, N] = x [rows, K] w, with w [N, K], or [K, N] where it is to be transposed.
template <class IO>
void multiply(IO* y, const IO* x, const IO* w, int64_t rows, int64_t N, int64_t K, bool transposed) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += widen(x[r * K + k]) * widen(transposed ? w[k * N + n] : w[n * K + k]);
      narrow(sum, y[r * N + n]);
    }
}

// In double, where the host is the machine.
struct OnHost {
  int cell;

  template <class T>
  T* host(T* p) const {
    return p;
  }
  void before_product() const {}
  void after_product() const {}
  template <class Step>
  void launch(const Step& step) const {
    const Sequence& q = cuda::sequence_of(step);
    cuda::dispatch_step<Step>(cell, [&](auto of) {
      for (int64_t n = 0; n < q.D * q.rows(); ++n)
        for (int64_t i = 0; i < cuda::units_of(step); ++i) step.template unit<decltype(of)>(cuda::Slot(q, n), i);
    });
  }
};

struct OnMachine {
  int cell;
  Arena& arena;

  template <class T>
  T* host(T* p) const {
    return arena.host_of(p);
  }
  void before_product() const {
    Machine::wait();
    arena.download();
  }
  void after_product() const { arena.upload(); }
  template <class Step>
  void launch(const Step& step) const {
    Machine::launch(cell, step);
  }
};

// State as it goes from step to step; h and c start as the initial states, and end as the final ones.
template <class IO>
struct Stepping {
  IO* gh;             // [D, B, G*H]
  IO* h;              // [D, B, H]
  Arithmetic<IO>* c;  // [D, B, H] or null
};

template <class IO, class Executor>
void forward_loop(const Forward<IO>& call, int G, const Stepping<IO>& s, const Executor& run) {
  const Sequence& q = call.seq;
  for (int64_t step = 0; step < q.T; ++step) {
    run.before_product();
    for (int64_t d = 0; d < q.D; ++d)
      multiply(run.host(s.gh) + d * q.B * G * q.H, run.host(s.h) + d * q.B * q.H, run.host(call.w_hh[d]), q.B, G * q.H,
               q.H, false);
    run.after_product();
    run.launch(cuda::ForwardCell<IO>{call, step, s.gh, s.h, nullptr, s.c, nullptr});
  }
}

template <class IO, class Executor>
void backward_loop(const Backward<IO>& call, int G, int A, const cuda::Carried<IO>& c, const Executor& run) {
  const Sequence& q = call.seq;
  const int64_t rows = q.rows(), width = G + A;
  const auto product = [&] {
    run.before_product();
    for (int64_t d = 0; d < q.D; ++d)
      multiply(run.host(c.dh_through) + d * rows * q.H, run.host(c.dgh) + d * rows * G * q.H, run.host(call.w_hh[d]),
               rows, q.H, G * q.H, true);
    run.after_product();
  };
  run.launch(cuda::BackwardBegin<IO>{q, q.H, call.dh_n, c.dh});
  if (c.dc) run.launch(cuda::BackwardBegin<IO>{q, q.H, call.dc_n, c.dc});
  for (int64_t step = q.steps() - 1; step >= 0; --step) {
    if (step + 1 < q.steps()) product();
    run.launch(cuda::BackwardCell<IO>{call, step, c});
    if (!c.unbounded) continue;
    run.before_product();
    for (int64_t n = 0; n < q.D * rows; ++n) {
      double sum = 0;
      const double* row = run.host(c.unbounded) + n * width * q.H;
      for (int64_t i = 0; i < G * q.H; ++i) sum += row[i] * row[i];
      run.host(c.norms)[n] = std::sqrt(sum);
    }
    run.after_product();
    run.launch(cuda::BackwardBound<IO>{call, step, c});
  }
  product();
  run.launch(cuda::BackwardFinish<IO>{q, q.H, c.dh_through, nullptr, c.dh, call.dh0});
  if (c.dc) run.launch(cuda::BackwardFinish<IO>{q, q.H, nullptr, nullptr, c.dc, call.dc0});
}

}  // namespace rnn::probe
