// Loops over time in which blocks or threads exchange values at each step, against the same loop without threads.
#include <memory>

#include "simt/selftest.h"

namespace rnn::simt::selftest {
namespace {

using namespace rnn::cuda;

struct Size {
  int blocks, threads, steps;
  int values() const { return blocks * threads; }
};

// Value i of step t + 1 from all values of step t.
float next_value(const float* h, int values, int i, int t) {
  float x = 0.25f * h[i];
  for (int k = 0; k < 8; ++k) x -= 0.2f * h[(i * 3 + k * 53 + t * 7) % values];
  return x + 0.5f;
}
float first_value(int i) { return float(i % 17) * 0.125f - 1; }

std::vector<float> plain_loop(Size size) {
  std::vector<float> h(size_t(size.values())), next = h;
  for (int i = 0; i < size.values(); ++i) h[size_t(i)] = first_value(i);
  for (int t = 0; t < size.steps; ++t) {
    for (int i = 0; i < size.values(); ++i) next[size_t(i)] = next_value(h.data(), size.values(), i, t);
    std::swap(h, next);
  }
  return h;
}

// `make_kernel` gets the memory for the last values; they have to have the same bits as the plain loop's.
template <class MakeKernel>
Case loop(const std::string& name, const Grid& grid, Size size, MakeKernel make_kernel) {
  return {name, grid, [=] {
            auto h = std::make_shared<std::vector<float>>(size.values());
            const auto check = [=] { return *h == plain_loop(size) ? "ok" : "wrong values"; };
            return Attempt{make_kernel(size, h), check};
          }};
}

Vec16 vec16_at(const void* p) { return *static_cast<const Vec16*>(p); }

// Every block of a cluster sends its values to all of them, into one of two buffers by turns. They are sent from two
// places by turns as well: when its own block has received all, a thread may still be sending to others.
template <int kPlaces>
const auto through_transactions = [](Size size, auto h_n) {
  return [=] {
    const int values = size.values(), thread = thread_index(), me = cluster_rank() * size.threads + thread;
    auto* const barriers = reinterpret_cast<TransactionBarrier*>(shared_memory());
    auto* const h = reinterpret_cast<float*>(barriers + 2);  // [2, values]
    auto* const places = h + 2 * values;                     // [kPlaces, threads]
    for (int i = thread; i < values; i += size.threads) h[i] = first_value(i);
    if (thread < 2) barriers[thread].open();
    sync_cluster();
    for (int t = 0; t < size.steps; ++t) {
      float* const to = h + (t + 1) % 2 * values;
      TransactionBarrier* const barrier = barriers + (t + 1) % 2;
      float* const mine = places + t % kPlaces * size.threads;
      mine[thread] = (*h_n)[size_t(me)] = next_value(h + t % 2 * values, values, me, t);
      sync_block();
      if (thread == 0) barrier->expect(values * int(sizeof(float)));
      for (int c = thread; c < values / 4; c += size.threads) {
        const int part = c % (size.threads / 4) * 4;
        send(to + cluster_rank() * size.threads + part, barrier, c / (size.threads / 4), vec16_at(mine + part));
      }
      barrier->await(t / 2);
    }
  };
};
template <int kPlaces = 2>
Case transactions(const std::string& name, Size size) {
  const int bytes =
      2 * int(sizeof(TransactionBarrier)) + (2 * size.values() + kPlaces * size.threads) * int(sizeof(float));
  return loop(name, {size.blocks, size.blocks, size.threads, bytes}, size, through_transactions<kPlaces>);
}

// Every block writes its values to global memory, sets a flag, and copies those of all blocks to its shared memory.
const auto through_flags = [](Size size, auto h_n) {
  const int values = size.values();
  auto global = std::make_shared<std::vector<Vec16>>(2 * values / 4);  // [2, values]
  auto flags = std::make_shared<std::vector<uint32_t>>(size.blocks);
  for (int i = 0; i < values; ++i) reinterpret_cast<float*>(global->data())[i] = first_value(i);
  return [=] {
    const int thread = thread_index(), me = block_index() * size.threads + thread;
    auto* const h = reinterpret_cast<float*>(shared_memory());
    for (int t = 0; t < size.steps; ++t) {
      for (int c = thread; c < values / 4; c += size.threads)
        copy_async(h + c * 4, global->data() + t % 2 * values / 4 + c);
      copies_arrive();
      sync_block();
      auto* const to = reinterpret_cast<float*>(global->data()) + (t + 1) % 2 * values;
      to[me] = (*h_n)[size_t(me)] = next_value(h, values, me, t);
      sync_block();
      if (thread == 0) publish(&(*flags)[size_t(block_index())], uint32_t(t + 1));
      if (thread < size.blocks) await(&(*flags)[size_t(thread)], uint32_t(t + 1));
      sync_block();
    }
  };
};
Case flags(const std::string& name, Size size) {
  return loop(name, {size.blocks, 1, size.threads, size.values() * int(sizeof(float))}, size, through_flags);
}

// Every block puts its values into vectors in global memory, eight of them by turns, and looks at those of all blocks.
const auto through_vectors = [](Size size, auto h_n) {
  const int vectors = size.values() / 4;
  auto global = std::make_shared<std::vector<Vec16>>(kGridBuffers * vectors, nothing());
  return [=] {
    const int thread = thread_index(), me = block_index() * size.threads + thread;
    const auto of_step = [&](int t) { return global->data() + t % kGridBuffers * vectors; };
    auto* const h = reinterpret_cast<float*>(shared_memory());  // [values]
    float* const mine = h + size.values();                      // [threads]
    for (int t = 0; t < size.steps; ++t) {
      for (int i = thread; t == 0 && i < size.values(); i += size.threads) h[i] = first_value(i);
      for (int c = thread; t > 0 && c < vectors; c += size.threads) {
        Vec16 found = look(of_step(t) + c);
        await(of_step(t) + c, found);
        reinterpret_cast<Vec16*>(h)[c] = found;
      }
      sync_block();
      mine[thread] = (*h_n)[size_t(me)] = next_value(h, size.values(), me, t);
      sync_block();
      for (int c = thread; c < size.threads / 4; c += size.threads) {
        const int place = block_index() * size.threads / 4 + c;
        put(of_step(t + 1) + place, vec16_at(mine + c * 4));
        empty(of_step(t + kGridBuffers / 2) + place);
      }
      if (t % 2) settle();
    }
  };
};
Case vectors(const std::string& name, Size size) {
  const int bytes = (size.values() + size.threads) * int(sizeof(float));
  return loop(name, {size.blocks, 1, size.threads, bytes}, size, through_vectors);
}

// One buffer and two barriers a step.
const auto through_barriers = [](Size size, auto h_n) {
  return [=] {
    const int values = size.values(), thread = thread_index();
    auto* const h = reinterpret_cast<float*>(shared_memory());
    h[thread] = first_value(thread);
    for (int t = 0; t < size.steps; ++t) {
      sync_block();
      const float x = next_value(h, values, thread, t);
      sync_block();
      h[thread] = (*h_n)[size_t(thread)] = x;
    }
  };
};
const auto through_cluster_barriers = [](Size size, auto h_n) {
  return [=] {
    const int values = size.values(), me = block_index() * size.threads + thread_index();
    float* const h = h_n->data();
    h[me] = first_value(me);
    for (int t = 0; t < size.steps; ++t) {
      sync_cluster();
      const float x = next_value(h, values, me, t);
      sync_cluster();
      h[me] = x;
    }
  };
};

}  // namespace

Case transactions_with_a_race() { return transactions<1>("transactions_with_a_race", {4, 32, 6}); }

std::vector<Case> loops() {
  return {
      transactions("transactions", {8, 256, 20}),
      transactions("few_transactions", {4, 32, 6}),
      flags("flags", {8, 256, 20}),
      flags("few_flags", {4, 32, 6}),
      vectors("vectors", {8, 64, 20}),
      vectors("few_vectors", {4, 32, 12}),
      loop("barriers", {1, 1, 96, 96 * sizeof(float)}, {1, 96, 8}, through_barriers),
      loop("cluster_barriers", {4, 4, 32, 0}, {4, 32, 8}, through_cluster_barriers),
  };
}

}  // namespace rnn::simt::selftest
