// The Python module rnnkernels._C: what there is beside the ops.
#include <pybind11/functional.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <functional>

#include "common/cell_list.h"
#include "cpu/cell_libraries.h"
#include "cpu/packs.h"
#include "cuda/cell_libraries.h"
#include "cuda/forced.h"
#include "cuda/here.h"
#include "cuda/probe.h"
#include "cuda/vetting.h"
#include "ops/check.h"
#include "ops/float32.h"
#include "ops/tables.h"
#include "python/by_reference.h"
#include "python/cell_step.h"
#include "python/chunks.h"
#include "python/direct.h"
#include "python/layers_call.h"

namespace py = pybind11;

namespace {

using rnn::cuda::Kernels;
using rnn::cuda::Precision;

constexpr std::array kPrecisionNames{"float64", "float32", "tf32", "bfloat16", "float16"};  // in the order of Precision

// What has this name among those of an enumeration, in its order.
template <class Value, size_t N>
Value named(const std::array<const char*, N>& names, const std::string& name, const char* argument) {
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), argument, ": expected one of ", at::ArrayRef<const char*>(names), ", got '",
                    name, "'");
  return Value(found - names.begin());
}
Precision precision_named(const std::string& name) {
  const auto found = std::find(kPrecisionNames.begin(), kPrecisionNames.end(), name);
  TORCH_CHECK_VALUE(found != kPrecisionNames.end(), "precision: expected a floating dtype or tf32, got '", name, "'");
  return Precision(found - kPrecisionNames.begin());
}
// What belongs to a backend that has cells of users as libraries.
template <class T>
T of_backend(const std::string& backend, T cpu, T cuda) {
  TORCH_CHECK_VALUE(backend == "cpu" || backend == "cuda", "backend: expected cpu or cuda, got '", backend, "'");
  return backend == "cpu" ? cpu : cuda;
}
const char* family_of(const rnn::cuda::Plan& plan) {
  return !plan.found ? "stepwise" : (plan.kernel.cluster ? "cluster" : "grid");
}

}  // namespace

