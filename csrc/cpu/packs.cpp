#include "cpu/packs.h"

#include <pthread.h>

namespace rnn::cpu {
namespace {

template <class F>
void each_weight(const ForwardLayer& layer, F&& f) {
  for (const LayerWeights::List* list : {&layer.w.w_ih, &layer.w.w_hh, &layer.w.w_hr})
    for (const Tensor& w : *list)
      if (w.numel()) f(w);
}

}  // namespace

PackKey::PackKey(const ForwardLayer& layer)
    : cell(layer.cell.number), dtype(layer.x.scalar_type()), sizes{layer.n.I, layer.n.H, layer.n.R, layer.n.D} {
  each_weight(layer,
              [&](const Tensor& w) { places.emplace_back(w.storage().unsafeGetStorageImpl(), w.storage_offset()); });
}

WeightPacks::Owners owners_of(const ForwardLayer& layer) {
  WeightPacks::Owners owners;
  each_weight(layer, [&](const Tensor& w) { owners.push_back(w.storage().getWeakStorageImpl()); });
  return owners;
}

WeightPacks::Version version_of(const ForwardLayer& layer) {
  WeightPacks::Version sum = 0;
  each_weight(layer, [&](const Tensor& w) {
    if (sum) sum = w.is_inference() ? std::nullopt : WeightPacks::Version(*sum + w._version());
  });
  return sum;
}

bool OfWeights::operator()(const PackKey& key) const {
  return std::all_of(key.places.begin(), key.places.end(), [&](const auto& place) {
    return std::any_of(weights.begin(), weights.end(), [&](const Tensor& w) {
      return w.has_storage() && w.storage().unsafeGetStorageImpl() == place.first && w.storage_offset() == place.second;
    });
  });
}

WeightPacks& pack_table() {
  static WeightPacks* const table = [] {
    // A fork while another thread holds the lock would leave it locked in the child for ever.
    pthread_atfork([] { pack_table().mutex().lock(); }, [] { pack_table().mutex().unlock(); },
                   [] { pack_table().mutex().unlock(); });
    return new WeightPacks;  // never destroyed: a call may come while the process ends
  }();
  return *table;
}

bool& runs_again() {
  thread_local bool again = false;
  return again;
}

PackedType packed_type(std::optional<at::ScalarType> dtype) {
  if (!dtype) return PackedType::kOwn;
  for (const PackedType type : {PackedType::kBFloat16, PackedType::kFloat16, PackedType::kInt8})
    if (dtype_of(type) == dtype) return type;
  TORCH_CHECK_VALUE(false, "dtype: expected torch.bfloat16, torch.float16, torch.int8 or None, got ", *dtype);
}

std::optional<at::ScalarType> dtype_of(PackedType type) {
  switch (type) {
    case PackedType::kBFloat16:
      return at::kBFloat16;
    case PackedType::kFloat16:
      return at::kHalf;
    case PackedType::kInt8:
      return at::kChar;
    case PackedType::kOwn:
      break;
  }
  return std::nullopt;
}

}  // namespace rnn::cpu
