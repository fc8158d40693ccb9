// Shadow memory, and what each thread knows.
#include "simt/races.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "simt/internals.h"

namespace rnn::simt {
namespace {

// Numbers of 16 bits are written by different threads next to each other; nothing smaller is written at all.
constexpr uintptr_t kGranule = 2, kPageBytes = 4096;

// Zeros. Nobody catches an exception between a kernel's access and the kernel.
void* allocate(size_t bytes) {
  void* const memory = std::calloc(1, bytes);
  if (!memory) std::abort();
  return memory;
}

}  // namespace

// Who wrote last, and who has read since then.
struct Races::Cell {
  Stamp written, read;
  Stamp* more;  // other readers
  uint32_t count, capacity;
  bool read_at_all, atomic;
};

struct Races::Page {
  uintptr_t number;
  Cell cells[kPageBytes / kGranule];
};

Races::Races(const Grid& grid, std::vector<const void*> shared, const void* stacks, const void* stacks_end)
    : grid_(grid),
      shared_(std::move(shared)),
      stacks_(reinterpret_cast<uintptr_t>(stacks)),
      stacks_end_(reinterpret_cast<uintptr_t>(stacks_end)),
      threads_(size_t(grid.blocks) * size_t(grid.threads)),
      agents_(2 * uint32_t(threads_.size())),
      table_size_(1 << 6) {
  const auto nothing = std::make_shared<const Clocks>();
  for (Thread& thread : threads_) thread.others = nothing;
  table_ = static_cast<Page**>(allocate(table_size_ * sizeof(Page*)));
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes)) throw std::bad_alloc();
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  host_stack_ = reinterpret_cast<uintptr_t>(stack);
  host_stack_end_ = host_stack_ + bytes;
}

Races::~Races() {
  for (size_t i = 0; i < table_size_; ++i) {
    if (!table_[i]) continue;
    for (Cell& cell : table_[i]->cells) std::free(cell.more);
    std::free(table_[i]);
  }
  std::free(table_);
}

// Where the page of this number is, or would be.
RNN_UNWATCHED Races::Page** Races::page(uintptr_t number) {
  size_t i = number * 0x9e3779b97f4a7c15 >> 32 & (table_size_ - 1);
  while (table_[i] && table_[i]->number != number) i = (i + 1) & (table_size_ - 1);
  return table_ + i;
}

void Races::grow() {
  Page** const smaller = table_;
  const size_t size = table_size_;
  table_size_ *= 2;
  table_ = static_cast<Page**>(allocate(table_size_ * sizeof(Page*)));
  for (size_t i = 0; i < size; ++i)
    if (smaller[i]) *page(smaller[i]->number) = smaller[i];
  std::free(smaller);
}

RNN_UNWATCHED Races::Cell* Races::cells(uintptr_t p) {
  const uintptr_t number = p / kPageBytes;
  if (!last_page_ || number != last_page_->number) {
    if (!*page(number)) {
      if (++pages_ * 2 > table_size_) grow();
      Page* const fresh = static_cast<Page*>(allocate(sizeof(Page)));
      fresh->number = number;
      *page(number) = fresh;
    }
    last_page_ = *page(number);
  }
  return last_page_->cells + p % kPageBytes / kGranule;
}

RNN_UNWATCHED bool Races::knows(uint32_t thread, const Stamp& stamp) const {
  const Thread& self = threads_[thread];
  if (stamp.agent == thread || stamp.clock == 0) return true;
  if (stamp.agent == thread + threads_.size() && stamp.clock <= self.copies) return true;
  const Clocks& others = *self.others;
  return stamp.agent < others.size() && stamp.clock <= others.data()[stamp.agent];
}

