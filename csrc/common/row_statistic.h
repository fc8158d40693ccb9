// A sum over the units of a row at one step, for whatever depends on a whole row: the bound of a gradient by its norm,
// the norms that are recorded. The threads of a row have some of its units each. So the sum takes two parts of a step:
//
//   1. whoever has units leaves what these contribute, as one or more parts;
//   2. after the next barrier everybody who needs the sum adds up the parts, in their order: the bits of the sum do not
//      depend on who comes first.
//
// The sum is of double: squares of float32 neither overflow nor vanish in it.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rnn {

// Where the parts of some rows lie. This is a view: it is copied freely, and the memory is the backend's.
struct RowStatistic {
  char* memory;
  int64_t row_bytes, part_bytes;  // from one to the next
  int64_t parts;                  // of a row

  // Parts one after the other: memory [rows, parts].
  static RNN_HD RowStatistic dense(double* memory, int64_t parts) {
    constexpr int64_t bytes = int64_t(sizeof(double));
    return {reinterpret_cast<char*>(memory), parts * bytes, bytes, parts};
  }

  RNN_HD double& part(int64_t row, int64_t n) const {
    return *reinterpret_cast<double*>(memory + row * row_bytes + n * part_bytes);
  }

  RNN_HD double sum(int64_t row) const {
    double total = 0;
    for (int64_t n = 0; n < parts; ++n) total += part(row, n);
    return total;
  }
};

}  // namespace rnn
