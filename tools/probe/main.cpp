// Runs the persistent kernels and those of the steps without torch, one case after the other, each in a process of its
// own: tools/probing.py does that, under a time limit.
//
//   probe list                   names of cases in order, what each needs, and whether it is large
//   probe run NAME               one line of JSON; exit status 0 where it passed or is absent
//   probe measured               names of what can be measured
//   probe measure NAME [STEPS]   microseconds per step, a line of JSON for each pass and family
//   probe device                 the limits by which kernels are laid out
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "attempt.h"
#include "machine.h"

using namespace rnn::probe;

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + '"';
}

int list() {
  for (const Case& c : all_cases())
    std::printf("%s\t%s\t%d\n", c.name().c_str(), c.needs().c_str(), int(c.shape.large));
  return 0;
}

int run(const std::string& name) {
  for (const Case& c : all_cases()) {
    if (c.name() != name) continue;
    const auto start = std::chrono::steady_clock::now();
    const Outcome found = attempt(c);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf(
        "{\"case\": %s, \"outcome\": %s, \"error\": %.3g, \"tolerance\": %g, \"detail\": %s, \"layout\": %s, "
        "\"seconds\": %.3f}\n",
        quoted(name).c_str(), quoted(found.outcome).c_str(), found.error, found.tolerance, quoted(found.detail).c_str(),
        quoted(found.layout).c_str(), seconds.count());
    return found.outcome == "passed" || found.outcome == "absent" ? 0 : 1;
  }
  std::fprintf(stderr, "probe: no case %s; `probe list` has their names\n", name.c_str());
  return 2;
}

int measured(const std::string& name, int steps = 0) {
  for (Measured m : all_measured()) {
    if (name.empty()) std::puts(m.name().c_str());
    if (steps > 0) m.steps = steps;
    if (m.name() == name) return measure(m), 0;
  }
  if (!name.empty()) std::fprintf(stderr, "probe: nothing called %s; `probe measured` has the names\n", name.c_str());
  return name.empty() ? 0 : 2;
}

int device() {
  const rnn::cuda::Device d = Machine::device();
  std::printf("{\"major\": %d, \"multiprocessors\": %d, \"shared_bytes\": %d, \"most_blocks\": %d}\n", d.major,
              d.multiprocessors, d.shared_bytes, d.most_blocks);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "", name = count > 2 ? words[2] : "";
  try {
    if (what == "list") return list();
    if (what == "run" && count == 3) return run(name);
    if (what == "measured") return measured("");
    if (what == "measure" && (count == 3 || count == 4)) return measured(name, count > 3 ? std::atoi(words[3]) : 0);
    if (what == "device") return device();
  } catch (const Failure& failure) {
    std::fprintf(stderr, "probe: %s\n", failure.what());
    return 1;
  }
  std::fputs("probe: expected list, run NAME, measured, measure NAME [STEPS] or device\n", stderr);
  return 2;
}
