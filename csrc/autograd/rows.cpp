#include "autograd/rows.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cstring>

#include "ops/layers.h"

namespace rnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether the bytes of a tensor on the CPU are its values, nobody is to see them copied, and the last dimension lies in
// one piece.
bool plain(const Tensor& t) {
  return t.is_cpu() && !at::isTensorSubclassLike(t) && !t._is_zerotensor() && !t.is_neg() && !t.is_conj() &&
         !torch::autograd::isFwGradDefined(t) && (t.size(-1) < 2 || t.stride(-1) == 1);
}

// Whether the memory of a tensor [A, B, W] is that of [B, A, W].
bool transposed(const Tensor& t) {
  return !t.is_contiguous() && t.stride(0) == t.size(2) && t.stride(1) == t.size(0) * t.size(2);
}

// copy(first, last) of this many rows of this many bytes each, shared among threads where there is much to copy.
template <class Copy>
void in_parts(int64_t rows, int64_t bytes, Copy&& copy) {
  constexpr int64_t kPart = 1 << 18;
  if (rows * bytes <= kPart) return copy(0, rows);
  at::parallel_for(0, rows, std::max<int64_t>(1, kPart / bytes), copy);
}

// visit(row, byte offset of its place in a tensor [A, B, ...] with these strides) for rows [first, last).
template <class Visit>
void for_rows(const Places& places, at::IntArrayRef strides, int64_t item, int64_t first, int64_t last, Visit&& visit) {
  const int64_t* const at = places.at.const_data_ptr<int64_t>();
  const bool joined = strides[0] == places.B * strides[1];
  for (int64_t n = first; n < last; ++n) {
    const int64_t offset = joined ? at[n] * strides[1] : at[n] / places.B * strides[0] + at[n] % places.B * strides[1];
    visit(n, offset * item);
  }
}

// Below autograd.
Tensor copied_out(const Tensor& all, const Places& places, at::IntArrayRef shape) {
  std::vector<int64_t> sizes = shape.vec();
  sizes.push_back(all.size(2));
  const Tensor rows = fresh(sizes, all.options());
  const int64_t item = all.element_size(), row = all.size(2) * item;
  if (!row) return rows;
  const auto* const from = static_cast<const char*>(all.const_data_ptr());
  auto* const to = static_cast<char*>(rows.mutable_data_ptr());
  in_parts(places.at.numel(), row, [&](int64_t first, int64_t last) {
    for_rows(places, all.strides(), item, first, last,
             [&](int64_t n, int64_t offset) { std::memcpy(to + n * row, from + offset, row); });
  });
  return rows;
}

// Below autograd. `transposed`: the memory of the result is that of [B, A, W].
Tensor copied_in(const Tensor& rows, const Places& places, bool transposed) {
  const int64_t W = rows.size(-1);
  const int64_t item = rows.element_size(), row = W * item;
  Tensor all = fresh({transposed ? places.B : places.A, transposed ? places.A : places.B, W}, rows.options());
  if (transposed) all = all.transpose(0, 1);
  if (!all.numel()) return all;
  if (places.at.numel() < places.A * places.B) all.zero_();
  const Tensor given = rows.contiguous();
  const auto* const from = static_cast<const char*>(given.const_data_ptr());
  auto* const to = static_cast<char*>(all.mutable_data_ptr());
  in_parts(places.at.numel(), row, [&](int64_t first, int64_t last) {
    for_rows(places, all.strides(), item, first, last,
             [&](int64_t n, int64_t offset) { std::memcpy(to + offset, from + n * row, row); });
  });
  return all;
}

// The same by torch's operations, which transforms, modes and tracers know.
Tensor picked_by_torch(const Tensor& all, const Places& places, at::IntArrayRef shape) {
  std::vector<c10::SymInt> sizes(shape.begin(), shape.end());
  sizes.push_back(all.sym_size(2));
  const Tensor rows = all.reshape_symint({places.A * places.B, all.sym_size(2)});
  return rows.index_select(0, places.at).view_symint(sizes);
}
Tensor placed_by_torch(const Tensor& rows, const Places& places) {
  const c10::SymInt W = rows.sym_size(-1);
  const Tensor zeros = rows.new_zeros_symint({places.A * places.B, W});
  const Tensor flat = rows.reshape_symint({places.at.sym_size(0), W});
  return zeros.index_copy(0, places.at, flat).view_symint({places.A, places.B, W});
}

// Whether functions of C++ may have a gradient here: inside of torch.func those of Python alone have.
// Torch tells that by an error alone; that it keeps a state for this thread says only that it once ran a transform.
bool may_record() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return true;
  try {
    transforms->checkSupportsCppAutogradFunction();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

// The gradients of picked and of placed rows are each other.
class Rows : public torch::autograd::Function<Rows> {
 public:
  static constexpr bool is_traceable = true;  // for compiled autograd

  // `transposed`: of what rows are picked from, or placed in.
  static Tensor forward(AutogradContext* context, const Tensor& from, const Places& places, bool picks, bool transposed,
                        at::IntArrayRef shape) {
    context->set_materialize_grads(false);
    std::vector<int64_t> numbers{places.A, places.B, picks, transposed};
    numbers.insert(numbers.end(), shape.begin(), shape.end());
    context->saved_data["places"] = places.at;
    context->saved_data["numbers"] = std::move(numbers);
    return picks ? copied_out(from, places, shape) : copied_in(from, places, transposed);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const std::vector<int64_t> numbers = context->saved_data["numbers"].toIntVector();
    const Places places{context->saved_data["places"].toTensor(), numbers[0], numbers[1]};
    variable_list found(5);
    if (!grads[0].defined()) return found;
    found[0] = numbers[2] ? place(grads[0], places, numbers[3])
                          : pick_rows(grads[0], places, at::IntArrayRef(numbers).slice(kBeforeShape));
    return found;
  }

  static Tensor place(const Tensor& rows, const Places& places, bool transposed) {
    if (!plain(rows)) return placed_by_torch(rows, places);
    if (torch::autograd::compute_requires_grad(rows)) {
      if (!may_record()) return placed_by_torch(rows, places);
      return apply(rows, places, false, transposed, rows.sizes().slice(0, rows.dim() - 1));
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    return copied_in(rows, places, transposed);
  }

 private:
  static constexpr size_t kBeforeShape = 4;
};

}  // namespace

Tensor pick_rows(const Tensor& all, const Places& places, at::IntArrayRef shape) {
  if (!plain(all)) return picked_by_torch(all, places, shape);
  if (torch::autograd::compute_requires_grad(all)) {
    return may_record() ? Rows::apply(all, places, true, transposed(all), shape) : picked_by_torch(all, places, shape);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return copied_out(all, places, shape);
}

Tensor place_rows(const Tensor& rows, const Places& places) { return Rows::place(rows, places, false); }

}  // namespace rnn
