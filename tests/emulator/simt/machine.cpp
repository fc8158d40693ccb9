#include "simt/machine.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "simt/internals.h"

namespace rnn::simt {
namespace {

// What the CUDA C++ Programming Guide has of a compute capability: bytes of shared memory of a block that asks for it,
// and blocks of a cluster that does, or 1.
struct Device {
  int capability, shared_bytes, cluster;
};
constexpr Device kDevices[] = {{80, 163 << 10, 1},  {86, 99 << 10, 1},    {89, 99 << 10, 1},
                               {90, 227 << 10, 16}, {100, 227 << 10, 16}, {120, 99 << 10, 8}};

thread_local Machine* machine = nullptr;
thread_local Stacks stacks;

// Unwinds the fibers that are left over when a launch has failed.
struct Abandoned {};

void check(const Grid& g, const Schedule& s) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("launch: " + what); };
  const auto* const device = std::ranges::find(kDevices, g.device, &Device::capability);
  if (device == std::end(kDevices)) refuse("no device of compute capability " + std::to_string(g.device));
  if (g.blocks < 1 || g.cluster < 1 || g.cluster > device->cluster || g.blocks % g.cluster)
    refuse("expected clusters of 1 to " + std::to_string(device->cluster) +
           " blocks and a multiple of that in all, got " + std::to_string(g.blocks) + " blocks in clusters of " +
           std::to_string(g.cluster));
  if (g.threads < 1 || g.threads > 1024) refuse("expected 1 to 1024 threads, got " + std::to_string(g.threads));
  if (g.shared_bytes < 0 || g.shared_bytes > device->shared_bytes)
    refuse("expected 0 to " + std::to_string(device->shared_bytes) + " bytes of shared memory, got " +
           std::to_string(g.shared_bytes));
  if (g.cooperative && s.resident && g.blocks > s.resident * g.cluster)
    refuse("expected at most " + std::to_string(s.resident * g.cluster) + " blocks of a cooperative launch, got " +
           std::to_string(g.blocks));
  if (machine) refuse("called inside of a kernel");
}

}  // namespace

Report launch(const Grid& grid, const Schedule& schedule, const std::function<void()>& kernel) {
  check(grid, schedule);
  Machine local(grid, schedule, kernel);
  machine = &local;
  struct Reset {
    ~Reset() { machine = nullptr; }
  } reset;
  return local.run();
}

Machine& Machine::current() {
  if (!machine) throw std::logic_error("a primitive of cuda/device.cuh was called outside of a launch");
  return *machine;
}

Machine::Machine(const Grid& grid, const Schedule& schedule, const std::function<void()>& kernel)
    : grid_(grid),
      schedule_(schedule),
      kernel_(kernel),
      random_(schedule.seed),
      clusters_(size_t(grid.blocks / grid.cluster)),
      blocks_(size_t(grid.blocks)),
      threads_(size_t(grid.blocks) * size_t(grid.threads)) {
  for (int i = 0; i < grid.blocks; ++i) {
    Block& block = blocks_[size_t(i)];
    block.index = i;
    block.rank = i % grid.cluster;
    block.cluster = &clusters_[size_t(i / grid.cluster)];
    if (block.rank == 0) block.cluster->blocks = &block;
    block.bytes = grid.shared_bytes;
    block.shared.reset(new char[size_t(grid.shared_bytes)]);
    std::memset(block.shared.get(), 0xff, size_t(grid.shared_bytes));
    block.warps.resize(size_t(grid.threads + kWarp - 1) / kWarp);
    for (int t = 0; t < grid.threads; ++t) {
      Thread& thread = threads_[size_t(i) * size_t(grid.threads) + size_t(t)];
      thread.block = &block;
      thread.index = t;
    }
  }
}

Report Machine::run() {
  try {
    Report report = run_all();
    if (!races_ || !races_->found()) return report;
  } catch (...) {  // may be what the race has led to
    if (!races_ || !races_->found()) throw;
  }
  throw Error(races_->report());
}

