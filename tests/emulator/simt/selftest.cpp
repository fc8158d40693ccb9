// selftest run MODE SEEDS SKIP CASE...   a line per case and seed: name, tab, result; "watched" for races is a mode
// selftest sites CASE                    a line per site: file:line, tab, primitive
// selftest list GROUP                    a line per case: name, tab, expected result
// selftest read|write TYPE               conversions of stdin to stdout
// selftest sigmoid|tanh ULPS ULPS        of stdin to stdout, by instructions that are off by so many units in the last
//                                        place: exp2, and reciprocal
#include "simt/selftest.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>

#include "simt/races.h"
#include "simt/storage.h"

namespace rnn::simt::selftest {
namespace {

const std::map<std::string, std::vector<Case> (*)()> kGroups{
    {"loops", loops},     {"primitives", primitives}, {"mistakes", mistakes}, {"mistakes_of_order", mistakes_of_order},
    {"crashes", crashes}, {"schedules", schedules}};
const std::map<std::string, Mode> kModes{{"random", Mode::random},
                                         {"forward", Mode::forward},
                                         {"reverse", Mode::reverse},
                                         {"watched", Mode::forward},
                                         {"shuffled", Mode::forward}};

Case find(const std::string& name) {
  for (const auto& [group, cases] : kGroups)
    for (const Case& c : cases())
      if (c.name == name) return c;
  throw std::invalid_argument("no case " + name);
}

// Threads whose stacks have not been unwound.
int alive = 0;
struct Alive {
  Alive() { add(1); }
  ~Alive() { add(-1); }

 private:
  static void add(int n) {
    const Unwatched unwatched;
    alive += n;
  }
};

std::string outcome(const Case& c, const Schedule& schedule) {
  const Attempt attempt = c.prepare();
  std::string text;
  try {
    const Report report = launch(c.grid, schedule, [&] {
      const Alive here;
      attempt.kernel();
    });
    text = attempt.result() + " after " + std::to_string(report.switches) + " switches";
    if (report.bank_conflicts) text += " and " + std::to_string(report.bank_conflicts) + " bank conflicts";
  } catch (const Error& e) {
    text = std::string("Error ") + e.what();
  } catch (const std::exception& e) {
    text = std::string("exception ") + e.what();
  }
  if (std::exchange(alive, 0)) text = "wrong: threads were not unwound; " + text;
  std::ranges::replace(text, '\n', ';');
  return text;
}

// A mode, and after a slash how many clusters are there at once; a site to skip, or with a ~ in front one to weaken.
Schedule schedule(const std::string& how, int seed, const std::string& site) {
  const std::string mode = how.substr(0, how.find('/'));
  Schedule s{kModes.at(mode), uint64_t(seed)};
  s.races = mode == "watched";
  s.shuffled = mode == "shuffled";
  if (mode.size() < how.size()) s.resident = std::stoi(how.substr(mode.size() + 1));
  if (site.starts_with('~'))
    s.weak_site = site.substr(1);
  else
    s.skip_site = site;
  return s;
}

template <class From, class To>
void convert(To (*f)(From)) {
  From x;
  while (std::fread(&x, sizeof(x), 1, stdin)) {
    const To y = f(x);
    std::fwrite(&y, sizeof(y), 1, stdout);
  }
}

// Of exact results, or their neighbours.
int of_exp2, of_reciprocal;
struct Off {
  static float exp2(float x) { return moved(cuda::Approximate::exp2(x), of_exp2); }
  static float reciprocal(float x) { return moved(cuda::Approximate::reciprocal(x), of_reciprocal); }

 private:
  static float moved(float x, int ulps) {
    if (x == 0 || !std::isfinite(x)) return x;
    for (; ulps > 0; --ulps) x = std::nextafter(x, std::numeric_limits<float>::infinity());
    for (; ulps < 0; ++ulps) x = std::nextafter(x, 0.0f);
    return x;
  }
};

int main(const std::vector<std::string>& args) {
  const std::string& what = args.at(0);
  if (what == "run") {
    for (size_t i = 4; i < args.size(); ++i)
      for (int seed = 0; seed < std::stoi(args[2]); ++seed)
        std::cout << args[i] << '\t' << outcome(find(args[i]), schedule(args[1], seed, args[3])) << '\n';
  } else if (what == "sites") {
    const Case c = find(args.at(1));
    for (const VisitedSite& site : launch(c.grid, {}, c.prepare().kernel).sites)
      std::cout << site.place << '\t' << site.primitive << '\n';
  } else if (what == "list") {
    for (const Case& c : kGroups.at(args.at(1))()) std::cout << c.name << '\t' << c.expected << '\n';
  } else if (what == "read") {
    args.at(1) == "bfloat16" ? convert(cuda::Storage<BFloat16>::read) : convert(cuda::Storage<Float16>::read);
  } else if (what == "write") {
    if (args.at(1) == "tf32") return convert(cuda::round_to_tf32), 0;
    args.at(1) == "bfloat16" ? convert(cuda::Storage<BFloat16>::write) : convert(cuda::Storage<Float16>::write);
  } else if (what == "sigmoid" || what == "tanh") {
    of_exp2 = std::stoi(args.at(1));
    of_reciprocal = std::stoi(args.at(2));
    what == "sigmoid" ? convert(cuda::fast_sigmoid<Off>) : convert(cuda::fast_tanh<Off>);
  } else {
    throw std::invalid_argument("what is " + what);
  }
  return 0;
}

}  // namespace
}  // namespace rnn::simt::selftest

int main(int argc, char** argv) { return rnn::simt::selftest::main({argv + 1, argv + argc}); }
