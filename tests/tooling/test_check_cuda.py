"""What tools/check_cuda.py reads out of the reports of nvcc and nvdisasm, and objects to."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import check_cuda
from check_cuda import TENSOR_CORE, Compiled, faults_of
from cubin import Function, Persistent, read_assembly, read_report, read_usage

MANGLED = {
    "rnn": "5OneOfINS_7RNNTanhEJNS_7RNNReluENS_10RNNSigmoidEEE",
    "lstm": "4LSTM",
    "gru": "3GRU",
}


def symbol(kernel: Persistent) -> str:
    """As GCC and Clang mangle its name."""
    cell, backward, numbers, family, batch = kernel
    io = {"bfloat16": "NS_8BFloat16E", "float16": "NS_7Float16E"}.get(numbers, "f")
    product = {"tf32": "NS0_4TF32E", "float32": "f"}.get(numbers, "S5_")
    way = "12BackwardPass" if backward else "11ForwardPass"
    exchange = {"cluster": "15ClusterExchange", "grid": "12GridExchange"}[family]
    return (
        "_ZN3rnn4cuda58_GLOBAL__N__6d_21_persistent_float16_cu_9e_7610persistentINS0_"
        f"{way}INS_{MANGLED[cell]}E{io}EENS0_15PersistentBlockIS6_{product}NS0_{exchange}"
        f"ELi{batch}EEEEEvNS0_10PersistentIT_EE"
    )


#: Of one family.
KERNELS = [
    Persistent(cell, backward, numbers, "cluster", batch)
    for cell in MANGLED
    for backward in (False, True)
    for numbers in TENSOR_CORE
    for batch in ((1,) if numbers == "float32" else (1, 2))
]


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


USAGE = """\

Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:216 STACK:0 SHARED:48 LOCAL:0 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:40 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage() -> None:
    assert read_usage(USAGE, "80") == {
        "first": Function("first", "80", registers=216, shared=48),
        "second": Function("second", "80", registers=40, stack=32),
    }


ASSEMBLY = """\
\t.target\tsm_90a
\t.section\t.nv.info.first,"",@"SHT_CUDA_INFO"
\t.sectionflags\t@""
\t//----- nvinfo : EIATTR_PARAM_CBANK
        /*0008*/ \t.word\t0x00000210
\t//----- nvinfo : EIATTR_MAX_THREADS
.L_343:
        /*0044*/ \t.byte\t0x04, 0x05
        /*0046*/ \t.short\t(.L_345 - .L_344)
        /*0048*/ \t.word\t0x00000100
        /*004c*/ \t.word\t0x00000002
        /*0050*/ \t.word\t0x00000001
\t//----- nvinfo : EIATTR_CRS_STACK_SIZE
        /*0054*/ \t.word\t0x00000007
\t.section\t.text.first,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=216"
first:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P2 HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
        /*0050*/                   { HFMA2.MMA R2, -RZ, RZ, 0, 0 ;
        /*0060*/                   FFMA R2, R2, R3, R4 }
\t.section\t.text.second,"ax",@progbits
        /*0000*/                   EXIT ;
\t.section\t.nv.constant0.second,"a",@progbits
        /*0000*/ \t.byte\t0x00
        /*0010*/                   FFMA R2, R2, R3, R4 ;
"""


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


LSTM = Persistent("lstm", False, "bfloat16", "cluster", 2)
GOOD = Function(
    symbol(LSTM),
    "90a",
    registers=255,
    threads=256,
    instructions=Counter({"HMMA.16816.F32.BF16": 38}),
)
TF32 = replace(
    GOOD,
    symbol=symbol(LSTM._replace(numbers="tf32")),
    instructions=Counter({"HMMA.1688.F32.TF32": 38, "FFMA": 60}),
)
IEEE = replace(
    GOOD, symbol=symbol(LSTM._replace(numbers="float32")), instructions=Counter({"FFMA": 650})
)


def test_nothing_to_object_to() -> None:
    assert not list(faults_of([GOOD, TF32, IEEE], True))
    # Where there are no clusters, their kernels are empty.
    assert not list(faults_of([replace(GOOD, arch="80", instructions=Counter("E"))], True))


