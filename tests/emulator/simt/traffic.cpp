// What moves data and counts it: transaction barriers, flags and vectors in global memory, copies from there to shared
// memory.
#include <cstring>

#include "simt/internals.h"

namespace rnn::simt {
namespace {

constexpr uint64_t kOpen = 0x6d61696c626f7800;  // what an open transaction barrier holds
constexpr int kMostExpected = (1 << 20) - 1;    // bytes that an mbarrier can count

bool aligned(const void* p, size_t alignment) { return reinterpret_cast<uintptr_t>(p) % alignment == 0; }

// A destination holds neither its old bytes nor its new ones until the new ones have arrived.
void scribble(char* to) { std::memset(to, 0xff, sizeof(Vec16)); }

}  // namespace

bool Block::holds(const void* p) const {
  const std::less<const void*> before;
  return !before(p, shared.get()) && before(p, shared.get() + bytes);
}

ptrdiff_t Machine::shared_offset(const Site& site, const char* name, const void* p, size_t bytes, size_t alignment) {
  const auto offset =
      ptrdiff_t(reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(self_->block->shared.get()));
  const std::string which = std::string(name) + " at byte " + std::to_string(offset) + " of shared memory";
  if (offset < 0 || offset + ptrdiff_t(bytes) > grid_.shared_bytes)
    fail(site, which + " is outside of its " + std::to_string(grid_.shared_bytes) + " bytes");
  if (!aligned(p, alignment)) fail(site, which + " is not a multiple of " + std::to_string(alignment) + " bytes");
  return offset;
}

Transactions& Machine::transactions(const Thread& thread, const Site& site, Block& block, ptrdiff_t offset) {
  const auto found = block.transactions.find(offset);
  const std::string which =
      "the transaction barrier at byte " + std::to_string(offset) + " of block " + std::to_string(block.index);
  if (found == block.transactions.end()) fail(thread, site.name, which + " was never opened");
  uint64_t state;
  std::memcpy(&state, block.shared.get() + offset, sizeof(state));
  if (state != kOpen) fail(thread, site.name, which + " was written over");
  return found->second;
}

void Machine::send(const Message& message) {
  char* to = message.block->shared.get() + message.to;
  if (!in_flight_.insert(to).second) fail(*message.site, "other bytes are on their way to the same destination");
  scribble(to);
  messages_.push_back(message);
}

void Machine::deliver(size_t i) {
  const Message message = messages_[i];
  messages_[i] = messages_.back();
  messages_.pop_back();
  Block& block = *message.block;
  char* to = block.shared.get() + message.to;
  std::memcpy(to, &message.vector, sizeof(Vec16));
  in_flight_.erase(to);
  Transactions& counts = transactions(*message.from, *message.site, block, message.barrier);
  const char* const barrier = block.shared.get() + message.barrier;
  if (races_) races_->arrive(message.released, barrier, counts.phase, message.meant, *message.site);
  counts.missing -= int64_t(sizeof(Vec16));
  settle(counts, barrier, *message.from, *message.site);
}

void Machine::settle(Transactions& barrier, const void* at, const Thread& thread, const Site& site) {
  if (!barrier.expected) return;
  if (barrier.missing < 0)
    fail(thread, site.name,
         std::to_string(-barrier.missing) + " bytes more than expected in phase " + std::to_string(barrier.phase) +
             " of the transaction barrier");
  if (barrier.missing) return;
  barrier.expected = false;
  if (races_) races_->complete(at, barrier.phase);
  ++barrier.phase;
  wake(barrier.asleep);
}

void Machine::let_messages_arrive() {
  while (!messages_.empty() && random_.chance(mood_.delivers)) deliver(random_.below(messages_.size()));
  Thread& other = threads_[random_.below(threads_.size())];
  if (!other.copies.empty() && random_.chance(mood_.delivers)) make_copy(other, random_.below(other.copies.size()));
}

void Machine::make_copy(Thread& thread, size_t i) {
  const Copy copy = thread.copies[i];
  thread.copies[i] = thread.copies.back();
  thread.copies.pop_back();
  std::memcpy(copy.to, copy.from, sizeof(Vec16));
}

void Machine::make_copies() {
  while (!self_->copies.empty()) make_copy(*self_, random_.below(self_->copies.size()));
  self_->copying = nullptr;
}

void Machine::check_flag(const Site& site, const uint32_t* flag) {
  if (!aligned(flag, alignof(uint32_t))) fail(site, "the address of the flag is not a multiple of 4 bytes");
  if (self_->block->holds(flag)) fail(site, "the flag lies in shared memory");
}

void Machine::publish(uint32_t* flag, uint32_t value) {
  *flag = value;
  const auto found = flags_.find(flag);
  if (found == flags_.end()) return;
  std::vector<Thread*> reached;
  std::erase_if(found->second, [&](const auto& waiting) {
    if (!cuda::reached(value, waiting.second)) return false;
    reached.push_back(waiting.first);
    return true;
  });
  wake(reached);
  yield();
}

bool Machine::await(const Site& site, const uint32_t* flag, uint32_t value) {
  if (cuda::reached(*flag, value)) return true;
  flags_[flag].emplace_back(self_, value);
  return sleep_in_time(site);
}

void Machine::check_vector(const Site& site, const void* p) {
  if (!aligned(p, alignof(Vec16))) fail(site, "the address of the vector is not a multiple of 16 bytes");
  if (self_->block->holds(p)) fail(site, "the vector lies in shared memory");
}

// One half after the other, in any order.
void Machine::put(void* to, const Vec16& v) {
  const size_t first = schedule_.mode == Mode::random ? random_.below(2) : 0;
  for (const size_t half : {first, 1 - first}) {
    std::memcpy(static_cast<char*>(to) + half * 8, v.words + half * 2, 8);
    const auto found = awaited_.find(to);
    if (found != awaited_.end()) wake(found->second);
    if (schedule_.mode == Mode::random && random_.chance(mood_.yields)) yield();
  }
}

bool Machine::await(const Site& site, const void* from, Vec16& found) {
  while (!is_there(found)) {
    std::memcpy(&found, from, sizeof(found));
    if (is_there(found)) break;
    awaited_[from].push_back(self_);
    if (!sleep_in_time(site)) return false;
  }
  return true;
}

}  // namespace rnn::simt

