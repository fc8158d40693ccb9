"""What setup.py decides to build."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NVCC = "/opt/cuda/bin/nvcc"


@pytest.fixture
def setup() -> ModuleType:
    """The module anew: what it decides for a machine, it keeps."""
    for needed in ("ninja", "setuptools"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("rnnkernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("setting", "nvcc", "gpu", "cuda", "line"),
    [
        ("", NVCC, True, True, f"CPU and CUDA, by {NVCC}"),
        ("", NVCC, False, False, "CPU alone, since no GPU is here (RNNKERNELS_CUDA=1 builds"),
        ("", None, True, False, "CPU alone, since nvcc was not found"),
        ("", None, False, False, "CPU alone, since nvcc was not found"),
        ("0", NVCC, True, False, "CPU alone, since RNNKERNELS_CUDA=0"),
        ("0", None, False, False, "CPU alone, since RNNKERNELS_CUDA=0"),
        ("1", NVCC, True, True, f"CPU and CUDA, since RNNKERNELS_CUDA=1, by {NVCC}"),
        ("1", NVCC, False, True, f"CPU and CUDA, since RNNKERNELS_CUDA=1, by {NVCC}"),
    ],
)
def test_choice(
    setup: Any, setting: str, nvcc: str | None, gpu: bool, cuda: bool, line: str
) -> None:
    choice = setup.choose(setting, nvcc, gpu)
    assert choice.cuda is cuda
    assert line in choice.line
    assert "\n" not in choice.line


@pytest.mark.parametrize("gpu", [True, False])
def test_cuda_kernels_that_cannot_be_built(setup: Any, gpu: bool) -> None:
    with pytest.raises(SystemExit, match="RNNKERNELS_CUDA=1, but nvcc was not found"):
        setup.choose("1", None, gpu)


def test_unknown_setting(setup: Any) -> None:
    with pytest.raises(SystemExit, match="RNNKERNELS_CUDA must be 0, 1 or empty, got 'yes'"):
        setup.choose("yes", NVCC, True)


@pytest.mark.parametrize(
    ("setting", "sanitize", "extension", "cuda", "looked", "line"),
    [
        ("", "", True, True, True, "CPU and CUDA"),
        ("1", "", True, True, False, "since RNNKERNELS_CUDA=1"),
        ("0", "", True, False, False, "since RNNKERNELS_CUDA=0"),
        ("1", "address", True, False, False, "since RNNKERNELS_SANITIZE=address"),
        ("1", "", False, False, False, "pure Python, without kernels: RNNKERNELS_EXTENSION=0"),
    ],
)
def test_choice_on_a_machine(
    setup: Any, monkeypatch: pytest.MonkeyPatch, setting: str, sanitize: str, extension: bool,
    cuda: bool, looked: bool, line: str,
) -> None:  # fmt: skip
    """A GPU is looked for only where nothing was said."""
    asked = []
    monkeypatch.setattr(setup, "CUDA", setting)
    monkeypatch.setattr(setup, "SANITIZE", sanitize)
    monkeypatch.setattr(setup, "EXTENSION", extension)
    monkeypatch.setattr(setup, "find_cxx", lambda: "c++")
    monkeypatch.setattr(setup, "find_nvcc", lambda: NVCC)
    monkeypatch.setattr(setup, "finds_gpu", lambda: asked.append(1) or True)
    choice = setup.choice()
    assert choice.cuda is cuda
    assert line in choice.line
    assert bool(asked) is looked


@pytest.mark.parametrize(
    ("device", "code", "printed", "found"),
    [
        (True, 9, "", True),
        (False, 0, "GPU 0: NVIDIA H100 (UUID: GPU-5)\n", True),
        (False, 0, "No devices found.\n", False),
        (False, 9, "NVIDIA-SMI has failed\n", False),
        (False, None, "", False),
    ],
)
def test_gpu(
    setup: Any, monkeypatch: pytest.MonkeyPatch, device: bool, code: int | None, printed: str,
    found: bool,
) -> None:  # fmt: skip
    """By the driver's device, else by what nvidia-smi lists; it may not be there (None)."""

    def run(command: list[str], **_: Any) -> Any:
        if code is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, code, printed)

    class Place(type(Path())):  # type: ignore[misc]
        def exists(self, **_: Any) -> bool:
            return device

    monkeypatch.setattr(setup, "Path", Place)
    monkeypatch.setattr(setup.subprocess, "run", run)
    assert setup.finds_gpu() is found


def test_what_make_prints(setup: Any) -> None:
    """Before a build, of the module as `import setup` finds it there."""
    code = "import setup; print(setup.choice().line)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == setup.choice().line