def also(instruction: str) -> Counter[str]:
    return GOOD.instructions + Counter([instruction])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "uses the stack or spills"),
        ({"spill_loads": 4}, "uses the stack or spills"),
        ({"shared": 16}, "has 16 bytes of static shared memory"),
        ({"threads": None}, "has no launch bounds"),
        ({"threads": 288}, "288 threads with 255 registers do not fit"),
        ({"instructions": Counter({"FFMA": 9})}, "multiplies with no HMMA, not"),
        ({"instructions": also("HMMA.16816.F32")}, "multiplies with ['HMMA.16816.F32', 'HMMA.16"),
        ({"instructions": also("LDL.64")}, "reads or writes local memory (LDL.64)"),
        ({"instructions": also("STL")}, "reads or writes local memory (STL)"),
        ({"instructions": also("RED.E.ADD.F32")}, "has an atomic operation (RED.E.ADD.F32)"),
        ({"instructions": also("ATOMG.E.ADD")}, "has an atomic operation (ATOMG.E.ADD)"),
        ({"instructions": also("ATOMS.ADD")}, "has an atomic operation (ATOMS.ADD)"),
        ({"symbol": "other", "instructions": also("ATOM")}, "other has an atomic operation (ATOM)"),
    ],
)
def test_faults(change: dict[str, object], fault: str) -> None:
    (found,) = faults_of([replace(GOOD, **change), TF32], True)
    assert found.startswith("sm_90a: ")
    assert fault in found


def test_harmless_instructions() -> None:
    """A reduction over a warp, and what only begins like an access of local memory."""
    for name in ("REDUX.SUM", "LDLX", "LDGSTS.E.BYPASS.128", "SYNCS.EXCH.64"):
        assert not list(faults_of([replace(GOOD, instructions=also(name))], True)), name


def test_ieee_products() -> None:
    """They need multiply-adds of their own, beside those of the cell; without tensor cores."""
    (found,) = faults_of([TF32, replace(IEEE, instructions=Counter({"FFMA": 60}))], True)
    assert "has 60 FFMA, no more than the 60 of the same in TF32" in found
    (found,) = faults_of([IEEE], True)
    assert "650 FFMA" in found
    (found,) = faults_of([TF32, replace(IEEE, instructions=IEEE.instructions + also("MOV"))], True)
    assert "not FFMA alone" in found


def test_without_disassembly() -> None:
    """What needs instructions is left out, the rest is not."""
    unread = replace(GOOD, threads=None, instructions=Counter())
    assert not list(faults_of([unread], False))
    assert list(faults_of([replace(unread, shared=1)], False))


def test_no_kernel_at_all() -> None:
    (found,) = faults_of([replace(GOOD, symbol="other")], True)
    assert "no persistent kernel" in found


def test_time(capsys: pytest.CaptureFixture[str]) -> None:
    results = [check_cuda.Compiled(name, [], 2.5, "") for name in ("a.cu", "b.cu")]
    assert not list(check_cuda.print_times(results, 5.0))
    (fault,) = check_cuda.print_times(results, 4.9)
    assert "took 5.0 s" in fault
    assert re.search(
        r"2\.5  a\.cu\n.*2\.5  b\.cu\n.*5\.0  in all, of 5 allowed", capsys.readouterr().out
    )


def test_disassembler_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where there is none: a line, and a failure if it was asked for."""
    monkeypatch.setattr(check_cuda, "CSRC", tmp_path)  # nothing to compile
    monkeypatch.setattr(check_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check_cuda, "find_tool", lambda name, nvcc: None)
    monkeypatch.setattr("sys.argv", ["check_cuda.py", "--instructions"])
    assert check_cuda.main() == 1
    asked = capsys.readouterr().err
    assert "nvdisasm not found" in asked
    assert "no persistent kernel" not in asked
    monkeypatch.setattr("sys.argv", ["check_cuda.py"])
    assert check_cuda.main() == 1  # there are no kernels, which is found without it
    assert "no persistent kernel" in capsys.readouterr().err


def test_finds_a_disassembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside nvcc first, then in PATH, and then in Python packages."""
    folders = ("triton/backends/nvidia/bin", "nvidia/cu13/bin", "path", "beside")
    packages: dict[str, SimpleNamespace] = {}
    monkeypatch.setattr("importlib.util.find_spec", packages.get)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    nvcc = str(tmp_path / "beside/nvcc")
    assert check_cuda.find_tool("nvdisasm", nvcc) is None
    for name in ("triton", "nvidia"):
        packages[name] = SimpleNamespace(submodule_search_locations=[str(tmp_path / name)])
    for folder in folders:  # each goes before those that are there
        program = tmp_path / folder / "nvdisasm"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert check_cuda.find_tool("nvdisasm", nvcc) == str(program)


