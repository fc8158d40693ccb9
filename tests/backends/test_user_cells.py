"""CPU kernels of cells that users write: compiled once and kept; where they cannot be, why."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkernels
from helpers import ROOT, run_python
from rnnkernels import _ops
from rnnkernels._backends import cache, headers, user_cells
from rnnkernels.cells import DefinedCell

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")

X = torch.ones(3, 2, 4)
numbers = count(1)


def fresh() -> DefinedCell:
    """A cell that no test before has compiled, in this process or another."""
    number = 1 + next(numbers) / 1000 + os.getpid() / 1e9

    def fresh(a: Any, *, h: Any) -> Any:
        return torch.tanh(number * a) + 0.5 * h

    return rnnkernels.cell(fresh)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own; what the process knows of other cells stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "rnnkernels" / "cells"


def layer(cell: DefinedCell, **options: Any) -> rnnkernels.nn.base.RNNBase:
    return rnnkernels.layer(cell)(4, 5, **options)


def backends(module: torch.nn.Module) -> tuple[str | None, str | None]:
    """Who runs a layer, and why the CPU's kernels do not."""
    (choice,) = rnnkernels.explain(module, X).choices
    return choice.backend, choice.refusals.get("cpu")


def test_compiled_once_and_kept(own_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cell = fresh()
    module = layer(cell)
    assert not own_cache.exists()  # a definition costs nothing
    y = module(X)[0]
    told = capfd.readouterr().err
    assert told.count("rnnkernels: compiled the cell fresh") == 1
    assert f"({cell.name}) for float on" in told
    assert [p.suffix for p in own_cache.iterdir()].count(".so") == 1
    torch.testing.assert_close(y, layer_of_reference(module)(X)[0])
    module(X)
    assert backends(module) == ("cpu", None)
    user_cells.forget()  # as another process
    module(X)
    assert "compiled" not in capfd.readouterr().err
    module.double()(X.double())  # a type is compiled once somebody asks for it
    assert f"({cell.name}) for double on" in capfd.readouterr().err
    module.float()(X)
    assert "compiled" not in capfd.readouterr().err


def test_compiled_code_that_runs_it_first() -> None:
    """Nobody has called the layer before torch.compile traces it."""
    module = layer(fresh(), backend="cpu")
    y = torch.compile(module, backend="eager", fullgraph=True)(X)[0]
    torch.testing.assert_close(y, layer_of_reference(module)(X)[0])


def layer_of_reference(module: Any) -> Any:
    other = layer(module.definition, backend="reference")
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.slow
def test_many_processes_compile_once(own_cache: Path) -> None:
    """Cold, all at once."""
    code = (
        "import torch, rnnkernels, written_cells as w\n"
        "m = rnnkernels.layer(w.scaled)(4, 5, backend='cpu')\n"
        "print(float(m(torch.ones(3, 2, 4))[0].isfinite().all()))\n"
    )
    paths = [str(ROOT), str(Path(__file__).parents[1] / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]
    results = [process.communicate(timeout=600) for process in running]
    assert [(p.returncode, out) for p, (out, _) in zip(running, results, strict=True)] == [
        (0, "1.0\n")
    ] * 8, results
    assert sum(errors.count("compiled the cell scaled") for _, errors in results) == 1


def test_a_damaged_library_is_made_again(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = fresh()
    assert user_cells.prepare(cell.name, X.dtype) is None
    (library,) = own_cache.glob("*.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # what is loaded is not changed
    damaged = tmp_path / "other" / "rnnkernels" / "cells" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(library.read_bytes()[:1000])
    user_cells.forget()
    assert user_cells.prepare(cell.name, X.dtype) is None
    assert damaged.stat().st_size == library.stat().st_size


def test_a_lock_that_was_left_behind(own_cache: Path) -> None:
    """Of a process that ended, and of one that holds it for longer than anybody waits."""
    own_cache.mkdir(parents=True)
    path = own_cache / "made"
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print('held', flush=True); sys.stdin.read()", f"{path}.lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with cache.turn(path, 0.0):
        cache.write(path, "by both")
    holder.kill()
    holder.communicate()
    with cache.turn(path, 600.0):
        assert path.read_text() == "by both"


def fails(cell: DefinedCell, reason: str) -> None:
    """The reference runs it, which is said once, with the reason; else it is an error."""
    module = layer(cell)
    with pytest.warns(UserWarning, match=f"runs on the slow reference: .*{reason}") as told:
        y = module(X)[0]
    assert told[0].filename == __file__  # the line that calls it, not one of ours or of torch
    module(X)  # once
    torch.testing.assert_close(y, layer_of_reference(module)(X)[0])
    backend, why = backends(module)
    assert backend == "reference" and why and reason in why
    with pytest.raises(RuntimeError, match=f"'cpu' was asked for .*{reason}"):
        layer(cell, backend="cpu")(X)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    fails(fresh(), "compiler was found to compile its kernels with")


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    fails(fresh(), "CXX=no-such-compiler")


def test_an_error_of_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cxx"
    script.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.h:1: error: no' >&2; exit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    fails(fresh(), "x.h:1: error: no")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fails(fresh(), "XDG_CACHE_HOME names another folder for it")


def test_sources_of_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_cells, "_digest", lambda csrc, backend: "other")
    fails(fresh(), "are others than this build's")


def test_a_library_of_another_build(own_cache: Path) -> None:
    """Even under the right name it is not loaded."""
    cell = fresh()
    csrc = headers.folder(user_cells.PACKAGE)
    compiler = user_cells.find_compiler()
    assert csrc and compiler
    own_cache.mkdir(parents=True)
    capability, sources = _ops.build_info()["cpu_capability"], _ops.build_info()["headers"]
    others = [
        ("float", capability, "0123", "compiled from other sources"),
        ("float", "default", sources, "compiled for default"),
    ]
    if capability in user_cells.REST:  # of bfloat16 other panels than AVX-512 by itself
        others.append(("BFloat16", "avx512", sources, "compiled for avx512, and the kernels in"))
    for type, instructions, digest, reason in others:
        library = user_cells.Library(cell, type, user_cells.target(instructions, type), digest)
        path = own_cache / library.file()
        user_cells.compile(library, csrc, compiler, path)
        assert reason in _ops.load_cell(cell.name, str(path), "cpu")
    assert "does not export" in _ops.load_cell(
        cell.name, str(next(ROOT.glob("rnnkernels/lib*s.so"))), "cpu"
    )


def test_other_backends_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = fresh()
    (choice,) = rnnkernels.explain(layer(cell), X).choices
    assert "torch.nn has no cell" in choice.refusals["torch"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("type", ["BFloat16", "float"])
def test_where_bfloat16_has_kernels_of_its_own(own_cache: Path, type: str) -> None:
    """Compiled and linked; whether this machine runs it is another matter. Those of other types are
    what all processors with AVX-512 take."""
    csrc, compiler = headers.folder(user_cells.PACKAGE), user_cells.find_compiler()
    assert csrc and compiler
    own_cache.mkdir(parents=True)
    path = own_cache / "amx.so"
    target = user_cells.target("amx", type)
    library = user_cells.Library(fresh(), type, target, "digest")
    user_cells.compile(library, csrc, compiler, path)
    names = (ctypes.c_char_p * 2).in_dll(ctypes.CDLL(str(path)), "rnnkernels_cell")
    assert list(names) == [b"digest", b"amx" if type == "BFloat16" else b"avx512"]


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_instruction_sets(instructions: str, tmp_path: Path) -> None:
    code = (
        "import torch, rnnkernels, written_cells as w\n"
        "print(name := rnnkernels.build_info()['cpu_capability'])\n"
        "if name == 'none': raise SystemExit\n"
        "x = torch.randn(3, 2, 4)\n"
        "for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "    m = rnnkernels.layer(w.lstm)(4, 5, backend='cpu', dtype=dtype)\n"
        "    g = rnnkernels.LSTM(4, 5, dtype=dtype)\n"
        "    g.load_state_dict(m.state_dict())\n"
        "    torch.testing.assert_close(m(x.to(dtype))[0], g(x.to(dtype))[0])\n"
    )
    done = run_python(
        "-c", code, RNNKERNELS_CPU_CAPABILITY=instructions, XDG_CACHE_HOME=str(tmp_path),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parents[1] / "support")]),
    )  # fmt: skip
    if done.stdout == "none\n":
        pytest.skip("not a processor, or not a build, for it")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{instructions}\n"


# --- CUDA kernels -------------------------------------------------------------------------------


@pytest.mark.skipif(user_cells.find_compiler("cuda") is None, reason="needs nvcc")
def test_compiled_for_gpus(
    own_cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, loaded and kept like those for the CPU, though there may be no GPU to run them."""
    monkeypatch.setattr(user_cells, "gpus", lambda: "sm_80")
    cell = fresh()
    assert user_cells.prepare(cell.name, X.dtype, "cuda") is None
    assert f"({cell.name}) for float on sm_80 in " in capfd.readouterr().err
    (library,) = own_cache.glob("*.so")
    user_cells.forget()  # as another process
    assert user_cells.prepare(cell.name, X.dtype, "cuda") is None
    assert capfd.readouterr().err == ""
    assert "does not export rnnkernels_cell" in _ops.load_cell(cell.name, str(library), "cpu")


def test_gpus_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is compiled, so that Triton's kernels run it."""
    monkeypatch.setattr(user_cells.shutil, "which", lambda *_, **__: None)
    cell = fresh()
    reason = user_cells._reason(cell.name, X.dtype, "cuda")
    assert reason == user_cells.prepare(cell.name, X.dtype, "cuda")
    assert reason and "no nvcc was found" in reason
    assert user_cells._reason("lstm", X.dtype, "cuda") is None  # built in


def test_the_op_asks_for_a_backend_that_there_is() -> None:
    with pytest.raises(ValueError, match="backend: expected cpu or cuda, got 'tpu'"):
        _ops.load_cell(fresh().name, "", "tpu")
