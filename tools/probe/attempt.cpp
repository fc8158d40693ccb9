#include "attempt.h"

#include <algorithm>
#include <cstdio>
#include <sstream>

#include "problem.h"

namespace rnn::probe {
namespace {

constexpr double kBound = 0.5;  // of a norm of gradients: some rows are longer, some are not
using Role = Arena::Role;

std::string text(const cuda::Plan& plan) {
  const cuda::Layout& l = plan.layout;
  std::ostringstream out;
  out << (plan.kernel.cluster ? "cluster" : "grid") << " of " << l.message.blocks << " blocks with " << l.units
      << " units, " << l.groups << " groups with " << l.tiles << " x " << l.message.rows << " rows, " << l.stages
      << " stages, " << l.shared_bytes << " bytes";
  return out.str();
}

// A layer's tensors in the arena: what is given to a pass, and what it returns.
template <class IO>
struct Placed {
  Fields<Arena::Tensor<IO>> tensors{};
  Fields<IO*> device{};
};

template <class IO>
class Attempt {
 public:
  Attempt(const Case& c, Problem& problem) : c_(c), problem_(problem) {
    for (int l = 0; l < problem_.n.layers; ++l) add(l);
    lengths_ = arena_.add<int64_t>("lengths", int64_t(problem_.lengths.size()), Role::kInput);
    reset_ = arena_.add<bool>("reset", int64_t(problem_.reset.size()), Role::kInput);
  }

  // The results of persistent kernels, as the plan has them.
  void run(const cuda::Plan& plan) {
    const cuda::Layout& l = plan.layout;
    const int64_t bytes = problem_.n.D * problem_.n.layers * l.groups * l.global_bytes;
    const auto exchange = arena_.add<char>("exchange", bytes, Role::kScratch);
    place();
    launch_all(plan, exchange);
    Machine::wait();
    arena_.download();
  }

  // Of a step, and of what comes before the first: from the whole sequence and from half of it.
  std::pair<double, double> microseconds(const cuda::Plan& plan) {
    const int64_t bytes = problem_.n.D * problem_.n.layers * plan.layout.groups * plan.layout.global_bytes;
    const auto exchange = arena_.add<char>("exchange", bytes, Role::kScratch);
    place();
    const int64_t T = problem_.n.T;
    const double whole = best(plan, exchange, T), half = best(plan, exchange, T / 2);
    const double step = (whole - half) / double(T - T / 2);
    return {step, whole - step * double(T)};
  }

  // The same step by step.
  void run_stepwise() {
    const Sizes& n = problem_.n;
    const Cell& cell = problem_.cell;
    const int64_t rows = n.D * n.B, states = rows * n.H;
    const OnMachine executor{cell.number, arena_};
    if (!c_.backward) {
      const auto gh = arena_.add<IO>("gh", states * cell.G, Role::kScratch);
      const auto c = arena_.add<Arithmetic<IO>>("c", cell.S > 1 ? states : 0, Role::kScratch);
      place();
      copy(layers_[0].tensors[kHn], problem_.layers[0][kH0]);
      copy(c, problem_.layers[0][kC0]);
      arena_.upload();
      forward_loop<IO>(forward_call(sequence(), cell, layers_[0].device), cell.G,
                       {arena_.device(gh), layers_[0].device[kHn], arena_.device(c)}, executor);
      executor.before_product();
      for (int64_t i = 0; i < c.size; ++i) narrow(widen(arena_.host(c)[i]), arena_.host(layers_[0].tensors[kCn])[i]);
    } else {
      using Wide = Arithmetic<IO>;
      const bool norm = problem_.clip.kind == Clip::kNorm, two = cell.S > 1;
      const auto dh = arena_.add<Wide>("dh", states, Role::kScratch),
                 dc = arena_.add<Wide>("dc", two ? states : 0, Role::kScratch);
      const auto dgh = arena_.add<IO>("dgh", states * cell.G, Role::kScratch),
                 through = arena_.add<IO>("dh_through", states, Role::kScratch);
      const auto unbounded = arena_.add<double>("unbounded", norm ? states * (cell.G + cell.A) : 0, Role::kScratch);
      const auto norms = arena_.add<double>("norms", norm ? rows : 0, Role::kScratch);
      place();
      const cuda::Carried<IO> carried{arena_.device(dh),
                                      arena_.device(dc),
                                      arena_.device(dgh),
                                      arena_.device(through),
                                      nullptr,
                                      nullptr,
                                      arena_.device(unbounded),
                                      arena_.device(norms),
                                      nullptr};
      backward_loop<IO>(backward_call(sequence(), cell, problem_.clip, layers_[0].device), cell.G, cell.A, carried,
                        executor);
      executor.before_product();
    }
  }

