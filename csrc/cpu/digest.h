// Digests of weights, by which a call sees whether panels that an earlier one has packed still hold what the weights
// hold now. Memory can be written to by ways that nobody counts (NumPy, .data, another process), so it is read.
//
// The words x of 32 bits of a period of memory, and as many random keys a, b != 0, give sum(a x) and sum(b x) modulo
// 2^64, for each lane of a vector by itself. One word that changes changes both sums: 0 < |a (x - x')| < 2^64. Whatever
// changes, for all but one of the keys as they may be, at most one value of that key leaves a sum as it was, since two
// such values would differ by less than 2^32, times less than 2^32. Of 2^32 values, two have become 1, so the odds that
// a change goes unnoticed are at most (2 / 2^32)^2 = 2^-62. Keys are drawn once per process and shown to nobody, so
// that they do not depend on what is written.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "cpu/digest_keys.h"

namespace rnn::cpu::RNN_ISA {

typedef uint64_t Words __attribute__((vector_size(RNN_VECTOR_BYTES)));

// The products of the lower halves of all lanes.
RNN_HD Words multiply_halves(Words a, Words b) {
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  // Without a mask GCC warns of a value that its own header leaves uninitialized.
  return reinterpret_cast<Words>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

struct Digest {
  Words sums[2];

  RNN_HD bool operator==(const Digest& other) const {
    const Words difference = (sums[0] ^ other.sums[0]) | (sums[1] ^ other.sums[1]);
    uint64_t any = 0;
    for (size_t i = 0; i < sizeof(Words) / sizeof(uint64_t); ++i) any |= difference[i];
    return any == 0;
  }
};

// Digests of a period of N rows of memory at once, which keeps the multipliers busy: n <= kDigestPeriod bytes of each;
// what is missing of a vector counts as zeros.
template <int N>
RNN_HD void digest(const char* const* from, int64_t n, const DigestKeys& keys, Digest* to) {
  constexpr int64_t kBytes = sizeof(Words);
  Words sums[N][2] = {};
  const auto add = [&](int64_t at, auto&& word) {
    Words a, b;
    std::memcpy(&a, keys.a + at / 4, kBytes);
    std::memcpy(&b, keys.b + at / 4, kBytes);
    const Words high_a = a >> 32, high_b = b >> 32;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Words x = word(from[i] + at), high = x >> 32;
      sums[i][0] += multiply_halves(x, a) + multiply_halves(high, high_a);
      sums[i][1] += multiply_halves(x, b) + multiply_halves(high, high_b);
    }
  };
  int64_t at = 0;
  for (; at + kBytes <= n; at += kBytes) {
    add(at, [](const char* p) {
      Words x;
      std::memcpy(&x, p, kBytes);
      return x;
    });
  }
  if (at < n) {
    add(at, [&](const char* p) {
      Words x = {};
      std::memcpy(&x, p, n - at);
      return x;
    });
  }
  for (int i = 0; i < N; ++i) to[i] = {{sums[i][0], sums[i][1]}};
}

}  // namespace rnn::cpu::RNN_ISA
