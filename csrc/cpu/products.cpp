#include "ops/products.h"

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

constexpr Products kProducts{take, outer_products, row_products};
[[maybe_unused]] const bool registered = (register_cpu_products(kProducts), true);

}  // namespace
}  // namespace rnn::cpu

TORCH_LIBRARY_IMPL(rnnkernels, CPU, library) { library.impl("input_gradient", rnn::cpu::input_gradient); }