  Outcome compared(double tolerance) {
    Outcome found{"passed", 0, tolerance, "", ""};
    if (const auto stray = arena_.stray()) return {"stray", 0, tolerance, *stray, ""};
    for (int l = 0; l < problem_.n.layers; ++l)
      for (const Field f : results()) compare(l, f, found);
    return found;
  }

 private:
  std::vector<Field> results() const {
    return c_.backward ? std::vector<Field>{kDgates, kDh0, kDc0} : std::vector<Field>{kY, kHn, kCn, kC, kSaved};
  }

  void add(int layer) {
    layers_.emplace_back();
    std::vector<Field> given{kWeights, kInputWeights, kH0, kC0};
    for (const Field f : c_.backward ? std::vector<Field>{kY, kC, kSaved, kDy, kDhn, kDcn}
                                     : std::vector<Field>{kInputBias, kHiddenBias, kGx})
      given.push_back(f);
    for (const Field f : given) place_one(layer, f, Role::kInput);
    for (const Field f : results()) place_one(layer, f, Role::kOutput);
  }
  void place_one(int layer, Field f, Role role) {
    layers_.back().tensors[f] = arena_.add<IO>(kNames[f], problem_.size(layer, f), role);
  }

  template <class T, class From>
  void copy(const Arena::Tensor<T>& to, const std::vector<From>& from) {
    for (int64_t i = 0; i < to.size; ++i) narrow(double(from[size_t(i)]), arena_.host(to)[i]);
  }

  // Everything at its place, here and on the machine.
  void place() {
    arena_.allocate();
    for (size_t l = 0; l < layers_.size(); ++l)
      for (int f = 0; f < kFields; ++f) {
        const auto& tensor = layers_[l].tensors[size_t(f)];
        layers_[l].device[size_t(f)] = arena_.device(tensor);
        const std::vector<Field> out = results();
        if (std::find(out.begin(), out.end(), Field(f)) == out.end()) copy(tensor, problem_.layers[l][size_t(f)]);
      }
    std::copy(problem_.lengths.begin(), problem_.lengths.end(), arena_.host(lengths_));
    std::copy(problem_.reset.begin(), problem_.reset.end(), arena_.host(reset_));
    arena_.upload();
  }

  double best(const cuda::Plan& plan, const Arena::Tensor<char>& exchange, int64_t steps) {
    steps_ = steps;
    double found = 0;
    for (int i = 0; i < 5; ++i) {
      Machine::set_bits(arena_.device(exchange), exchange.size);
      const double us = Machine::microseconds([&] { launch_part(plan, arena_.device(exchange), 0); });
      if (i == 0 || us < found) found = us;
    }
    return found;
  }

  Sequence sequence() const {
    Sequence q = problem_.sequence(arena_.device(lengths_), arena_.device(reset_), c_.backward);
    if (steps_) q.T = steps_;
    return q;
  }

  void launch_all(const cuda::Plan& plan, const Arena::Tensor<char>& exchange) {
    const cuda::Layout& l = plan.layout;
    for (int64_t i = 0; i < plan.launches; ++i) {
      Machine::set_bits(arena_.device(exchange), exchange.size);
      launch_part(plan, arena_.device(exchange), i * l.groups * l.tiles * l.message.rows);
    }
  }

