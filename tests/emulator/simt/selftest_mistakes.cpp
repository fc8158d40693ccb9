// Kernels with one mistake each, which the hardware would answer with an error, a hang or wrong values.
#include <algorithm>
#include <stdexcept>

#include "simt/selftest.h"

namespace rnn::simt::selftest {
namespace {

using namespace rnn::cuda;

Vec16 global[4];  // zero at each launch
uint32_t& flag() { return global[0].words[0]; }

Case mistake(const std::string& name, const std::string& expected, const Grid& grid, void (*kernel)()) {
  return {name, grid,
          [=] {
            std::ranges::fill(global, Vec16{});
            return Attempt{kernel};
          },
          expected};
}

bool first() { return thread_index() == 0; }
TransactionBarrier* barrier() { return reinterpret_cast<TransactionBarrier*>(shared_memory()); }
char* data() { return shared_memory() + 16; }
// Each block of a cluster has an open transaction barrier that expects so many bytes.
void open_barriers(int expected) {
  if (first()) barrier()->open();
  sync_cluster();
  if (first() && expected) barrier()->expect(expected);
}

constexpr Grid kWarpOnly{1, 1, 32, 64}, kBlock{1, 1, 64, 64}, kPair{2, 2, 32, 64}, kTwoBlocks{2, 1, 32, 64};

std::vector<Case> of_warps() {
  return {
      mistake("collective_at_two_sites",
              "Error block 0, thread 7, shuffle_xor at .*: lanes of its warp wait elsewhere, shuffle_xor", kWarpOnly,
              [] {
                if (thread_index() == 7) shuffle_xor(0, 1);
                shuffle_xor(0, 1);
              }),
      mistake("collective_without_a_lane",
              "Error deadlock: .*block 0, threads 32-39: shuffle_xor .*threads 40-40: sync_block", kBlock,
              [] {
                if (thread_index() != 40) shuffle_xor(0, 1);
                sync_block();
              }),
      mistake("collective_after_exit", "Error block 0, thread 40, at its end: other threads wait for it, shuffle_xor",
              kBlock,
              [] {
                if (thread_index() != 40) shuffle_xor(0, 1);
              }),
      mistake("collective_without_first_lane",
              "Error block 0, thread 1, shuffle_xor at .*: a lane of its warp has come to its end", kBlock,
              [] {
                if (!first()) shuffle_xor(0, 1);
              }),
      mistake("products_at_two_sites",
              "Error block 0, thread 16, multiply at .*: lanes of its warp wait elsewhere, multiply", kWarpOnly,
              [] {
                float sum[4] = {};
                const uint32_t a[4] = {};
                if (thread_index() < 16)
                  multiply(sum, a, 0, 0, BFloat16{});
                else
                  multiply(sum, a, 0, 0, BFloat16{});
              }),
      mistake("collective_of_part_of_a_warp",
              "Error block 0, thread 32, shuffle_xor at .*: its warp has less than 32 threads", {1, 1, 48, 0},
              [] { shuffle_xor(0, 1); }),
      mistake("shuffle_past_the_warp", "Error block 0, thread 0, shuffle_xor at .*: a mask of 32", kWarpOnly,
              [] { shuffle_xor(0, 32); }),
      mistake("misaligned_row",
              "Error block 0, thread 5, load_matrices at .*: the row at byte 8 .* not a multiple of 16", kWarpOnly,
              [] {
                uint32_t to[4];
                load_matrices(to, shared_memory() + (thread_index() == 5 ? 8 : 16));
              }),
      mistake("row_outside",
              "Error block 0, thread 5, load_matrices at .*: the row at byte 64 .* outside of its 64 bytes", kWarpOnly,
              [] {
                uint32_t to[4];
                load_matrices(to, shared_memory() + (thread_index() == 5 ? 64 : 48));
              }),
  };
}

std::vector<Case> of_barriers() {
  return {
      mistake("barrier_at_two_sites",
              "Error block 0, thread 32, sync_block at .*: thread 0 of block 0 waits at another barrier", kBlock,
              [] {
                if (thread_index() < 32) sync_block();
                if (thread_index() >= 32) sync_block();
              }),
      mistake("barrier_without_a_thread", "Error block 0, thread 40, at its end: other threads wait for it, sync_block",
              kBlock,
              [] {
                if (thread_index() != 40) sync_block();
              }),
      mistake("barrier_after_exit",
              "Error block 0, thread 1, sync_block at .*: a thread that takes part has come to its end", kBlock,
              [] {
                if (!first()) sync_block();
              }),
      mistake("cluster_barrier_at_two_sites",
              "Error block 1, thread 0, sync_cluster at .*: thread 0 of block 0 waits at another", kPair,
              [] {
                if (cluster_rank() == 0) sync_cluster();
                if (cluster_rank() == 1) sync_cluster();
              }),
      mistake("cluster_barrier_without_a_block",
              "Error block 1, thread 0, at its end: other threads wait for it, sync_cluster", kPair,
              [] {
                if (cluster_rank() == 0) sync_cluster();
              }),
      mistake("barriers_of_block_and_cluster",
              "Error deadlock: .*block 1, threads 0-2: sync_block.*threads 3-31: sync_cluster", kPair,
              [] { thread_index() < 3 ? sync_block() : sync_cluster(); }),
  };
}

std::vector<Case> of_messages() {
  return {
      mistake("misaligned_send",
              "Error block 0, thread 0, send at .*: the destination at byte 24 .* not a multiple of 16", kPair,
              [] {
                open_barriers(0);
                send(data() + 8, barrier(), 1, Vec16{});
              }),
      mistake("send_outside",
              "Error block 0, thread 0, send at .*: the destination at byte 64 .* outside of its 64 bytes", kPair,
              [] {
                open_barriers(0);
                send(shared_memory() + 64, barrier(), 1, Vec16{});
              }),
      mistake("send_past_the_cluster", "Error block 0, thread 0, send at .*: rank 2 in a cluster of 2 blocks", kPair,
              [] {
                open_barriers(0);
                send(data(), barrier(), 2, Vec16{});
              }),
      mistake("send_in_a_cluster_of_one",
              "Error block 0, thread 0, send at .*: a cluster of one block has nobody to send to", kWarpOnly,
              [] {
                open_barriers(0);
                send(data(), barrier(), 0, Vec16{});
              }),
      mistake("send_after_exit", "Error block 1, thread 0, send at .*: block 0 has come to its end", kPair,
              [] {
                open_barriers(0);
                if (cluster_rank() == 1 && first()) send(data(), barrier(), 0, Vec16{});
              }),
      mistake("send_to_closed_transaction_barrier",
              "Error block 0, thread 0, send at .*: the transaction barrier at byte 0 of block 1 was never opened",
              kPair, [] { send(data(), barrier(), 1, Vec16{}); }),
      mistake("two_sends_to_one_place",
              "Error block 0, thread 0, send at .*: other bytes are on their way to the same destination", kPair,
              [] {
                open_barriers(32);
                if (first()) send(data(), barrier(), 1, Vec16{});
                if (first()) send(data(), barrier(), 1, Vec16{});
                barrier()->await(0);
              }),
      mistake("exit_before_arrival",
              "Error block 1, thread 31, at its end: bytes are on their way .* from block 0, send at", kPair,
              [] {
                open_barriers(0);
                if (cluster_rank() == 0 && first()) send(data(), barrier(), 1, Vec16{});
                sync_cluster();
              }),
  };
}

std::vector<Case> of_transactions() {
  return {
      mistake("expected_by_closed_transaction_barrier",
              "Error block 0, thread 0, expect at .*: the transaction barrier .* was never opened", kWarpOnly,
              [] { barrier()->expect(16); }),
      mistake("awaited_closed_transaction_barrier",
              "Error block 0, thread 0, await at .*: the transaction barrier .* was never opened", kWarpOnly,
              [] { barrier()->await(0); }),
      mistake("opened_twice", "Error block 0, thread 1, open at .*: the transaction barrier was opened before",
              kWarpOnly, [] { barrier()->open(); }),
      mistake("misaligned_transaction_barrier",
              "Error block 0, thread 0, open at .*: the transaction barrier at byte 4 .* not a multiple of 8",
              kWarpOnly, [] { reinterpret_cast<TransactionBarrier*>(shared_memory() + 4)->open(); }),
      mistake("transaction_barrier_outside",
              "Error block 0, thread 0, open at .*: the transaction barrier at byte 64 .* outside of its 64 bytes",
              kWarpOnly, [] { reinterpret_cast<TransactionBarrier*>(shared_memory() + 64)->open(); }),
      mistake("transaction_barrier_written_over",
              "Error block 0, thread 0, await at .*: the transaction barrier at byte 0 of block 0 was written over",
              kPair,
              [] {
                open_barriers(16);
                if (first()) barrier()->state = 0;
                barrier()->await(0);
              }),
      mistake("more_than_expected", "Error block 0, thread ., send at .*: 8 bytes more than expected in phase 0", kPair,
              [] {
                open_barriers(24);
                if (thread_index() < 2 && cluster_rank() == 0)
                  send(data() + thread_index() * 16, barrier(), 1, Vec16{});
                barrier()->await(0);
              }),
      mistake("expected_twice", "Error block 0, thread 0, expect at .*: phase 0 was expected before, and is not over",
              kPair, [] { open_barriers(16), barrier()->expect(16); }),
      mistake("expected_too_much", "Error block 0, thread 0, expect at .*: 1048576 bytes, expected 0 to 1048575", kPair,
              [] { open_barriers(1 << 20); }),
      mistake("awaited_too_early", "Error block 0, thread 0, await at .*: phase 1 awaited in phase 0", kPair,
              [] { open_barriers(16), barrier()->await(1); }),
      mistake("awaited_too_late", "Error block 0, thread 0, await at .*: phase 0 awaited in phase 2", kPair,
              [] {
                open_barriers(0);
                for (int phase = 0; phase < 2 && first(); ++phase) barrier()->expect(0);
                sync_block();
                barrier()->await(0);
              }),
      mistake("too_few_bytes", "Error deadlock: every thread waits;  block 1, threads 0-31: await", kPair,
              [] {
                open_barriers(16);
                if (cluster_rank() == 1) barrier()->await(0);
              }),
  };
}

std::vector<Case> of_global_memory() {
  return {
      mistake("falling_flag", "Error block 0, thread 0, publish at .*: a flag of 2 set to 1", kWarpOnly,
              [] { publish(&flag(), 2), publish(&flag(), 1); }),
      mistake("misaligned_flag", "Error block 0, thread 0, publish at .*: .* not a multiple of 4", kWarpOnly,
              [] { publish(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(global) + 2), 1); }),
      mistake("flag_in_shared_memory", "Error block 0, thread 0, await at .*: the flag lies in shared memory",
              kWarpOnly, [] { await(reinterpret_cast<uint32_t*>(shared_memory()), 1); }),
      mistake("flag_never_set", "Error deadlock: .*block 1, threads 0-8: await .*block 1, threads 9-31: sync_block",
              kTwoBlocks,
              [] {
                if (block_index() == 1 && first()) publish(&flag(), 1);
                if (thread_index() < 9) await(&flag(), 2);
                sync_block();
              }),
      mistake("misaligned_vector", "Error block 0, thread 0, put at .*: .* not a multiple of 16", kWarpOnly,
              [] { put(reinterpret_cast<char*>(global) + 8, Vec16{}); }),
      mistake("vector_in_shared_memory", "Error block 0, thread 0, look at .*: the vector lies in shared memory",
              kWarpOnly, [] { look(shared_memory()); }),
      mistake("vector_never_put", "Error deadlock: .*block 1, threads 0-8: await .*block 1, threads 9-31: sync_block",
              kTwoBlocks,
              [] {
                if (block_index() == 1 && first()) empty(global);
                sync_block();
                Vec16 found = nothing();
                if (thread_index() < 9) await(global, found);
                sync_block();
              }),
      mistake("misaligned_copy",
              "Error block 0, thread 0, copy_async at .*: the destination at byte 4 .* not a multiple of 16", kWarpOnly,
              [] { copy_async(shared_memory() + 4, global); }),
      mistake("misaligned_source",
              "Error block 0, thread 0, copy_async at .*: the address of the source is not a multiple of 16", kWarpOnly,
              [] { copy_async(shared_memory(), reinterpret_cast<char*>(global) + 4); }),
      mistake("copy_outside",
              "Error block 0, thread 0, copy_async at .*: the destination at byte 64 .* outside of its 64 bytes",
              kWarpOnly, [] { copy_async(shared_memory() + 64, global); }),
      mistake("copy_from_shared_memory", "Error block 0, thread 0, copy_async at .*: the source lies in shared memory",
              kWarpOnly, [] { copy_async(shared_memory(), shared_memory() + 16); }),
      mistake("copies_not_waited_for",
              "Error block 0, thread 3, at its end: it did not wait for its copies, copy_async", kWarpOnly,
              [] {
                if (thread_index() == 3) copy_async(shared_memory(), global);
              }),
  };
}

std::vector<Case> of_the_host() {
  return {
      mistake("exception_of_the_kernel", "exception of the kernel", kPair,
              [] {
                if (thread_index() < 20) sync_cluster();
                throw std::runtime_error("of the kernel");
              }),
      mistake("too_many_blocks_in_a_cluster",
              "exception launch: expected clusters of 1 to 16 blocks .*, got 32 blocks in clusters of 32",
              {32, 32, 32, 0}, [] {}),
      mistake("part_of_a_cluster", "exception launch: expected .*, got 3 blocks in clusters of 2", {3, 2, 32, 0},
              [] {}),
      mistake("too_many_threads", "exception launch: expected 1 to 1024 threads, got 1056", {1, 1, 1056, 0}, [] {}),
      mistake("too_much_shared_memory", "exception launch: expected 0 to 232448 bytes of shared memory, got 233472",
              {1, 1, 32, 228 << 10}, [] {}),
      mistake("launch_in_a_kernel", "exception launch: called inside of a kernel", kWarpOnly,
              [] { launch(kWarpOnly, {}, [] {}); }),
  };
}

}  // namespace