// device: compute capability, multiprocessors, bytes of shared memory of a block, blocks of a cluster. index: of the
// device whose kernels are to be vetted first; -1: as the sizes alone have it.
static py::dict cuda_plan(const std::string& cell, bool backward, const std::string& precision, bool projected,
                          bool norm, bool recorded, int64_t H, int64_t T, int64_t B, int64_t window, int D, int layers,
                          bool heads, bool dropped, const std::array<int, 4>& device, int index, bool here,
                          const std::function<std::string(const std::string&, int)>& refused) {
  const rnn::CellInfo& info = rnn::find_cell(cell);
  const auto [major, multiprocessors, shared_bytes, most_blocks] = device;
  const rnn::cuda::Request request{
      info.G, info.A, info.S, backward, precision_named(precision), projected, norm,    recorded,   H, T,
      B,      window, D,      layers,   !info.built_in(),           heads,     dropped, info.normed};
  rnn::cuda::Check check;
  if (refused)
    check = [&](const rnn::cuda::Plan& plan, int) { return refused(family_of(plan), plan.layout.message.blocks); };
  TORCH_CHECK_VALUE(!here || !refused, "here: expected False where `refused` answers in place of the device");
  if (here) {
#if defined(RNNKERNELS_CUDA)
    check = rnn::cuda::check_here(info.number, request);
#else
    TORCH_CHECK(false, "here: there is no device to ask, since this build has no CUDA kernels");
#endif
  }
  const rnn::cuda::Stack stack = rnn::cuda::vetted.plan(
      request.precision, {major, multiprocessors, shared_bytes, most_blocks}, index,
      [&](const rnn::cuda::Device& limits) { return rnn::cuda::plan_call(request, limits, check); });
  const rnn::cuda::Plan& plan = stack.plan;
  const rnn::cuda::Layout& l = plan.layout;
  py::dict found;
  found["reason"] = plan.reason;
  found["passed_over"] = plan.passed_over;
  found["family"] = family_of(plan);
  found["kernels"] = rnn::cuda::kKernelsNames[size_t(rnn::cuda::kernels_of(stack))];
  found["blocks"] = l.message.blocks;
  found["units"] = l.units;
  found["tiles"] = l.tiles;
  found["rows"] = l.rows;
  found["pitch"] = l.message.pitch;
  found["groups"] = l.groups;
  found["launches"] = plan.launches;
  found["stages"] = stack.stages;
  found["shared_bytes"] = l.shared_bytes;
  found["cycles"] = plan.cycles;
  found["all_cycles"] = stack.cycles;
  return found;
}

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // has its name
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of rnnkernels: registers torch.ops.rnnkernels.*";

  module.def(
      "build_info",
      [] {
        py::dict info;
        const rnn::cpu::Kernels* kernels = rnn::cpu::kernels();
        info["cpu_capability"] = kernels ? kernels->name : "none";
        info["cpu_capabilities"] = rnn::cpu::kernels_built();
        info["compiler"] = kCompiler;
        info["torch"] = TORCH_VERSION;
        info["headers"] = rnn::cpu::kHeadersDigest;
        info["cuda_headers"] = rnn::cuda::kHeadersDigest;
#if defined(RNNKERNELS_CUDA)
        info["cuda_archs"] = RNNKERNELS_CUDA_ARCHS;
#else
        info["cuda_archs"] = py::none();
#endif
        return info;
      },
      "How this module was built, and the instruction set that its CPU kernels use here.");

  module.def(
      "register_cell",
      [](const std::string& name, const std::string& gates, const std::string& params, int G, int S, int K, int A,
         int P, int E, bool recurrent,
         bool reads_h) { rnn::register_cell(name, gates, params, {G, S, K, A, P, E, recurrent}, reads_h); },
      py::arg("name"), py::arg("gates"), py::arg("params"), py::arg("G"), py::arg("S"), py::arg("K"), py::arg("A"),
      py::arg("P"), py::arg("E"), py::arg("recurrent"), py::arg("reads_h"),
      "Makes a cell that a user wrote known to the ops; its name says what it computes.");
  module.def(
      "load_cell",
      [](const std::string& name, const std::string& path, const std::string& backend) {
        const auto load = of_backend(backend, &rnn::cpu::load_cell_library, &rnn::cuda::load_cell_library);
        return load(rnn::find_cell(name).number, path.c_str());
      },
      py::arg("name"), py::arg("path"), py::arg("backend"),
      "Loads the kernels of such a cell for a backend, cpu or cuda; returns the reason where it cannot, or ''.");

  module.def(
      "set_cell_compiler",
      [](py::function compiler, const std::string& backend) {
        // Never destroyed: a call may come while Python ends.
        auto* const kept = new py::function(std::move(compiler));
        const rnn::CellCompiler asks = [kept](const std::string& name, const std::string& type) {
          const py::gil_scoped_acquire gil;
          return (*kept)(name, type).cast<std::string>();
        };
        using Set = void (*)(const rnn::CellCompiler&);
        const Set cpu = [](const rnn::CellCompiler& c) { rnn::cpu::loaded_cells().set_compiler(c); };
        const Set cuda = [](const rnn::CellCompiler& c) { rnn::cuda::loaded_cells().set_compiler(c); };
        of_backend(backend, cpu, cuda)(asks);
      },
      py::arg("compiler"), py::arg("backend"),
      "compiler(name, type) has the kernels of a cell for a backend and a storage type loaded; it returns the reason "
      "where it cannot.");

  module.def(
      "set_cell_finder",
      [](py::function finder) {
        auto* const kept = new py::function(std::move(finder));  // as that of the compiler
        rnn::set_cell_finder([kept](const std::string& name) {
          const py::gil_scoped_acquire gil;
          (*kept)(name);
        });
      },
      py::arg("finder"), "finder(name) may register a cell that a call names and nobody has registered yet.");

  module.def("set_batch_invariant", &rnn::set_batch_invariant, py::arg("on"),
             "Whether results of a row may not depend on the batch that it is in, for the whole process.");
  module.def("batch_invariant", &rnn::batch_invariant, "What set_batch_invariant has set.");

  module.def(
      "set_cuda_family",
      [](const std::string& name) {
        TORCH_CHECK_VALUE(rnn::cuda::set_family(name), "name: expected auto, stepwise, cluster or grid, got '", name,
                          "'");
      },
      py::arg("name"),
      "Which kernels run layers on a GPU, for tests and benchmarks: all that the sizes allow (auto), or one family; "
      "what it cannot run goes step by step.");

  module.def(
      "set_cuda_stacks",
      [](const std::string& name) {
        TORCH_CHECK_VALUE(rnn::cuda::set_stacks(name), "name: expected auto, in turn or together, got '", name, "'");
      },
      py::arg("name"),
      "How the layers of a stack run on a GPU, for tests and benchmarks: as is estimated to be fastest (auto), layer "
      "by "
      "layer, or as many at a time as fit on the device.");

  module.def(
      "force_cuda_layout",
      [](int units, int tiles, int batch) {
        TORCH_CHECK_VALUE(units >= 0 && units <= rnn::cuda::kMostUnits && units % 8 == 0,
                          "units: expected a multiple of 8 up to ", rnn::cuda::kMostUnits, ", or 0, got ", units);
        TORCH_CHECK_VALUE(tiles >= 0 && tiles < 1 << 15, "tiles: expected a number of tiles, or 0, got ", tiles);
        TORCH_CHECK_VALUE(batch >= 0 && batch <= 2, "batch: expected 1 or 2, or 0, got ", batch);
        rnn::cuda::force_layout({int16_t(units), int16_t(tiles), int16_t(batch)});
      },
      py::arg("units"), py::arg("tiles"), py::arg("batch"),
      "How layers are laid out over a GPU, for tests: units of a block, tiles of a group, eights of rows in a tile; 0 "
      "leaves it to the plan. What does not fit so runs step by step.");

  module.def(
      "force_cuda_kernels",
      [](const std::string& name) {
        using rnn::cuda::Family, rnn::cuda::Stacks, rnn::cuda::set_thread_choice;
        if (name.empty()) return set_thread_choice({Family::kAuto, Stacks::kAuto});
        const Kernels kernels = named<Kernels>(rnn::cuda::kKernelsNames, name, "name");
        const bool together = kernels == Kernels::kGridWavefront || kernels == Kernels::kClusterWavefront;
        const bool cluster = kernels == Kernels::kCluster || kernels == Kernels::kClusterWavefront;
        const Family family = kernels == Kernels::kStepwise ? Family::kStepwise
                              : cluster                     ? Family::kCluster
                                                            : Family::kGrid;
        set_thread_choice({family, together ? Stacks::kTogether : Stacks::kInTurn});
      },
      py::arg("name"),
      "Runs the calls of this thread on these kernels, unvetted, for as far as their sizes allow; '': as any other.");

  module.def(
      "settle_cuda_kernels",
      [](int device, const std::string& name, const std::string& precision, bool right) {
        rnn::cuda::vetted.settle(device, named<Kernels>(rnn::cuda::kKernelsNames, name, "name"),
                                 precision_named(precision), right);
      },
      py::arg("device"), py::arg("name"), py::arg("precision"), py::arg("right"),
      "These kernels were found right or wrong in this precision on the device of this number.");
  module.def(
      "forget_cuda_kernels",
      [] {
        rnn::cuda::vetted.forget();
        for (int device = 0; device < rnn::cuda::kMostDevices; ++device) rnn::open_short_ways(device, false);
      },
      "What was found of all kernels; the short ways are closed.");
  module.def(
      "set_cuda_inspector",
      [](py::function inspector) {
        // Never destroyed: a call may come while Python ends.
        auto* const kept = new py::function(std::move(inspector));
        rnn::cuda::vetted.set_inspector([kept](int device, Kernels kernels, Precision precision) {
          const py::gil_scoped_acquire gil;
          return (*kept)(device, rnn::cuda::kKernelsNames[size_t(kernels)], kPrecisionNames[size_t(precision)])
              .cast<bool>();
        });
      },
      py::arg("inspector"),
      "inspector(device, name, precision) is asked when kernels are to run that nothing is known of: it settles what "
      "it "
      "can and says whether it did.");
  module.def("bring_reference", &rnn::bring_reference, py::arg("forward_tangents"), py::arg("gradient_tangents"),
             py::arg("second_order"),
             "What the autograd formula asks the reference for: tangents of what the ops return, and derivatives of "
             "gradients. See rnnkernels/_ops/by_reference.py.");
  module.def("open_short_ways", &rnn::open_short_ways, py::arg("device"), py::arg("open"),
             "Whether layers and cells on the CUDA device of this number may go past the choice of a backend.");
  module.def("short_ways_open", &rnn::short_ways_open, py::arg("device"), "What open_short_ways has set.");

  module.def("cuda_plan", &cuda_plan, py::kw_only(), py::arg("cell"), py::arg("backward"), py::arg("precision"),
             py::arg("projected"), py::arg("norm"), py::arg("recorded"), py::arg("H"), py::arg("T"), py::arg("B"),
             py::arg("window"), py::arg("D"), py::arg("layers"), py::arg("heads") = false, py::arg("dropped") = false,
             py::arg("device"), py::arg("index") = -1, py::arg("here") = false, py::arg("refused") = py::none(),
             "How the layers of a call would run on a GPU, or why no persistent kernel would run them.\n\nindex: of "
             "the device whose kernels are to be vetted first. here: ask the current device whether it can launch what "
             "is chosen. refused(family, blocks): in its place, why not, or an empty string.");

  module.def(
      "take_cuda_fault",
      []([[maybe_unused]] int device_index) -> std::string {
#if defined(RNNKERNELS_CUDA)
        return rnn::cuda::take_fault(device_index);
#else
        return "";
#endif
      },
      py::arg("device_index"),
      "What a kernel on this CUDA device has recorded when it waited in vain and gave up, in words: the op, the block, "
      "the tile and the round, and what to do. Empty where there is no such record, which this call takes away. It "
      "does not wait for the device.");

  module.def(
      "tf32_allowed", [](at::ScalarType dtype) { return rnn::tf32_allowed(dtype); }, py::arg("dtype"),
      "Whether kernels may multiply numbers of this dtype as TF32, by torch's settings as they are now.");

