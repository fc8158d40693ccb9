"""What tools/check_triton.py makes of reports of compilers; none is run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rnnkernels.cells import CELLS

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'backward' for 'sm_90a'
ptxas info    : Function properties for backward
    48 bytes stack frame, 40 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""
AMD = """\
    .sgpr_count:     49
    .sgpr_spill_count: 3
    .symbol:         backward.kd
    .vgpr_count:     256
    .vgpr_spill_count: 17
"""
TTIR = """\
%1 = tt.atomic_rmw add, release, gpu, %0, %c1, %true : (!tt.ptr<i32>, i32, i1) -> i32 loc(#l1)
%2 = tt.atomic_rmw fadd, relaxed, gpu, %9, %v, %m : (tensor<16x!tt.ptr<f32>>, tensor<16xf32>, t
%3 = tt.atomic_cas acq_rel, gpu, %0, %c0, %c1 : (!tt.ptr<i64>, i64, i64) -> i64
%4 = tt.load %5 : !tt.ptr<i32>
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools/check_triton.py"
    spec = importlib.util.spec_from_file_location("check_triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["check_triton"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reports(tool: ModuleType) -> None:
    assert tool.parse_ptxas(PTXAS) == (255, 76)
    assert tool.parse_amd(AMD) == (256, 20)
    assert tool.parse_atomics(TTIR) == ("i32", "f32", "i64")


def test_a_report_of_nothing_is_an_error(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="no registers"):
        tool.parse_ptxas("ptxas info    : 0 bytes gmem")
    with pytest.raises(ValueError, match="no registers"):
        tool.parse_amd(".symbol: backward.kd")


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({}, ""),
        ({"kind": "grid", "atomics": ("i32",) * 3}, ""),
        ({"kind": "grid", "atomics": ("i32",) * 4}, "atomics"),
        ({"kind": "grid", "atomics": ("f32",)}, "atomics"),
        ({"kind": "step", "atomics": ("i32",)}, "atomics"),
        ({"spills": 4}, "spills: 4"),
        ({"shared": 65536}, ""),
        ({"shared": 65537}, "65537 bytes of shared memory"),
        ({"error": "no such thing"}, "does not compile: no such thing"),
    ],
    ids=str,
)
def test_faults(tool: ModuleType, found: dict[str, object], fault: str) -> None:
    variant = tool.Variant("lstm", "backward", "ieee", 64, 16, "all")
    faults = list(tool.Kernel(variant, "gfx942", **found).faults())
    assert len(faults) == bool(fault)
    assert all(fault in text for text in faults)


def test_selection_covers_each_target(tool: ModuleType) -> None:
    chosen, everything = set(tool.selected(False)), set(tool.selected(True))
    assert chosen < everything
    for target in tool.TARGETS:
        variants = [variant for variant, name in chosen if name == target]
        assert {(v.cell, v.which) for v in variants} == {(c, w) for c in CELLS for w in tool.PASSES}
        for which in tool.PASSES:
            assert {v.precision for v in variants if v.which == which} == set(tool.PRECISIONS)
        assert {(v.H, v.rows) for v in variants} == set(tool.SIZES)
        assert {v.options for v in variants} == set(tool.OPTIONS)


def test_table(tool: ModuleType) -> None:
    variant = tool.Variant("lstm", "forward", "ieee", 64, 16, "all")
    kernels = [
        tool.Kernel(variant, "sm_80", "grid", 4, 1000, 90, 0),
        tool.Kernel(variant, "sm_80", "grid", 4, 2000, 80, 8),
    ]
    _, row = tool.table(kernels)
    assert row == ["sm_80", "forward", "2", "90", "2000 (166912)", "1"]
