"""What tools/check_triton.py compiles, and makes of reports of compilers; none is run."""

from __future__ import annotations

import pytest

import check_triton
import triton_report
from rnnkernels.cells import CELLS, NORMED

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'backward' for 'sm_90a'
ptxas info    : Function properties for backward
    48 bytes stack frame, 40 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""
AMD = """\
    .private_segment_fixed_size: 64
    .sgpr_count:     49
    .sgpr_spill_count: 3
    .symbol:         backward.kd
    .vgpr_count:     256
    .vgpr_spill_count: 17
"""
PTX = "ld.global.cg.b16 %rs1; ld.global.cg.v4.b32 %r1; ld.global.b16 %rs2"
TTIR = """\
%1 = tt.atomic_rmw add, release, gpu, %0, %c1, %true : (!tt.ptr<i32>, i32, i1) -> i32 loc(#l1)
%2 = tt.atomic_rmw fadd, relaxed, gpu, %9, %v, %m : (tensor<16x!tt.ptr<f32>>, tensor<16xf32>, t
%3 = tt.atomic_cas acq_rel, gpu, %0, %c0, %c1 : (!tt.ptr<i64>, i64, i64) -> i64
%4 = tt.load %5 : !tt.ptr<i32>
"""


def test_reports() -> None:
    assert triton_report.parse_ptxas(PTXAS) == (255, 76)
    assert triton_report.parse_amd(AMD) == (256, 68)
    assert triton_report.parse_amd(AMD.replace("64", "72")) == (256, 72)
    assert triton_report.parse_atomics(TTIR) == ("i32", "f32", "i64")
    assert triton_report.parse_narrow(PTX) == 1


def test_a_report_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no registers"):
        triton_report.parse_ptxas("ptxas info    : 0 bytes gmem")
    with pytest.raises(ValueError, match="no registers"):
        triton_report.parse_amd(".symbol: backward.kd")


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({}, ""),
        ({"kind": "grid", "atomics": ("i32",) * 3}, ""),
        ({"kind": "grid", "atomics": ("i32",) * 4}, "atomics"),
        ({"kind": "grid", "atomics": ("f32",)}, "atomics"),
        ({"kind": "step", "atomics": ("i32",)}, "atomics"),
        ({"spills": 4}, "spills: 4"),
        ({"narrow": 8}, "reads what others sent by 2 bytes, in 8 loads"),
        ({"shared": 65536}, ""),
        ({"shared": 65537}, "65537 bytes of shared memory"),
        ({"error": "no such thing"}, "does not compile: no such thing"),
    ],
    ids=str,
)
def test_faults(found: dict[str, object], fault: str) -> None:
    variant = triton_report.Variant("lstm", "backward", "ieee", 64, 16, "all")
    faults = list(triton_report.Kernel(variant, "gfx942", **found).faults())
    assert len(faults) == bool(fault)
    assert all(fault in text for text in faults)


def test_selection_covers_each_target() -> None:
    selections = map(set, map(check_triton.selected, check_triton.EXTENTS))
    chosen, each, everything = (
        {(v, target) for v, target in found if v.cell in CELLS} for found in selections
    )
    assert chosen < each < everything
    assert {(v.cell, v.which, v.precision, target) for v, target in each} == {
        (v.cell, v.which, v.precision, target) for v, target in everything
    }
    for target in triton_report.TARGETS:
        variants = [variant for variant, name in chosen if name == target]
        assert {(v.cell, v.which) for v in variants} == {
            (c, w) for c in CELLS for w in triton_report.PASSES
        }
        for which in triton_report.PASSES:
            assert {v.precision for v in variants if v.which == which} == set(
                check_triton.PRECISIONS
            )
        assert {(v.H, v.rows) for v in variants} == set(check_triton.SIZES)
        assert {v.options for v in variants} == set(check_triton.OPTIONS)


def test_selection_has_written_cells() -> None:
    """Both passes of each once; among them all targets and precisions."""
    for extent in check_triton.EXTENTS:
        found = [(v, t) for v, t in check_triton.selected(extent) if v.cell in check_triton.WRITTEN]
        wanted = {(c, w) for c in check_triton.WRITTEN for w in triton_report.PASSES}
        assert len(found) == len(wanted) and {(v.cell, v.which) for v, _ in found} == wanted
        assert {t for _, t in found} == set(triton_report.TARGETS)
        assert {v.precision for v, _ in found} == set(check_triton.PRECISIONS)


def test_selection_has_normalised_cells() -> None:
    """Both passes of one on each target; of all in each precision; among them every size and
    option."""
    few, each, everything = (
        {(v, t) for v, t in check_triton.selected(extent) if v.cell in NORMED}
        for extent in check_triton.EXTENTS
    )
    assert each < everything
    assert {(v.which, t) for v, t in few} == {
        (w, t) for w in triton_report.PASSES for t in triton_report.TARGETS
    }
    assert {v.cell for v, _ in few} == set(NORMED)
    assert {(v.cell, v.which, v.precision, t) for v, t in each} == {
        (v.cell, v.which, v.precision, t) for v, t in everything
    }
    for found in (few, each):
        assert {(v.H, v.rows) for v, _ in found} == set(check_triton.NORMED_SIZES)
        assert {v.options for v, _ in found} == set(check_triton.OPTIONS)


def test_table() -> None:
    variant = triton_report.Variant("lstm", "forward", "ieee", 64, 16, "all")
    kernels = [
        triton_report.Kernel(variant, "sm_80", "grid", 4, 1000, 90, 0),
        triton_report.Kernel(variant, "sm_80", "grid", 4, 2000, 80, 8),
    ]
    _, row = triton_report.table(kernels)
    assert row == ["sm_80", "forward", "2", "90", "2000 (166912)", "1"]


@pytest.mark.parametrize("which", triton_report.PASSES)
def test_packed_steps_are_compiled(which: str) -> None:
    """With the places of the steps, and one dimension in place of two."""
    padded, packed = (
        check_triton.arguments(triton_report.Variant("gru", which, "ieee", 8, 3, options))
        for options in ("all", "packed")
    )
    assert padded["starts"] is None
    assert packed["starts"].shape == (3,)
    for name, tensor in padded.items():
        if hasattr(tensor, "shape") and tensor.shape[:2] == (2, 3):
            assert packed[name].shape == (6, *tensor.shape[2:]), name
        elif hasattr(tensor, "shape"):
            assert packed[name].shape == tensor.shape, name
