// The kernels as a library by themselves, without torch and Python: layers forward, held against the formulas of
// torch.nn's documentation in double precision, and to the same bits in any number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/cell_list.h"
#include "cpu/kernels.h"

namespace {

using namespace rnn;

constexpr int64_t T = 9, B = 3, I = 11, H = 37;  // no multiples of a vector
int failures = 0;

// Memory of a call, aligned as kernels ask for it.
struct Memory {
  std::unique_ptr<void, decltype(&std::free)> held{nullptr, std::free};
  static void* allocate(int64_t bytes, void* context) {
    auto* self = static_cast<Memory*>(context);
    self->held.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
    return self->held.get();
  }
};

template <class IO>
std::vector<IO> drawn(int64_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::uniform_real_distribution<float> number(-0.5f, 0.5f);
  std::vector<IO> values(n);
  for (IO& x : values) x = IO(number(bits));
  return values;
}

template <class IO>
struct Layer {
  CellSizes cell;
  std::vector<IO> x, w_ih, w_hh, b_ih, b_hh, h0, c0;
  explicit Layer(const CellSizes& cell) : cell(cell) {
    x = drawn<IO>(T * B * I, 1), w_ih = drawn<IO>(cell.G * H * I, 2), w_hh = drawn<IO>(cell.G * H * H, 3);
    b_ih = drawn<IO>(cell.G * H, 4), b_hh = drawn<IO>(cell.G * H, 5);
    h0 = drawn<IO>(B * H, 6), c0 = drawn<IO>(B * cell.C() * H, 7);
  }
};

template <class IO>
const cpu::Entry<IO>& entry() {
  if constexpr (sizeof(IO) == sizeof(double)) {
    return cpu::kernels()->float64;
  } else {
    return cpu::kernels()->float32;
  }
}

template <class IO>
std::vector<IO> by_kernels(const Layer<IO>& l, int number, int threads) {
  std::vector<IO> y(T * B * H), h_n(B * H), c_n(B * H), c(T * B * H);
  Forward<IO> p{};
  p.seq = {T, B, 1, H, H, nullptr, nullptr, nullptr, 0};
  p.I = I, p.x = l.x.data(), p.x_time = B * I, p.x_batch = I;
  p.w_ih[0] = l.w_ih.data(), p.w_hh[0] = l.w_hh.data(), p.b_ih[0] = l.b_ih.data(), p.b_hh[0] = l.b_hh.data();
  p.h0 = l.h0.data(), p.y = y.data(), p.h_n = h_n.data();
  if (l.cell.C() > 0) p.c0 = l.c0.data(), p.c_n = c_n.data(), p.c = c.data();
  Memory memory;
  cpu::ThreadBudget budget(threads);
  entry<IO>().forward({budget, Memory::allocate, &memory}, entry<IO>().cells[number], p, {});
  return y;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A step of one unit: what comes from the input and from h, G numbers each, and the states before it.
using Step = double (*)(const double* x, const double* h, double before, double& c);
double rnn_tanh(const double* x, const double* h, double, double&) { return std::tanh(x[0] + h[0]); }
double lstm(const double* x, const double* h, double, double& c) {
  c = sigmoid(x[1] + h[1]) * c + sigmoid(x[0] + h[0]) * std::tanh(x[2] + h[2]);
  return sigmoid(x[3] + h[3]) * std::tanh(c);
}
double gru(const double* x, const double* h, double before, double&) {
  const double z = sigmoid(x[1] + h[1]), n = std::tanh(x[2] + sigmoid(x[0] + h[0]) * h[2]);
  return (1 - z) * n + z * before;
}

template <class IO>
std::vector<double> by_formula(const Layer<IO>& l, Step step) {
  std::vector<double> y(T * B * H), h(l.h0.begin(), l.h0.end()), c(B * H), next(H);
  for (size_t i = 0; i < l.c0.size(); ++i) c[i] = l.c0[i];
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t j = 0; j < H; ++j) {
        double gx[4], gh[4];
        for (int g = 0; g < l.cell.G; ++g) {
          const int64_t row = g * H + j;
          gx[g] = l.b_ih[row], gh[g] = l.b_hh[row];
          for (int64_t i = 0; i < I; ++i) gx[g] += double(l.w_ih[row * I + i]) * l.x[(t * B + b) * I + i];
          for (int64_t k = 0; k < H; ++k) gh[g] += double(l.w_hh[row * H + k]) * h[b * H + k];
        }
        next[j] = step(gx, gh, h[b * H + j], c[b * H + j]);
      }
      for (int64_t j = 0; j < H; ++j) y[(t * B + b) * H + j] = h[b * H + j] = next[j];
    }
  }
  return y;
}

// The bound: each of T steps adds up I + H products and two biases, and rounds each sum once; values are below 1.
template <class IO, class Cell>
void check(Cell cell, Step step, const char* name) {
  const int number = number_of<Cell>(AllCells{});
  const Layer<IO> layer(CellSizes::of(cell));
  const std::vector<IO> found = by_kernels(layer, number, 1);
  const std::vector<double> wanted = by_formula(layer, step);
  double most = 0;
  for (size_t i = 0; i < wanted.size(); ++i) most = std::fmax(most, std::fabs(found[i] - wanted[i]));
  const double epsilon = sizeof(IO) == sizeof(double) ? 0x1p-52 : 0x1p-23;
  const double bound = double(T * (I + H + 2)) * epsilon;
  std::printf("%s in %d bytes: %.1e, at most %.1e\n", name, int(sizeof(IO)), most, bound);
  if (!(most <= bound)) ++failures;
  for (int threads : {2, 3}) {
    const std::vector<IO> again = by_kernels(layer, number, threads);
    if (std::memcmp(again.data(), found.data(), found.size() * sizeof(IO)) != 0) {
      std::printf("%s: other bits in %d threads\n", name, threads);
      ++failures;
    }
  }
}

}  // namespace

int main() {
  if (!cpu::kernels()) return 2;
  std::printf("kernels: %s\n", cpu::kernels()->name);
  check<float>(RNNTanh{}, rnn_tanh, "RNN"), check<double>(RNNTanh{}, rnn_tanh, "RNN");
  check<float>(LSTM{}, lstm, "LSTM"), check<double>(LSTM{}, lstm, "LSTM");
  check<float>(GRU{}, gru, "GRU"), check<double>(GRU{}, gru, "GRU");
  std::puts(failures == 0 ? "all right" : "wrong");
  return failures == 0 ? 0 : 1;
}
