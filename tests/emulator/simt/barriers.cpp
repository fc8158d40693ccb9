// Where a thread is, the barriers, and a thread's end.
#include "simt/internals.h"

namespace rnn::simt {

void Machine::meet(Barrier& barrier, int threads, int exited, const Site& site) {
  if (exited) fail(site, "a thread that takes part has come to its end");
  if (barrier.asleep.empty()) barrier.site = &site;
  if (barrier.site != &site)
    fail(site, "thread " + std::to_string(barrier.asleep[0]->index) + " of block " +
                   std::to_string(barrier.asleep[0]->block->index) + " waits at another barrier, " +
                   barrier.site->name);
  if (int(barrier.asleep.size()) + 1 < threads) {
    barrier.asleep.push_back(self_);
    sleep(site);
    return;
  }
  if (races_ && !site.weak) {
    std::vector<uint32_t> all{number()};
    for (const Thread* thread : barrier.asleep) all.push_back(number(*thread));
    races_->meet(all);
  }
  wake(barrier.asleep);
  yield();
}

void Machine::exit_thread() {
  Block& block = *self_->block;
  Warp& warp = self_->warp();
  const auto refuse = [&](const std::string& what) { fail(*self_, "at its end", what); };
  const auto left_waiting = [&](const Site& site) { refuse("other threads wait for it, " + site.name); };
  if (self_->copying) refuse("it did not wait for its copies, " + self_->copying->name);
  if (!block.barrier.asleep.empty()) left_waiting(*block.barrier.site);
  if (!block.cluster->barrier.asleep.empty()) left_waiting(*block.cluster->barrier.site);
  if (warp.arrived) left_waiting(*warp.site);
  ++warp.exited;
  ++block.cluster->exited;
  if (++block.exited < grid_.threads) return;
  if (races_) {
    std::vector<uint32_t> all;
    for (int i = 0; i < grid_.threads; ++i) all.push_back(uint32_t(block.index * grid_.threads + i));
    races_->end_block(all, block.shared.get(), size_t(block.bytes));
  }
  for (const Message& message : messages_)
    if (message.block == &block)
      refuse("bytes are on their way to its block from block " + std::to_string(message.from->block->index) + ", " +
             message.site->name);
  for (const auto& [offset, count] : block.transactions)
    if (count.missing < 0)
      refuse(std::to_string(-count.missing) + " bytes came to a transaction barrier that did not expect them");
  if (block.cluster->exited == grid_.cluster * grid_.threads) begin_next();
}

}  // namespace rnn::simt

namespace rnn::cuda {

using simt::Machine;

int block_index() {
  const simt::Unwatched unwatched;
  return Machine::current().self().block->index;
}
int thread_index() {
  const simt::Unwatched unwatched;
  return Machine::current().self().index;
}
int cluster_rank() {
  const simt::Unwatched unwatched;
  return Machine::current().self().block->rank;
}
char* shared_memory() {
  const simt::Unwatched unwatched;
  return Machine::current().self().block->shared.get();
}

void sync_block(Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  simt::Block& block = *m.self().block;
  if (const auto* site = m.enter(here, "sync_block")) m.meet(block.barrier, m.grid().threads, block.exited, *site);
}

void sync_cluster(Here here) {
  const simt::Unwatched unwatched;
  Machine& m = Machine::current();
  simt::Cluster& cluster = *m.self().block->cluster;
  if (const auto* site = m.enter(here, "sync_cluster"))
    m.meet(cluster.barrier, m.grid().cluster * m.grid().threads, cluster.exited, *site);
}

}  // namespace rnn::cuda
