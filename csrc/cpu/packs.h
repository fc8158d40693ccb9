// The packed weights that this process keeps between calls that save nothing for backward.
#pragma once

#include "cpu/pack_table.h"
#include "ops/layers.h"

namespace rnn::cpu {

// What the packed weights of a layer are found by: where the weights lie, and how large they are. Which values lie
// there is another question, which the loop answers by digests. Of weights that are copies for one call, because they
// were not contiguous or are cast, nobody asks again.
struct PackKey {
  int cell;
  at::ScalarType dtype;
  std::array<int64_t, 4> sizes;                                             // I, H, R, D
  c10::SmallVector<std::pair<const c10::StorageImpl*, int64_t>, 4> places;  // storage and offset of each weight

  explicit PackKey(const ForwardLayer& layer);
  bool operator==(const PackKey&) const = default;
};

struct HashOfPlace {
  size_t operator()(const PackKey& key) const { return c10::get_hash(key.places[0].first, key.places[0].second); }
};

using WeightPacks = PackTable<PackKey, HashOfPlace, Tensor, c10::weak_intrusive_ptr<c10::StorageImpl>>;

WeightPacks& pack_table();

// Whether the calls of this thread, up to a change of this, run the same weights again and again: then those that save
// for backward keep packs like any others, and all take the weights as they are, whatever type was chosen.
bool& runs_again();

WeightPacks::Owners owners_of(const ForwardLayer& layer);

// The sum of what torch has counted of writes to each weight: one more write is another sum. Nothing is counted of
// tensors of inference mode.
WeightPacks::Version version_of(const ForwardLayer& layer);

// For choose() and kept_of(): the layers all of whose weights are among these.
struct OfWeights {
  TensorList weights;
  bool operator()(const PackKey& key) const;
};

// By torch's name; none is the type of the layer itself.
PackedType packed_type(std::optional<at::ScalarType> dtype);
std::optional<at::ScalarType> dtype_of(PackedType type);

}  // namespace rnn::cpu
