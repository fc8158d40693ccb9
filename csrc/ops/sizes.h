// Sizes that follow from those that a call has: they fit 64 bits, or what is too large is refused by its name.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "ops/calls.h"

namespace rnn {

struct Size {
  int64_t number;
  const char* argument;  // whose size it is; null: nobody gave it
  const char* what;      // that it counts
};

[[noreturn]] inline void refuse_sizes(std::initializer_list<Size> sizes) {
  const auto given = [](const Size& size) { return size.argument ? size.number : 0; };
  const Size& largest =
      *std::max_element(sizes.begin(), sizes.end(), [&](const Size& a, const Size& b) { return given(a) < given(b); });
  std::string others;
  for (const Size& size : sizes)
    if (size.argument && &size != &largest)
      others += (others.empty() ? " beside " : ", ") + std::to_string(size.number) + " " + size.what;
  TORCH_CHECK_VALUE(false, largest.argument, ": expected sizes of which the product fits 64 bits, got ", largest.number,
                    " ", largest.what, others, ". Make them smaller.");
}

// The product of sizes. A size of zero makes it zero, and leaves the others bounded as if it were one: something else
// may be computed from these alone.
inline int64_t product_of(std::initializer_list<Size> sizes) {
  int64_t product = 1;
  bool zero = false, fits = true;
  for (const Size& size : sizes) {
    zero = zero || size.number == 0;
    fits = fits && !__builtin_mul_overflow(product, std::max<int64_t>(size.number, 1), &product);
  }
  if (!fits) [[unlikely]]
    refuse_sizes(sizes);
  return zero ? 0 : product;
}

// How many directions a layer has, heads counted; those of all layers fit 64 bits as well.
inline int64_t all_directions(const Settings& settings) {
  const Size directions{settings.directions, "directions", "directions"}, heads{settings.heads, "heads", "heads"};
  product_of({directions, heads, {settings.layers, "layers", "layers"}});
  return product_of({directions, heads});
}

}  // namespace rnn