RNN_UNWATCHED void Races::read(Cell& cell, uint32_t thread, const Stamp& mine, uintptr_t p) {
  if (!knows(thread, cell.written)) add("is read after it was written", cell.written, mine, reinterpret_cast<void*>(p));
  if (!cell.read_at_all || cell.read.agent == mine.agent) {
    cell.read = mine;
    cell.read_at_all = true;
    return;
  }
  for (uint32_t i = 0; i < cell.count; ++i)
    if (cell.more[i].agent == mine.agent) {
      cell.more[i] = mine;
      return;
    }
  if (cell.count == cell.capacity) {  // those that this thread knows of matter to nobody who knows of it
    uint32_t kept = 0;
    for (uint32_t i = 0; i < cell.count; ++i)
      if (!knows(thread, cell.more[i])) cell.more[kept++] = cell.more[i];
    cell.count = kept;
    if (kept * 2 >= cell.capacity) {
      cell.capacity = cell.capacity ? cell.capacity * 2 : 4;
      cell.more = static_cast<Stamp*>(std::realloc(cell.more, cell.capacity * sizeof(Stamp)));
      if (!cell.more) std::abort();
    }
  }
  cell.more[cell.count++] = mine;
}

RNN_UNWATCHED void Races::write(Cell& cell, uint32_t thread, const Stamp& mine, uintptr_t p) {
  void* const at = reinterpret_cast<void*>(p);
  if (!knows(thread, cell.written)) add("is written twice", cell.written, mine, at);
  if (cell.read_at_all && !knows(thread, cell.read)) add("is written after it was read", cell.read, mine, at);
  for (uint32_t i = 0; i < cell.count; ++i)
    if (!knows(thread, cell.more[i])) add("is written after it was read", cell.more[i], mine, at);
  cell.written = mine;
  cell.read_at_all = false;
  cell.count = 0;
}

RNN_UNWATCHED void Races::stamp(uint32_t thread, const void* memory, size_t bytes, bool writes, const Stamp& mine) {
  const auto first = reinterpret_cast<uintptr_t>(memory);
  if ((first >= stacks_ && first < stacks_end_) || (first >= host_stack_ && first < host_stack_end_)) return;
  ++accesses_;
  for (uintptr_t p = first & ~(kGranule - 1); p < first + bytes; p += kGranule) {
    Cell& cell = *cells(p);
    if (cell.atomic) add("is used as a flag, and otherwise", cell.read, mine, reinterpret_cast<void*>(p));
    writes ? write(cell, thread, mine, p) : read(cell, thread, mine, p);
  }
}

RNN_UNWATCHED void Races::access(uint32_t thread, const void* p, size_t bytes, bool writes, Origin origin) {
  stamp(thread, p, bytes, writes, {thread, threads_[thread].own, origin});
}

void Races::atomic(uint32_t thread, const void* memory, size_t bytes, Origin origin) {
  const auto first = reinterpret_cast<uintptr_t>(memory);
  const Stamp mine{thread, threads_[thread].own, origin};
  ++accesses_;
  for (uintptr_t p = first & ~(kGranule - 1); p < first + bytes; p += kGranule) {
    Cell& cell = *cells(p);
    if (!cell.atomic && cell.read_at_all && !knows(thread, cell.read))
      add("is read, and used as a flag", cell.read, mine, memory);
    read(cell, thread, mine, p);
    cell.atomic = true;
  }
}

void Races::merge(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size());
  uint32_t* const to = into.data();
  const uint32_t* const other = from.data();
  for (size_t i = 0, n = from.size(); i < n; ++i) to[i] = to[i] < other[i] ? other[i] : to[i];
}

void Races::raise(Clocks& in, uint32_t agent, uint32_t clock) {
  if (agent >= in.size()) in.resize(agent + 1);
  in[agent] = std::max(in[agent], clock);
}

Races::Known Races::after(const Release& release) const {
  auto known = std::make_shared<Clocks>(*release.others);
  raise(*known, release.thread, release.own);
  raise(*known, copier(release.thread), release.copies);
  return known;
}

// What threads of a block learn is mostly the same.
void Races::acquire(uint32_t thread, const Known& known) {
  Known& mine = threads_[thread].others;
  if (joined_.a != mine || joined_.b != known) {
    auto both = std::make_shared<Clocks>(*mine);
    merge(*both, *known);
    joined_ = {mine, known, std::move(both)};
  }
  mine = joined_.result;
}

Races::Release Races::release(uint32_t thread) {
  Thread& self = threads_[thread];
  return {self.others, thread, self.own++, self.copies};
}

