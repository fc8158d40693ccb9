// The products over all steps of a sequence, for the gradients of weights and inputs: torch's, or, where those of a
// device's own kernels are faster, these (cpu/products.cpp).
#pragma once

#include "ops/fields.h"

namespace rnn {

// Whether a device's own products take the place of torch's for tensors like t. Only where these are real and nobody
// looks on.
bool has_products(const Tensor& t);

// Rows of all tensors are contiguous, or copied; those of out are contiguous. Where it adds, to what stands in out.
// out [M, N] = a^T b of a [K, M] and b [K, N]
void outer_products(const Tensor& out, const Tensor& a, const Tensor& b, bool adds);
// out [M, N] = a w of a [M, K] and w [K, N], each row by itself
void row_products(const Tensor& out, const Tensor& a, const Tensor& w, bool adds);

}  // namespace rnn
