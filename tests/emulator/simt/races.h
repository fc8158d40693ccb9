// Which accesses of a kernel's threads to the same memory no barrier, message or flag puts in order: races. An access
// is compared with the accesses before it by what its thread knows to have happened, not by when the scheduler let it
// run: one run finds what any schedule could. Where there is no race, every execution that the hardware's memory model
// allows is one of those that the emulator can run.
//
// Agents act: every thread; the copies of every thread, of which it knows once it has waited for them; every
// transaction barrier, whose phases write what was sent in them. Each counts its actions, and whoever knows of one
// knows of all before it. Epochs are places in that count.
//
// A vector that says by itself whether it is there tells of itself and of nothing else: who finds it knows no other
// action of who has put it. It hands on what that one knew at its last fence, and that only with the next fence of who
// has found it. As looks may find what they should not, and miss what they should find, three things are asked: who
// empties a vector knows of all who have found what was in it; who puts into it knows that it is empty; and so does who
// looks at it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "simt/machine.h"

#if defined(__SANITIZE_THREAD__)
#define RNN_SIMT_WATCHES 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define RNN_SIMT_WATCHES 1
#endif
#endif
// What answers the calls of the sanitizer makes none.
#if defined(RNN_SIMT_WATCHES)
#define RNN_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define RNN_UNWATCHED
#endif

namespace rnn::simt {

struct Site;

// Where an access happens: in a primitive, or in code of the kernel.
class Origin {
 public:
  Origin() = default;
  Origin(const Site& site) : bits_(reinterpret_cast<uintptr_t>(&site) | kPrimitive) {}
  static Origin of_code(const void* return_address) {
    Origin origin;
    origin.bits_ = reinterpret_cast<uintptr_t>(return_address);
    return origin;
  }
  std::string text() const;
  friend bool operator<(Origin a, Origin b) { return a.bits_ < b.bits_; }

 private:
  static constexpr uint64_t kPrimitive = uint64_t(1) << 63;  // of no address
  uint64_t bits_ = 0;
};

class Races {
 public:
  // How many actions of each agent are known; of those past the end, none.
  using Clocks = std::vector<uint32_t>;
  using Known = std::shared_ptr<const Clocks>;
  // What a thread makes known by a message.
  struct Release {
    Known others;
    uint32_t thread, own, copies;
  };

  // Threads are numbered over all blocks. Memory between `stacks` and `stacks_end`, and the stack of the caller, is
  // nobody's business: locals, and the parameters of the kernel.
  Races(const Grid& grid, std::vector<const void*> shared, const void* stacks, const void* stacks_end);
  ~Races();
  Races(const Races&) = delete;

  void access(uint32_t thread, const void* p, size_t bytes, bool writes, Origin origin);
  // By what is atomic: in order with all others of its kind, and with no other access.
  void atomic(uint32_t thread, const void* p, size_t bytes, Origin origin);

  // Each knows all that any of them did.
  void meet(const std::vector<uint32_t>& threads);

  void publish(uint32_t thread, const void* flag, uint32_t value, bool ordered, Origin origin);
  void await(uint32_t thread, const void* flag, uint32_t value, bool ordered, Origin origin);

  // Vectors, by their first byte; not `strong`, they are accesses like any others.
  void put(uint32_t thread, const void* to, bool strong, Origin origin);
  void empty(uint32_t thread, const void* at, bool strong, Origin origin);
  void look(uint32_t thread, const void* from, bool found, bool strong, Origin origin);
  void settle(uint32_t thread);

  void copy(uint32_t thread, const void* to, const void* from, size_t bytes, Origin origin);
  void copies_arrive(uint32_t thread);

  // A transaction barrier by its address.
  void open(uint32_t thread, const void* barrier, Origin origin);
  void expect(uint32_t thread, const void* barrier, int phase, Origin origin);
  void wait(uint32_t thread, const void* barrier, int phase, Origin origin);   // begins to
  void waited(uint32_t thread, const void* barrier, int phase, bool ordered);  // has ended
  uint32_t send(uint32_t thread, const void* to, size_t bytes, const void* barrier,
                Origin origin);  // the phase it is for
  void arrive(const Release& from, const void* barrier, int phase, uint32_t meant, Origin origin);
  void complete(const void* barrier, int phase);
  Release release(uint32_t thread);
  // The block's memory is gone: of all that was sent there, somebody in it has to know.
  void end_block(const std::vector<uint32_t>& threads, const void* shared, size_t bytes);