Report Machine::run_all() {
  stacks.reserve(threads_.size());
  if (schedule_.races) {
#if defined(RNN_SIMT_WATCHES)
    std::vector<const void*> shared;
    for (const Block& block : blocks_) shared.push_back(block.shared.get());
    const char* const first = stacks.stack(0);
    const auto end = stacks.stack(threads_.size() - 1) + Stacks::bytes();
    races_ = std::make_unique<Races>(grid_, shared, first, end);
#else
    throw std::invalid_argument("launch: accesses can be watched only if kernels are compiled for it");
#endif
  }
  for (Cluster& cluster : clusters_) waiting_.push_back(&cluster);
  for (size_t i = waiting_.size(); schedule_.shuffled && i > 1; --i)
    std::swap(waiting_[i - 1], waiting_[random_.below(i)]);
  std::ranges::reverse(waiting_);  // the next one is the last
  alive_ = threads_.size();
  const size_t at_once = schedule_.resident ? size_t(schedule_.resident) : clusters_.size();
  for (size_t i = 0; i < at_once; ++i) begin_next();
  change_mood();
  self_ = choose();
  root_.switch_to(self_->fiber);
  if (error_) {
    abandon();
    std::rethrow_exception(error_);
  }

  Report report{switches_, {}, races_ ? races_->accesses() : 0, bank_conflicts_};
  bool skipped = (schedule_.skip_site + schedule_.weak_site).empty();
  for (const auto& [place, site] : sites_) {
    report.sites.push_back({place.first, place.second, site.visits});
    skipped |= site.skipped || site.weak;
  }
  if (!skipped)
    throw std::invalid_argument("launch: nothing ran at the site to skip, " + schedule_.skip_site +
                                schedule_.weak_site);
  return report;
}

void Machine::fiber_main() {
  machine->start();
  machine->run_thread();
  Machine& m = *machine;
  Thread* next = nullptr;
  if (!m.error_) {
    try {
      next = m.choose();
    } catch (...) {
      m.error_ = std::current_exception();
    }
  }
  if (next) {
    ++m.switches_;
    Thread& last = *m.self_;
    m.self_ = next;
    last.fiber.leave_for(next->fiber);
  }
  m.self_->fiber.leave_for(m.root_);
}

// A cluster takes the place of one that has come to its end.
void Machine::begin_next() {
  if (waiting_.empty()) return;
  const auto first = size_t(waiting_.back()->blocks - blocks_.data()) * size_t(grid_.threads);
  waiting_.pop_back();
  for (size_t i = first; i < first + size_t(grid_.cluster) * size_t(grid_.threads); ++i) {
    threads_[i].fiber.prepare(stacks.stack(i), Stacks::bytes(), fiber_main);
    make_ready(threads_[i]);
  }
}

void Machine::start() {
  Fiber::began(root_);
  self_->started = true;
}

void Machine::run_thread() {
  try {
    {
      const Watched watched;
      kernel_();
    }
    exit_thread();
  } catch (const Abandoned&) {
  } catch (...) {
    error_ = std::current_exception();
  }
  self_->done = true;
  --alive_;
}

void Machine::abandon() {
  abandoned_ = true;
  for (Thread& thread : threads_) {
    if (!thread.started || thread.done) continue;
    self_ = &thread;
    root_.switch_to(thread.fiber);
  }
}

void Machine::seen(const void* p, size_t bytes, bool writes, const void* from) {
  if (machine->races_) machine->races_->access(machine->number(), p, bytes, writes, Origin::of_code(from));
}

void Machine::fail(const Thread& thread, const std::string& where, const std::string& what) {
  throw Error("block " + std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index) + ", " +
              where + ": " + what);
}

// Which threads of which blocks wait where: runs of threads, block by block.
void Machine::fail_deadlock() {
  std::ostringstream text;
  text << "deadlock: every thread waits";
  for (size_t i = 0; i < threads_.size();) {
    const Thread& first = threads_[i];
    size_t end = i;
    while (end < threads_.size() && threads_[end].block == first.block && threads_[end].waits_at == first.waits_at)
      ++end;
    if (first.waits_at)
      text << "\n  block " << first.block->index << ", threads " << first.index << "-" << threads_[end - 1].index
           << ": " << first.waits_at->name;
    i = end;
  }
  if (!waiting_.empty())
    text << "\n  " << waiting_.size() * size_t(grid_.cluster) << " blocks have not begun: the device holds "
         << schedule_.resident * grid_.cluster << " at once";
  throw Error(text.str());
}

size_t Machine::PlaceHash::operator()(const Place& p) const {
  const auto file = reinterpret_cast<uintptr_t>(p.first.first), primitive = reinterpret_cast<uintptr_t>(p.second);
  return (file ^ primitive << 1) * 31 + size_t(p.first.second);
}