@pytest.mark.parametrize(
    ("archs", "code"),
    [
        (["80", "90a"], ["sm_80", "sm_90a", "compute_90"]),
        (["80", "100"], ["sm_80", "sm_100", "compute_100"]),
        (["80"], ["sm_80", "compute_80"]),
        (
            ["80", "90a", "100f", "120f"],
            ["sm_80", "sm_90a", "sm_100f", "sm_120f", "compute_90"],
        ),
    ],
    ids=str,
)
def test_architectures(setup: ModuleType, archs: list[str], code: list[str]) -> None:
    """PTX is always there, for cards between these and for newer ones."""
    toolkit = setup.CudaToolkit.__new__(setup.CudaToolkit)
    toolkit.archs = archs
    flags = " ".join(toolkit.flags())
    assert re.findall(r"code=(\w+)", flags) == code


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("sm_80 sm_90", ["80", "90a"]),
        ("sm_80 sm_90 sm_100 sm_120", ["80", "90a"]),  # before there were families
        ("sm_80 sm_90 sm_100 sm_103 sm_120 sm_121", ["80", "90a", "100f", "120f"]),
    ],
)
def test_all_architectures(
    setup: Any, monkeypatch: pytest.MonkeyPatch, listed: str, archs: list[str]
) -> None:
    """Those that nvcc knows, for wheels."""
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[1])
        return subprocess.CompletedProcess(command, 0, listed.replace(" ", "\n"), "")

    monkeypatch.setattr(setup.subprocess, "run", run)
    monkeypatch.setattr(setup.CudaToolkit, "_find", lambda *_: Path("found"))
    assert setup.CudaToolkit(NVCC, "all").archs == archs
    assert setup.CudaToolkit(NVCC, "80;86").archs == ["80", "86"]
    assert asked.count("--list-gpu-code") == 1
    with pytest.raises(SystemExit, match="must be all or look like 80;90a, got 'every'"):
        setup.CudaToolkit(NVCC, "every")


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq"}
PAIRS = {*AVX512, "avx512_bf16"}
AMX = {*PAIRS, "amx_bf16", "amx_tile"}
NARROW = {"default", "avx2"}


@pytest.mark.parametrize(
    ("has", "left_out"),
    [
        (AMX, NARROW | {"avx512_bf16"}),
        (PAIRS, NARROW | {"amx"}),
        (AVX512, NARROW | {"amx", "avx512_bf16"}),
        (AVX2, {"default", "avx512", "amx", "avx512_bf16"}),
        ({"asimd"}, set()),  # an Arm has one set of kernels
    ],
    ids=["amx", "avx512_bf16", "avx512", "avx2", "other"],
)
@pytest.mark.parametrize("setting", [("SANITIZE", "address,undefined"), ("NATIVE", True)])
def test_kernels_of_this_machine_alone(
    setup: Any,
    monkeypatch: pytest.MonkeyPatch,
    has: set[str],
    left_out: set[str],
    setting: tuple[str, Any],
) -> None:
    """Of the widest instruction set of the machine, and what it has for bfloat16; else all."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup, "processor", lambda: has)
    monkeypatch.setattr(setup, "cuda_toolkit", lambda: None)
    every = set(setup.kernels().sources)
    assert setup.without() == []

    monkeypatch.setattr(setup, *setting)
    built = setup.kernels()
    assert set(setup.without()) == left_out
    missing = {Path(path).name for path in every} - {Path(path).name for path in built.sources}
    assert missing == {f"kernels_{name}.cpp" for name in left_out}
    said = {name for name, _ in built.define_macros if name.startswith("RNNKERNELS_")}
    assert said == {f"RNNKERNELS_WITHOUT_{name.upper()}" for name in left_out}


def test_torchs_headers_once(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All files of a library in one, which stays as it is where nothing has changed."""
    monkeypatch.chdir(ROOT)
    files = setup.sources("python/*.cpp")
    monkeypatch.setattr(setup, "build_folder", lambda: tmp_path / "build")
    (made,) = setup.in_one("module", files)
    included = re.findall(r'#include "(.+)"', Path(made).read_text())
    assert [f"csrc/{name}" for name in included] == files
    before = Path(made).stat().st_mtime_ns
    assert setup.in_one("module", files) == [made]
    assert Path(made).stat().st_mtime_ns == before
    setup.in_one("module", files[1:])
    assert Path(made).read_text().count("#include") == len(files) - 1


def test_sources_of_cells_are_in_the_package(setup: Any, tmp_path: Path) -> None:
    """What a user's cell is compiled from, as the kernels were: an installed package has it."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)],
        env={**os.environ, "RNNKERNELS_EXTENSION": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = setup.HEADERS["folder"](tmp_path / "rnnkernels")
    assert found == tmp_path / "rnnkernels" / "_csrc"
    assert setup.HEADERS["digest"](found) == setup.HEADERS["digest"](ROOT / "csrc")
    assert setup.HEADERS["folder"](ROOT / "rnnkernels") == ROOT / "csrc"
