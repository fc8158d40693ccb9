// How a persistent kernel is laid out over a device, and whether it can be: arithmetic on sizes, no CUDA. The choice
// depends on sizes, dtype and the device's limits alone, so that it can be tested for any device on any machine.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "common/macros.h"

namespace rnn::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kColumns = 8;          // rows of the batch in one product of a warp
constexpr int kStepBytes = 32;       // of k in one product of a warp
constexpr int kFragment = 16;        // rows of the weights in one product of a warp
constexpr int kMostUnits = 64;       // of a block
constexpr int kPortableCluster = 8;  // blocks of a cluster on every device that has clusters
constexpr int kMostStages = 8;       // layers of a stack in one launch
constexpr int kGridBuffers = 8;      // that take turns through global memory: see exchange.cuh
// Of a Vec16, a TransactionBarrier, a Slot, a flag, a mark that the block has failed.
constexpr int kVec16Bytes = 16, kBarrierBytes = 8, kSlotBytes = 40, kFlagBytes = 4, kFailedBytes = 4;

// Of 16 rows of the weights that a warp multiplies at once, for numbers per unit that come out; and how many pairs of
// steps of k of these it holds in registers.
constexpr int warp_tiles(int out) { return out == 1 ? 1 : (out == 3 ? 3 : 2); }
constexpr int pairs_in_registers(int tiles, int batch, bool exact) {
  return (exact ? 8 : (batch > 1 && tiles > 1 ? 10 : 12)) / tiles;
}

// How the warps of a block share a product, the same in all blocks of a launch.
struct ProductShape {
  int groups;  // of rows of the weights
  int parts;   // of k; groups * parts <= kWarps
  int pairs;   // of steps of k in one part
};

// What the blocks of a group send each other. Every block sends a slice, which has for each row of a tile the numbers
// of its own units and the sum over them (common/row_statistic.h), if there is one. A buffer has the slices of all
// blocks: in each row the numbers of all, zeros, and then the sums of all.
struct MessageLayout {
  int blocks;     // that share the weights
  int bytes;      // of the numbers in a row of a slice, which are to be multiplied; a multiple of 16
  int sum_bytes;  // of the sum in a row of a slice: 0 or 16
  int rows;       // of a tile
  int sums;       // where the sums of all blocks begin in a row of a buffer
  int pitch;      // bytes between rows of a buffer
  int numbers;    // bytes of the numbers in a row of a buffer
  int received;   // and of the sums

  // One block has nobody to send to: what its cells leave in its own buffer is what it multiplies next.
  RNN_HD bool alone() const { return blocks == 1; }
  RNN_HD int slice_pitch() const { return bytes + sum_bytes; }
  RNN_HD int64_t buffer() const { return int64_t(rows) * pitch; }
  RNN_HD int64_t slice() const { return alone() ? 0 : int64_t(rows) * slice_pitch(); }
};

// A launch. A group of blocks holds the weights of one direction and takes some tiles of rows through the sequence. Of
// a stack of layers, each has groups of its own: a stage. All stages run at the same time, as a pipeline: each has the
// stage before it as its upstream. Offsets are bytes of a block's shared memory.
struct Layout {
  int units;   // of a block; a multiple of 8, at most kMostUnits
  int tiles;   // of a group
  int rows;    // of the batch in a tile, of the rows that it has room for
  int groups;  // per direction or stage
  int stages;  // 1: a layer by itself, of one or two directions
  int values;  // numbers of a unit and row that stay with the block: states, what waits for the norm, masked
  int masked;  // of these, factors of recurrent dropout: 1 or 0
  ProductShape product;
  MessageLayout message;
  // Weights lie at 0.
  int64_t exchange, partial, staging, state, constants, squares, slots, failed;
  int64_t upstream_weights, upstream_rows, upstream_partial;  // of the product with what comes from upstream
  int64_t shared_bytes;
  // Of a group, in global memory, all of whose bits are set at first: what it exchanges and, from `flags` on, how far
  // its tiles are.
  int64_t flags, global_bytes;

  RNN_HD int upstream_pitch() const { return message.sums + kVec16Bytes; }
  RNN_HD int64_t upstream_bytes() const { return int64_t(message.rows) * upstream_pitch(); }
};

// What the layout has to know of a kernel: constants of its template.
struct Kernel {
  int out, sent, state;  // numbers per unit: see passes.h
  int constants;         // numbers per unit that are added at every step
  int kept;              // numbers per unit that wait for the norm, if there is one
  int bytes;             // of an operand
  bool exact;            // IEEE products of float32, without tensor cores
  bool norm;             // gradients are bounded by the norm of a row, which all blocks have a part of
  bool masked;           // recurrent dropout: a factor of a unit and row stays with the block
  bool pipelined;        // runs the layers of a stack as stages
  int batch;             // eights of rows in a tile
  bool cluster;          // else through the grid

