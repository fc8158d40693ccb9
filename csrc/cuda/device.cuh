// What the kernels that stay on the chip ask of the machine: where a thread is, how threads wait for each other, matrix
// products of a warp, and messages between the blocks of a cluster or of the grid. Under nvcc this is the GPU's own
// instructions; under another compiler the same names are declared in device_on_host.h, and tests bring an emulator
// that defines them.
//
//   block_index(), thread_index(), cluster_rank()
//   shared_memory()               the block's dynamic shared memory; 16-byte aligned, no more
//   sync_block(), sync_cluster()  barriers; they order all memory of the threads that take part
//   load_matrices, multiply       ldmatrix and mma of a warp
//   shuffle_xor                   of a warp
//   send, TransactionBarrier      16 bytes at a time into another block's shared memory, and their arrival
//   publish, await                a flag in global memory, and all that its writer's block wrote before
//   put, look, await, empty       16 bytes of global memory that say by themselves whether they are there
//   settle                        a fence, for what these leave in no order
//   copy_async, copies_arrive     16 bytes at a time from global to shared memory, past the L1 cache
//   record                        a fault, in memory that the host reads
//
// Waiting is for these alone: a loop that polls memory never ends in the emulator. What waits for other blocks says
// whether these have come in time, which is kPatienceSeconds.
#pragma once

#include <bit>
#include <cstdint>

#include "common/macros.h"
#include "common/storage.h"
#include "cuda/fault.h"
#include "cuda/plan.h"

namespace rnn::cuda {

struct alignas(16) Vec16 {
  uint32_t words[4];
};

// What nobody has put anything into: all bits are set, in each half by itself, since halves may arrive one by one. As
// a number of any type that is a NaN, and put() writes another one in its place: nothing that is put is taken for this.
constexpr uint32_t kNothing = 0xffffffff;
RNN_HD Vec16 nothing() { return {{kNothing, kNothing, kNothing, kNothing}}; }
RNN_HD bool is_there(const Vec16& v) {
  return (v.words[0] & v.words[1]) != kNothing && (v.words[2] & v.words[3]) != kNothing;
}
RNN_HD Vec16 told_from_nothing(Vec16 v) {
  constexpr uint32_t kAnotherNaN = 0x7fffffff;  // of 4 or 8 bytes, and of 2 in its upper half
  for (int half = 0; half < 4; half += 2)
    if ((v.words[half] & v.words[half + 1]) == kNothing) v.words[half] = v.words[half + 1] = kAnotherNaN;
  return v;
}

// Has a flag come to a value? It begins with all bits set, which is one less than zero.
RNN_HD bool reached(uint32_t found, uint32_t value) { return int32_t(found - value) >= 0; }

// float32 with a mantissa of 10 bits, as the tensor cores multiply it.
struct TF32 {};

RNN_HD uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
RNN_HD float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }

}  // namespace rnn::cuda

#if defined(__CUDACC__)
#define RNN_DEVICE __device__ __forceinline__

// Clusters came with sm_90. What needs them compiles for older GPUs too, but is never launched there.
#if __CUDA_ARCH__ >= 900
#define RNN_CLUSTERS 1
#else
#define RNN_CLUSTERS 0
#endif

namespace rnn::cuda {

RNN_DEVICE int block_index() { return int(blockIdx.x); }
RNN_DEVICE int thread_index() { return int(threadIdx.x); }
RNN_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if RNN_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

RNN_DEVICE char* shared_memory() {
  extern __shared__ Vec16 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
}
RNN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

RNN_DEVICE void sync_block() { __syncthreads(); }
RNN_DEVICE void sync_cluster() {
#if RNN_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Matrices of 8 rows of 16 bytes; lane l names row l % 8 of matrix l / 8. It gets word l % 4 of row l / 4 of each.
RNN_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum [16, 8] += a [16, 32 bytes] * b [8, 32 bytes]^T. Lane l holds word l % 4 of the first and second half of row
// l / 4 of b and, in turn with row l / 4 + 8, of a; and of sum columns l % 4 * 2 and the next of these two rows.
#define RNN_MULTIPLY(Type, shape, operands)                                                           \
  RNN_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Type) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." operands                                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                                          \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                        \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                     \
  }
RNN_MULTIPLY(BFloat16, "m16n8k16", "bf16.bf16")
RNN_MULTIPLY(Float16, "m16n8k16", "f16.f16")
RNN_MULTIPLY(TF32, "m16n8k8", "tf32.tf32")
#undef RNN_MULTIPLY

RNN_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

RNN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Of a thread that polls: is it too late to go on? The device's clock is read once in so many polls, and not at all
// where there is nothing to wait for.
class Patience {
 public:
  RNN_DEVICE bool ended() {
    if (++polls_ % 64) return false;
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    const auto now = uint32_t(nanoseconds >> kShift) | 1;  // in milliseconds, about
    if (!begun_) begun_ = now;
    return now - begun_ > uint32_t(uint64_t(kPatienceSeconds) * 1'000'000'000 >> kShift);
  }

 private:
  static constexpr int kShift = 20;
  uint32_t polls_ = 0, begun_ = 0;
};

// An mbarrier that counts the bytes which other blocks of the cluster send. One thread calls open() once, before a
// sync_cluster(), and then expect(bytes) once per phase, of less than 2^20 bytes, before or after they arrive; phase n,
// from 0, is over once they have all arrived. A thread awaits the current phase or the one before. Lies in shared
// memory, at the same place in each block.
struct TransactionBarrier {
  uint64_t state;

