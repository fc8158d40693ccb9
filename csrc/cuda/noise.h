// Noise of a unit: common/noise.h.
#pragma once

#include "common/noise.h"

namespace rnn::cuda {

struct ProductOfWords {
  RNN_HD constexpr uint64_t operator()(uint64_t a, uint32_t m) const { return (a & 0xffffffff) * m; }
};

// to[k] for leaves k < E of unit i, of row b at position t in direction d.
template <int E, class V>
RNN_HD void draw_noise(const Noise& noise, int64_t b, int64_t t, int64_t d, int64_t i, V* to) {
  if (!noise.draws) {
    for (int k = 0; k < E; ++k) to[k] = V(noise.probabilities[k]);
    return;
  }
  const Noise::Counter at = noise.counter(b, t, d);
  for (int leaf = 0; leaf < E; leaf += kPhiloxWords) {
    uint64_t words[kPhiloxWords] = {uint64_t(i), at.position, at.row, at.stream | uint32_t(leaf / kPhiloxWords)};
    philox4x32(words, at.key, ProductOfWords{});
    for (int k = leaf; k < E && k < leaf + kPhiloxWords; ++k)
      to[k] = V(int64_t(words[k - leaf] & 0xffffffff) < noise.threshold(k) ? 1 : 0);
  }
}

}  // namespace rnn::cuda
