// The sequence ops on the CPU.
#include "cpu/check_values.h"
#include "cpu/launch.h"
#include "cpu/packs.h"
#include "cpu/single.h"
#include "ops/pointers.h"

namespace rnn::cpu {
namespace {

// A call that saves for backward is followed by a change of the weights, unless it says otherwise. Of others the second
// one with the same weights keeps its packs for the calls to come: many weights are seen but once, such as those that
// autocast has made.
template <class IO>
void run_loop(const Entry<IO>& entry, const Launch& launch, const ForwardLayer& a) {
  const CellKernels<IO>& cell = kernels_of(a.cell, entry);
  const Forward<IO> p = parameters<IO>(a);
  const bool again = runs_again();
  if (a.call.save && !again) {
    entry.forward(launch, cell, p, {});
    return;
  }
  WeightPacks& table = pack_table();
  const PackKey key(a);
  const auto found = table.find(key);
  const bool packed = found && found->pack;
  const WeightPacks::Version version = found && found->by_version ? version_of(a) : std::nullopt;
  const PackedType type = found ? found->type : PackedType::kOwn;
  if (again && type != PackedType::kOwn) {
    entry.forward(launch, cell, p, {});
    return;
  }
  const bool trusted = found && found->trusted(version);
  if (packed && entry.forward(launch, cell, p, {true, found->pack->data_ptr(), true, type, trusted})) {
    if (version && !trusted) table.confirm(key, *found, version);
    return;
  }
  const int64_t bytes = entry.packed_bytes(cell, p, type);
  if (found && !packed && bytes <= table.limit()) {
    auto pack = std::make_shared<Tensor>(fresh({bytes}, at::kByte));
    entry.forward(launch, cell, p, {true, pack->data_ptr(), false, type});
    table.put(key, owners_of(a), std::move(pack), bytes, found, version);
  } else {
    entry.forward(launch, cell, p, {false, nullptr, false, type});
    if (!found || packed) table.put(key, owners_of(a), nullptr, 0, found);
  }
}
template <class IO>
void run_loop(const Entry<IO>& entry, const Launch& launch, const BackwardLayer& a) {
  entry.backward(launch, kernels_of(a.cell, entry), parameters<IO>(a));
}

// Runs a layer, whose dtype is that of `like`, by the kernels of a single step where they take it.
template <class Layer>
void run_layer(Layer& a, const Tensor& like) {
  if (a.n.B == 0) return;  // every result is empty, however many directions and steps there would be
  dispatch_dtype(like.scalar_type(), [&]<class IO>(const Entry<IO>& entry) {
    if (is_single_step(a)) return run_single(a, entry);
    with_launch([&](const Launch& launch) { run_loop(entry, launch, a); });
  });
}

void forward(ForwardRun& all) {
  check_values(all.call(), all.sizes());
  all.each([](ForwardLayer& layer) { run_layer(layer, layer.x); });
}

void backward(BackwardRun& all) {
  check_values(all.call(), all.sizes());
  all.each([](BackwardLayer& layer) { run_layer(layer, layer.y); });
}

}  // namespace
}  // namespace rnn::cpu

TORCH_LIBRARY_IMPL(rnnkernels, CPU, library) {
  rnn::register_sequence_ops<rnn::cpu::forward, rnn::cpu::backward>(library);
}
