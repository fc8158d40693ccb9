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

PackKey PackTable::key(const ForwardLayer& layer) {
  const Sizes& n = layer.n;
  PackKey key{layer.cell.number, layer.x.scalar_type(), {n.I, n.H, n.R, n.D}, {}};
  each_weight(
      layer, [&](const Tensor& w) { key.places.emplace_back(w.storage().unsafeGetStorageImpl(), w.storage_offset()); });
  return key;
}

std::optional<PackTable::Found> PackTable::find(const PackKey& key) {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(key);
  if (found == entries_.end()) return std::nullopt;
  found->second.used = ++clock_;
  return Found{found->second.pack, found->second.type};
}

void PackTable::put(const PackKey& key, const ForwardLayer& layer, const Tensor& pack,
                    const std::optional<Found>& found) {
  Entry entry{pack, found ? found->type : PackedType::kOwn, {}, 0};
  each_weight(layer, [&](const Tensor& w) { entry.storages.push_back(w.storage().getWeakStorageImpl()); });
  const std::lock_guard lock(mutex_);
  bury();
  if (const auto now = entries_.find(key); now != entries_.end()) {
    if (!found || !now->second.pack.is_same(found->pack) || now->second.type != found->type) return;
    erase(now);
  }
  if (entry.bytes() > limit_) entry.pack = Tensor();
  shrink(limit_ - entry.bytes());
  entry.used = ++clock_;
  bytes_ += entry.bytes();
  entries_.emplace(key, std::move(entry));
}

PackTable::Entries::iterator PackTable::erase(Entries::iterator entry) {
  bytes_ -= entry->second.bytes();
  return entries_.erase(entry);
}

void PackTable::bury() {
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    const auto& storages = entry->second.storages;
    const bool gone = std::any_of(storages.begin(), storages.end(), [](const auto& s) { return s.expired(); });
    entry = gone ? erase(entry) : std::next(entry);
  }
}

// That weights were seen, and what type was chosen for them, stays known: results may depend on the type.
void PackTable::shrink(int64_t most) {
  while (bytes_ > most) {
    Entry* oldest = nullptr;
    for (auto& [key, entry] : entries_)
      if (entry.bytes() && (!oldest || entry.used < oldest->used)) oldest = &entry;
    bytes_ -= oldest->bytes();
    oldest->pack = Tensor();
  }
}

int64_t PackTable::bytes() {
  const std::lock_guard lock(mutex_);
  bury();
  return bytes_;
}

// Calls f(entry) for those of layers all of whose weights are among these.
template <class F>
void PackTable::each_of(TensorList weights, F&& f) {
  bury();
  for (auto& [key, entry] : entries_) {
    const bool all = std::all_of(key.places.begin(), key.places.end(), [&](const auto& place) {
      return std::any_of(weights.begin(), weights.end(), [&](const Tensor& w) {
        return w.has_storage() && w.storage().unsafeGetStorageImpl() == place.first &&
               w.storage_offset() == place.second;
      });
    });
    if (all) f(entry);
  }
}

std::vector<PackTable::Kept> PackTable::kept_of(TensorList weights) {
  const std::lock_guard lock(mutex_);
  std::vector<Kept> kept;
  each_of(weights, [&](const Entry& entry) { kept.push_back({entry.bytes(), entry.type}); });
  return kept;
}

int64_t PackTable::choose(TensorList weights, PackedType type) {
  const std::lock_guard lock(mutex_);
  int64_t layers = 0;
  each_of(weights, [&](Entry& entry) {
    ++layers;
    if (entry.type == type) return;
    bytes_ -= entry.bytes();
    entry.pack = Tensor();
    entry.type = type;
  });
  return layers;
}

int64_t PackTable::limit() {
  const std::lock_guard lock(mutex_);
  return limit_;
}

void PackTable::set_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "bytes: expected 0 or more, got ", bytes);
  const std::lock_guard lock(mutex_);
  limit_ = bytes;
  shrink(bytes);
}

void PackTable::drop() {
  const std::lock_guard lock(mutex_);
  entries_.clear();
  bytes_ = 0;
}

PackTable& pack_table() {
  static PackTable* const table = [] {
    // A fork while another thread holds the lock would leave it locked in the child for ever.
    pthread_atfork([] { pack_table().mutex().lock(); }, [] { pack_table().mutex().unlock(); },
                   [] { pack_table().mutex().unlock(); });
    return new PackTable;  // never destroyed: a call may come while the process ends
  }();
  return *table;
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
