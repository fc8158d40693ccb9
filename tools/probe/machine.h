// What the probe asks of the machine that it tries: memory and launches. gpu.cpp has them for a GPU, by the very
// objects that the extension is made of; tests/emulator/probe_machine.cpp has them for the emulator.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "cuda/plan.h"
#include "cuda/stages.h"
#include "cuda/step.h"

namespace rnn::probe {

// Something that the machine would not do. `kind` is a word of the outcome that the probe prints.
struct Failure : std::runtime_error {
  Failure(const char* kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  const char* kind;
};

// A launch goes to one stream, after all that was asked for before; wait() ends when all of it is done.
struct Machine {
  static cuda::Device device();
  static char* allocate(int64_t bytes);
  static void upload(char* to, const char* from, int64_t bytes);
  static void download(char* to, const char* from, int64_t bytes);
  static void set_bits(char* to, int64_t bytes);  // all of them
  static void wait();

  // Stages of a persistent kernel: forward or backward, of float or BFloat16.
  template <class Stages>
  static void launch(int cell, const Stages& stages, const cuda::Plan& plan, const cuda::Part& part);
  // A step of cuda/step.h.
  template <class Step>
  static void launch(int cell, const Step& step);

  // Microseconds that a call of `work`, which launches, takes from its first launch to the end of its last.
  static double microseconds(const std::function<void()>& work);
};

}  // namespace rnn::probe

// What a machine has to have, for a storage type.
#define RNN_PROBE_LAUNCHES(IO)                                                                                 \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::ForwardStages<IO>&, const rnn::cuda::Plan&,  \
                                            const rnn::cuda::Part&);                                           \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::BackwardStages<IO>&, const rnn::cuda::Plan&, \
                                            const rnn::cuda::Part&);                                           \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::ForwardCell<IO>&);                           \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::BackwardBegin<IO>&);                         \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::BackwardCell<IO>&);                          \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::BackwardBound<IO>&);                         \
  template void rnn::probe::Machine::launch(int, const rnn::cuda::BackwardFinish<IO>&);
