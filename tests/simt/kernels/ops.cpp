// The sequence ops on persistent kernels, run by the emulator. They are registered for CPU tensors in a library of
// their own, with an op that says how the next calls are laid out and scheduled, and one that tells where they have
// been.
#include <set>

#include "cuda/persistent.h"
#include "simt/kernels/launch.h"

namespace rnn::cuda {
namespace {

struct Settings {
  bool cluster = true;
  int64_t batch = 1, units = 8, tiles = 1, launches = 1;
  bool tf32 = false;
  simt::Schedule schedule;
};
Settings settings;
std::set<std::pair<std::string, std::string>> visited;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan chosen(Kernel kernel, const Problem& problem) {
  kernel.cluster = settings.cluster;
  kernel.batch = int(settings.batch);
  Plan plan{true, "", kernel, {}, int(settings.launches), 0};
  const int units = int(settings.units);
  plan.layout = lay_out(kernel, int(divide_up(problem.H, units)), units, int(settings.tiles));
  const int64_t groups = divide_up(problem.rows, settings.tiles * plan.layout.slices.rows);
  plan.layout.groups = int(divide_up(groups, settings.launches));
  return plan;
}

struct Runner {
  int cell;

  template <class IO>
  void forward(const Forward<IO>& call, const Plan& plan, char* global, int64_t first_row) const {
    note(kernels<IO>().forward(cell, call, plan, {global, first_row, settings.schedule}));
  }
  template <class IO>
  void backward(const Backward<IO>& call, double* all_dh, const Plan& plan, char* global, int64_t first_row) const {
    note(kernels<IO>().backward(cell, call, all_dh, plan, {global, first_row, settings.schedule}));
  }

 private:
  template <class IO>
  static const simt::Kernels<IO>& kernels() {
    TORCH_CHECK(simt::Kernels<IO>::compiled, "this library was compiled without kernels of the dtype");
    return *simt::Kernels<IO>::compiled;
  }
  static void note(const simt::Report& report) {
    for (const simt::VisitedSite& site : report.sites) visited.insert({site.place, site.primitive});
  }
};

template <class Arguments>
auto run(Arguments& a) {
  const Sizes n = check(a);
  const char* reason = refusal(a);
  TORCH_CHECK(!reason, reason);
  return run_persistent(a, n, chosen(kernel_of(a, settings.tf32), problem_of(a, n)), Runner{a.cell.number});
}

ForwardResults forward(ForwardArguments& a) { return run(a); }
BackwardResults backward(BackwardArguments& a) { return run(a); }

void configure(bool cluster, int64_t batch, int64_t units, int64_t tiles, int64_t launches, bool tf32,
               c10::string_view mode, int64_t seed, c10::string_view skip) {
  settings = {cluster, batch, units, tiles, launches, tf32, {}};
  settings.schedule.mode = mode == "forward"   ? simt::Mode::forward
                           : mode == "reverse" ? simt::Mode::reverse
                                               : simt::Mode::random;
  settings.schedule.seed = uint64_t(seed);
  settings.schedule.skip_site = std::string(skip);
  visited.clear();
}

std::vector<std::string> sites() {
  std::vector<std::string> all;
  for (const auto& [place, primitive] : visited) all.push_back(place + " " + primitive);
  return all;
}

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY(rnnkernels_simt, library) {
  rnn::define_sequence_ops(library);
  library.def("configure", rnn::cuda::configure);
  library.def("sites", rnn::cuda::sites);
}

TORCH_LIBRARY_IMPL(rnnkernels_simt, CPU, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}
