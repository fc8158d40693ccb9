#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "common/layout.h"
#include "cuda/forced.h"

namespace rnn::cuda {
namespace {

constexpr int64_t kFewSteps = 32;  // where loading the weights counts
constexpr int64_t kLeastRows = 2;  // of a tile, where the batch has as many

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

std::atomic<Family> chosen_family{Family::kAuto};
std::atomic<Stacks> chosen_stacks{Stacks::kAuto};
thread_local Choice chosen_by_thread{Family::kAuto, Stacks::kAuto};
std::atomic<Forced> forced_layout{Forced{}};
static_assert(std::atomic<Forced>::is_always_lock_free);

// Sets what has this name, in the order of its values; false where nothing has.
template <class Value>
bool set(std::atomic<Value>& to, const std::string& name, std::initializer_list<const char*> names) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) return false;
  to = Value(found - names.begin());
  return true;
}

// Cycles of a round of a group on an H100, estimated from published costs of its instructions and, where a cell or a
// message is sent, from counts of the compiled kernels' own (docs/compiled_kernels.md); docs/performance.md says what
// has been measured. Only the order of the layouts counts here.
double estimate(const Kernel& k, const Layout& l) {
  constexpr double kMultiplyIssue = 6.3, kMultiplyLatency = 33;              // mma.sync; four multiply at once
  constexpr double kOperands = 60;                                           // until the first can multiply
  constexpr double kSharedBytes = 128, kClusterBytes = 14.5, kL2Bytes = 27;  // per cycle
  constexpr double kFragmentBytes = 512;                                     // of a warp: operands of 16 bytes per lane
  constexpr double kClusterMessage = 500;                                    // until the last has arrived
  // Through the L2 cache: until the last could be found there, and until the look that finds it has come back. Every
  // second round ends with a fence, while messages are on their way.
  constexpr double kGridMessage = 500, kGlobalRead = 600, kFence = 600;
  constexpr double kBarriers = 100, kSend = 80;
  // A cell: a chain of instructions that wait for each other, and those of a warp, one per cycle.
  constexpr double kCellLatency = 150, kCellIssue = 150, kPartIssue = 3, kNumberIssue = 8;
  const double warps = l.product.groups * l.product.parts, pairs = l.product.pairs, tiles = k.tiles();
  const double in_shared = std::max(0, l.product.pairs - k.in_registers());
  const double chains = k.tiles() * k.batch == 1 ? 2 : 1;
  // Per pair of steps without tensor cores: 64 multiply-adds and half as many reads of a word for each tile.
  const double multiply = k.exact ? warps * pairs * std::max(64 * tiles / 4, 32.0)
                                  : std::max(warps * pairs * 2 * tiles * k.batch * kMultiplyIssue / 4,
                                             pairs * 2 * kMultiplyLatency / chains);
  const double sums = 2 * warps * tiles * kFragment * l.message.rows * sizeof(float);
  const auto product = [&](double weights) {  // pairs of steps whose weights are read from shared memory
    const double operands = warps * kFragmentBytes * (weights * 2 * tiles + (k.exact ? 0 : pairs * k.batch));
    return kOperands + multiply + (operands + sums) / kSharedBytes;
  };
  const double cells = std::ceil(std::ceil(double(l.units) * l.rows / kWarp) / 4);  // of a scheduler, by warps
  const double issue = kCellIssue + kPartIssue * k.out * l.product.parts + kNumberIssue * (k.sent + k.state + k.masked);
  const double cell = kCellLatency + cells * issue;
  const bool alone = l.message.alone();
  const double bytes = alone ? 0 : double(l.message.blocks) * l.rows * l.message.slice_pitch();
  const double moved = alone ? 0 : kSend + (k.cluster ? bytes / kClusterBytes : kGlobalRead + bytes / kL2Bytes);
  const double from_upstream = double(l.rows) * l.message.blocks * l.message.slice_pitch();
  const double upstream = k.pipelined ? 2 * kGlobalRead + from_upstream / kL2Bytes + product(pairs) : 0;
  const double tile = product(in_shared) + cell + kBarriers + moved;
  const double message = alone ? 0 : (k.cluster ? kClusterMessage : kGridMessage);
  // While a tile is on its way, the others are computed, and what comes from upstream is multiplied.
  const double busy = l.tiles * (tile + upstream);
  const double idle = std::max(0.0, message - upstream - (l.tiles - 1) * (tile + upstream));
  return busy + (alone || k.cluster ? idle : (idle + std::max(idle, kFence)) / 2);
}

