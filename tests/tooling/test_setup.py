"""What setup.py decides to build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build_support import cells, choice, commands, cuda, libraries, processor, settings, torches
from build_support.torches import Torch

ROOT = Path(__file__).parents[2]
NVCC = "/opt/cuda/bin/nvcc"


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """What is decided for a machine is kept."""
    kept = (choice.choice, cuda.toolkit, torches.torches)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


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
def test_choice(setting: str, nvcc: str | None, gpu: bool, cuda: bool, line: str) -> None:
    found = choice.choose(setting, nvcc, gpu)
    assert found.cuda is cuda
    assert line in found.line
    assert "\n" not in found.line


@pytest.mark.parametrize("gpu", [True, False])
def test_cuda_kernels_that_cannot_be_built(gpu: bool) -> None:
    with pytest.raises(SystemExit, match="RNNKERNELS_CUDA=1, but nvcc was not found"):
        choice.choose("1", None, gpu)


def test_unknown_setting() -> None:
    with pytest.raises(SystemExit, match="RNNKERNELS_CUDA must be 0, 1 or empty, got 'yes'"):
        choice.choose("yes", NVCC, True)


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
    monkeypatch: pytest.MonkeyPatch, setting: str, sanitize: str, extension: bool, cuda: bool,
    looked: bool, line: str,
) -> None:  # fmt: skip
    """A GPU is looked for only where nothing was said."""
    asked = []
    monkeypatch.setattr(settings, "CUDA", setting)
    monkeypatch.setattr(settings, "SANITIZE", sanitize)
    monkeypatch.setattr(settings, "EXTENSION", extension)
    monkeypatch.setattr(choice.cuda, "find_nvcc", lambda: NVCC)
    monkeypatch.setattr(choice.cuda, "finds_gpu", lambda: asked.append(1) or True)
    found = choice.choice()
    assert found.cuda is cuda
    assert line in found.line
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
    monkeypatch: pytest.MonkeyPatch, device: bool, code: int | None, printed: str, found: bool
) -> None:
    """By the driver's device, else by what nvidia-smi lists; it may not be there (None)."""

    def run(command: list[str], **_: Any) -> Any:
        if code is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, code, printed)

    class Place(type(Path())):  # type: ignore[misc]
        def exists(self, **_: Any) -> bool:
            return device

    monkeypatch.setattr(cuda, "Path", Place)
    monkeypatch.setattr(cuda.subprocess, "run", run)
    assert cuda.finds_gpu() is found


def test_what_make_prints() -> None:
    """Before a build."""
    code = "from build_support.commands import line; print(line())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == commands.line()
    assert choice.choice().line in commands.line()


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
def test_architectures(archs: list[str], code: list[str]) -> None:
    """PTX is always there, for cards between these and for newer ones."""
    toolkit = cuda.CudaToolkit.__new__(cuda.CudaToolkit)
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
def test_all_architectures(monkeypatch: pytest.MonkeyPatch, listed: str, archs: list[str]) -> None:
    """Those that nvcc knows, for wheels."""
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[1])
        return subprocess.CompletedProcess(command, 0, listed.replace(" ", "\n"), "")

    monkeypatch.setattr(cuda.subprocess, "run", run)
    monkeypatch.setattr(cuda.CudaToolkit, "_find", lambda *_: Path("found"))
    assert cuda.CudaToolkit(NVCC, "all").archs == archs
    assert cuda.CudaToolkit(NVCC, "80;86").archs == ["80", "86"]
    assert asked.count("--list-gpu-code") == 1
    with pytest.raises(SystemExit, match="must be all or look like 80;90a, got 'every'"):
        cuda.CudaToolkit(NVCC, "every")


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
    monkeypatch: pytest.MonkeyPatch, has: set[str], left_out: set[str], setting: tuple[str, Any]
) -> None:
    """Of the widest instruction set of the machine, and what it has for bfloat16; else all."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(processor, "processor", lambda: has)
    monkeypatch.setattr(libraries, "cuda_toolkit", lambda: None)
    monkeypatch.setattr(settings, "NATIVE", False)
    every = set(libraries.kernels().sources)
    assert processor.without() == []

    monkeypatch.setattr(settings, *setting)
    built = libraries.kernels()
    assert set(processor.without()) == left_out
    missing = {Path(path).name for path in every} - {Path(path).name for path in built.sources}
    assert missing == {f"kernels_{name}.cpp" for name in left_out}
    said = {name for name in built.macros if name.startswith("RNNKERNELS_")}
    assert said == {f"RNNKERNELS_WITHOUT_{name.upper()}" for name in left_out}


def test_torchs_headers_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All files of a library in one, which stays as it is where nothing has changed."""
    monkeypatch.chdir(ROOT)
    files = libraries.sources("python/*.cpp")
    (made,) = libraries.in_one(tmp_path / "build", "module", files)
    included = re.findall(r'#include "(.+)"', Path(made).read_text())
    assert [f"csrc/{name}" for name in included] == files
    before = Path(made).stat().st_mtime_ns
    assert libraries.in_one(tmp_path / "build", "module", files) == [made]
    assert Path(made).stat().st_mtime_ns == before
    libraries.in_one(tmp_path / "build", "module", files[1:])
    assert Path(made).read_text().count("#include") == len(files) - 1


