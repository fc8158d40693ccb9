#include "cpu/packs.h"

#include <pthread.h>

namespace rnn::cpu {
namespace {

template <class F>
void each_weight(const ForwardLayer& layer, F&& f) {
  for (const LayerWeights::List* list : {&layer.w.w_ih, &layer.w.w_hh, &layer.w.w_hr})
    for (const Tensor& w : *list) f(w);
}

}  // namespace

PackKey PackTable::key(const ForwardLayer& layer) {
  const Sizes& n = layer.n;
  PackKey key{layer.cell.number, layer.x.scalar_type(), {n.I, n.H, n.R, n.D}, {}};
  each_weight(
      layer, [&](const Tensor& w) { key.places.emplace_back(w.storage().unsafeGetStorageImpl(), w.storage_offset()); });
  return key;
}

std::optional<Tensor> PackTable::find(const PackKey& key) {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(key);
  if (found == entries_.end()) return std::nullopt;
  found->second.used = ++clock_;
  return found->second.pack;
}

void PackTable::put(const PackKey& key, const ForwardLayer& layer, const Tensor& pack,
                    const std::optional<Tensor>& found) {
  Entry entry{pack, {}, 0};
  each_weight(layer, [&](const Tensor& w) { entry.storages.push_back(w.storage().getWeakStorageImpl()); });
  const std::lock_guard lock(mutex_);
  bury();
  if (const auto now = entries_.find(key); now != entries_.end()) {
    if (!found || !now->second.pack.is_same(*found)) return;
    erase(now);
  }
  const int64_t bytes = entry.bytes();
  if (bytes > limit_) return;
  shrink(limit_ - bytes);
  entry.used = ++clock_;
  bytes_ += bytes;
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

void PackTable::shrink(int64_t most) {
  while (bytes_ > most) {
    erase(std::min_element(entries_.begin(), entries_.end(),
                           [](const auto& a, const auto& b) { return a.second.used < b.second.used; }));
  }
}

int64_t PackTable::bytes() {
  const std::lock_guard lock(mutex_);
  bury();
  return bytes_;
}

std::vector<int64_t> PackTable::bytes_of(TensorList weights) {
  const std::lock_guard lock(mutex_);
  bury();
  std::vector<int64_t> bytes;
  for (const auto& [key, entry] : entries_) {
    const bool all = std::all_of(key.places.begin(), key.places.end(), [&](const auto& place) {
      return std::any_of(weights.begin(), weights.end(), [&](const Tensor& w) {
        return w.has_storage() && w.storage().unsafeGetStorageImpl() == place.first &&
               w.storage_offset() == place.second;
      });
    });
    if (all && entry.pack.defined()) bytes.push_back(entry.bytes());
  }
  return bytes;
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

}  // namespace rnn::cpu
