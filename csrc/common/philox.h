// Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"):
// four words of 32 bits that are a function of a counter of four words and a key of two, and of nothing else.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rnn {

constexpr int kPhiloxWords = 4;

// Turns a counter into the words that it stands for. A word is the low half of a U, a number of 64 bits or a vector of
// them, whose high half may hold anything; product(a, m) is the product of the low half of a with m.
template <class U, class Product>
RNN_HD constexpr void philox4x32(U (&words)[kPhiloxWords], uint64_t key, Product product) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const U a = product(words[0], 0xD2511F53u), b = product(words[2], 0xCD9E8D57u);
    words[0] = (b >> 32) ^ words[1] ^ uint64_t(k0);
    words[1] = b;
    words[2] = (a >> 32) ^ words[3] ^ uint64_t(k1);
    words[3] = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The answers of the authors' own implementation (Random123, kat_vectors).
namespace known_answers {
struct Words {
  uint64_t of[kPhiloxWords];
  constexpr bool operator==(const Words&) const = default;
};
constexpr Words answer(Words counter, uint64_t key) {
  philox4x32(counter.of, key, [](uint64_t a, uint32_t m) { return (a & 0xffffffff) * m; });
  for (uint64_t& word : counter.of) word &= 0xffffffff;
  return counter;
}
static_assert(answer({0, 0, 0, 0}, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(answer({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff) ==
              Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(answer({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822) ==
              Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}  // namespace known_answers

}  // namespace rnn
