// The machine that the probe tries is the emulator, and at a word a faulty one: what a GPU may do wrong, the probe and
// what runs it have to read rightly.
//
// PROBE_FAULT in the environment, for persistent kernels:
//   wrong    spoils a result          stray   writes in front of a tensor   crash   ends the process
//   idle     launches nothing         fail    the kernel does               hang    never comes back
//   refuse   the launch is refused
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "../../tools/probe/loop.h"
#include "simt/kernels/launch.h"
#include "simt/storage.h"

namespace rnn::probe {
namespace {

std::string fault() {
  const char* word = std::getenv("PROBE_FAULT");
  return word ? word : "";
}

// What only a GPU's memory would be like: nobody frees it before the process ends.
std::map<char*, std::unique_ptr<char[]>> memory;

// The last tensor that a launch writes, for what spoils it.
template <class IO>
IO* result(const cuda::ForwardStages<IO>& stages) {
  return stages.back().y;
}
template <class IO>
IO* result(const cuda::BackwardStages<IO>& stages) {
  return stages.back().dgates;
}

template <class IO>
auto kernel(const cuda::ForwardStages<IO>&) {
  return simt::Kernels<IO>::compiled->forward;
}
template <class IO>
auto kernel(const cuda::BackwardStages<IO>&) {
  return simt::Kernels<IO>::compiled->backward;
}

}  // namespace

constexpr int kCapability = 90;
cuda::Device Machine::device() { return {kCapability / 10, 132, 232448, 16}; }
char* Machine::allocate(int64_t bytes) {
  auto block = std::make_unique<char[]>(size_t(bytes) + 256);
  char* aligned = block.get() + (256 - reinterpret_cast<uintptr_t>(block.get()) % 256);
  memory[aligned] = std::move(block);
  return aligned;
}
void Machine::upload(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
void Machine::download(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
void Machine::set_bits(char* to, int64_t bytes) {
  if (bytes) std::memset(to, 0xff, size_t(bytes));
}
void Machine::wait() {}
double Machine::microseconds(const std::function<void()>& work) {
  work();
  return 1;  // time passes nowhere here
}

template <class Stages>
void Machine::launch(int cell, const Stages& stages, const cuda::Plan& plan, const cuda::Part& part) {
  const std::string what = fault();
  if (what == "refuse") throw Failure("refused", "too many resources requested for launch");
  if (what == "fail") throw Failure("failed", "the kernels: an illegal memory access was encountered");
  if (what == "crash") std::abort();
  while (what == "hang") pause();
  if (what != "idle") {
    try {
      kernel(stages)(cell, stages, plan, part, kCapability, {});
    } catch (const simt::Error& error) {
      throw Failure("failed", error.what());
    }
  }
  const Sequence& q = stages[0].seq;
  auto* const written = result(stages);
  const int64_t numbers = q.T * q.B * q.D * q.H;
  if (what == "wrong") narrow(8, written[numbers / 2]);
  if (what == "stray") reinterpret_cast<char*>(written)[-1] = 0;
}

template <class Step>
void Machine::launch(int cell, const Step& step) {
  const Sequence& q = cuda::sequence_of(step);
  cuda::dispatch_step<Step>(cell, [&](auto of) {
    for (int64_t n = q.D * q.rows() - 1; n >= 0; --n)
      for (int64_t i = cuda::units_of(step) - 1; i >= 0; --i) step.template unit<decltype(of)>(cuda::Slot(q, n), i);
  });
}

}  // namespace rnn::probe

RNN_PROBE_LAUNCHES(float)
RNN_PROBE_LAUNCHES(rnn::BFloat16)