  RNN_DEVICE void open() {
#if RNN_CLUSTERS
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  RNN_DEVICE void expect(int bytes) {
#if RNN_CLUSTERS
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
#endif
  }
  // Every thread that reads what was sent waits.
  [[nodiscard]] RNN_DEVICE bool await(int phase) {
#if RNN_CLUSTERS
    for (Patience patience;;) {
      uint32_t arrived;
      asm volatile(
          "{\n\t"
          ".reg .pred arrived;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 arrived, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, arrived;\n\t"
          "}"
          : "=r"(arrived)
          : "r"(shared_address(&state)), "r"(phase & 1)
          : "memory");
      if (arrived) return true;
      if (patience.ended()) return false;
    }
#else
    return false;
#endif
  }
};

// Writes 16 bytes where `to` lies in the shared memory of block `rank` of the cluster, and counts them in its
// `barrier`.
RNN_DEVICE void send(void* to, TransactionBarrier* barrier, int rank, const Vec16& vector) {
#if RNN_CLUSTERS
  asm volatile(
      "{\n\t"
      ".reg .b32 to, counter;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 counter, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [counter];\n\t"
      "}" ::"r"(shared_address(to)),
      "r"(shared_address(&barrier->state)), "r"(rank), "r"(vector.words[0]), "r"(vector.words[1]), "r"(vector.words[2]),
      "r"(vector.words[3])
      : "memory");
#endif
}

// Sets a flag; who finds it set sees all that this thread wrote before, and what it had seen of others at a barrier.
RNN_DEVICE void publish(uint32_t* flag, uint32_t value) {
  asm volatile("fence.acq_rel.gpu;\n\tst.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Waits until a flag, which only grows, has reached a value.
[[nodiscard]] RNN_DEVICE bool await(const uint32_t* flag, uint32_t value) {
  for (Patience patience;;) {
    uint32_t found;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
    if (reached(found, value)) return true;
    if (patience.ended()) return false;
  }
}

// Vectors in global memory, each of which one thread puts, awaits and empties at a time. A half of 8 bytes is read as
// it was put, as a whole; halves, and different vectors, are in no order. What a thread has put, looked at or emptied
// before a settle() comes before what another one does that has seen what the first put after it, and has settled too.
RNN_DEVICE void store_strong(void* to, const Vec16& v) {
  asm volatile(
      "{\n\t"
      ".reg .b64 low, high;\n\t"
      "mov.b64 low, {%1, %2};\n\t"
      "mov.b64 high, {%3, %4};\n\t"
      "st.relaxed.gpu.global.v2.b64 [%0], {low, high};\n\t"
      "}" ::"l"(to),
      "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
      : "memory");
}
RNN_DEVICE void put(void* to, const Vec16& v) { store_strong(to, told_from_nothing(v)); }
RNN_DEVICE void empty(void* at) { store_strong(at, nothing()); }
// What is there now, and may be nothing.
RNN_DEVICE Vec16 look(const void* from) {
  Vec16 v;
  asm volatile(
      "{\n\t"
      ".reg .b64 low, high;\n\t"
      "ld.relaxed.gpu.global.v2.b64 {low, high}, [%4];\n\t"
      "mov.b64 {%0, %1}, low;\n\t"
      "mov.b64 {%2, %3}, high;\n\t"
      "}"
      : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
      : "l"(from)
      : "memory");
  return v;
}
// Looks again until all vectors are there of which `found` has what was seen first, and meanwhile at those that come
// `later`. Each lies `at` so many bytes from `from`; below zero there is none, and `found` has anything but nothing.
template <int n, int n_later>
[[nodiscard]] RNN_DEVICE bool await(const char* from, const int (&at)[n], Vec16 (&found)[n],
                                    const int (&at_later)[n_later], Vec16 (&later)[n_later]) {
  for (Patience patience;;) {
    bool there = true;
#pragma unroll
    for (int i = 0; i < n; ++i) there = there && is_there(found[i]);
    if (there) return true;
    if (patience.ended()) return false;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (!is_there(found[i])) found[i] = look(from + at[i]);
#pragma unroll
    for (int i = 0; i < n_later; ++i)
      if (!is_there(later[i])) later[i] = look(from + at_later[i]);
  }
}
// By every thread that has put, looked or emptied.
RNN_DEVICE void settle() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// In one piece: of several threads that record a fault, one is read.
RNN_DEVICE void record(uint64_t* fault, const Fault& found) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(fault), "l"(found.packed()) : "memory");
}

RNN_DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Waits for the copies of this thread.
RNN_DEVICE void copies_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace rnn::cuda

#else
#define RNN_DEVICE inline
#include "cuda/device_on_host.h"
#endif
