// Kernels that test the emulator itself.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "simt/machine.h"

namespace rnn::simt::selftest {

// One launch of a case: its kernel, and what came of it, which begins with "wrong" if it is that.
struct Attempt {
  std::function<void()> kernel;
  std::function<std::string()> result = [] { return std::string("ok"); };
};

struct Case {
  std::string name;
  Grid grid;
  std::function<Attempt()> prepare;
  std::string expected = "ok";  // of mistakes, what they come to under Mode::forward; a regular expression
};

std::vector<Case> loops();              // over time: results against a plain loop
std::vector<Case> primitives();         // one each
std::vector<Case> schedules();          // what depends on the schedule, and may
std::vector<Case> mistakes();           // each ends with an exception
std::vector<Case> mistakes_of_order();  // as expected under some random schedules, under others otherwise
std::vector<Case> crashes();            // each ends the process, at the latest with sanitizers

Case transactions_with_a_race();

}  // namespace rnn::simt::selftest
