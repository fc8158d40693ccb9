"""What tools/cubin.py reads out of the reports of nvcc, cuobjdump and nvdisasm."""

from __future__ import annotations

from pathlib import Path

import check_cuda
from compiler_reports import ASSEMBLY, KERNELS, MANGLED, USAGE, script, symbol
from cubin import Function, Persistent, read_assembly, read_report, read_usage


def test_names() -> None:
    for kernel in KERNELS:
        for family in ("cluster", "grid"):
            kernel = kernel._replace(family=family)
            assert Persistent.of(symbol(kernel)) == kernel
    for name, mangled in (("mgu", "3MGU"), ("lem", "3LEM"), ("indrnn", "6IndRNN")):
        other = symbol(KERNELS[0]).replace(MANGLED[KERNELS[0].cell], mangled)
        assert Persistent.of(other) == KERNELS[0]._replace(cell=name)  # whatever cells there are
    assert Persistent.of("_ZN3rnn4cuda13for_each_unitINS_4LSTMENS0_11ForwardCellIfEEEEvT0_") is None


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 216 registers, used 1 barriers, 48 bytes smem, 720 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for helper
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 400 bytes cmem[0]
"""


def test_report() -> None:
    assert read_report(REPORT, "80") == {
        "first": Function("first", "80", registers=216, shared=48),
        "second": Function("second", "80", registers=40),
        "helper": Function("helper", "80", stack=24, spill_stores=16, spill_loads=20),
    }


def test_usage() -> None:
    assert read_usage(USAGE, "80") == {
        "first": Function("first", "80", registers=216, shared=48),
        "second": Function("second", "80", registers=40, stack=32),
    }


def test_assembly() -> None:
    functions = {name: Function(name, "90a") for name in ("first", "second")}
    read_assembly(ASSEMBLY, functions)
    first, second = functions.values()
    assert first.threads == 512
    assert first.count("HMMA") == 2
    assert first.count("HM") == 0
    assert dict(first.instructions) == {
        "IMAD.MOV.U32": 1, "BRA": 1, "UIADD3": 1,
        "HMMA.16816.F32.BF16": 2, "HFMA2.MMA": 1, "FFMA": 1,
    }  # fmt: skip
    assert (second.threads, dict(second.instructions)) == (None, {"EXIT": 1})


def test_code_is_taken_out_of_an_object(tmp_path: Path) -> None:
    """Of each architecture that is in it, with usage and instructions; a failure is one."""
    (tmp_path / "usage").write_text(USAGE)
    (tmp_path / "assembly").write_text(ASSEMBLY)
    extract = "-xelf) touch x.1.sm_80.cubin x.2.sm_90a.cubin ;;"
    text = f'case $1 in\n{extract}\n*) cat "{tmp_path}/usage" ;;\nesac\n'
    cuobjdump = script(tmp_path / "cuobjdump", text)
    nvdisasm = script(tmp_path / "nvdisasm", f'cat "{tmp_path}/assembly"\n')
    source = check_cuda.CSRC / "cuda/x.cu"
    found = check_cuda.take_out(cuobjdump, nvdisasm, tmp_path / "x.cu.o", source)
    assert set(found) == {"80", "90a"}
    for arch, compiled in found.items():
        assert compiled.where == f"csrc/cuda/x.cu for sm_{arch}, as built"
        assert not compiled.failure
        first, second = compiled.functions
        assert (first.arch, first.registers, first.threads) == (arch, 216, 512)
        assert first.count("HMMA") == 2
        assert not second.in_registers
    nvdisasm = script(tmp_path / "nvdisasm", "echo no; exit 3\n")
    found = check_cuda.take_out(cuobjdump, nvdisasm, tmp_path / "x.cu.o", source)
    assert (found["80"].failure, found["80"].report) == ("nvdisasm", "no\n")
