// The state of a launch, as the primitives of device_on_host.h see it.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cuda/device.cuh"
#include "simt/fiber.h"
#include "simt/machine.h"
#include "simt/races.h"

namespace rnn::simt {

using cuda::Here;
using cuda::kWarp;
using cuda::Vec16;

struct Block;
struct Thread;

// One primitive at one place.
struct Site {
  std::string name;  // "send at kernel.cuh:12"
  bool skipped, weak;
  mutable uint64_t visits = 0;
};

struct Barrier {
  const Site* site = nullptr;
  std::vector<Thread*> asleep;
};

// Lanes that have come to a collective, and what they bring.
struct Warp {
  const Site* site = nullptr;
  int arrived = 0, exited = 0;
  std::array<Thread*, kWarp> lanes;
  std::array<void*, kWarp> brought;
};

struct Cluster {
  Block* blocks = nullptr;  // the first of them
  int exited = 0;           // threads
  Barrier barrier;
};

// What a TransactionBarrier counts, an mbarrier of one arrival. A phase is over when it was expected and no byte is
// missing.
struct Transactions {
  int phase = 0;
  bool expected = false;
  int64_t missing = 0;  // below zero: arrived before they were expected
  std::vector<Thread*> asleep;
};

struct Block {
  int index = 0, rank = 0;
  Cluster* cluster = nullptr;
  int bytes = 0;  // of its shared memory
  std::unique_ptr<char[]> shared;
  int exited = 0;  // threads
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<ptrdiff_t, Transactions> transactions;  // by their place in shared memory

  bool holds(const void* p) const;
};

struct Copy {
  char* to;
  const char* from;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int index = 0;
  const Site* waits_at = nullptr;
  std::vector<Copy> copies;       // not made yet
  const Site* copying = nullptr;  // the last copy not waited for
  bool waits_in_time = false;     // what it waits for has a bound
  bool late = false;              // which was reached
  bool started = false, done = false;

  Warp& warp() const { return block->warps[size_t(index / kWarp)]; }
  int lane() const { return index % kWarp; }
};

// 16 bytes on their way.
struct Message {
  Thread* from;
  const Site* site;
  Block* block;
  ptrdiff_t to, barrier;  // where in its shared memory
  Vec16 vector;
  Races::Release released{};
  uint32_t meant = 0;  // the phase
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  size_t below(size_t n) { return size_t((next() >> 32) * n >> 32); }
  bool chance(unsigned of_256) { return next() >> 56 < of_256; }

 private:
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }

  uint64_t state_;
};

// How the random schedule behaves for a while.
struct Mood {
  unsigned yields = 0;                  // of 256 primitives, those that let another thread run
  unsigned delivers = 0;                // of 256, how likely one more message arrives at a primitive
  size_t slow_begin = 0, slow_end = 0;  // threads that run when hardly another can
};

class Machine {
 public:
  Machine(const Grid& grid, const Schedule& schedule, const std::function<void()>& kernel);
  Report run();

  // The machine and the thread that call.
  static Machine& current();
  Thread& self() { return *self_; }
  const Grid& grid() const { return grid_; }

  // Of the launch, if it is watched for them; and the number of a thread among all.
  Races* races() { return races_.get(); }
  uint32_t number(const Thread& thread) const { return uint32_t(&thread - threads_.data()); }
  uint32_t number() const { return number(*self_); }
  // The thread that runs has come to an access.
  static void seen(const void* p, size_t bytes, bool writes, const void* from);
  // A primitive reads an operand for this thread.
  void reads(const Thread& thread, const void* p, size_t bytes, const Site& site) {
    if (races_) races_->access(number(thread), p, bytes, false, site);
  }

  // At the start of each primitive: others may run. Null where the site is skipped.
  const Site* enter(const Here& here, const char* primitive);
  // The same for what cannot be skipped, since it has a result.
  const Site& enter_always(const Here& here, const char* primitive);
  // The thread runs again after somebody woke it.
  void sleep(const Site& site);
  // The same for a wait that has a bound, in a list of those who wait for the same; false where it was reached, which
  // is when nobody can run any more.
  bool sleep_in_time(const Site& site);
  void wake(std::vector<Thread*>& threads);
  // Lets others run, such as those that this thread has woken.
  void yield();
  void note_bank_conflicts(int passes) { bank_conflicts_ += uint64_t(passes); }
  void meet(Barrier& barrier, int threads, int exited, const Site& site);

  [[noreturn]] void fail(const Site& site, const std::string& what) { fail(*self_, site.name, what); }
  [[noreturn]] static void fail(const Thread& thread, const std::string& where, const std::string& what);
  // `p` has to be so aligned, and to lie with its bytes in the block's shared memory; where it does.
  ptrdiff_t shared_offset(const Site& site, const char* name, const void* p, size_t bytes, size_t alignment);
  // The opened transaction barrier of `block` at a place of its shared memory.
  Transactions& transactions(const Thread& thread, const Site& site, Block& block, ptrdiff_t offset);

  void send(const Message& message);
  void settle(Transactions& barrier, const void* at, const Thread& thread, const Site& site);
  void make_copies();
  void check_flag(const Site& site, const uint32_t* flag);
  void publish(uint32_t* flag, uint32_t value);
  bool await(const Site& site, const uint32_t* flag, uint32_t value);
  void check_vector(const Site& site, const void* p);
  void put(void* to, const Vec16& v);
  bool await(const Site& site, const void* from, Vec16& found);

 private:
  Report run_all();
  static void fiber_main();
  void run_thread();
  void exit_thread();
  void start();
  void begin_next();
  void abandon();

  void make_ready(Thread& thread);
  Thread* choose();
  size_t choose_random();
  void resume(Thread& next);
  [[noreturn]] void fail_deadlock();
  void let_time_pass();
  void change_mood();
  void let_messages_arrive();
  void deliver(size_t i);
  void make_copy(Thread& thread, size_t i);
  const Site& visit(const Here& here, const char* primitive);

  using Place = std::pair<std::pair<const char*, int>, const char*>;
  struct PlaceHash {
    size_t operator()(const Place& p) const;
  };

  const Grid grid_;
  const Schedule schedule_;
  const std::function<void()>& kernel_;
  Random random_;
  Mood mood_;

  std::vector<Cluster> clusters_;
  std::vector<Block> blocks_;
  std::vector<Thread> threads_;
  std::vector<Cluster*> waiting_;  // for a place on the device
  std::vector<Thread*> ready_;     // in the ordered modes a heap
  std::vector<Message> messages_;
  std::unordered_set<const char*> in_flight_;  // where they go
  std::unordered_map<const uint32_t*, std::vector<std::pair<Thread*, uint32_t>>> flags_;
  std::unordered_map<const void*, std::vector<Thread*>> awaited_;  // who waits for a vector

  std::unordered_map<Place, const Site*, PlaceHash> known_;
  std::map<std::pair<std::string, std::string>, Site> sites_;  // by file:line and primitive

  std::unique_ptr<Races> races_;
  Fiber root_;
  Thread* self_ = nullptr;
  size_t alive_ = 0;
  uint64_t switches_ = 0, bank_conflicts_ = 0;
  std::exception_ptr error_;
  bool abandoned_ = false;
};

}  // namespace rnn::simt
