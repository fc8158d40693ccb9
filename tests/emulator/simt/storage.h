// Conversions of the storage types of 16 bits on the host, rounded to the nearest, ties to even; NaN as the GPU writes
// it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/scalar.cuh"

namespace rnn::cuda {

template <>
struct Storage<BFloat16> {
  static float read(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
  static BFloat16 write(float x) {
    if (x != x) return {0x7fff};
    const auto bits = std::bit_cast<uint32_t>(x);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

template <>
struct Storage<Float16> {
  static float read(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits & 0x7c00, rest = x.bits & 0x3ff;
    if (exponent == 0) {
      const float tiny = float(rest) * 0x1p-24f;
      return sign ? -tiny : tiny;
    }
    const uint32_t wide = exponent == 0x7c00 ? 0x7f800000 : (exponent << 13) + kRebias;
    return std::bit_cast<float>(sign | wide | rest << 13);
  }
  static Float16 write(float x) {
    if (x != x) return {0x7fff};
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    // Below 2^-14 units are 2^-24, as those of a float in [0.5, 1).
    if (size < 0x38800000)
      return {uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000))};
    const uint32_t rounded = (size - kRebias + 0xfff + (size >> 13 & 1)) >> 13;
    return {uint16_t(sign | std::min<uint32_t>(rounded, 0x7c00))};
  }

 private:
  static constexpr uint32_t kRebias = (127 - 15) << 23;
};

}  // namespace rnn::cuda
