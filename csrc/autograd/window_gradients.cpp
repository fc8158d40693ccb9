// window_gradients: a window of recompute runs forward once more, and then backwards, with nothing between them that
// anybody could see: so the gradients of the gates take the memory of what forward saved, and those of the weights are
// added where they belong as they come.
#include <ATen/ops/empty.h>

#include "autograd/gradients.h"

namespace rnn {
namespace {

GradientsOutputs run(WindowCall& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  call.save = true;
  Kept kept = given_to(call);
  std::vector<bool> wanted(kept.inputs.size());
  std::vector<Tensor> sums(kept.inputs.size());
  size_t added = 0;
  for (const int64_t i : call.wanted) {
    TORCH_CHECK_VALUE(i >= 0 && size_t(i) < wanted.size() && !wanted[size_t(i)] && kept.inputs[size_t(i)].defined(),
                      "wanted: expected positions from 0 to ", wanted.size() - 1,
                      ", of x, h0, c0 where there is one, and the weights, each once, got ", i);
    wanted[size_t(i)] = true;
    if (size_t(i) < kFirstWeight) continue;
    TORCH_CHECK_VALUE(added < call.sums.size(), "sums: expected one for each weight that is wanted, got ",
                      call.sums.size());
    const Tensor &sum = call.sums[added++], &weight = kept.inputs[size_t(i)];
    TORCH_CHECK_VALUE(sum.sizes() == weight.sizes() && sum.is_contiguous() && sum.device() == weight.device(),
                      "sums: expected a contiguous tensor of shape ", weight.sizes(), " on ", weight.device(),
                      " like its weight, got shape ", sum.sizes(), ", strides ", sum.strides(), " on ", sum.device());
    TORCH_CHECK_VALUE(sum.scalar_type() == weight.scalar_type() ||
                          (sum.is_floating_point() && sum.element_size() > weight.element_size()),
                      "sums: expected dtype ", weight.scalar_type(), " like its weight, or a wider one, got ",
                      sum.scalar_type());
    sums[size_t(i)] = sum;
  }
  TORCH_CHECK_VALUE(added == call.sums.size(), "sums: expected one for each weight that is wanted, ", added, ", got ",
                    call.sums.size());
  std::vector<Tensor> in_place = sums;
  for (Tensor& sum : in_place)
    if (sum.defined() && sum.scalar_type() != call.x.scalar_type()) sum = Tensor();

  Tensor h_n, c_n;
  std::tie(kept.y, h_n, c_n, kept.ys, kept.c, kept.h_raw, kept.saved) =
      ForwardOp::call(SequenceOps<Library::kCompiled>::forward(), call);
  const bool record = call.flow.has_value(), overwrite = find_cell(call.cell).fits_over_saved();
  Gradients found = gradients(call, kept, call, wanted, {Library::kCompiled, call.invariant, record, true, overwrite},
                              std::move(in_place));
  GradientsOutputs outputs;
  for (const int64_t i : call.wanted) {
    Tensor& gradient = found.inputs[size_t(i)];
    if (size_t(i) < kFirstWeight) {
      outputs.gradients.push_back(std::move(gradient));
    } else if (!gradient.is_same(sums[size_t(i)])) {
      sums[size_t(i)].add_(gradient);
    }
  }
  outputs.flow = record ? found.flow : at::empty({0}, call.x.options());
  return outputs;
}

}  // namespace
}  // namespace rnn

TORCH_LIBRARY_IMPL(rnnkernels, CompositeExplicitAutograd, library) {
  library.impl(
      "window_gradients",
      TORCH_FN((rnn::WindowOp::Dispatched::entry<rnn::WindowOp::Results, rnn::WindowOp::implementation<rnn::run>>)));
}
