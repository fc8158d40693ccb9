// The stack ops on every device: one layer after the other, each through the ops of a layer.
#include "common/stack.h"

namespace rnn {
namespace {

using Ops = SequenceOps<Library::kCompiled>;

ForwardResults forward_layer(ForwardArguments& a) {
  // What backward alone takes of sequence_forward's arguments is nothing to a call below autograd.
  return Ops::forward().call(a.cell.name, a.x, a.w_ih, a.w_hh, given(a.b_ih), given(a.b_hh), given(a.w_hr), a.h0, a.c0,
                             a.steps.lengths, a.steps.starts, a.steps.reset, a.save, a.all_c, a.layer, 0,
                             clip_name(Clip::kNone), 1.0);
}

BackwardResults backward_layer(BackwardArguments& a) {
  const auto call = [&](const auto& op) {
    return op.call(a.cell.name, a.dy, a.dh_n, a.dc_n, a.dc, a.w_hh, given(a.w_hr), a.h0, a.c0, a.y, a.c, a.saved,
                   a.steps.lengths, a.steps.starts, a.steps.reset, a.window, clip_name(a.clip.kind), a.clip.bound,
                   a.flow, a.initial, a.invariant);
  };
  if (!a.over_saved) return call(Ops::backward());
  return std::tuple_cat(std::tuple(a.saved), call(Ops::backward_over_saved()));
}

std::vector<ForwardResults> forward(std::vector<ForwardArguments>& layers, const Links& links) {
  return run_in_turn(layers, links, forward_layer);
}
std::vector<BackwardResults> backward(std::vector<BackwardArguments>& layers, const Links& links) {
  return run_in_turn(layers, links, backward_layer);
}

}  // namespace
}  // namespace rnn

TORCH_LIBRARY_IMPL(rnnkernels, CompositeExplicitAutograd, library) {
  rnn::register_stack_ops<rnn::forward, rnn::backward>(library);
}
