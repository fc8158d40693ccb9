// The threads of the CPU kernels, to be watched by ThreadSanitizer (make sanitize-threads): callers that run at the
// same time, each with threads of its own, which share units and rows and wait for each other at every step; and packed
// weights that one caller leaves behind and all others use. Every result is held against one thread's, bit by bit.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/cell_list.h"
#include "cpu/kernels.h"

namespace {

using namespace rnn;

struct Sizes {
  int64_t T, B, D, I, H;
};

// Memory of a call, aligned as kernels ask for it.
struct Memory {
  std::unique_ptr<void, decltype(&std::free)> held{nullptr, std::free};
  static void* allocate(int64_t bytes, void* context) {
    auto* self = static_cast<Memory*>(context);
    self->held.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
    return self->held.get();
  }
};

std::vector<float> drawn(int64_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::uniform_real_distribution<float> number(-0.3f, 0.3f);
  std::vector<float> values(n);
  for (float& x : values) x = number(bits);
  return values;
}

// A layer with its inputs, and what a call of it returns.
struct Layer {
  Sizes n;
  CellSizes cell;
  std::vector<float> x, w_ih, w_hh, b_ih, b_hh, h0, c0, dy;
  Layer(const Sizes& sizes, const CellSizes& cell) : n(sizes), cell(cell) {
    const int64_t rows = cell.G * n.H;
    x = drawn(n.T * n.B * n.I, 1), w_ih = drawn(n.D * rows * n.I, 2), w_hh = drawn(n.D * rows * n.H, 3);
    b_ih = drawn(n.D * rows, 4), b_hh = drawn(n.D * rows, 5);
    h0 = drawn(n.D * n.B * n.H, 6), c0 = drawn(n.D * n.B * n.H, 7), dy = drawn(n.T * n.B * n.D * n.H, 8);
  }
};

struct Results {
  std::vector<float> y, h_n, c_n, c, saved, dgates, dh0, dc0;
  explicit Results(const Layer& l) {
    const auto [T, B, D, I, H] = l.n;
    const int64_t steps = T * B * D * H, states = D * B * H;
    y.resize(steps), c.resize(steps), saved.resize(steps * l.cell.K), dgates.resize(steps * (l.cell.G + l.cell.A));
    h_n.resize(states), c_n.resize(states), dh0.resize(states), dc0.resize(states);
  }
  bool operator==(const Results& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(y, o.y) && same(h_n, o.h_n) && same(c_n, o.c_n) && same(c, o.c) && same(saved, o.saved) &&
           same(dgates, o.dgates) && same(dh0, o.dh0) && same(dc0, o.dc0);
  }
};

Forward<float> forward_of(const Layer& l, Results& r) {
  Forward<float> p{};
  p.seq = {l.n.T, l.n.B, l.n.D, l.n.H, l.n.H, nullptr, nullptr, nullptr, 0};
  p.I = l.n.I, p.x = l.x.data(), p.x_time = l.n.B * l.n.I, p.x_batch = l.n.I;
  for (int64_t d = 0; d < l.n.D; ++d) {
    const int64_t rows = l.cell.G * l.n.H;
    p.w_ih[d] = l.w_ih.data() + d * rows * l.n.I, p.w_hh[d] = l.w_hh.data() + d * rows * l.n.H;
    p.b_ih[d] = l.b_ih.data() + d * rows, p.b_hh[d] = l.b_hh.data() + d * rows;
  }
  p.h0 = l.h0.data(), p.y = r.y.data(), p.h_n = r.h_n.data(), p.saved = r.saved.data();
  if (l.cell.S > 1) p.c0 = l.c0.data(), p.c_n = r.c_n.data(), p.c = r.c.data();
  return p;
}

Backward<float> backward_of(const Layer& l, Results& r) {
  Backward<float> p{};
  p.seq = {l.n.T, l.n.B, l.n.D, l.n.H, l.n.H, nullptr, nullptr, nullptr, 0};
  p.dy = l.dy.data(), p.h0 = l.h0.data(), p.y = r.y.data();
  if (l.cell.S > 1) p.c0 = l.c0.data(), p.c = r.c.data(), p.dc0 = r.dc0.data();
  for (int64_t d = 0; d < l.n.D; ++d) p.w_hh[d] = l.w_hh.data() + d * l.cell.G * l.n.H * l.n.H;
  p.saved = r.saved.data(), p.dgates = r.dgates.data(), p.dh0 = r.dh0.data();
  return p;
}

// Forward and backward in `threads` threads at most; whether the packs were of use.
bool run(int cell, const Layer& l, Results& r, int threads, const cpu::Packs& packs) {
  const cpu::Entry<float>& entry = cpu::kernels()->float32;
  Memory memory;
  bool ran;
  {
    cpu::ThreadBudget budget(threads);
    ran = entry.forward({budget, Memory::allocate, &memory}, entry.cells[cell], forward_of(l, r), packs);
  }
  if (!ran) return false;
  cpu::ThreadBudget budget(threads);
  entry.backward({budget, Memory::allocate, &memory}, entry.cells[cell], backward_of(l, r));
  return true;
}

int failures = 0;
void expect(bool truth, const char* what, int cell, const Sizes& n) {
  if (truth) return;
  __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
  std::fprintf(stderr, "%s: cell %d, T %ld, B %ld, D %ld, H %ld\n", what, cell, long(n.T), long(n.B), long(n.D),
               long(n.H));
}

void try_layer(int cell, const CellSizes& sizes, const Sizes& n) {
  const Layer layer(n, sizes);
  Results alone(layer), first(layer);
  run(cell, layer, alone, 1, {});

  const cpu::Entry<float>& entry = cpu::kernels()->float32;
  const int64_t bytes = entry.packed_bytes(entry.cells[cell], forward_of(layer, first), cpu::PackedType::kOwn);
  Memory kept;
  cpu::Packs packs{.keep = true, .memory = Memory::allocate(bytes, &kept)};
  run(cell, layer, first, 2, packs);
  expect(first == alone, "other bits where packs are made", cell, n);
  packs.filled = true;

  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      Results own(layer);
      for (int call = 0; call < 3; ++call) {
        const bool ran = run(cell, layer, own, 1 + (caller + call) % 3, call == 1 ? cpu::Packs{} : packs);
        expect(ran, "packs taken for stale", cell, n);
        expect(own == alone, "other bits", cell, n);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();

  Layer changed(layer);
  for (float& x : changed.w_hh) x += 1;  // in the tiles of every thread
  expect(!run(cell, changed, first, 3, packs), "stale packs taken", cell, n);
}

}  // namespace

int main() {
  int cell = 0;
  for_each_cell([&](auto of) {
    // By directions and units, by units, by rows; odd numbers of units.
    for (const Sizes& n : {Sizes{6, 3, 2, 40, 72}, Sizes{9, 2, 1, 33, 131}, Sizes{5, 24, 1, 16, 48}})
      try_layer(cell, CellSizes::of(of), n);
    ++cell;
  });
  if (failures == 0) std::puts("done");
  return failures == 0 ? 0 : 1;
}
