// The cases of the probe, in the order in which they are tried: each family adds one thing to the families before it.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan.h"

namespace rnn::probe {

// How the rows and units of a case lie over blocks.
struct Shape {
  const char* family;
  const char* needs;  // the family without which this one cannot work; empty where there is none
  enum Way { kStepwise, kGrid, kCluster } way;
  const char* cell;
  int blocks, tiles, groups;  // of a group; of a group; of a direction or layer
  int batch;                  // eights of rows in a tile
  bool norm = false;          // gradients are bounded by their norm
  int layers = 1;             // as a wavefront, if more
  bool options = false;       // both directions, lengths, resets, windows of backward
  bool large = false;         // takes an emulator minutes
};

struct Case {
  Shape shape;
  bool backward;
  cuda::Precision precision;

  std::string name() const;
  std::string needs() const;  // the name of the case of the needed family with the same pass and numbers
};

// A precision by its name in names of cases: bfloat16, tf32 or float32.
const char* name_of(cuda::Precision precision);

std::vector<Case> all_cases();

// What is measured: an LSTM layer in bfloat16, as the plan lays it out and as the plan of the other family does.
struct Measured {
  int rows, H, steps;
  std::string name() const;
};
std::vector<Measured> all_measured();

}  // namespace rnn::probe