def test_sources_of_cells_are_in_the_package(tmp_path: Path) -> None:
    """What a user's cell is compiled from, as the kernels were: an installed package has it."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)],
        env={**os.environ, "RNNKERNELS_EXTENSION": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = libraries.HEADERS["folder"](tmp_path / "rnnkernels")
    assert found == tmp_path / "rnnkernels" / "_csrc"
    digest = libraries.HEADERS["digest"]
    for backend in libraries.HEADERS["PATTERNS"]:
        assert digest(found, backend) == digest(ROOT / "csrc", backend)
    assert libraries.HEADERS["folder"](ROOT / "rnnkernels") == ROOT / "csrc"


# --- The package's own cells --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("", ()),
        ("0", ()),
        ("1", ("float32", "float64")),
        ("bfloat16", ("bfloat16",)),
        ("float32,float16", ("float32", "float16")),
    ],
)
def test_types_of_cells(setting: str, found: tuple[str, ...]) -> None:
    assert cells.types(setting) == found


def test_types_that_are_none() -> None:
    message = r"RNNKERNELS_CELLS must be 0, 1 \(for float32,float64\), .*, got 'yes'"
    with pytest.raises(SystemExit, match=message):
        cells.types("yes")


def test_cells_are_for_what_the_kernels_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "processor", lambda: PAIRS)
    monkeypatch.setattr(settings, "NATIVE", False)
    monkeypatch.setattr(cells.platform, "machine", lambda: "x86_64")
    assert cells.instructions() == ["default", "avx512", "avx2", "amx", "avx512_bf16"]
    monkeypatch.setattr(settings, "NATIVE", True)
    assert cells.instructions() == ["avx512", "avx512_bf16"]
    monkeypatch.setattr(cells.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(processor, "processor", lambda: {"asimd"})
    assert cells.instructions() == ["default"]


def test_cells_take_a_torch_that_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is compiled; an isolated build has none."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    monkeypatch.setattr(settings, "CELLS", "")
    commands.check()
    monkeypatch.setattr(settings, "CELLS", "1")
    with pytest.raises(SystemExit, match=r"RNNKERNELS_CELLS: .* needs a torch to import"):
        commands.check()


def test_what_compiles_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package as it is installed, which Python leaves nothing in, for the types that were asked
    for."""
    ran = []
    monkeypatch.setattr(cells.subprocess, "run", lambda *args, **more: ran.append((args, more)))
    monkeypatch.setattr(settings, "CELLS", "float64")
    cells.build(tmp_path, tmp_path / "out")
    (((command,), more),) = ran
    module = command.index("-m")
    said = ["rnnkernels.nn.shipped", str(tmp_path / "out"), "float64"]
    assert command[module + 1 : module + 4] == said and "-B" in command[:module]
    assert more["env"]["PYTHONPATH"] == str(tmp_path) and more["check"]


# --- The torch that is built for ----------------------------------------------------------------


def a_torch(folder: Path, version: str) -> Path:
    """As much of one as a build looks at."""
    (folder / "torch/include/ATen").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = {version!r}\ndebug = False\n")
    return folder


def test_torches_that_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package or the folder it lies in; one binding each."""
    first, second = a_torch(tmp_path / "a", "2.13.0+cpu"), a_torch(tmp_path / "b", "2.14.1")
    monkeypatch.setattr(settings, "TORCH", f"{first}{os.pathsep}{second / 'torch'}")
    found = torches.torches()
    assert [torch.version for torch in found] == ["2.13.0+cpu", "2.14.1"]
    assert [torch.folder for torch in found] == [first / "torch", second / "torch"]
    places = [libraries.in_package(Path("x", libraries.OPS), torch) for torch in found]
    assert [str(path.parent) for path in places] == ["_bindings/torch2.13", "_bindings/torch2.14"]
    assert libraries.in_package(Path("x", libraries.KERNELS), None) == Path(libraries.KERNELS)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ([None], "RNNKERNELS_TORCH: expected folders that hold a torch, got"),
        (["2.10.0"], "torch 2.10.0 in .* is too old: 2.11 or newer"),
        (["2.13.0", "2.13.1+cu130"], "one torch of each minor version"),
    ],
)
def test_torches_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: list[str | None], message: str
) -> None:
    folders = []
    for i, version in enumerate(versions):
        folders.append(str(a_torch(tmp_path / str(i), version) if version else tmp_path))
    monkeypatch.setattr(settings, "TORCH", os.pathsep.join(folders))
    with pytest.raises(SystemExit, match=message):
        torches.torches()


def test_torch_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An isolated build does not see it, and finds it all the same; where none is, says so."""
    monkeypatch.setattr(settings, "TORCH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match=r"no torch was found .*'pip install torch'"):
        torches.torches()
    a_torch(tmp_path, "2.13.1")
    (found,) = torches.torches()
    assert found == Torch(tmp_path / "torch", "2.13.1")


def test_what_a_build_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="building needs ninja"):
        commands.check()
    monkeypatch.setattr(settings, "CXX", ["no-such-compiler"])
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found \(no-such-compiler\)"):
        commands.check()


def test_leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build in place takes away what does not go with its kernels any more."""
    monkeypatch.chdir(ROOT)
    for minor, sources in (("2.13", libraries.digest()), ("2.12", "others")):
        record = tmp_path / libraries.NAMES["folder"](minor) / libraries.NAMES["RECORD"]
        record.parent.mkdir(parents=True)
        record.write_text(f'{{"torch": "{minor}.1", "sources": "{sources}"}}')
    old = [tmp_path / name for name in ("librnnkernels.so", "_C.cpython-311-x86_64-linux-gnu.so")]
    for path in (*old, tmp_path / libraries.KERNELS):
        path.touch()
    commands.clear(tmp_path)
    assert not any(path.exists() for path in old)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == sorted(["_bindings", "torch2.13", "built_for.json", libraries.KERNELS])
    commands.clear(tmp_path, {"2.14"})
    assert not (tmp_path / libraries.NAMES["folder"]("2.13")).exists()