  void launch_part(const cuda::Plan& plan, char* exchange, int64_t first_row) {
    const cuda::Part part{exchange, first_row};
    const Sequence q = sequence();
    const int L = problem_.n.layers;
    if (!c_.backward) {
      cuda::ForwardStages<IO> stages;
      for (int l = 0; l < L; ++l) {
        cuda::ForwardStage<IO> stage{forward_call(q, problem_.cell, layers_[size_t(l)].device), nullptr};
        if (l > 0) stage.x = layers_[size_t(l - 1)].device[kY];
        stages.push_back(stage);
      }
      return Machine::launch(problem_.cell.number, stages, plan, part);
    }
    cuda::BackwardStages<IO> stages;
    for (int l = L; l-- > 0;) {
      cuda::BackwardStage<IO> stage{backward_call(q, problem_.cell, problem_.clip, layers_[size_t(l)].device), nullptr,
                                    nullptr, nullptr, nullptr};
      if (l + 1 < L) {
        stage.dgates_above = layers_[size_t(l + 1)].device[kDgates];
        stage.w_ih_above = layers_[size_t(l + 1)].device[kInputWeights];
      }
      stages.push_back(stage);
    }
    Machine::launch(problem_.cell.number, stages, plan, part);
  }

  void compare(int layer, Field f, Outcome& found) {
    const auto& tensor = layers_[size_t(layer)].tensors[f];
    const std::vector<double>& want = problem_.layers[size_t(layer)][f];
    double largest = 1, worst = -1;
    int64_t at = -1, wrong = 0, unwritten = 0;
    for (const double x : want) largest = std::max(largest, std::abs(x));
    for (int64_t i = 0; i < tensor.size; ++i) {
      const double got = widen(arena_.host(tensor)[i]), error = std::abs(got - want[size_t(i)]) / largest;
      unwritten += arena_.poisoned(tensor, i);
      if (error <= found.tolerance) {
        worst = std::max(worst, error);
        continue;
      }
      if (!wrong++) at = i;
    }
    found.error = std::max(found.error, worst);
    if (!wrong || found.outcome != "passed") return;
    std::ostringstream detail;
    detail << wrong << " of " << tensor.size << " numbers of " << kNames[f] << " of layer " << layer << " are wrong, "
           << unwritten << " of them never written; the first at " << place_of(f, at) << ": "
           << widen(arena_.host(tensor)[at]) << ", not " << want[size_t(at)];
    found.detail = detail.str();
    found.outcome = unwritten ? "unwritten" : "wrong";
  }

  std::string place_of(Field f, int64_t at) const {
    const Sizes& n = problem_.n;
    const bool state = f == kHn || f == kCn || f == kDh0 || f == kDc0;
    const int64_t rows = n.D * n.B, width = problem_.size(0, f) / (state ? rows : n.T * rows);
    const int64_t row = at / width;
    std::ostringstream out;
    if (!state) out << "t=" << row / rows << " ";
    out << "b=" << (state ? row % n.B : row / n.D % n.B) << " d=" << (state ? row / n.B : row % n.D) << " column "
        << at % width << " of " << width;
    return out.str();
  }

