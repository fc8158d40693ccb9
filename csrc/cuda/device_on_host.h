// What device.cuh offers where no nvcc compiles it: declarations, which whoever runs kernels on a CPU defines, as the
// emulator of the tests does. Each primitive that waits, sends, copies or publishes takes the place of its call, so
// that the emulator can name it and leave it out. Included by device.cuh, after the types.
#pragma once

namespace rnn::cuda {

struct Here {
  const char* file;
  int line;

  static constexpr Here current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

int block_index();
int thread_index();
int cluster_rank();
char* shared_memory();

void sync_block(Here here = Here::current());
void sync_cluster(Here here = Here::current());

void load_matrices(uint32_t (&to)[4], const void* row, Here here = Here::current());
// Products are exact, and added one after the other in float.
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16, Here here = Here::current());
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16, Here here = Here::current());
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TF32, Here here = Here::current());
uint32_t round_to_tf32(float x);
float shuffle_xor(float x, int mask, Here here = Here::current());

struct TransactionBarrier {
  uint64_t state;  // a mark of being open: the counts are elsewhere

  void open(Here here = Here::current());
  void expect(int bytes, Here here = Here::current());
  bool await(int phase, Here here = Here::current());
};

void send(void* to, TransactionBarrier* barrier, int rank, const Vec16& vector, Here here = Here::current());

void publish(uint32_t* flag, uint32_t value, Here here = Here::current());
bool await(const uint32_t* flag, uint32_t value, Here here = Here::current());

void put(void* to, const Vec16& v, Here here = Here::current());
void empty(void* at, Here here = Here::current());
Vec16 look(const void* from, Here here = Here::current());
bool await(const void* from, Vec16& found, Here here = Here::current());
template <int n, int n_later>
bool await(const char* from, const int (&at)[n], Vec16 (&found)[n], const int (&)[n_later], Vec16 (&)[n_later],
           Here here = Here::current()) {
  for (int i = 0; i < n; ++i)
    if (at[i] >= 0 && !await(from + at[i], found[i], here)) return false;
  return true;
}
void settle(Here here = Here::current());

void record(uint64_t* fault, const Fault& found);

void copy_async(void* to, const void* from, Here here = Here::current());
void copies_arrive(Here here = Here::current());

}  // namespace rnn::cuda
