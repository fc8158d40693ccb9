#include "ops/products.h"

#include <ATen/ops/mm.h>

#include "cpu/launch.h"
#include "ops/check.h"
#include "ops/layers.h"
#include "ops/pointers.h"

namespace rnn::cpu {
namespace {

// Autograd calls this below the dispatcher, which would have negated what is negated lazily.
Tensor with_whole_rows(const Tensor& given) {
  const Tensor t = given.resolve_neg();
  return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

// Torch's product of 16 bits is faster where the processor has instructions for them, and takes ten times as long where
// it has none.
bool take(at::ScalarType type) {
  static const bool bfloat16 = !multiplies_bfloat16(), float16 = !multiplies_float16();
  if ((type == at::kBFloat16 && !bfloat16) || (type == at::kHalf && !float16)) return false;
  bool has = false;
  dispatch_dtype(type, [&](const auto& entry) { has = entry.outer != nullptr; });
  return has;
}

void outer_products(const Tensor& out, const Tensor& a, const Tensor& b, bool adds) {
  if (out.dim() == 2) return outer_products(out.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), adds);
  TORCH_INTERNAL_ASSERT(out.size(0) == a.size(0) && out.size(0) == b.size(0) && a.size(1) == b.size(1) &&
                        out.size(1) == a.size(2) && out.size(2) == b.size(2));
  if (out.numel() == 0) return;
  const Tensor left = with_whole_rows(a), right = with_whole_rows(b);
  with_launch([&](const Launch& launch) {
    dispatch_dtype(out.scalar_type(), [&]<class IO>(const Entry<IO>& entry) {
      TORCH_INTERNAL_ASSERT(entry.outer);
      entry.outer(launch, {left.size(0), left.size(1), left.size(2), right.size(2), pointer<const IO>(left),
                           left.stride(1), left.stride(0), pointer<const IO>(right), right.stride(1), right.stride(0),
                           pointer<IO>(out), out.stride(1), out.stride(0), adds});
    });
  });
}

void row_products(const Tensor& out, const Tensor& a, const Tensor& w, bool adds) {
  TORCH_INTERNAL_ASSERT(a.size(1) == w.size(0) && out.size(0) == a.size(0) && out.size(1) == w.size(1) &&
                        out.is_contiguous());
  if (out.numel() == 0) return;
  const Tensor left = with_whole_rows(a), right = w.contiguous();
  with_launch([&](const Launch& launch) {
    dispatch_dtype(out.scalar_type(), [&]<class IO>(const Entry<IO>& entry) {
      entry.rows(launch, {left.size(0), left.size(1), right.size(1), pointer<const IO>(left), left.stride(0),
                          pointer<const IO>(right), pointer<IO>(out), adds});
    });
  });
}

Tensor input_gradient(const Tensor& dgates, TensorList w_ih) {
  check_input_gradient(dgates, w_ih);
  const int64_t D = dgates.size(-2), G_H = w_ih[0].size(0), I = w_ih[0].size(1);
  at::DimVector shape(dgates.sizes().slice(0, dgates.dim() - 2));
  const int64_t rows = c10::multiply_integers(shape);
  const Tensor steps = dgates.contiguous().view({rows, D, dgates.size(-1)}), dx = fresh({rows, I}, dgates.options());
  for (int64_t d = 0; d < D; ++d) row_products(dx, steps.select(1, d).narrow(1, 0, G_H), w_ih[d], d > 0);
  shape.push_back(I);
  return dx.view(shape);
}

void check_factors(const Tensor& a, const Tensor& b, int64_t dim, const char* names) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(dim) == b.size(0), names,
                    ": expected two matrices of one inner size, got shapes ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type() && a.is_floating_point(), names,
                    ": expected one floating dtype, got ", a.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK_VALUE(a.is_cpu() && b.is_cpu(), names, ": expected tensors on the CPU, got ", a.device(), " and ",
                    b.device());
}

Tensor rows_product(const Tensor& a, const Tensor& w) {
  check_factors(a, w, 1, "a, w");
  if (!products_for(a)) return at::mm(a, w);
  const Tensor out = fresh({a.size(0), w.size(1)}, a.options());
  if (a.size(1) == 0) return out.zero_();
  row_products(out, a, w, false);
  return out;
}

Tensor steps_product(TensorList a, TensorList b) {
  TORCH_CHECK_VALUE(!a.empty() && a.size() == b.size(), "a, b: expected as many of both, and one or more, got ",
                    a.size(), " and ", b.size());
  const int64_t M = a[0].dim() == 2 ? a[0].size(1) : 0, N = b[0].dim() == 2 ? b[0].size(1) : 0;
  for (size_t i = 0; i < a.size(); ++i) {
    check_factors(a[i], b[i], 0, "a, b");
    TORCH_CHECK_VALUE(a[i].size(1) == M && b[i].size(1) == N && a[i].scalar_type() == a[0].scalar_type(),
                      "a, b: expected products of one shape and dtype, got shapes ", a[i].sizes(), " and ",
                      b[i].sizes(), " behind ", a[0].sizes(), " and ", b[0].sizes());
  }
  const bool own = products_for(a[0]);
  Tensor out = own ? fresh({M, N}, a[0].options()) : at::mm(a[0].t(), b[0]);
  if (own) outer_products(out, a[0], b[0], false);
  for (size_t i = 1; i < a.size(); ++i) {
    if (own) {
      outer_products(out, a[i], b[i], true);
    } else {
      out.addmm_(a[i].t(), b[i]);
    }
  }
  return out;
}

constexpr Products kProducts{take, outer_products, row_products};
[[maybe_unused]] const bool registered = (register_cpu_products(kProducts), true);

}  // namespace
}  // namespace rnn::cpu

TORCH_LIBRARY_IMPL(rnnkernels, CPU, library) {
  library.impl("input_gradient", rnn::cpu::input_gradient);
  library.impl("rows_product", rnn::cpu::rows_product);
  library.impl("steps_product", rnn::cpu::steps_product);
}
