#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <system_error>

#if defined(RNN_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Pushes what a called function has to preserve, leaves the stack pointer in *from, and continues on `to`, which was
// left in the same way: on x86-64 the control words of SSE and x87 and six registers, on aarch64 twenty registers and
// FPCR.
extern "C" __attribute__((visibility("hidden"))) void rnn_simt_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .hidden rnn_simt_switch
  .type rnn_simt_switch, @function
rnn_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size rnn_simt_switch, . - rnn_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .p2align 4
  .hidden rnn_simt_switch
  .type rnn_simt_switch, %function
rnn_simt_switch:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mrs x9, fpcr
  str x9, [sp, #160]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldr x9, [sp, #160]
  msr fpcr, x9
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
  .size rnn_simt_switch, . - rnn_simt_switch
)");
#endif

namespace rnn::simt {
namespace {

// The words of a stack as rnn_simt_switch would have left it in front of the first instruction of `entry`.
[[maybe_unused]] void* first_frame(char* top, void (*entry)()) {
  auto* word = reinterpret_cast<uint64_t*>(top);
#if defined(__x86_64__)
  uint32_t control[2] = {};
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(control[0]), "=m"(control[1]));
  *--word = 0;  // no caller
  *--word = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--word = 0;
  *--word = control[0] | uint64_t(control[1]) << 32;
#elif defined(__aarch64__)
  word -= 22;
  for (int i = 0; i < 22; ++i) word[i] = 0;
  word[11] = reinterpret_cast<uint64_t>(entry);  // x30
  asm volatile("mrs %0, fpcr" : "=r"(word[20]));
#endif
  return word;
}

}  // namespace

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
#if defined(RNN_SIMT_ASAN)
  bottom_ = stack;
  bytes_ = bytes;
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // of frames that were never returned from
#endif
#if defined(RNN_SIMT_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  stack_pointer_ = first_frame(stack + bytes, entry);
#endif
}

void Fiber::began([[maybe_unused]] Fiber& root) {
#if defined(RNN_SIMT_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!root.bottom_) {
    root.bottom_ = bottom;
    root.bytes_ = bytes;
  }
#endif
}

void Fiber::hand_over(Fiber& next) {
#if defined(RNN_SIMT_UCONTEXT)
  swapcontext(&context_, &next.context_);
#else
  rnn_simt_switch(&stack_pointer_, next.stack_pointer_);
#endif
}

void Fiber::switch_to(Fiber& next) {
#if defined(RNN_SIMT_ASAN)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(&mine, next.bottom_, next.bytes_);
  hand_over(next);
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#else
  hand_over(next);
#endif
}

void Fiber::leave_for(Fiber& next) {
#if defined(RNN_SIMT_ASAN)
  __sanitizer_start_switch_fiber(nullptr, next.bottom_, next.bytes_);
#endif
  hand_over(next);
  std::abort();  // nobody comes back
}

size_t Stacks::bytes() {
#if defined(RNN_SIMT_ASAN)
  return 128 << 10;
#else
  return 64 << 10;
#endif
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  release();
  page_ = size_t(sysconf(_SC_PAGESIZE));
  const size_t all = count * (bytes() + page_);
  void* memory = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "memory for the stacks of fibers");
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; ++i) {
    if (!mprotect(stack(i) - page_, page_, PROT_NONE)) continue;
    const int error = errno;
    release();
    throw std::system_error(error, std::generic_category(),
                            "pages below " + std::to_string(count) + " stacks; too many for vm.max_map_count?");
  }
}

void Stacks::release() {
  if (memory_) munmap(memory_, count_ * (bytes() + page_));
  memory_ = nullptr;
  count_ = 0;
}

}  // namespace rnn::simt
