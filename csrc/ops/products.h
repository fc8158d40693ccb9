// The products over all steps of a sequence, for the gradients of weights and inputs: torch's, or, where those of a
// device's own kernels are faster, these, which it registers (cpu/products.cpp).
#pragma once

#include "ops/fields.h"

namespace rnn {

// Rows of all tensors are contiguous, or copied; those of out are contiguous. Where it adds, to what stands in out.
struct Products {
  bool (*take)(at::ScalarType type);  // the place of torch's for tensors of this type
  // out [M, N] = a^T b of a [K, M] and b [K, N], or the same of each lane of [lanes, ...]
  void (*outer)(const Tensor& out, const Tensor& a, const Tensor& b, bool adds);
  // out [M, N] = a w of a [M, K] and w [K, N], each row by itself
  void (*rows)(const Tensor& out, const Tensor& a, const Tensor& w, bool adds);
};
void register_cpu_products(const Products& products);

// Those of the device of t where they take the place of torch's, or null. Only for tensors that are real, while nobody
// looks on.
const Products* products_for(const Tensor& t);

}  // namespace rnn