const Site& Machine::visit(const Here& here, const char* primitive) {
  const Site*& known = known_[{{here.file, here.line}, primitive}];
  if (!known) {
    const std::string place = std::string(here.file) + ":" + std::to_string(here.line);
    const Site site{std::string(primitive) + " at " + place, place == schedule_.skip_site, place == schedule_.weak_site,
                    0};
    known = &sites_.emplace(std::pair{place, primitive}, site).first->second;
  }
  ++known->visits;
  return *known;
}

const Site& Machine::enter_always(const Here& here, const char* primitive) {
  const Site& site = visit(here, primitive);
  if (races_ && races_->found()) throw Error("race");  // told when all threads have been given up
  if (schedule_.mode == Mode::random) {
    let_messages_arrive();
    if (random_.chance(mood_.yields)) yield();
  }
  return site;
}

const Site* Machine::enter(const Here& here, const char* primitive) {
  const Site& site = enter_always(here, primitive);
  return site.skipped ? nullptr : &site;
}

void Machine::sleep(const Site& site) {
  self_->waits_at = &site;
  resume(*choose());
}

bool Machine::sleep_in_time(const Site& site) {
  self_->waits_in_time = true;
  sleep(site);
  self_->waits_in_time = false;
  return !std::exchange(self_->late, false);
}

// Everybody who waits with a bound has reached it.
void Machine::let_time_pass() {
  for (Thread& thread : threads_) {
    if (!thread.waits_at || !thread.waits_in_time) continue;
    thread.late = true;
    make_ready(thread);
  }
  for (Block& block : blocks_)
    for (auto& [offset, barrier] : block.transactions) barrier.asleep.clear();
  flags_.clear();
  awaited_.clear();
}

void Machine::yield() {
  make_ready(*self_);
  resume(*choose());
}

void Machine::wake(std::vector<Thread*>& threads) {
  for (Thread* thread : threads) make_ready(*thread);
  threads.clear();
}

void Machine::resume(Thread& next) {
  if (&next == self_) return;
  Thread& last = *self_;
  self_ = &next;
  ++switches_;
  last.fiber.switch_to(next.fiber);
  if (abandoned_) throw Abandoned();
}

void Machine::make_ready(Thread& thread) {
  thread.waits_at = nullptr;
  ready_.push_back(&thread);
  if (schedule_.mode == Mode::forward) std::push_heap(ready_.begin(), ready_.end(), std::greater<>());
  if (schedule_.mode == Mode::reverse) std::push_heap(ready_.begin(), ready_.end(), std::less<>());
}

// Who runs next; null when all have come to their end.
Thread* Machine::choose() {
  while (ready_.empty()) {
    if (!alive_) return nullptr;
    if (!messages_.empty()) {
      deliver(random_.below(messages_.size()));
      continue;
    }
    if (schedule_.bounded) let_time_pass();
    if (ready_.empty()) fail_deadlock();
  }
  if (schedule_.mode == Mode::forward) std::pop_heap(ready_.begin(), ready_.end(), std::greater<>());
  if (schedule_.mode == Mode::reverse) std::pop_heap(ready_.begin(), ready_.end(), std::less<>());
  if (schedule_.mode == Mode::random) std::swap(ready_[choose_random()], ready_.back());
  Thread* next = ready_.back();
  ready_.pop_back();
  return next;
}

size_t Machine::choose_random() {
  // A mood lasts for a few rounds of all threads.
  if (random_.below(4 * threads_.size()) == 0) change_mood();
  size_t i = 0;
  for (int tries = 0; tries < 16; ++tries) {
    i = random_.below(ready_.size());
    const auto number = size_t(ready_[i] - threads_.data());
    if (number < mood_.slow_begin || number >= mood_.slow_end) break;
  }
  return i;
}

void Machine::change_mood() {
  if (schedule_.mode != Mode::random) return;
  constexpr unsigned kYields[] = {0, 4, 32, 128}, kDelivers[] = {0, 8, 224, 256};
  const size_t kSlow[] = {0, 1, kWarp, size_t(grid_.threads)};
  mood_.yields = kYields[random_.below(4)];
  mood_.delivers = kDelivers[random_.below(4)];
  const size_t slow = kSlow[random_.below(4)];
  mood_.slow_begin = slow ? random_.below(threads_.size() / slow + 1) * slow : 0;
  mood_.slow_end = mood_.slow_begin + slow;
}

}  // namespace rnn::simt