def test_tables() -> None:
    """Numbers and tiles that are alike share a line; shared memory is the plan's."""
    pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
    import kernel_table

    functions = []
    for k in KERNELS:
        f = Function(symbol(k), "90a", registers=100 * k.batch, threads=256)
        f.instructions.update({"FFMA": 7 + k.backward}, **dict.fromkeys(TENSOR_CORE[k.numbers], 5))
        functions.append(f)
    lines = kernel_table.kernel_table(functions).splitlines()
    assert lines[0] == "| cell | pass | numbers | sm_90a, cluster |"
    assert "| gru | forward | bfloat16, float16, tf32 | 100–200 · 5 · 7 |" in lines
    assert "| gru | backward | float32 | 100 · 0 · 8 |" in lines
    assert len(lines) == 2 + 3 * 2 * 2

    H100 = kernel_table.DEVICES["H100"]
    both = [kernel_table.plan("lstm", b, "bfloat16", 1024, 128, 1, H100) for b in (False, True)]
    assert not both[0].reason
    assert both[1].reason
    wanted = f" {both[0].shared_bytes / 1024:.1f} {both[0].family} / – "
    lstm, gru = kernel_table.shared_table([(1, 128, 1024)]).splitlines()[2:]
    assert lstm.split("|")[4] == wanted
    assert gru.startswith("| gru | 1 | 128, 1024 |")
    line = kernel_table.shared_table([(4, 16, 256)]).splitlines()[2]
    assert re.search(r"\| \d+\.\d 4 x grid / \d+\.\d 4 x grid \|", line)


def test_brief_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All sources for some architectures, one storage type's kernels for others."""
    asked: list[tuple[str, str]] = []

    def compile_one(nvcc: str, nvdisasm: str | None, source: Path, arch: str) -> Compiled:
        asked.append((source.stem, arch))
        return Compiled(f"{source.stem} for {arch}", [], 0.0, "")

    monkeypatch.setattr(check_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check_cuda, "compile_one", compile_one)
    monkeypatch.setattr("sys.argv", ["check_cuda", "--arch=80", "--brief=100f", "--brief=120f"])
    check_cuda.main()
    all_sources = {path.stem for path in (check_cuda.CSRC / "cuda").glob("*.cu")}
    assert {stem for stem, arch in asked if arch == "80"} == all_sources
    for arch in ("100f", "120f"):
        assert [stem for stem, other in asked if other == arch] == ["persistent_bfloat16"]
    asked.clear()
    monkeypatch.setattr("sys.argv", ["check_cuda", "--arch=all"])
    check_cuda.main()
    assert {arch for _, arch in asked} == {"80", "90a", "100f", "120f"}


# --- What setup.py has built --------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return str(path)


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


def test_objects_of_other_sources_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ninja")
    setup = importlib.import_module("setup")
    monkeypatch.setattr(setup, "build_folder", lambda: tmp_path)
    monkeypatch.setattr(check_cuda, "CSRC", tmp_path)
    assert check_cuda.built_objects() == {}  # nothing was built
    compiler = script(tmp_path / "nvcc", 'echo "$7: $5" >"$3"; cp "$5" "$7"\n')
    source, built = tmp_path / "cuda/x.cu", tmp_path / "cuda/x.cu.o"
    source.parent.mkdir()
    source.write_text("first")
    os.utime(source, (1e9, 1e9))  # well before what is made of it, however coarse the clock
    setup.run_ninja(tmp_path / "cuda", [compiler], [(str(built), str(source))])
    assert check_cuda.built_objects() == {source: built}
    os.utime(source, (2e9, 2e9))
    assert check_cuda.built_objects() == {}


def test_what_was_built_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what was built wrong is found; and without the tools for it, all is compiled."""
    asked: list[str] = []

    def compile_one(nvcc: str, nvdisasm: str | None, source: Path, arch: str) -> Compiled:
        asked.append(arch)
        return Compiled(f"{source.stem} for {arch}", [], 0.0, "")

    def take_out(cuobjdump: str, nvdisasm: str, built: Path, source: Path) -> dict[str, Compiled]:
        return {"80": Compiled(f"{source.stem}, as built", [replace(GOOD, stack=8)], 0.0, "")}

    monkeypatch.setattr(check_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check_cuda, "find_tool", lambda name, nvcc: name)
    monkeypatch.setattr(check_cuda, "compile_one", compile_one)
    monkeypatch.setattr(check_cuda, "take_out", take_out)
    sources = sorted((check_cuda.CSRC / "cuda").glob("*.cu"))
    monkeypatch.setattr(check_cuda, "built_objects", lambda: {source: source for source in sources})
    monkeypatch.setattr("sys.argv", ["check_cuda", "--built", "--arch=80", "--arch=90a"])
    assert check_cuda.main() == 1
    assert asked == ["90a"] * len(sources)
    assert "uses the stack or spills" in capsys.readouterr().err
    monkeypatch.setattr(check_cuda, "find_tool", lambda name, nvcc: None)
    asked.clear()
    check_cuda.main()
    assert sorted(asked) == ["80"] * len(sources) + ["90a"] * len(sources)
    assert "all is compiled again" in capsys.readouterr().err
