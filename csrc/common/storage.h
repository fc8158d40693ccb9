// Storage types of 16 and 8 bits as the kernels see them, without torch's headers, and the arithmetic type of each.
#pragma once

#include <cstdint>

namespace rnn {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Of packed weights alone: a multiple of a scale that is kept elsewhere.
struct Int8 {
  int8_t value;
};

template <class IO>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class IO>
using Arithmetic = typename ArithmeticOf<IO>::type;

}  // namespace rnn
