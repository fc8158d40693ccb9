// Runs a case on the machine and says what came of it.
#pragma once

#include <string>

#include "cases.h"

namespace rnn::probe {

// Outcomes:
//   passed, wrong      within its tolerance of the reference, or not
//   unwritten          a result still holds what it was filled with
//   stray              something was written that is not a result
//   refused, failed    the launch; what it ran
//   gave up            a kernel waited in vain, and said where
//   absent             this machine has no such kernel, or too little of something
struct Outcome {
  std::string outcome;
  double error = 0, tolerance = 0;  // of the largest value, or of 1
  std::string detail;
  std::string layout;
};

Outcome attempt(const Case& c);

// One line of JSON for each pass and family.
void measure(const Measured& m);

}  // namespace rnn::probe
