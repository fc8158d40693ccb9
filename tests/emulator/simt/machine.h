// An emulator that runs CUDA kernels written against cuda/device.cuh on the CPU: every thread of every block is a
// fiber, and a seeded scheduler decides who runs. Barriers, messages and copies take effect as late and in as odd an
// order as the hardware would be allowed to, and what the hardware would not forgive is an Error.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace rnn::simt {

// Memory by its name, for reports.
struct Area {
  std::string name;
  int64_t begin, bytes;  // an address, or a place in the shared memory of a block
};

struct Grid {
  int blocks = 1;
  int cluster = 1;  // blocks of a cluster
  int threads = 256;
  int shared_bytes = 0;      // dynamic shared memory of a block; filled with 0xff
  int device = 90;           // its compute capability: 80, 86, 89, 90, 100 or 120
  bool cooperative = false;  // all blocks at once, or the launch is refused
  std::string name = {};
  std::vector<Area> shared_areas = {}, global_areas = {};
};

enum class Mode {
  random,   // any thread that can run; at times some thread, warp or block is slow, and messages are fast or slow
  forward,  // always the first thread that can run; messages arrive only when none can
  reverse,  // always the last
};

struct Schedule {
  Mode mode = Mode::random;
  uint64_t seed = 0;
  std::string skip_site = {};  // where a primitive does nothing, as in `VisitedSite::place`
  int resident = 0;            // clusters that the device holds at once; 0: all
  bool shuffled = false;       // in which they begin: in the order of their numbers, or in any
  bool races = false;          // watches every access; takes kernels compiled for that (races.h)
  std::string weak_site = {};  // where a primitive waits and signals as always, and orders no memory
  bool bounded = false;        // waits for other blocks end where nobody can run; else that is an Error
};

struct VisitedSite {
  std::string place;  // file:line
  std::string primitive;
  uint64_t visits;  // by all threads
};

struct Report {
  uint64_t switches = 0;
  std::vector<VisitedSite> sites;
  uint64_t accesses = 0;        // compared with those before them
  uint64_t bank_conflicts = 0;  // passes of load_matrices() over shared memory that one would have spared
};

// A mistake of the kernel: says which block, thread and site.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `kernel` once in each thread. Whatever a thread throws ends the launch and comes out of it.
Report launch(const Grid& grid, const Schedule& schedule, const std::function<void()>& kernel);

}  // namespace rnn::simt