// Before the first round: the launch, and the weights, which a thread reads one fragment after the other.
double estimate_begin(const Kernel& k, const Layout& l) {
  constexpr double kLaunch = 4000, kFragmentRead = 800;
  return kLaunch + l.product.pairs * 2 * k.tiles() * (k.pipelined ? 2 : 1) * kFragmentRead;
}

// A step of the step-by-step kernels: two launches from the host, a product of the whole device, and what the cells
// read and write.
double estimate_stepwise(const Kernel& k, const Problem& p) {
  constexpr double kStep = 16000, kTensorCores = 135000, kNone = 12000, kBytes = 1700;  // per cycle
  const double rows = double(p.rows) * p.D, H = double(p.H), gates = std::max(k.out, k.sent);
  const double product = rows * gates * H * H / (k.exact ? kNone : kTensorCores * 2 / k.bytes);
  return kStep + product + rows * H * (3 * gates + 4 * k.state) * k.bytes / kBytes;
}

}  // namespace

int Device::clusters(int blocks) const {
  // Clusters lie within a GPC, and GPCs may lack a few multiprocessors: of the largest size one GPC in eight is counted
  // as too small.
  const int fit = multiprocessors / blocks;
  return blocks >= 8 ? std::max(1, fit - std::max(1, fit / 8)) : fit;
}

int most_blocks_of(int major) { return major == 9 || major == 10 ? 2 * kPortableCluster : kPortableCluster; }

const char* refusal(const Request& a) {
  if (a.written) return "a cell that is written, or has zoneout, has no kernels for whole sequences";
  if (a.normed) return "layer_norm has no kernels for whole sequences";
  if (a.heads) return "heads have no kernels for whole sequences";
  if (a.precision == Precision::kFloat64) return "float64 has no kernels for whole sequences";
  if (a.projected) return "a projection (proj_size) has no kernels for whole sequences";
  if (a.norm && a.precision == Precision::kFloat16)
    return "float16 gradients might overflow before they are bounded by norm";
  return nullptr;
}

Kernel kernel_of(int G, int A, int S, bool backward, Precision precision, bool norm, bool masked) {
  const bool wide = precision == Precision::kFloat32 || precision == Precision::kTF32;
  Kernel k{};
  k.out = backward ? 1 : G;
  k.sent = backward ? G : 1;
  k.state = S;
  k.constants = backward ? 0 : 2 * G;
  k.kept = backward ? G + A : 0;
  k.bytes = wide ? 4 : 2;
  k.exact = precision == Precision::kFloat32;
  k.norm = backward && norm;
  k.masked = masked;
  return k;
}

Layout lay_out(const Kernel& k, int blocks, int units, int tiles) {
  Layout l{};
  l.units = units;
  l.tiles = tiles;
  l.rows = k.batch * kColumns;
  l.stages = 1;
  l.masked = k.masked;
  l.values = k.state + (k.norm ? k.kept : 0) + l.masked;
  l.product.groups = int(divide_up(int64_t(k.out) * units, int64_t(k.tiles()) * kFragment));
  l.product.parts = std::max(1, kWarps / l.product.groups);
  const int64_t steps = divide_up(int64_t(blocks) * units * k.sent * k.bytes, kStepBytes);
  l.product.pairs = int(divide_up(steps, 2 * l.product.parts));
  const int rows = k.batch * kColumns;
  // An odd number of 16 bytes between rows puts eight of them into different banks.
  const int columns = l.product.parts * l.product.pairs * 2 * kStepBytes, sum = k.norm ? kVec16Bytes : 0;
  const int filled = columns + sum * blocks, pitch = filled + (filled / kVec16Bytes % 2 ? 0 : kVec16Bytes);
  const int bytes = units * k.sent * k.bytes, numbers = blocks * bytes;
  l.message = {blocks, bytes, sum, rows, columns, pitch, numbers, numbers + blocks * sum};

  const auto after = [](int64_t at, int64_t bytes) { return divide_up(at + bytes, 128) * 128; };
  const int64_t warps = int64_t(l.product.groups) * l.product.parts,
                in_shared = std::max(0, l.product.pairs - k.in_registers());
  l.exchange = after(0, warps * in_shared * 2 * k.tiles() * kWarp * kVec16Bytes);
  const bool alone = l.message.alone();
  const int64_t own = l.message.buffer(), shared = int64_t(tiles) * 2 * (own + kBarrierBytes);
  l.partial = after(l.exchange, alone ? tiles * own : (k.cluster ? shared : own));
  l.staging = after(l.partial, warps * k.tiles() * kFragment * (rows + 1) * int64_t(sizeof(float)));
  l.state = after(l.staging, l.message.slice());
  l.constants = after(l.state, int64_t(tiles) * l.values * rows * units * int64_t(sizeof(float)));
  l.squares = after(l.constants, int64_t(k.constants) * units * int64_t(sizeof(float)));
  l.slots = after(l.squares, k.norm ? rows * (units + 1) * int64_t(sizeof(double)) : 0);
  l.failed = after(l.slots, int64_t(tiles) * rows * kSlotBytes);
  l.upstream_weights = after(l.failed, kFailedBytes);
  l.upstream_rows =
      after(l.upstream_weights, k.pipelined ? warps * l.product.pairs * 2 * k.tiles() * kWarp * kVec16Bytes : 0);
  l.upstream_partial = after(l.upstream_rows, k.pipelined ? l.upstream_bytes() : 0);
  l.shared_bytes = after(l.upstream_partial, k.pipelined ? l.staging - l.partial : 0);
  // One beside the other: a warp that polls those of 32 blocks reads one line.
  const int64_t flags = divide_up(int64_t(tiles) * blocks * kFlagBytes, kVec16Bytes) * kVec16Bytes;
  l.flags = k.cluster || alone ? 0 : tiles * kGridBuffers * l.message.buffer();
  l.global_bytes = l.flags + (k.pipelined ? flags : 0);
  return l;
}

