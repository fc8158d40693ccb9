// The numbers of a case: what a layer is given, rounded as it is stored, and what it has to return, from the loop in
// double (loop.h).
#pragma once

#include <array>
#include <cmath>

#include "cases.h"
#include "common/cell_list.h"
#include "loop.h"

namespace rnn::probe {

// clang-format off
enum Field : int {
  kWeights, kInputWeights, kInputBias, kHiddenBias, kGx, kH0, kC0, kDy, kDhn, kDcn,  // given
  kY, kHn, kCn, kC, kSaved,                                                          // of forward
  kDgates, kDh0, kDc0,                                                               // of backward
  kFields
};
// clang-format on
constexpr const char* kNames[kFields] = {"w_hh", "w_ih", "b_ih", "b_hh", "gx", "h0",    "c0",     "dy",  "dh_n",
                                         "dc_n", "y",    "h_n",  "c_n",  "c",  "saved", "dgates", "dh0", "dc0"};

struct Cell {
  int number = -1, G = 0, S = 0, K = 0, A = 0;

  explicit Cell(const std::string& name) {
    int n = 0;
    for_each_cell([&](auto of) {
      using C = decltype(of);
      if (name == C::kName) number = n, G = C::G, S = C::S, K = C::K, A = C::A;
      ++n;
    });
  }
};

struct Sizes {
  int64_t T, B, D, H;
  int layers;
  int64_t window;
};

// Numbers by field; empty where a layer has no such tensor.
template <class T>
using Fields = std::array<T, kFields>;

// The arguments of a call of one layer, by where each field lies.
template <class IO>
Forward<IO> forward_call(const Sequence& q, const Cell& cell, const Fields<IO*>& at) {
  Forward<IO> call{};
  call.seq = q;
  call.I = q.H;
  for (int64_t d = 0; d < q.D; ++d) {
    call.w_hh[d] = at[kWeights] + d * cell.G * q.H * q.H;
    call.w_ih[d] = at[kInputWeights];  // of the upper layers of a wavefront, which have one direction
    call.b_ih[d] = at[kInputBias] + d * cell.G * q.H;
    call.b_hh[d] = at[kHiddenBias] + d * cell.G * q.H;
  }
  call.gx = at[kGx];
  call.h0 = at[kH0];
  call.c0 = at[kC0];
  call.y = at[kY];
  call.h_n = at[kHn];
  call.c_n = at[kCn];
  call.c = at[kC];
  call.saved = at[kSaved];
  return call;
}
template <class IO>
Backward<IO> backward_call(const Sequence& q, const Cell& cell, const Clip& clip, const Fields<IO*>& at) {
  Backward<IO> call{};
  call.seq = q;
  call.clip = clip;
  for (int64_t d = 0; d < q.D; ++d) call.w_hh[d] = at[kWeights] + d * cell.G * q.H * q.H;
  call.dy = at[kDy];
  call.dh_n = at[kDhn];
  call.dc_n = at[kDcn];
  call.h0 = at[kH0];
  call.c0 = at[kC0];
  call.y = at[kY];
  call.c = at[kC];
  call.saved = at[kSaved];
  call.dgates = at[kDgates];
  call.dh0 = at[kDh0];
  call.dc0 = at[kDc0];
  return call;
}

class Problem {
 public:
  Problem(const Cell& cell, const Sizes& n, bool options, Clip clip, cuda::Precision precision);

  // Fills in what forward returns; backward takes it rounded, and fills in what it returns.
  void run_forward();
  void run_backward();

  int64_t size(int layer, Field field) const;
  Sequence sequence(const int64_t* lengths, const bool* reset, bool backward) const {
    return {n.T, n.B, n.D, n.H, n.H, lengths, nullptr, reset, backward ? n.window : 0};
  }

  const Cell cell;
  const Sizes n;
  const Clip clip;
  std::vector<Fields<std::vector<double>>> layers;  // the lowest first
  std::vector<int64_t> lengths;                     // empty: every row is whole
  std::vector<char> reset;                          // of bool

 private:
  double random();  // in [-1, 1)
  void round(std::vector<double>& values) const;
  Fields<double*> pointers(int layer);
  Sequence on_host(bool backward) const;

  const cuda::Precision precision_;
  uint64_t state_ = 1;
};

}  // namespace rnn::probe
