// The sequence ops on persistent kernels, run by the emulator; step by step, too, where accesses are watched. They are
// registered for CPU tensors in a library of their own, with an op that says how the next calls are laid out and
// scheduled, and two that tell where they have been and how often.
#include <map>

#include "cuda/answers.h"
#include "cuda/persistent.h"
#include "simt/kernels/launch.h"
#include "simt/races.h"
#if defined(RNN_SIMT_WATCHES)
#include "simt/kernels/stepwise.h"
#endif

namespace rnn::cuda {
namespace {

struct Settings {
  bool cluster = true;
  int64_t batch = 1, units = 8, tiles = 1, launches = 1, stages = 1, rows = 0;
  bool tf32 = false;
  int device = 90;
  int64_t stepwise = 0;  // the most blocks of rows of a launch; 0: persistent kernels
  std::string twice;
  simt::Schedule schedule;
};
Settings settings;
int64_t conflicts = 0;                                            // of banks
std::map<std::pair<std::string, std::string>, uint64_t> visited;  // place and primitive: how often
int64_t accesses = 0;                                             // watched

void note(const simt::Report& report) {
  for (const simt::VisitedSite& site : report.sites) visited[{site.place, site.primitive}] += site.visits;
  accesses += int64_t(report.accesses);
  conflicts += int64_t(report.bank_conflicts);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan chosen(Kernel kernel, const Problem& problem, int stages = 1) {
  kernel.cluster = settings.cluster;
  kernel.batch = int(settings.batch);
  kernel.pipelined = stages > 1;
  Plan plan{true, "", kernel, {}, int(settings.launches), 0, 0, ""};
  const int units = int(settings.units);
  plan.layout = lay_out(kernel, int(divide_up(problem.H, units)), units, int(settings.tiles));
  if (settings.rows) plan.layout.rows = int(settings.rows);
  const int64_t groups = divide_up(problem.rows, settings.tiles * plan.layout.rows);
  plan.layout.groups = int(divide_up(groups, settings.launches));
  return plan;
}

struct Runner {
  int cell;

  template <class IO>
  void operator()(const ForwardStages<IO>& stages, const Plan& plan, const Part& part) const {
    note(kernels<IO>().forward(cell, stages, plan, part, settings.device, settings.schedule));
  }
  template <class IO>
  void operator()(const BackwardStages<IO>& stages, const Plan& plan, const Part& part) const {
    note(kernels<IO>().backward(cell, stages, plan, part, settings.device, settings.schedule));
  }

 private:
  template <class IO>
  static const simt::Kernels<IO>& kernels() {
    TORCH_CHECK(simt::Kernels<IO>::compiled, "this library was compiled without kernels of the dtype");
    return *simt::Kernels<IO>::compiled;
  }
};

template <class Run>
void run_stepwise_layers(Run& all) {
#if defined(RNN_SIMT_WATCHES)
  const auto count = [](const std::string& kind, const simt::Report& report) {
    ++visited[{kind, "launch"}];
    note(report);
  };
  const simt::StepLauncher launcher{all.cell().number, settings.stepwise, settings.twice, settings.schedule, count};
  all.each([&](auto& layer) { run_stepwise(layer, launcher); });
#else
  TORCH_CHECK(false, "this library was compiled without the stepwise loops");
#endif
}

// As many layers at a time as the settings have stages.
template <class Run>
void run(Run& all) {
  if (settings.stepwise) return run_stepwise_layers(all);
  const Request a = request_of(all, settings.tf32);
  const char* reason = refusal(a);
  TORCH_CHECK(!reason, reason);
  const Runner runner{all.cell().number};
  const int stages = a.D == 1 && !a.recorded ? std::min(int(settings.stages), a.layers) : 1;
  const int64_t rows = sequence_of(all.call(), all.sizes(), a.backward ? a.window : 0).rows();
  const Plan plan =
      chosen(kernel_of(a.G, a.A, a.S, a.backward, a.precision, a.norm, a.dropped), {a.H, rows, a.D, 1}, stages);
  if (stages > 1) return run_stack(all, Stack{stages, plan, 0}, runner);
  all.each([&](auto& layer) { run_persistent(layer, plan, runner); });
}

void forward(ForwardRun& all) { run(all); }
void backward(BackwardRun& all) { run(all); }

void configure(bool cluster, int64_t batch, int64_t units, int64_t tiles, int64_t launches, int64_t stages,
               int64_t rows, bool tf32, c10::string_view mode, int64_t seed, c10::string_view skip, bool races,
               c10::string_view weak, int64_t device, int64_t resident, bool shuffled, int64_t stepwise,
               c10::string_view twice) {
  settings = {cluster, batch, units,       tiles,    launches,           stages,
              rows,    tf32,  int(device), stepwise, std::string(twice), {}};
  settings.schedule.mode = mode == "forward"   ? simt::Mode::forward
                           : mode == "reverse" ? simt::Mode::reverse
                                               : simt::Mode::random;
  settings.schedule.seed = uint64_t(seed);
  settings.schedule.skip_site = std::string(skip);
  settings.schedule.races = races;
  settings.schedule.weak_site = std::string(weak);
  settings.schedule.resident = int(resident);
  settings.schedule.shuffled = shuffled;
  settings.schedule.bounded = !races;  // who gives up leaves in no order
  visited.clear();
  accesses = conflicts = 0;
}

std::vector<std::string> sites() {
  std::vector<std::string> all;
  for (const auto& [site, visits] : visited) all.push_back(site.first + " " + site.second);
  return all;
}

int64_t visits(c10::string_view primitive) {
  int64_t all = 0;
  for (const auto& [site, visits] : visited)
    if (site.second == primitive) all += int64_t(visits);
  return all;
}

int64_t watched() { return accesses; }
int64_t bank_conflicts() { return conflicts; }

// Why a device that runs so many groups of blocks at once, or says something else, cannot launch a layout of a
// direction.
std::string refused(bool cluster, int64_t blocks, int64_t groups, int64_t stages, int64_t at_once,
                    const std::string& reason) {
  Answers known;
  int asked = 0;
  const auto ask = [&]() -> Answer { return ++asked, Answer{int(at_once), ""}; };
  const Answers::Question question{nullptr, 0, blocks, 0};
  known.find(question, ask);
  if (!reason.empty()) known.refuse(question, reason);
  Plan plan{true, "", kernel_of(1, 0, 1, false, Precision::kFloat32, false), {}, 1, 0, 0, ""};
  plan.kernel.cluster = cluster;
  plan.layout.message.blocks = int(blocks);
  plan.layout.groups = int(groups);
  plan.layout.stages = int(stages);
  std::string said = refusal(plan, 1, known.find(question, ask));
  TORCH_CHECK(asked == 1, "asked ", asked, " times");
  return said;
}

}  // namespace
}  // namespace rnn::cuda

#define RNN_SIMT_LIBRARY(macro, ...) macro(__VA_ARGS__)  // with the name as it is defined

RNN_SIMT_LIBRARY(TORCH_LIBRARY, RNN_SIMT_OPS, library) {
  rnn::define_sequence_ops(library);
  library.def("configure", rnn::cuda::configure);
  library.def("sites", rnn::cuda::sites);
  library.def("watched", rnn::cuda::watched);
  library.def("bank_conflicts", rnn::cuda::bank_conflicts);
  library.def("visits", rnn::cuda::visits);
  library.def("refused", rnn::cuda::refused);
}

RNN_SIMT_LIBRARY(TORCH_LIBRARY_IMPL, RNN_SIMT_OPS, CPU, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}