namespace rnn::cuda {

using simt::Machine;

void TransactionBarrier::open(Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "open");
  if (!site) return;
  const ptrdiff_t offset =
      m.shared_offset(*site, "the transaction barrier", this, sizeof(TransactionBarrier), alignof(TransactionBarrier));
  if (!m.self().block->transactions.try_emplace(offset).second)
    m.fail(*site, "the transaction barrier was opened before");
  state = simt::kOpen;
  if (m.races()) m.races()->open(m.number(), this, *site);
}

void TransactionBarrier::expect(int bytes, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "expect");
  if (!site) return;
  const ptrdiff_t offset =
      m.shared_offset(*site, "the transaction barrier", this, sizeof(TransactionBarrier), alignof(TransactionBarrier));
  simt::Transactions& barrier = m.transactions(m.self(), *site, *m.self().block, offset);
  if (bytes < 0 || bytes > simt::kMostExpected)
    m.fail(*site, std::to_string(bytes) + " bytes, expected 0 to " + std::to_string(simt::kMostExpected));
  if (barrier.expected)
    m.fail(*site, "phase " + std::to_string(barrier.phase) + " was expected before, and is not over");
  barrier.expected = true;
  barrier.missing += bytes;
  if (m.races()) m.races()->expect(m.number(), this, barrier.phase, *site);
  m.settle(barrier, this, m.self(), *site);
  m.yield();
}

bool TransactionBarrier::await(int phase, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "await");
  if (!site) return true;
  const ptrdiff_t offset =
      m.shared_offset(*site, "the transaction barrier", this, sizeof(TransactionBarrier), alignof(TransactionBarrier));
  simt::Transactions& barrier = m.transactions(m.self(), *site, *m.self().block, offset);
  // The hardware tells odd phases from even ones, no more.
  const auto check = [&](const char* when) {
    if (phase > barrier.phase || phase < barrier.phase - 1)
      m.fail(*site, "phase " + std::to_string(phase) + when + std::to_string(barrier.phase) +
                        ", which is neither the same nor the next");
  };
  check(" awaited in phase ");
  if (m.races()) m.races()->wait(m.number(), this, phase, *site);
  if (phase == barrier.phase) {
    barrier.asleep.push_back(&m.self());
    if (!m.sleep_in_time(*site)) return false;
    check(" awaited until phase ");
  }
  if (m.races()) m.races()->waited(m.number(), this, phase, !site->weak);
  return true;
}

