// The schemas of all ops, and the Python module rnnkernels._C that carries them.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "common/cells.h"
#include "cpu/kernels.h"

// Shapes: common/layout.h. Lists hold one tensor per direction; biases and w_hr are empty lists where there are none.
// `save` keeps what backward needs, `all_c` keeps all c; an output that is not kept is an empty tensor.
TORCH_LIBRARY(rnnkernels, library) {
  library.def(
      "sequence_forward(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, "
      "Tensor[] w_hr, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? reset, bool save, bool all_c, int layer) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor h_raw, Tensor saved)");
  library.def(
      "sequence_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor[] w_hh, Tensor[] w_hr, "
      "Tensor h0, Tensor? c0, Tensor y, Tensor c, Tensor saved, Tensor? lengths, Tensor? reset) "
      "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dproj)");
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
}