std::vector<Case> mistakes() {
  std::vector<Case> all;
  for (const auto& part :
       {of_warps(), of_barriers(), of_messages(), of_transactions(), of_global_memory(), of_the_host()})
    all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::vector<Case> mistakes_of_order() {
  return {
      mistake("never_expected",
              "Error block 1, thread .*, at its end: 16 bytes came to a transaction barrier that did not expect them",
              kPair,
              [] {
                open_barriers(0);
                if (cluster_rank() == 0 && first()) send(data(), barrier(), 1, Vec16{});
                for (int i = 0; i < 8; ++i) sync_block();
              }),
      mistake("expected_too_late", "Error block 1, thread 0, expect at .*: 16 bytes more than expected in phase 0",
              kPair,
              [] {
                open_barriers(0);
                if (cluster_rank() == 0 && thread_index() < 2)
                  send(data() + thread_index() * 16, barrier(), 1, Vec16{});
                if (cluster_rank() == 1 && first()) barrier()->expect(16);
              }),
      mistake("overtaken_while_awaited", "Error block ., thread .*, await at .*: phase 0 awaited until phase 2", kPair,
              [] {
                open_barriers(0);
                if (thread_index() != 31) return void(barrier()->await(0));
                barrier()->expect(0);
                barrier()->expect(0);
              }),
  };
}

// What an address sanitizer, or the page below a stack, ends the process for.
std::vector<Case> crashes() {
  return {
      mistake("write_past_shared_memory", "heap-buffer-overflow", kBlock,
              [] { shared_memory()[64 + thread_index()] = 0; }),
      mistake("endless_recursion", "stack-overflow", kBlock,
              [] {
                const std::function<int(int)> deeper = [&](int n) { return n < 0 ? 0 : deeper(n + 1) + n; };
                deeper(0);
              }),
  };
}

}  // namespace rnn::simt::selftest