  bool found() const { return !pairs_.empty(); }
  std::string report() const;
  uint64_t accesses() const { return accesses_; }

 private:
  struct Stamp {
    uint32_t agent, clock;
    Origin origin;
  };
  struct Cell;
  struct Page;
  struct Thread {
    Known others;
    uint32_t own = 1;            // the epoch that the thread is in
    uint32_t copies = 0;         // of its copies' epochs, those that it knows
    Release settled{};           // at its last fence
    std::vector<Release> found;  // with vectors since then
  };
  struct Vector {
    bool full = false;
    Stamp put{}, emptied{};  // the last time
    Release told{};          // at a fence of who has put it
    std::vector<Stamp> found;
  };
  struct Phase {
    Clocks joined;
    std::set<const Clocks*> merged;
    std::vector<Known> kept;
    Known known;  // once it is over
    std::vector<Stamp> waits;
  };
  struct Barrier {
    uint32_t agent;
    std::map<int, Phase> phases;
    uint32_t written = 0;  // the last phase that something was sent in, plus one
    Stamp sent{};
  };
  struct Flag {
    std::vector<std::pair<uint32_t, Known>> values;  // null where nothing was released
    Stamp last{};
  };

  uint32_t copier(uint32_t thread) const { return uint32_t(threads_.size()) + thread; }
  bool knows(uint32_t thread, const Stamp& stamp) const;
  static uint32_t at(const Clocks& clocks, uint32_t agent) { return agent < clocks.size() ? clocks[agent] : 0; }
  static void merge(Clocks& into, const Clocks& from);
  static void raise(Clocks& in, uint32_t agent, uint32_t clock);
  Known after(const Release& release) const;
  void acquire(uint32_t thread, const Known& known);

  Page** page(uintptr_t number);
  void grow();
  Cell* cells(uintptr_t p);
  void stamp(uint32_t thread, const void* p, size_t bytes, bool writes, const Stamp& mine);
  void read(Cell& cell, uint32_t thread, const Stamp& mine, uintptr_t p);
  void write(Cell& cell, uint32_t thread, const Stamp& mine, uintptr_t p);
  void add(const char* what, const Stamp& before, const Stamp& after, const void* p);
  std::string who(const Stamp& stamp) const;
  std::string where(const void* p) const;
  Barrier& barrier(const void* p) { return barriers_.at(p); }

  const Grid grid_;
  const std::vector<const void*> shared_;  // of each block
  const uintptr_t stacks_, stacks_end_;
  uintptr_t host_stack_ = 0, host_stack_end_ = 0;
  std::vector<Thread> threads_;
  uint32_t agents_;
  std::map<const void*, Barrier> barriers_;
  std::unordered_map<const void*, Flag> flags_;
  std::unordered_map<const void*, Vector> vectors_;
  struct Joined {
    Known a, b, result;
  } joined_;  // the last one

  Page** table_;
  size_t table_size_, pages_ = 0;
  Page* last_page_ = nullptr;

  uint64_t accesses_ = 0;
  std::set<std::pair<Origin, Origin>> seen_;
  struct Pair {
    const char* what;
    Stamp before, after;
    const void* p;
  };
  std::vector<Pair> pairs_;
};

// Between its construction and its end the thread's accesses are the emulator's own.
class Unwatched {
 public:
#if defined(RNN_SIMT_WATCHES)
  Unwatched();
  ~Unwatched();

 private:
  bool before_;
#else
  Unwatched() {}
#endif
};
// The same, but the kernel's: they are given to Machine::current().
class Watched {
 public:
#if defined(RNN_SIMT_WATCHES)
  Watched();
  ~Watched();
#else
  Watched() {}
#endif
};

}  // namespace rnn::simt
