// The packed weights that this process keeps between calls that save nothing for backward: who has which, and how much.
#pragma once

#include "cpu/kernels.h"
#include "ops/layers.h"

namespace rnn::cpu {

// What the packed weights of a layer are found by: where the weights lie, and how large they are. Which values lie
// there is another question, which the loop answers by digests.
struct PackKey {
  int cell;
  at::ScalarType dtype;
  std::array<int64_t, 4> sizes;                                             // I, H, R, D
  c10::SmallVector<std::pair<const c10::StorageImpl*, int64_t>, 4> places;  // storage and offset of each weight

  bool operator==(const PackKey&) const = default;
};

// Safe to use from any thread. Packs are never written to once they are here: who has found one may use it for as long
// as it likes, also when it has been dropped meanwhile.
class PackTable {
 public:
  // Of weights that are copies for one call, because they were not contiguous or are cast, nobody asks again: an entry
  // holds on to the addresses of storages, if not to their memory.
  static PackKey key(const ForwardLayer& layer);

  struct Found {
    Tensor pack;      // undefined where the weights have been seen, and no more
    PackedType type;  // that these weights are packed in
  };
  // What was put under this key, if anything was.
  std::optional<Found> find(const PackKey& key);
  // In place of what find() gave: the packs, or an undefined tensor, which says that the weights have been seen. Where
  // another thread was faster, its own stay. What does not fit into the limit is not kept; what was used the longest
  // time ago makes room.
  void put(const PackKey& key, const ForwardLayer& layer, const Tensor& pack, const std::optional<Found>& found);

  // From now on the packed weights of each layer all of whose weights are among these, and which a call has seen, are
  // of this type, as long as the weights live. Returns how many layers there are.
  int64_t choose(TensorList weights, PackedType type);

  int64_t bytes();
  struct Kept {
    int64_t bytes;  // 0 where there are none now
    PackedType type;
  };
  std::vector<Kept> kept_of(TensorList weights);  // of each layer all of whose weights are among these
  int64_t limit();
  void set_limit(int64_t bytes);
  void drop();

  std::mutex& mutex() { return mutex_; }

 private:
  struct Hash {
    size_t operator()(const PackKey& key) const { return c10::get_hash(key.places[0].first, key.places[0].second); }
  };
  struct Entry {
    Tensor pack;
    PackedType type;
    int64_t bytes() const { return pack.defined() ? int64_t(pack.nbytes()) : 0; }
    c10::SmallVector<c10::weak_intrusive_ptr<c10::StorageImpl>, 4> storages;
    uint64_t used;
  };
  using Entries = std::unordered_map<PackKey, Entry, Hash>;

  template <class F>
  void each_of(TensorList weights, F&& f);
  void shrink(int64_t most);
  Entries::iterator erase(Entries::iterator entry);
  void bury();  // the packs of weights that are gone

  std::mutex mutex_;
  Entries entries_;
  int64_t bytes_ = 0, limit_ = int64_t(256) << 20;
  uint64_t clock_ = 0;
};

PackTable& pack_table();

// By torch's name; none is the type of the layer itself.
PackedType packed_type(std::optional<at::ScalarType> dtype);
std::optional<at::ScalarType> dtype_of(PackedType type);

}  // namespace rnn::cpu
