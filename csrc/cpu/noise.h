// Noise of a vector of units: common/noise.h.
#pragma once

#include "common/noise.h"
#include "cpu/vec.h"

namespace rnn::cpu::RNN_ISA {

// As many words of Philox as a vector has places of 64 bits.
typedef uint64_t Words __attribute__((vector_size(RNN_VECTOR_BYTES)));
typedef int64_t SignedWords __attribute__((vector_size(RNN_VECTOR_BYTES)));
constexpr int kWords = RNN_VECTOR_BYTES / 8;

// Of the low halves. GCC multiplies all 64 bits, in three products, unless it is told which it needs.
RNN_HD Words product_of_words(Words a, uint32_t m) {
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#else
  return (a & uint64_t(0xffffffff)) * uint64_t(m);
#endif
}

// to[k][l] for leaves k < E of unit i + l, of row b at position t in direction d.
template <int E, class T>
RNN_HD void draw_noise(const Noise& noise, int64_t b, int64_t t, int64_t d, int64_t i, Vec<T>* to) {
  if (!noise.draws) {
    for (int k = 0; k < E; ++k) to[k] = Vec<T>(noise.probabilities[k]);
    return;
  }
  typedef T Part __attribute__((vector_size(kWords * sizeof(T))));
  const Noise::Counter at = noise.counter(b, t, d);
  for (int first = 0; first < Vec<T>::kLanes; first += kWords) {
    Words unit;
    for (int l = 0; l < kWords; ++l) unit[l] = uint64_t(l);
    unit += uint64_t(i + first);
    for (int leaf = 0; leaf < E; leaf += kPhiloxWords) {
      Words words[kPhiloxWords] = {unit, Words{} + uint64_t(at.position), Words{} + uint64_t(at.row),
                                   Words{} + uint64_t(at.stream | uint32_t(leaf / kPhiloxWords))};
      philox4x32(words, at.key, product_of_words);
      for (int k = leaf; k < E && k < leaf + kPhiloxWords; ++k) {
        const SignedWords word = reinterpret_cast<SignedWords>(words[k - leaf] & uint64_t(0xffffffff));
        const SignedWords below = word < noise.threshold(k);  // -1 or 0
        const Part value = __builtin_convertvector(-below, Part);
        std::memcpy(reinterpret_cast<T*>(&to[k].v) + first, &value, sizeof value);
      }
    }
  }
}

}  // namespace rnn::cpu::RNN_ISA
