// The schemas of all ops, and the Python module rnnkernels._C that carries them.
#include "common/ops.h"

#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "autograd/cell_step.h"
#include "autograd/node.h"
#include "common/cells.h"
#include "cpu/kernels.h"
#if defined(RNNKERNELS_CUDA)
#include "cuda/plan.h"
#endif

TORCH_LIBRARY(rnnkernels, library) {
  rnn::define_sequence_ops(library);
  rnn::define_input_gradient_op(library);
  rnn::define_differentiable_op(library);
}

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of rnnkernels: registers torch.ops.rnnkernels.*";

  module.def(
      "build_info",
      [] {
        py::dict info;
        const rnn::cpu::Kernels* kernels = rnn::cpu::kernels();
        info["cpu_capability"] = kernels ? kernels->name : "none";
        info["compiler"] = __VERSION__;
#if defined(RNNKERNELS_CUDA)
        info["cuda_archs"] = RNNKERNELS_CUDA_ARCHS;
#else
        info["cuda_archs"] = py::none();
#endif
        return info;
      },
      "How this module was built, and the instruction set that its CPU kernels use here.");

  module.def("set_batch_invariant", &rnn::set_batch_invariant, py::arg("on"),
             "Whether results of a row may not depend on the batch that it is in, for the whole process.");
  module.def("batch_invariant", &rnn::batch_invariant, "What set_batch_invariant has set.");

#if defined(RNNKERNELS_CUDA)
  module.def(
      "set_cuda_family",
      [](const std::string& name) {
        TORCH_CHECK_VALUE(rnn::cuda::set_family(name), "name: expected auto, stepwise, cluster or grid, got '", name,
                          "'");
      },
      py::arg("name"),
      "Which kernels run layers on a GPU, for tests and benchmarks: all that the sizes allow (auto), or one family; "
      "what it cannot run goes step by step.");
#endif

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
          table.append(row);
        });
        return table;
      },
      "The cells as C++ knows them: name, gates and the sizes of the cell contract.");

  module.def("set_flow_sink", &rnn::set_flow_sink, py::arg("sink").none(true),
             "Has `sink` called with |dL/dh_t| [T, B, D] by every backward of this thread's next sequence_forward that "
             "makes a graph. None takes it back.");

  static PyMethodDef cell_step{"cell_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&rnn::py_cell_step)),
                               METH_FASTCALL,
                               "cell_step(cell, parameters, input_size, hidden_size, input, hx)\n\nThe next state of a "
                               "cell with these parameters (a "
                               "module's dictionary of them), or None where anything is unusual."};
  module.add_object("cell_step", py::reinterpret_steal<py::object>(PyCFunction_New(&cell_step, nullptr)));
}
