// Primitives by themselves, and what a schedule may change.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>

#include "simt/selftest.h"
#include "simt/storage.h"

namespace rnn::simt::selftest {
namespace {

using namespace rnn::cuda;

// Kernels that write what is wrong, if anything.
using Kernel = std::function<void(std::string& wrong)>;
Case checked(const std::string& name, const Grid& grid, const Kernel& kernel) {
  return {name, grid, [=] {
            auto wrong = std::make_shared<std::string>();
            return Attempt{[=] { kernel(*wrong); }, [=] { return wrong->empty() ? "ok" : "wrong " + *wrong; }};
          }};
}

float random_value(size_t i) { return float(int(i * 2654435761u >> 8 & 0xffff) - 0x8000) * 0x1.0001p-14f; }

void shuffles(std::string& wrong) {
  const int me = block_index() * 64 + thread_index();
  for (int mask = 0; mask < kWarp; ++mask)
    if (shuffle_xor(float(me * mask), mask) != float((me ^ mask) * mask)) wrong = "mask " + std::to_string(mask);
}

// Rows at places of their own, 48 bytes apart and in an order of their own.
void matrices(std::string& wrong) {
  const int lane = thread_index() % kWarp;
  auto* const words = reinterpret_cast<uint32_t*>(shared_memory());
  const auto place = [](int row) { return (row * 5 + 3) % kWarp * 12; };
  for (int i = 0; i < 12; ++i) words[lane * 12 + i] = uint32_t(lane * 12 + i);
  sync_block();
  uint32_t got[4];
  load_matrices(got, words + place(lane));
  for (int m = 0; m < 4; ++m)
    if (int(got[m]) != place(m * 8 + lane / 4) + lane % 4) wrong = "matrix " + std::to_string(m);
}

// Rows so many bytes apart.
template <int kPitch>
void pitched(std::string&) {
  uint32_t got[4];
  load_matrices(got, shared_memory() + thread_index() % 8 * kPitch + thread_index() / 8 * 16);
}

// What elements of 4 or 2 bytes are worth to multiply().
uint32_t encode(float x, TF32) { return std::bit_cast<uint32_t>(x); }
template <class IO>
auto encode(float x, IO) {
  return Storage<IO>::write(x).bits;
}
float decode(uint32_t bits, TF32) { return std::bit_cast<float>(bits >> 13 << 13); }
template <class IO>
float decode(uint16_t bits, IO) {
  return Storage<IO>::read({bits});
}

// Two products of 16 by 8 from matrices in shared memory: a has 16 rows of 32 bytes, b as many, 8 for each product.
template <class Type>
void products(std::string& wrong) {
  const Type type{};
  using Element = decltype(encode(0, type));
  constexpr int kK = 32 / sizeof(Element);
  auto* const a = reinterpret_cast<Element*>(shared_memory());
  auto* const b = a + 16 * kK;
  const int lane = thread_index();
  for (int i = lane; i < 32 * kK; i += kWarp) a[i] = encode(random_value(size_t(i)), type);
  sync_block();

  const int row = lane % 8, matrix = lane / 8;
  uint32_t of_a[4], of_b[4];
  load_matrices(of_a, a + (row + matrix % 2 * 8) * kK + matrix / 2 * kK / 2);
  load_matrices(of_b, b + (row + matrix / 2 * 8) * kK + matrix % 2 * kK / 2);
  for (int product = 0; product < 2; ++product) {
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = random_value(size_t(lane * 4 + i + 4096));
    float want[4];
    for (int i = 0; i < 4; ++i) {
      want[i] = sum[i];
      const int m = lane / 4 + i / 2 * 8, n = product * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < kK; ++k) want[i] += decode(a[m * kK + k], type) * decode(b[n * kK + k], type);
    }
    multiply(sum, of_a, of_b[product * 2], of_b[product * 2 + 1], type);
    if (std::memcmp(sum, want, sizeof(sum))) wrong = "product " + std::to_string(product);
  }
}

void fresh_memory(std::string& wrong) {
  for (int i = 0; i < 64; ++i)
    if (shared_memory()[i] != char(0xff)) wrong = "byte " + std::to_string(i);
}

// Threads that wait for different values of one flag.
Attempt flag_steps() {
  auto flag = std::make_shared<uint32_t>(0);
  auto early = std::make_shared<bool>(false);
  return {[=] {
            const auto thread = uint32_t(thread_index());
            for (uint32_t value = 1; thread == 0 && value < 4; ++value) publish(flag.get(), value);
            await(flag.get(), thread);
            *early |= *flag < thread;
          },
          [=] { return *early ? "wrong: woken early" : "ok"; }};
}

// Whatever is put is found, as it was put: of NaNs others, in halves of nothing but set bits.
Attempt put_and_found() {
  struct Halves {
    uint64_t put, found;
  };
  static constexpr uint64_t kAll = ~uint64_t(0), kOther = 0x7fffffff7fffffff;
  static constexpr Halves kHalves[] = {{0, 0},
                                       {kAll, kOther},
                                       {kAll - 1, kAll - 1},
                                       {kAll >> 1, kAll >> 1},
                                       {kAll << 32, kAll << 32},
                                       {kAll >> 32, kAll >> 32}};
  constexpr int kMany = 36;
  auto vectors = std::make_shared<std::array<Vec16, kMany>>();
  vectors->fill(nothing());
  auto wrong = std::make_shared<std::string>();
  return {[=] {
            const int thread = thread_index() % kMany;
            const Halves &low = kHalves[thread % 6], &high = kHalves[thread / 6];
            Vec16* const vector = &(*vectors)[size_t(thread)];
            if (thread_index() >= kMany) return put(vector, std::bit_cast<Vec16>(std::array{low.put, high.put}));
            Vec16 found = look(vector);
            await(vector, found);
            if (std::bit_cast<std::array<uint64_t, 2>>(found) != std::array{low.found, high.found})
              *wrong += " " + std::to_string(thread);
          },
          [=] { return wrong->empty() ? "ok" : "wrong" + *wrong; }};
}

// Whether a thread finds half of a vector before the other half has come.
Attempt halves() {
  auto vector = std::make_shared<Vec16>(nothing());
  auto seen = std::make_shared<std::string>();
  return {[=] {
            if (thread_index() == 0) return put(vector.get(), Vec16{{1, 2, 3, 4}});
            const Vec16 found = look(vector.get());
            const bool low = found.words[0] == 1, high = found.words[2] == 3;
            *seen += low && high ? "both" : low ? "low" : high ? "high" : "none";
          },
          [=] { return "ok " + *seen; }};
}

// The order in which threads of four warps pass their primitives.
Attempt order() {
  auto hash = std::make_shared<uint64_t>(1);
  const auto pass = [=] { *hash = (*hash + uint64_t(thread_index())) * 0x9e3779b97f4a7c15; };
  return {[=] {
            for (int i = 0; i < 4; ++i) {
              pass();
              sync_block();
            }
          },
          [=] { return "ok " + std::to_string(*hash); }};
}

// Whether others run while a thread is busy with what makes nobody wait.
Attempt interruption() {
  auto last = std::make_shared<int>(-1);
  auto flags = std::make_shared<std::array<uint32_t, 64>>();
  auto interrupted = std::make_shared<bool>(false);
  return {[=] {
            *last = thread_index();
            for (uint32_t i = 1; i < 4; ++i) publish(&(*flags)[size_t(thread_index())], i);
            *interrupted |= *last != thread_index();
          },
          [=] { return *interrupted ? "ok interrupted" : "ok"; }};
}

// The order in which blocks begin, while one is there at a time.
Attempt turns() {
  auto begun = std::make_shared<std::string>();
  return {[=] {
            if (thread_index() == 0) *begun += std::to_string(block_index());
            sync_block();
          },
          [=] { return "ok " + *begun; }};
}

// Whether all others come to their end before some block of 32 begins.
Attempt slowness() {
  auto begun = std::make_shared<std::array<int, 4>>();
  auto ended = std::make_shared<int>(0);
  auto slow = std::make_shared<bool>(false);
  return {[=] {
            ++(*begun)[size_t(block_index())];
            if (++*ended == 96) *slow = std::ranges::count(*begun, 0) == 1;
          },
          [=] { return *slow ? "ok slow" : "ok"; }};
}

// Which of two messages arrives first, while nobody waits.
Attempt arrivals() {
  auto first = std::make_shared<std::string>();
  return {[=] {
            if (cluster_rank() > 0) return;
            auto* const barriers = reinterpret_cast<TransactionBarrier*>(shared_memory());
            auto* const to = reinterpret_cast<Vec16*>(shared_memory() + 16);
            for (int i = 0; i < 2; ++i) {
              barriers[i].open();
              barriers[i].expect(16);
            }
            for (int i = 0; i < 2; ++i) send(to + i, barriers + i, 0, Vec16{});
            for (int patience = 16; patience > 0 && first->empty(); --patience) {
              sync_block();
              for (int i = 0; i < 2; ++i)
                if (to[i].words[0] == 0) *first += std::to_string(i);
            }
            for (int i = 0; i < 2; ++i) barriers[i].await(0);
          },
          [=] { return "ok " + *first; }};
}

// Whose message arrives first, while all wait.
Attempt race() {
  auto first = std::make_shared<int>(-1);
  return {[=] {
            auto* const barriers = reinterpret_cast<TransactionBarrier*>(shared_memory());
            const int thread = thread_index();
            barriers[thread].open();
            barriers[thread].expect(16);
            sync_cluster();
            if (cluster_rank() == 0 && thread == 0)
              for (int i = 0; i < 4; ++i) send(shared_memory() + 32 + i % 2 * 16, barriers + i % 2, i / 2, Vec16{});
            barriers[thread].await(0);
            if (cluster_rank() == 1 && *first < 0) *first = thread;
          },
          [=] { return "ok " + std::to_string(*first); }};
}

// Whether a copy sees what was written after its call, and what its destination holds meanwhile.
Attempt late_copy() {
  auto source = std::make_shared<Vec16>(Vec16{{1}});
  auto got = std::make_shared<std::array<uint32_t, 2>>();
  return {[=] {
            auto* const to = reinterpret_cast<Vec16*>(shared_memory());
            *to = Vec16{{7}};
            copy_async(to, source.get());
            sync_block();
            (*got)[0] = to->words[0];
            source->words[0] = 2;
            copies_arrive();
            (*got)[1] = to->words[0];
          },
          [=] { return "ok " + std::to_string(int((*got)[0])) + " " + std::to_string((*got)[1]); }};
}

// A message's destination before and after it is awaited.
Attempt late_message() {
  auto got = std::make_shared<std::array<uint32_t, 2>>();
  return {[=] {
            if (cluster_rank() > 0) return;
            auto* const barrier = reinterpret_cast<TransactionBarrier*>(shared_memory());
            auto* const to = reinterpret_cast<Vec16*>(shared_memory() + 16);
            *to = Vec16{{7}};
            barrier->open();
            barrier->expect(16);
            send(to, barrier, 0, Vec16{{2}});
            sync_block();
            (*got)[0] = to->words[0];
            barrier->await(0);
            (*got)[1] = to->words[0];
          },
          [=] { return "ok " + std::to_string(int((*got)[0])) + " " + std::to_string((*got)[1]); }};
}

}  // namespace