static Plan plan_kernel(const Kernel& k, const Problem& p, const Device& d, const Check& check, Plan& refused) {
  Plan best{};
  best.reason = "the recurrent weights do not fit on the chip";
  if (k.cluster && d.major < 9) {
    best.reason = "clusters need a GPU of compute capability 9.0";
    return best;
  }
  const int64_t tile_rows = k.batch * kColumns, row_tiles = divide_up(p.rows, tile_rows);
  const Forced forced = forced_layout;
  for (int units = 8; units <= kMostUnits; units += 8) {
    const int64_t blocks = divide_up(p.H, units);
    if (forced.units && units != forced.units) continue;
    if (k.cluster ? blocks > d.most_blocks : blocks > d.multiprocessors) continue;
    if (k.cluster && (blocks & (blocks - 1))) continue;  // GPCs divide into such clusters without rest
    const int at_once = (k.cluster ? d.clusters(int(blocks)) : d.multiprocessors / int(blocks)) / (p.D * p.stages);
    if (at_once == 0) continue;
    if (lay_out(k, int(blocks), units, 1).product.groups > kWarps) continue;
    // As many tiles as one launch needs, or as fit; the memory grows with them, by a byte at least.
    int64_t tiles = 0, most = forced.tiles ? forced.tiles : divide_up(row_tiles, at_once);
    most = std::min<int64_t>(most, d.shared_bytes);
    while (tiles < most) {
      const int64_t middle = (tiles + most + 1) / 2;
      if (lay_out(k, int(blocks), units, int(middle)).shared_bytes <= d.shared_bytes) {
        tiles = middle;
      } else {
        most = middle - 1;
      }
    }
    if (tiles == 0 || tiles < forced.tiles) continue;
    Layout l = lay_out(k, int(blocks), units, int(tiles));
    // Groups that wait for nobody else begin whenever there is room.
    const bool unbounded = k.cluster || (l.message.alone() && p.stages == 1);
    int64_t groups = divide_up(row_tiles, tiles);
    const int64_t launches = divide_up(groups, at_once);
    if (p.stages > 1 && launches > 1) continue;  // no stage waits for one that has not begun
    if (launches == 1) {  // where there is room for more groups, each takes fewer rows, and less travels
      l.rows = int(std::min(tile_rows, std::max(divide_up(p.rows, at_once * tiles), std::min(p.rows, kLeastRows))));
      groups = divide_up(p.rows, l.rows * tiles);
    }
    l.groups = int(unbounded ? groups : std::min<int64_t>(groups, at_once));
    l.stages = p.stages;
    const double cycles = estimate(k, l) * double(launches), begin = estimate_begin(k, l) * double(launches);
    Plan plan{true, "", k, l, int(unbounded ? 1 : launches), cycles, begin, ""};
    if (best.found && plan.all_cycles(double(p.steps)) >= best.all_cycles(double(p.steps))) continue;
    if (check) plan.reason = check(plan, p.D);
    if (plan.reason.empty()) {
      best = std::move(plan);
    } else if (!refused.found || plan.all_cycles(double(p.steps)) < refused.all_cycles(double(p.steps))) {
      refused = std::move(plan);
    }
  }
  return best;
}