#if defined(RNNKERNELS_CUDA)
  module.def("cuda_probe", &rnn::cuda::probe, "Why kernels of this build cannot run on the current device, or ''.");

  module.def(
      "cuda_device",
      [] {
        rnn::cuda::Device device{};
        const char* error = rnn::cuda::query(device);
        TORCH_CHECK(!error, "cuda_device: ", error);
        return std::array{device.major, device.multiprocessors, device.shared_bytes, device.most_blocks};
      },
      "The limits of the current CUDA device that a plan depends on.");
#endif

  using rnn::cpu::pack_table;
  module.def(
      "set_runs_again", [](bool on) { return std::exchange(rnn::cpu::runs_again(), on); }, py::arg("on"),
      "Whether calls of this thread run the same weights again and again; returns what it was.");
  module.def("packed_bytes", [] { return pack_table().bytes(); }, "Memory of the packed weights that are kept.");
  module.def(
      "packed_of",
      [](const std::vector<at::Tensor>& weights) {
        std::vector<std::tuple<int64_t, std::optional<at::ScalarType>, bool>> all;
        for (const auto& [bytes, type, by_version] : pack_table().kept_of(rnn::cpu::OfWeights{weights}))
          all.emplace_back(bytes, rnn::cpu::dtype_of(type), by_version);
        return all;
      },
      py::arg("weights"),
      "The same, and what was chosen for them, a type and whether versions are compared in place of values, of each "
      "layer all of whose weights are among these.");
  module.def(
      "choose_packed",
      [](const std::vector<at::Tensor>& weights, std::optional<at::ScalarType> dtype, bool by_version) {
        return pack_table().choose(rnn::cpu::OfWeights{weights}, rnn::cpu::packed_type(dtype), by_version);
      },
      py::arg("weights"), py::arg("dtype"), py::arg("by_version"),
      "What each of these layers that a call has seen is packed in from now on, and whether versions of weights are "
      "compared in place of their values; returns how many there are.");
  module.def("packed_limit", [] { return pack_table().limit(); }, "How much memory packed weights may take.");
  module.def(
      "set_packed_limit",
      [](int64_t bytes) {
        TORCH_CHECK_VALUE(bytes >= 0, "bytes: expected 0 or more, got ", bytes);
        pack_table().set_limit(bytes);
      },
      py::arg("bytes"), "Sets how much memory packed weights may take.");
  module.def("drop_packed", [] { pack_table().drop(); }, "Frees the packed weights that are kept.");

  module.def(
      "threads_at_work", [] { return rnn::cpu::process.working(); },
      "Threads that calls of the CPU kernels in this process hold now.");

  module.def(
      "cell_table",
      [] {
        py::list table;
        rnn::for_each_cell([&](auto cell) {
          py::dict row;
          row["name"] = cell.kName;
          row["gates"] = cell.kGates;
          row["G"] = cell.G;
          row["S"] = cell.S;
          row["K"] = cell.K;
          row["A"] = cell.A;
          row["reads_h"] = cell.kReadsH;
          table.append(row);
        });
        return table;
      },
      "The cells as C++ knows them: name, gates and the sizes of the cell contract.");

  static std::array<PyMethodDef, 7> fast{{
      {"cell_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_cell_step)), METH_FASTCALL,
       "cell_step(cell, parameters, input_size, hidden_size, input, hx)\n\nThe next state of a cell with these "
       "parameters (a module's dictionary of them, or a tuple of four), or None where anything is unusual."},
      {"layers_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_layers_call)), METH_FASTCALL,
       "layers_call(cell, weights, input_size, hidden_size, proj_size, num_layers, directions, merge_mode, "
       "batch_first, input, hx, lengths, reset)\n\nWhat layers with this flat list of weights return, or None where "
       "anything is unusual."},
      {"same_weights", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_same_weights)), METH_FASTCALL,
       "same_weights(parameters, names, flat_weights, references)\n\nWhether a module's flat list of weights holds its "
       "parameters of these names, and weak references are to them: none was replaced since the list was made."},
      {"cast", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_cast)), METH_FASTCALL,
       "cast(tensor, dtype)\n\nA tensor as autocast casts it to this type, parameters once per region, or None where "
       "anything is unusual."},
      {"chunk_lengths", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_chunk_lengths)), METH_FASTCALL,
       "chunk_lengths(chunks, input_size, weight)\n\nT of each of these chunks [T, input_size], or None where a layer "
       "with this weight takes one of them not, or not as it is."},
      {"join_chunks", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_join_chunks)), METH_FASTCALL,
       "join_chunks(chunks)\n\nData [N, I] and batch sizes [T] of chunks, longest first, step after step; None where "
       "anything is unusual."},
      {"part_steps", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_part_steps)), METH_FASTCALL,
       "part_steps(steps, lengths)\n\nThe way back: a tensor [T, R] for each chunk, or None where anything is "
       "unusual."},
  }};
  for (PyMethodDef& method : fast)
    module.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));

  module.def("threads_granted", &rnn::cpu::threads_granted, py::arg("wanted"), py::arg("at_work"), py::arg("cores"),
             "How many threads a call of the CPU kernels gets, for tests.");
  module.def(
      "contention_after",
      [](const std::array<int64_t, 3>& state, int64_t took, int64_t waited, int threads, int64_t now) {
        const auto [gained, pause, until] = state;
        const auto next = rnn::cpu::Contention{gained, pause, until}.after({took, waited, threads}, now);
        return py::make_tuple(next.gained, next.pause, next.until);
      },
      py::arg("state"), py::arg("took"), py::arg("waited"), py::arg("threads"), py::arg("now"),
      "What a process knows after a call of the CPU kernels, for tests: see csrc/cpu/contention.h.");
}