std::vector<Case> primitives() {
  return {
      checked("shuffles", {2, 1, 64, 0}, shuffles),
      checked("matrices", {1, 1, 32, 32 * 48}, matrices),
      checked("products_bfloat16", {1, 1, 32, 1024}, products<BFloat16>),
      checked("products_float16", {1, 1, 32, 1024}, products<Float16>),
      checked("products_tf32", {1, 1, 32, 1024}, products<TF32>),
      checked("pitch_of_80_bytes", {1, 1, 32, 1024}, pitched<80>),
      checked("pitch_of_128_bytes", {1, 1, 32, 1024}, pitched<128>),
      checked("pitch_of_32_bytes", {1, 1, 32, 1024}, pitched<32>),
      {"flag_steps", {1, 1, 4, 0}, flag_steps},
      {"put_and_found", {1, 1, 72, 0}, put_and_found},
      checked("fresh_memory", {2, 1, 1, 64}, fresh_memory),
  };
}

std::vector<Case> schedules() {
  return {
      {"order", {1, 1, 128, 0}, order},        {"interruption", {1, 1, 64, 0}, interruption},
      {"turns", {4, 1, 32, 0}, turns},         {"slowness", {4, 1, 32, 0}, slowness},
      {"arrivals", {2, 2, 1, 48}, arrivals},   {"race", {2, 2, 2, 64}, race},
      {"late_copy", {1, 1, 1, 16}, late_copy}, {"late_message", {2, 2, 1, 32}, late_message},
      {"halves", {1, 1, 2, 0}, halves},        transactions_with_a_race(),
  };
}

}  // namespace rnn::simt::selftest