void send(void* to, TransactionBarrier* barrier, int rank, const Vec16& vector, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "send");
  if (!site) return;
  simt::Message message{&m.self(), site, nullptr, 0, 0, vector};
  message.to = m.shared_offset(*site, "the destination", to, sizeof(Vec16), alignof(Vec16));
  message.barrier = m.shared_offset(*site, "the transaction barrier", barrier, sizeof(TransactionBarrier),
                                    alignof(TransactionBarrier));
  if (m.grid().cluster == 1) m.fail(*site, "a cluster of one block has nobody to send to: it is not defined");
  if (rank < 0 || rank >= m.grid().cluster)
    m.fail(*site, "rank " + std::to_string(rank) + " in a cluster of " + std::to_string(m.grid().cluster) + " blocks");
  message.block = m.self().block->cluster->blocks + rank;
  if (message.block->exited == m.grid().threads)
    m.fail(*site, "block " + std::to_string(message.block->index) + " has come to its end");
  m.transactions(m.self(), *site, *message.block, message.barrier);
  m.reads(m.self(), &vector, sizeof(vector), *site);
  if (m.races()) {
    char* const memory = message.block->shared.get();
    message.meant = m.races()->send(m.number(), memory + message.to, sizeof(Vec16), memory + message.barrier, *site);
    message.released = m.races()->release(m.number());
  }
  m.send(message);
}

void publish(uint32_t* flag, uint32_t value, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "publish");
  if (!site) return;
  m.check_flag(*site, flag);
  if (!reached(value, *flag)) m.fail(*site, "a flag of " + std::to_string(*flag) + " set to " + std::to_string(value));
  if (m.races()) m.races()->publish(m.number(), flag, value, !site->weak, *site);
  m.publish(flag, value);
}

bool await(const uint32_t* flag, uint32_t value, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "await");
  if (!site) return true;
  m.check_flag(*site, flag);
  if (!m.await(*site, flag, value)) return false;
  if (m.races()) m.races()->await(m.number(), flag, value, !site->weak, *site);
  return true;
}

void put(void* to, const Vec16& vector, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "put");
  if (!site) return;
  m.check_vector(*site, to);
  m.reads(m.self(), &vector, sizeof(vector), *site);
  if (m.races()) m.races()->put(m.number(), to, !site->weak, *site);
  m.put(to, told_from_nothing(vector));
  m.yield();
}

void empty(void* at, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "empty");
  if (!site) return;
  m.check_vector(*site, at);
  if (m.races()) m.races()->empty(m.number(), at, !site->weak, *site);
  m.put(at, nothing());
}

// What it finds counts once it is there; what it does not, nobody has seen.
Vec16 look(const void* from, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site& site = m.enter_always(here, "look");
  m.check_vector(site, from);
  Vec16 found;
  std::memcpy(&found, from, sizeof(found));
  if (m.races()) m.races()->look(m.number(), from, is_there(found), !site.weak, site);
  return found;
}

bool await(const void* from, Vec16& found, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "await");
  if (!site || is_there(found)) return true;
  m.check_vector(*site, from);
  if (m.races()) m.races()->look(m.number(), from, false, !site->weak, *site);
  if (!m.await(*site, from, found)) return false;
  if (m.races()) m.races()->look(m.number(), from, true, !site->weak, *site);
  return true;
}

void settle(Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "settle");
  if (site && m.races() && !site->weak) m.races()->settle(m.number());
}

void record(uint64_t* fault, const Fault& found) {
  const simt::Unwatched unwatched;
  *fault = found.packed();
}

void copy_async(void* to, const void* from, Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "copy_async");
  if (!site) return;
  m.shared_offset(*site, "the destination", to, sizeof(Vec16), alignof(Vec16));
  if (!simt::aligned(from, alignof(Vec16))) m.fail(*site, "the address of the source is not a multiple of 16 bytes");
  if (m.self().block->holds(from)) m.fail(*site, "the source lies in shared memory");
  if (m.races()) m.races()->copy(m.number(), to, from, sizeof(Vec16), *site);
  simt::scribble(static_cast<char*>(to));
  m.self().copies.push_back({static_cast<char*>(to), static_cast<const char*>(from)});
  m.self().copying = site;
}

void copies_arrive(Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  const simt::Site* site = m.enter(here, "copies_arrive");
  if (!site) return;
  m.make_copies();
  if (m.races() && !site->weak) m.races()->copies_arrive(m.number());
}

}  // namespace rnn::cuda