Plan make_plan(Family family, Kernel k, const Problem& p, const Device& d, const Check& check) {
  Plan best{}, refused{};
  if (family == Family::kStepwise) {
    best.reason = "the step-by-step kernels were asked for";
    return best;
  }
  for (const bool cluster : {true, false}) {
    if (family == (cluster ? Family::kGrid : Family::kCluster)) continue;
    if (!d.allows(cluster ? Kernels::kCluster : Kernels::kGrid) ||
        (p.stages > 1 && !d.allows(cluster ? Kernels::kClusterWavefront : Kernels::kGridWavefront))) {
      if (!best.found) best.reason = "the kernels for whole sequences were found wrong on this device";
      continue;
    }
    for (const int batch : kBatches) {
      if (k.exact && batch > 1) continue;
      if (const int forced = forced_layout.load().batch; forced && !k.exact && batch != forced) continue;
      k.cluster = cluster;
      k.batch = batch;
      k.pipelined = p.stages > 1;
      Plan plan = plan_kernel(k, p, d, check, refused);
      if (plan.found ? !best.found || plan.all_cycles(double(p.steps)) < best.all_cycles(double(p.steps)) : !best.found)
        best = std::move(plan);
    }
  }
  if (refused.found && !best.found) best.reason = refused.reason;
  if (refused.found && best.found && refused.all_cycles(double(p.steps)) < best.all_cycles(double(p.steps)))
    best.passed_over = refused.reason;
  return best;
}

Stack plan_stack(Choice choice, const Kernel& k, Problem p, int layers, const Device& d, const Check& check) {
  p.stages = 1;
  Stack best{1, make_plan(choice.family, k, p, d, check), 0};
  best.cycles = layers * best.plan.all_cycles(double(p.steps));
  if (!best.plan.found || choice.stacks == Stacks::kInTurn) return best;
  for (p.stages = 2; p.stages <= std::min(layers, kMostStages); ++p.stages) {
    Plan plan = make_plan(choice.family, k, p, d, check);
    if (!plan.found) break;
    // A stage begins once the one before has told of its first step, which takes about as long as a step.
    const int64_t launches = divide_up(layers, p.stages);
    const double cycles = double(launches) * plan.all_cycles(double(p.steps) + 2 * (p.stages - 1));
    if (cycles < best.cycles || choice.stacks == Stacks::kTogether) best = {p.stages, std::move(plan), cycles};
  }
  if (choice.family == Family::kAuto && choice.stacks != Stacks::kTogether &&
      best.cycles > double(layers) * double(p.steps) * estimate_stepwise(k, p)) {
    best = {1, {}, 0};
    best.plan.reason = p.steps < kFewSteps ? "too few steps to load the weights for"
                                           : "a product of the whole device is estimated to be faster";
  }
  return best;
}

Stack plan_call(const Request& a, const Device& device, const Check& check) {
  Stack stack{1, {}, 0};
  if (a.T == 0 || a.B == 0) {
    stack.plan.reason = "there is nothing to run";
  } else if (const char* reason = refusal(a)) {
    stack.plan.reason = reason;
  } else {
    const Sequence q{a.T, a.B, a.D, a.H, a.H, nullptr, nullptr, nullptr, a.backward ? a.window : 0};
    // Layers may run at the same time where each takes the y of the one below as it is, but for a mask.
    const int layers = a.D == 1 && !a.recorded ? a.layers : 1;
    const Kernel kernel = kernel_of(a.G, a.A, a.S, a.backward, a.precision, a.norm, a.dropped);
    stack = plan_stack(choice(), kernel, {a.H, q.rows(), a.D, q.steps()}, layers, device, check);
  }
  return stack;
}

Kernels kernels_of(const Stack& stack) {
  if (!stack.plan.found) return Kernels::kStepwise;
  if (stack.stages > 1) return stack.plan.kernel.cluster ? Kernels::kClusterWavefront : Kernels::kGridWavefront;
  return stack.plan.kernel.cluster ? Kernels::kCluster : Kernels::kGrid;
}

Choice choice() { return chosen_by_thread.free() ? Choice{chosen_family, chosen_stacks} : chosen_by_thread; }
void set_thread_choice(Choice choice) { chosen_by_thread = choice; }

bool set_family(const std::string& name) { return set(chosen_family, name, {"auto", "stepwise", "cluster", "grid"}); }
void force_layout(const Forced& forced) { forced_layout = forced; }
bool set_stacks(const std::string& name) { return set(chosen_stacks, name, {"auto", "in turn", "together"}); }

}  // namespace rnn::cuda