  const Case& c_;
  Problem& problem_;
  Arena arena_;
  std::vector<Placed<IO>> layers_;
  Arena::Tensor<int64_t> lengths_;
  Arena::Tensor<bool> reset_;
  int64_t steps_ = 0;  // of which to run the first alone; 0: all
};

cuda::Kernel kernel(const Case& c, const Cell& cell) {
  return cuda::kernel_of(cell.G, cell.A, cell.S, c.backward, c.precision, c.shape.norm);
}

constexpr int kUnits = 16, kFewUnits = 8;
int units(const Shape& s) { return s.blocks >= 8 ? kFewUnits : kUnits; }

// The layout that the case is about, whatever the plan would choose.
cuda::Plan plan_of(const Case& c, const Cell& cell) {
  const Shape& s = c.shape;
  cuda::Plan plan{};
  plan.found = true;
  plan.kernel = kernel(c, cell);
  plan.kernel.cluster = s.way == Shape::kCluster;
  plan.kernel.batch = s.batch;
  plan.kernel.pipelined = s.layers > 1;
  plan.layout = cuda::lay_out(plan.kernel, s.blocks, units(s), s.tiles);
  plan.layout.groups = s.groups;
  plan.layout.stages = s.layers;
  plan.launches = 1;
  return plan;
}

std::string missing(const cuda::Plan& plan, int64_t D, const cuda::Device& device) {
  const cuda::Layout& l = plan.layout;
  const int64_t blocks = D * l.stages * l.groups * l.message.blocks;
  if (l.shared_bytes > device.shared_bytes) return "too little shared memory";
  if (plan.kernel.cluster && device.major < 9) return "no clusters";
  if (plan.kernel.cluster && l.message.blocks > device.most_blocks) return "no cluster so large";
  if (!plan.kernel.cluster && blocks > device.multiprocessors) return "too few multiprocessors";
  return "";
}

double tolerance(cuda::Precision precision) {
  return precision == cuda::Precision::kBFloat16 ? 3e-2 : precision == cuda::Precision::kTF32 ? 2e-3 : 1e-5;
}

template <class IO>
Outcome attempt(const Case& c) {
  const Shape& s = c.shape;
  const Cell cell(s.cell);
  const cuda::Plan plan = plan_of(c, cell);
  const bool stepwise = s.way == Shape::kStepwise;
  const int64_t D = s.options ? 2 : 1;
  // So many steps that a grid uses its buffers again, and one unit and three rows less than there is room for.
  const bool again = s.way == Shape::kGrid && s.blocks == 2;
  const Sizes n{s.large ? 20 : (again ? cuda::kGridBuffers + 3 : 6),
                s.groups * s.tiles * plan.layout.message.rows - 3,
                D,
                s.blocks * units(s) - 1,
                s.layers,
                0};
  if (!stepwise) {
    const std::string reason = missing(plan, D, Machine::device());
    if (!reason.empty()) return {"absent", 0, 0, reason, text(plan)};
  }
  Problem problem(cell, n, s.options, {s.norm ? Clip::kNorm : Clip::kNone, kBound}, c.precision);
  problem.run_forward();
  if (c.backward) problem.run_backward();
  Attempt<IO> attempt(c, problem);
  stepwise ? attempt.run_stepwise() : attempt.run(plan);
  Outcome found = attempt.compared(tolerance(c.precision));
  found.layout = stepwise ? "step by step" : text(plan);
  return found;
}

}  // namespace

Outcome attempt(const Case& c) {
  try {
    return c.precision == cuda::Precision::kBFloat16 ? attempt<BFloat16>(c) : attempt<float>(c);
  } catch (const Failure& failure) {
    return {failure.kind, 0, 0, failure.what(), ""};
  }
}

void measure(const Measured& m) {
  const Cell cell("lstm");
  const cuda::Device device = Machine::device();
  for (const bool backward : {false, true})
    for (const auto& [family, name] : {std::pair{cuda::Family::kCluster, "cluster"}, {cuda::Family::kGrid, "grid"}}) {
      const Case c{{"", "", Shape::kGrid, "lstm", 1, 1, 1, 1}, backward, cuda::Precision::kBFloat16};
      const cuda::Plan plan = cuda::make_plan(family, kernel(c, cell), {m.H, m.rows, 1, m.steps}, device);
      std::printf("{\"measured\": \"%s\", \"pass\": \"%s\", \"family\": \"%s\"", m.name().c_str(),
                  backward ? "backward" : "forward", name);
      if (!plan.found) {
        std::printf(", \"reason\": \"%s\"}\n", plan.reason.c_str());
        continue;
      }
      Problem problem(cell, {m.steps, m.rows, 1, m.H, 1, 0}, false, {Clip::kNone, 0}, c.precision);
      for (const Field f : {kY, kC, kSaved}) problem.layers[0][f].assign(size_t(problem.size(0, f)), 0.5);
      const auto [step, before] = Attempt<BFloat16>(c, problem).microseconds(plan);
      std::printf(", \"layout\": \"%s\", \"cycles\": %.0f, \"us_per_step\": %.3f, \"us_before\": %.1f}\n",
                  text(plan).c_str(), plan.cycles, step, before);
      std::fflush(stdout);
    }
}

}  // namespace rnn::probe