void Races::meet(const std::vector<uint32_t>& threads) {
  auto all = std::make_shared<Clocks>();
  std::set<const Clocks*> merged;
  for (const uint32_t thread : threads) {
    if (merged.insert(threads_[thread].others.get()).second) merge(*all, *threads_[thread].others);
  }
  for (const uint32_t thread : threads) {
    raise(*all, thread, threads_[thread].own);
    raise(*all, copier(thread), threads_[thread].copies);
  }
  for (const uint32_t thread : threads) {
    threads_[thread].others = all;
    ++threads_[thread].own;
  }
}

void Races::publish(uint32_t thread, const void* p, uint32_t value, bool ordered, Origin origin) {
  atomic(thread, p, sizeof(uint32_t), origin);
  Flag& flag = flags_[p];
  // One value after the other: else a flag could fall.
  if (!knows(thread, flag.last)) add("is published twice", flag.last, {thread, threads_[thread].own, origin}, p);
  const Release released = release(thread);
  flag.last = {thread, released.own, origin};
  flag.values.emplace_back(value, ordered ? after(released) : nullptr);
}

// Who waits for a value may have found the first that is large enough: of later ones it knows nothing.
void Races::await(uint32_t thread, const void* p, uint32_t value, bool ordered, Origin origin) {
  atomic(thread, p, sizeof(uint32_t), origin);
  if (!ordered || value == 0) return;
  for (const auto& [set, known] : flags_[p].values) {
    if (set < value) continue;
    if (known) acquire(thread, known);
    return;
  }
}

void Races::put(uint32_t thread, const void* to, bool strong, Origin origin) {
  if (!strong) return access(thread, to, sizeof(cuda::Vec16), true, origin);
  atomic(thread, to, sizeof(cuda::Vec16), origin);
  Vector& vector = vectors_[to];
  const Stamp mine{thread, threads_[thread].own, origin};
  if (vector.full) add("is put into before it was emptied", vector.put, mine, to);
  if (!knows(thread, vector.emptied)) add("is put into after it was emptied", vector.emptied, mine, to);
  vector.full = true;
  vector.put = mine;
  vector.told = threads_[thread].settled;
}

void Races::empty(uint32_t thread, const void* at, bool strong, Origin origin) {
  if (!strong) return access(thread, at, sizeof(cuda::Vec16), true, origin);
  atomic(thread, at, sizeof(cuda::Vec16), origin);
  Vector& vector = vectors_[at];
  const Stamp mine{thread, threads_[thread].own, origin};
  if (!knows(thread, vector.put)) add("is emptied after it was put into", vector.put, mine, at);
  if (!knows(thread, vector.emptied)) add("is emptied twice", vector.emptied, mine, at);
  for (const Stamp& stamp : vector.found)
    if (!knows(thread, stamp)) add("is emptied after it was found", stamp, mine, at);
  vector.full = false;
  vector.emptied = mine;
  vector.found.clear();
}

void Races::look(uint32_t thread, const void* from, bool found, bool strong, Origin origin) {
  if (!strong) return access(thread, from, sizeof(cuda::Vec16), false, origin);
  atomic(thread, from, sizeof(cuda::Vec16), origin);
  Vector& vector = vectors_[from];
  const Stamp mine{thread, threads_[thread].own, origin};
  // What was there before it was emptied would be found as well.
  if (!knows(thread, vector.emptied)) add("is looked at after it was emptied", vector.emptied, mine, from);
  if (!found || !vector.full) return;
  vector.found.push_back(mine);
  if (vector.told.others) threads_[thread].found.push_back(vector.told);
}

void Races::settle(uint32_t thread) {
  Thread& self = threads_[thread];
  if (!self.found.empty()) {
    auto known = std::make_shared<Clocks>(*self.others);
    std::set<const Clocks*> merged;
    for (const Release& from : self.found) {
      if (merged.insert(from.others.get()).second) merge(*known, *from.others);
      raise(*known, from.thread, from.own);
      raise(*known, copier(from.thread), from.copies);
    }
    self.others = std::move(known);
    self.found.clear();
  }
  self.settled = release(thread);
}

void Races::copy(uint32_t thread, const void* to, const void* from, size_t bytes, Origin origin) {
  const Stamp mine{copier(thread), threads_[thread].copies + 1, origin};
  stamp(thread, from, bytes, false, mine);
  stamp(thread, to, bytes, true, mine);
}
void Races::copies_arrive(uint32_t thread) { ++threads_[thread].copies; }

