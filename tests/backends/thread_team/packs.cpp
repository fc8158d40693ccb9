// The table of packed weights, to be watched by ThreadSanitizer (make sanitize-threads): callers that find and leave
// packs of a few layers while others take the room away, choose another type, drop all, and let weights go.
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/pack_table.h"

namespace {

using namespace rnn::cpu;

// What was packed: `weights`, in this type.
struct Pack {
  int weights;
  PackedType type;
  int64_t bytes;
};
using Weights = std::shared_ptr<int>;
using Table = PackTable<int, std::hash<int>, Pack, std::weak_ptr<int>>;

constexpr int kLayers = 5, kCallers = 4, kCalls = 2000;
constexpr int64_t kLimit = 300;
int64_t bytes_of(int layer) { return 40 * (layer + 1); }

int failures = 0;
void expect(bool truth, const char* what) {
  if (truth) return;
  __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
  std::fprintf(stderr, "%s\n", what);
}

// As a call of a layer does: seen first, packed at the second call, found from then on.
void call(Table& table, int layer, const Weights& weights) {
  const auto found = table.find(layer);
  if (found && found->pack) {
    expect(found->pack->weights == layer, "the pack of another layer");
    expect(found->pack->type == found->type, "a pack of another type than was chosen");
    expect(found->pack->bytes == bytes_of(layer), "another size");
  } else if (found) {
    const int64_t bytes = bytes_of(layer);
    table.put(layer, {weights}, std::make_shared<Pack>(Pack{layer, found->type, bytes}), bytes, found);
  } else {
    table.put(layer, {weights}, nullptr, 0, found);
  }
}

// Each caller chooses the type of its own layer alone.
void others(Table& table, int caller, int number, bool drops) {
  const auto own = [&](int layer) { return layer == caller; };
  const PackedType type = number % 2 ? PackedType::kInt8 : PackedType::kOwn;
  switch (number % 5) {
    case 0:
      table.choose(own, type, number % 3 == 0);
      break;
    case 1:
      table.choose(own, type, number % 3 == 0);
      for (const auto& kept : table.kept_of(own)) {
        expect(kept.bytes <= kLimit, "more than the limit for one layer");
        expect(drops || kept.type == type, "another type than was chosen");
      }
      break;
    case 2:
      table.set_limit(number % 3 ? kLimit : kLimit / 3);
      break;
    case 3:
      expect(table.bytes() <= kLimit && table.limit() <= kLimit, "more than the limit");
      break;
    case 4:
      if (drops && number % 7 == 0) table.drop();
  }
}

// A caller whose answer is older than what others did meanwhile leaves theirs alone.
void try_slow_caller() {
  Table table;
  const Weights weights = std::make_shared<int>(0);
  call(table, 0, weights);
  const auto all = [](int) { return true; };
  const auto put = [&](const auto& found) {
    table.put(0, {weights}, std::make_shared<Pack>(Pack{0, found->type, bytes_of(0)}), bytes_of(0), found);
  };
  const auto before = table.find(0);
  table.choose(all, PackedType::kInt8, false);
  put(before);
  expect(table.kept_of(all)[0].type == PackedType::kInt8 && table.bytes() == 0, "a type chosen meanwhile is lost");
  const auto seen = table.find(0);
  put(seen);
  const auto kept = table.find(0)->pack;
  put(seen);
  expect(kept && table.find(0)->pack == kept, "a pack left meanwhile is lost");
}

void try_table(bool drops) {
  Table table;
  table.set_limit(kLimit);
  std::vector<Weights> weights;
  for (int layer = 0; layer < kLayers; ++layer) weights.push_back(std::make_shared<int>(layer));
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      const Weights own = std::make_shared<int>(kLayers + caller);  // of a layer that goes with this thread
      for (int i = 0; i < kCalls; ++i) {
        const int layer = (i + caller) % (kLayers + 1);
        call(table, layer < kLayers ? layer : kLayers + caller, layer < kLayers ? weights[layer] : own);
        others(table, caller, i + caller, drops);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();

  table.set_limit(kLimit);
  expect(table.kept_of([](int layer) { return layer >= kLayers; }).empty(), "weights are gone, their packs are not");
  int64_t all = 0;
  for (const auto& kept : table.kept_of([](int) { return true; })) all += kept.bytes;
  expect(all == table.bytes(), "the bytes of all are not the sum of each");
  table.drop();
  expect(table.bytes() == 0, "bytes after all were dropped");
}

}  // namespace

int main() {
  try_slow_caller();
  for (const bool drops : {true, false}) try_table(drops);
  if (failures == 0) std::puts("done");
  return failures == 0 ? 0 : 1;
}
