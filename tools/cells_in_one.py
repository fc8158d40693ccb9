"""Written cells in one file of C++, for whoever compiles several at once: the check of what nvcc
makes of them (check_cuda.py --cells), and the tests of their steps on the CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rnnkernels.cells import DefinedCell, stated, zoned_out
from rnnkernels.functional._noise import known
from rnnkernels.nn import gated

#: The steps that have a text per cell.
STEPS = ("ForwardCell", "BackwardCell", "BackwardBound")
#: Those that the package brings, and zoneout.
BROUGHT: list[DefinedCell] = [
    gated.mgu,
    gated.cifg,
    gated.peephole_lstm,
    gated.ind_rnn,
    gated.slstm,
    known(zoned_out(stated("lstm"), (True, True))),
]


def _structs(cells: Sequence[DefinedCell]) -> list[str]:
    return [f"Written{i}" for i in range(len(cells))]


def header(cells: Sequence[DefinedCell]) -> str:
    """Their structs as rnnkernels.cell writes them, and rnn::WrittenCells, a list of them."""
    parts, names = ["#pragma once", '#include "common/cell_list.h"'], _structs(cells)
    for cell, name in zip(cells, names, strict=True):
        text = re.sub(r"#pragma once|#include .*", "", cell.cpp)
        parts.append(text.replace("struct UserCell", f"struct {name}"))
    parts.append(f"namespace rnn {{\nusing WrittenCells = CellList<{', '.join(names)}>;\n}}")
    return "\n".join(parts) + "\n"


def cuda_source(cells: Sequence[DefinedCell], types: Sequence[str]) -> str:
    """All kernels of these cells for some storage types, as nvcc compiles them one by one."""
    launches = [
        f"template const char* launch_units<{name}>(const {step}<{type}>&, Stream);"
        for name in _structs(cells)
        for step in STEPS
        for type in types
    ]
    return "\n".join(
        [
            header(cells).replace("#pragma once", ""),
            '#include "cuda/pointwise_launch.cuh"',
            "namespace rnn::cuda {\nnamespace {",
            *launches,
            "}\n}",
            "",
        ]
    )
