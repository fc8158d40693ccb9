// How the gradients of the gates' pre-activations are bounded at every step of backward, so that none can explode on
// its way through time (Graves 2013, section 2.1; Pascanu et al. 2013 for norms). The gradients of gx and of gh, which
// are equal but for the split gates, are bounded in the same way.
#pragma once

#include <cmath>

#include "macros.h"

namespace rnn {

struct Clip {
  enum Kind : int {
    kNone,
    kValue,  // g -> max(-bound, min(bound, g))
    kNorm,   // g -> g * min(1, bound / |dgx|), the Euclidean norm over all gates and units of one row and step
    kTanh,   // g -> bound * tanh(g / bound)
  };
  Kind kind;
  double bound;

  // What is done to each number on its own. T is the arithmetic type, V T or a vector of T.
  template <class T, class V>
  RNN_HD V elementwise(V g) const {
    const T b = static_cast<T>(bound);
    // A NaN stays one in both.
    if (kind == kValue) return where_at_most_zero(V(b) - g, V(b), where_at_most_zero(g + V(b), V(-b), g));
    if (kind == kTanh) return V(b) * tanh(g * V(1 / b));
    return g;
  }

  // What kNorm multiplies a row by whose numbers have this sum of squares. If one of them is NaN, so is the factor: the
  // norm is unknown, and numbers must not pass without a bound.
  RNN_HD double factor(double squares) const { return squares <= bound * bound ? 1.0 : bound / std::sqrt(squares); }
};

}  // namespace rnn
