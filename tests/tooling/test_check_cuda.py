"""What tools/check_cuda.py objects to, and what it compiles to find out."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import check_cuda
from build_support.plan import Plan
from check_cuda import TENSOR_CORE, Compiled, faults_of
from compiler_reports import KERNELS, script, symbol
from cubin import Function, Persistent

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


BRIEF = ["--brief=100f", "--brief=120f=float"]


def test_brief_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All sources for some architectures, for others one cell's kernels of one storage type; no
    table of these."""
    asked: list[tuple[str, str, str]] = []

    def compile_one(
        nvcc: str, nvdisasm: str | None, source: Path, arch: str, cell: str
    ) -> Compiled:
        asked.append((source.stem, arch, cell))
        return Compiled(f"{source.stem} for {arch}", [], 0.0, "")

    monkeypatch.setattr(check_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check_cuda, "compile_one", compile_one)
    every = {path.stem for path in (check_cuda.CSRC / "cuda").glob("*.cu")}
    monkeypatch.setattr("sys.argv", ["check_cuda", "--arch=80", *BRIEF])
    check_cuda.main()
    whole = {(stem, "80", "") for stem in every}
    others = {("persistent_bfloat16", "100f", "LSTM"), ("persistent_float", "120f", "LSTM")}
    assert set(asked) == whole | others and len(asked) == len(every) + 2
    for wrong in (["--markdown=x.md", *BRIEF], ["--brief=80=double"]):
        monkeypatch.setattr("sys.argv", ["check_cuda", *wrong])
        with pytest.raises(SystemExit, match="2"):
            check_cuda.main()
    asked.clear()
    monkeypatch.setattr("sys.argv", ["check_cuda", "--arch=all"])
    check_cuda.main()
    assert set(asked) == {(s, arch, "") for s in every for arch in ("80", "90a", "100f", "120f")}


# --- What setup.py has built --------------------------------------------------------------------


def test_objects_of_other_sources_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ninja")
    monkeypatch.setattr(check_cuda.libraries, "build_folder", lambda: tmp_path)
    monkeypatch.setattr(check_cuda, "CSRC", tmp_path)
    assert check_cuda.built_objects() == {}  # nothing was built
    compiler = script(tmp_path / "nvcc", 'echo "$7: $5" >"$3"; cp "$5" "$7"\n')
    source, built = tmp_path / "cuda/x.cu", tmp_path / "kernels/cuda/x.cu.o"
    source.parent.mkdir()
    source.write_text("first")
    os.utime(source, (1e9, 1e9))  # well before what is made of it, however coarse the clock
    plan = Plan(tmp_path)
    plan.rule("cuda", [compiler])
    plan.add("cuda", built, source)
    plan.run()
    assert check_cuda.built_objects() == {source: built}
    os.utime(source, (2e9, 2e9))
    assert check_cuda.built_objects() == {}


def test_what_was_built_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what was built wrong is found; and without the tools for it, all is compiled."""
    asked: list[str] = []

    def compile_one(
        nvcc: str, nvdisasm: str | None, source: Path, arch: str, cell: str
    ) -> Compiled:
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