  int tiles() const { return warp_tiles(out); }
  int in_registers() const { return pairs_in_registers(tiles(), batch, exact); }
};
// What the numbers of a call are; kTF32: float32 where torch allows tensor cores for it.
enum class Precision { kFloat64, kFloat32, kTF32, kBFloat16, kFloat16 };
// Of a cell with G gates, A of them split, and S states. Batch and exchange are still to be chosen.
Kernel kernel_of(int G, int A, int S, bool backward, Precision precision, bool norm, bool masked = false);
constexpr int kBatches[] = {1, 2};  // of which exact products take the first

constexpr int kMostDevices = 64;  // of a machine: what is known of devices has so many places

// What may be found wrong on a device, and then is left out of its plans: a family of kernels, alone or as a wavefront.
enum class Kernels : int { kStepwise, kGrid, kCluster, kGridWavefront, kClusterWavefront };
inline constexpr std::array kKernelsNames{"stepwise", "grid", "cluster", "grid wavefront", "cluster wavefront"};

struct Device {
  int major, multiprocessors, shared_bytes;  // of a block, at most
  int most_blocks;                           // of a cluster: most_blocks_of its major number
  unsigned refused = 0;                      // a bit for each of Kernels
  int clusters(int blocks) const;            // of this size that run at once, at least
  bool allows(Kernels kernels) const { return !(refused >> int(kernels) & 1u); }
};

int most_blocks_of(int major);

// What a call asks for.
struct Problem {
  int64_t H, rows;  // rows of the loop, per direction
  int D;
  int64_t steps;   // of the loop
  int stages = 1;  // with D = 1, if more
};

struct Plan {
  bool found;
  std::string reason;  // why not
  Kernel kernel;
  Layout layout;
  int launches;             // one after the other, each with all groups
  double cycles;            // of a round of all launches, estimated
  double begin;             // before the first round, in all launches
  std::string passed_over;  // why a layout that was estimated to be faster cannot be launched on this device

  double all_cycles(double rounds) const { return begin + rounds * cycles; }
  bool in_clusters() const { return kernel.cluster && !layout.message.alone(); }
  // Must all blocks of a launch run at the same time?
  bool cooperates() const { return !in_clusters() && (!layout.message.alone() || layout.stages > 1); }
};

// Fills in what follows from blocks, units and tiles.
Layout lay_out(const Kernel& k, int blocks, int units, int tiles);

// Which kernels may run, and how stacks do: as the estimate says, layer by layer, or as many layers at a time as fit.
// For tests and benchmarks; settings of the process, kAuto unless somebody sets them.
enum class Family : int { kAuto, kStepwise, kCluster, kGrid };
enum class Stacks : int { kAuto, kInTurn, kTogether };
struct Choice {
  Family family;
  Stacks stacks;
  bool free() const { return family == Family::kAuto && stacks == Stacks::kAuto; }
};
Choice choice();
// For this thread, in place of what is set for the process, unless it is free.
void set_thread_choice(Choice choice);
// "auto", "stepwise", "cluster" or "grid"; "auto", "in turn" or "together". False where it is none of these.
bool set_family(const std::string& name);
bool set_stacks(const std::string& name);

// Whether a device can launch a plan for so many directions: why not, or nothing. Limits of a device say what should
// fit; what does, depends on the compiled kernel, on how multiprocessors lie together and on who else uses the device.
using Check = std::function<std::string(const Plan& plan, int D)>;

// The fastest plan of a family for kernels with these numbers per unit and operands; their batch and exchange are
// chosen here.
Plan make_plan(Family family, Kernel k, const Problem& p, const Device& d, const Check& check = {});

// The fastest way to run a stack of layers of one direction: one after the other, or as many as `stages` at a time;
// step by step where that is faster and no family was asked for.
struct Stack {
  int stages;
  Plan plan;
  double cycles;  // of all layers and steps, estimated
};
Kernels kernels_of(const Stack& stack);
Stack plan_stack(Choice choice, const Kernel& k, Problem p, int layers, const Device& d, const Check& check = {});

// All that a plan depends on of a call. What launches kernels and what tells users of it ask with the same request.
struct Request {
  int G, A, S;  // of the cell
  bool backward;
  Precision precision;
  bool projected, norm, recorded;  // a proj_size, gradients bounded by their norm, norms of gradients asked for
  int64_t H, T, B, window;
  int D, layers;
  bool written = false, heads = false, dropped = false;  // a cell that is not built in; heads; recurrent dropout
  bool normed = false;                                   // a cell whose products are normalised
};
// What persistent kernels do not take of a call, or null.
const char* refusal(const Request& request);
// How the layers of a call run, as the settings of the process choose; a plan that is not found has its reason.
Stack plan_call(const Request& request, const Device& device, const Check& check = {});

}  // namespace rnn::cuda
