// What the 32 lanes of a warp do together: the last lane to come does it for all.
#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "simt/internals.h"
#include "simt/storage.h"

namespace rnn::simt {
namespace {

template <class Operands>
using Lanes = std::array<Operands*, kWarp>;

// `act` gets what each lane brought.
template <class Operands, class Act>
void together(Machine& m, const Site& site, Operands& mine, const Act& act) {
  Thread& self = m.self();
  Warp& warp = self.warp();
  const int lane = self.lane();
  if (m.grid().threads - (self.index - lane) < kWarp) m.fail(site, "its warp has less than 32 threads");
  if (warp.exited) m.fail(site, "a lane of its warp has come to its end");
  if (warp.arrived == 0) warp.site = &site;
  if (warp.site != &site) m.fail(site, "lanes of its warp wait elsewhere, " + warp.site->name);
  warp.lanes[size_t(lane)] = &self;
  warp.brought[size_t(lane)] = &mine;
  if (++warp.arrived < kWarp) return m.sleep(site);
  Lanes<Operands> all;
  std::ranges::transform(warp.brought, all.begin(), [](void* p) { return static_cast<Operands*>(p); });
  act(all);
  warp.arrived = 0;
  std::vector<Thread*> others;
  for (Thread* other : warp.lanes)
    if (other != &self) others.push_back(other);
  m.wake(others);
  m.yield();
}

// Passes that eight rows of 16 bytes take beyond the first: the rows of a pass are in different banks, of which there
// are eight for 16 bytes each.
int bank_conflicts(const std::array<ptrdiff_t, 8>& rows) {
  int most = 0;
  for (ptrdiff_t bank = 0; bank < 8; ++bank) {
    std::set<ptrdiff_t> different;
    for (const ptrdiff_t row : rows)
      if (row / 16 % 8 == bank) different.insert(row);
    most = std::max(most, int(different.size()));
  }
  return most - 1;
}

// The elements of a word of 4 bytes.
std::array<float, 1> elements(uint32_t word, cuda::TF32) { return {std::bit_cast<float>(word & 0xffffe000)}; }
template <class IO>
std::array<float, 2> elements(uint32_t word, IO) {
  const auto read = [](uint32_t bits) { return cuda::Storage<IO>::read({uint16_t(bits)}); };
  return {read(word), read(word >> 16)};
}

struct Product {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Type>
void multiply(const Lanes<Product>& lanes, Type type) {
  constexpr size_t kPerWord = std::tuple_size_v<decltype(elements(0, type))>, kK = 8 * kPerWord;
  float a[16][kK], b[kK][8], sum[16][8];
  // Lane, word of a or b in the order of the operands, its row and its place in that row.
  for (size_t l = 0; l < kWarp; ++l) {
    const Product& p = *lanes[l];
    const size_t row = l / 4, column = l % 4 * 2;
    for (size_t half = 0; half < 2; ++half) {
      const size_t k = (half * 4 + l % 4) * kPerWord;
      const auto upper = elements(p.a[half * 2], type), lower = elements(p.a[half * 2 + 1], type);
      const auto of_b = elements(p.b[half], type);
      for (size_t i = 0; i < kPerWord; ++i) {
        a[row][k + i] = upper[i];
        a[row + 8][k + i] = lower[i];
        b[k + i][row] = of_b[i];
      }
      for (size_t i = 0; i < 2; ++i) sum[row + half * 8][column + i] = p.sum[half * 2 + i];
    }
  }
  for (size_t m = 0; m < 16; ++m)
    for (size_t k = 0; k < kK; ++k)
      for (size_t n = 0; n < 8; ++n) sum[m][n] += a[m][k] * b[k][n];
  for (size_t l = 0; l < kWarp; ++l)
    for (size_t i = 0; i < 4; ++i) lanes[l]->sum[i] = sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

template <class Type>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Type type, const Here& here) {
  const Unwatched unwatched;
  Machine& m = Machine::current();
  Product mine{sum, a, {b0, b1}};
  together(m, m.enter_always(here, "multiply"), mine, [&](const Lanes<Product>& all) { multiply(all, type); });
}

}  // namespace
}  // namespace rnn::simt

namespace rnn::cuda {

using simt::Lanes;
using simt::Machine;

void load_matrices(uint32_t (&to)[4], const void* row, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site& site = m.enter_always(here, "load_matrices");
  m.shared_offset(site, "the row", row, 16, 16);
  struct Load {
    uint32_t* to;
    const char* row;
  } mine{to, static_cast<const char*>(row)};
  simt::together(m, site, mine, [&](const Lanes<Load>& all) {
    const auto& lanes = m.self().warp().lanes;
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      std::array<ptrdiff_t, 8> rows;
      for (size_t i = 0; i < 8; ++i) rows[i] = all[matrix * 8 + i]->row - m.self().block->shared.get();
      m.note_bank_conflicts(simt::bank_conflicts(rows));
    }
    for (size_t l = 0; l < kWarp; ++l) {
      // Whoever names a row reads it, and so does whoever gets a word of it.
      m.reads(*lanes[l], all[l]->row, 16, site);
      for (size_t matrix = 0; matrix < 4; ++matrix) {
        const char* const word = all[matrix * 8 + l / 4]->row + l % 4 * 4;
        m.reads(*lanes[l], word, 4, site);
        std::memcpy(all[l]->to + matrix, word, 4);
      }
    }
  });
}

void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16 type, Here here) {
  simt::multiply(sum, a, b0, b1, type, here);
}
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16 type, Here here) {
  simt::multiply(sum, a, b0, b1, type, here);
}
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TF32 type, Here here) {
  simt::multiply(sum, a, b0, b1, type, here);
}

// To the nearest, ties away from zero.
uint32_t round_to_tf32(float x) { return x != x ? 0x7fffffff : (std::bit_cast<uint32_t>(x) + 0x1000) & 0xffffe000; }

float shuffle_xor(float x, int mask, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site& site = m.enter_always(here, "shuffle_xor");
  if (mask < 0 || mask >= kWarp) m.fail(site, "a mask of " + std::to_string(mask) + ", expected 0 to 31");
  struct Exchange {
    float mine, theirs;
    int mask;
  } mine{x, 0, mask};
  simt::together(m, site, mine, [](const Lanes<Exchange>& all) {
    for (size_t l = 0; l < kWarp; ++l) all[l]->theirs = all[l ^ size_t(all[l]->mask)]->mine;
  });
  return mine.theirs;
}

}  // namespace rnn::cuda