void Races::open(uint32_t thread, const void* p, Origin origin) {
  access(thread, p, sizeof(uint64_t), true, origin);
  barriers_.emplace(p, Barrier{agents_++, {}, 0, {}});
}

void Races::expect(uint32_t thread, const void* p, int phase, Origin origin) {
  atomic(thread, p, sizeof(uint64_t), origin);
  Barrier& b = barrier(p);
  const Stamp mine{thread, threads_[thread].own, origin};
  if (at(*threads_[thread].others, b.agent) < uint32_t(phase))
    add("may be expected in an earlier phase", b.sent, mine, p);
  arrive(release(thread), p, phase, uint32_t(phase), origin);
}

void Races::wait(uint32_t thread, const void* p, int phase, Origin origin) {
  atomic(thread, p, sizeof(uint64_t), origin);
  Barrier& b = barrier(p);
  const Stamp mine{thread, threads_[thread].own, origin};
  // In the phase before, that before it would do.
  if (at(*threads_[thread].others, b.agent) < uint32_t(phase))
    add("may be awaited in an earlier phase", b.sent, mine, p);
  b.phases[phase].waits.push_back(mine);
}

void Races::waited(uint32_t thread, const void* p, int phase, bool ordered) {
  Phase& over = barrier(p).phases.at(phase);
  if (ordered && over.known) acquire(thread, over.known);
}

uint32_t Races::send(uint32_t thread, const void* to, size_t bytes, const void* p, Origin origin) {
  atomic(thread, p, sizeof(uint64_t), origin);
  Barrier& b = barrier(p);
  const uint32_t phase = at(*threads_[thread].others, b.agent);
  const Stamp mine{b.agent, phase + 1, origin};
  stamp(thread, to, bytes, true, mine);
  if (phase + 1 > b.written) {
    b.written = phase + 1;
    b.sent = mine;
  }
  return phase;
}

void Races::arrive(const Release& from, const void* p, int phase, uint32_t meant, Origin origin) {
  Barrier& b = barrier(p);
  Phase& now = b.phases[phase];
  if (meant != uint32_t(phase)) add("may arrive in another phase", b.sent, {from.thread, from.own, origin}, p);
  if (now.merged.insert(from.others.get()).second) {
    now.kept.push_back(from.others);
    merge(now.joined, *from.others);
  }
  raise(now.joined, from.thread, from.own);
  raise(now.joined, copier(from.thread), from.copies);
}

void Races::complete(const void* p, int phase) {
  Barrier& b = barrier(p);
  Phase& over = b.phases[phase];
  // Whoever waits tells a phase from the next but one by nothing: all have to be through before this one ends.
  const auto before = b.phases.find(phase - 1);
  if (before != b.phases.end())
    for (const Stamp& stamp : before->second.waits)
      if (at(over.joined, stamp.agent) < stamp.clock) add("may be awaited in a later phase", stamp, b.sent, p);
  raise(over.joined, b.agent, uint32_t(phase) + 1);
  over.known = std::make_shared<const Clocks>(std::move(over.joined));
  over.merged.clear();
  over.kept.clear();
  b.phases.erase(phase - 2);
}

void Races::end_block(const std::vector<uint32_t>& threads, const void* shared, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(shared);
  for (auto it = barriers_.lower_bound(shared); it != barriers_.end(); ++it) {
    if (reinterpret_cast<uintptr_t>(it->first) >= first + bytes) break;
    const Barrier& b = it->second;
    const bool known = std::ranges::any_of(
        threads, [&](uint32_t thread) { return at(*threads_[thread].others, b.agent) >= b.written; });
    if (!known)
      add("may arrive after the end of the block", b.sent, {threads[0], threads_[threads[0]].own, {}}, it->first);
  }
}

void Races::add(const char* what, const Stamp& before, const Stamp& after, const void* p) {
  constexpr size_t kMost = 20;
  if (pairs_.size() < kMost && seen_.insert({before.origin, after.origin}).second)
    pairs_.push_back({what, before, after, p});
}

}  // namespace rnn::simt
