"""What the compiled host code of the CUDA kernels asks of the runtime, by a stand-in for it: every
launch keeps to what the device and the kernel allow, and every error comes out as one."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import building
import check_cuda
import op_parity
import prepare_gpu
import probing
from cubin import read_usage
from probing import Program

ROOT = Path(__file__).parents[2]
RUNTIME = "tests/backends/cuda_runtime/runtime.cpp"
SOURCES = ("csrc/cuda", "csrc/common")
#: Compute capability, multiprocessors, shared memory of a block and of a multiprocessor, cluster.
DEVICES = {
    "H100": "9 132 232448 233472 16",
    "small clusters": "9 132 232448 233472 8",
    "slice of an H100": "9 16 232448 233472 8",
    "A100": "8 108 166912 167936 1",
    "small": "8 28 101376 102400 1",
}


def objects() -> list[Path]:
    """Of the kernels, as the extension was built with them."""
    made = check_cuda.built_objects()
    if not made:
        pytest.skip("needs objects of the CUDA kernels of these sources: RNNKERNELS_CUDA=1 builds")
    return list(made.values())


def resources(made: list[Path]) -> Iterator[str]:
    """Symbol, registers and static shared memory of every kernel, out of the cubins."""
    nvcc = check_cuda.find_nvcc()
    cuobjdump = nvcc and check_cuda.find_tool("cuobjdump", nvcc)
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    for path in made:
        done = subprocess.run(
            [cuobjdump, "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
        for function in read_usage(done.stdout, "").values():
            yield f"{function.symbol} {function.registers} {function.shared}"


@dataclass(frozen=True)
class StandIn:
    program: Path
    resources: Path
    log: Path

    def run(self, case: str, device: str = "H100", fail: str = "") -> dict[str, Any]:
        """What the probe says of a case; nothing runs, so at best that its results are missing."""
        self.log.unlink(missing_ok=True)
        settings = {
            "STAND_IN_DEVICE": DEVICES[device],
            "STAND_IN_RESOURCES": str(self.resources),
            "STAND_IN_LOG": str(self.log),
            "STAND_IN_FAIL": fail,
        }
        program = Program(self.program, environment=tuple(settings.items()))
        answers, wrong, said = program.answer(60, "run", case)
        assert not wrong, said
        return dict(answers[-1])

    def launches(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="session")
def built() -> tuple[Path, Path]:
    made = objects()
    digest = building.contents("tools/probe", "tests/backends/cuda_runtime", *SOURCES)
    stamps = (str(p.stat().st_mtime_ns) for p in made)
    with building.folder("cuda_runtime", digest, *stamps) as folder:
        table = folder / "resources"
        if not table.exists():
            lines = list(resources(made))
            include = prepare_gpu.toolkit_flags()[0]
            machine = ["tools/probe/gpu.cpp", "csrc/cuda/plan.cpp", RUNTIME, *map(str, made)]
            probing.build(folder, machine, [include])
            table.write_text("\n".join(lines) + "\n")
        return folder / "probe", table


def test_fewer_multiprocessors(built: tuple[Path, Path]) -> None:
    """RNNKERNELS_CUDA_MULTIPROCESSORS caps what a plan may take of a device."""

    def device(most: str) -> tuple[dict[str, Any], str]:
        settings = (("RNNKERNELS_CUDA_MULTIPROCESSORS", most),)
        answers, _, said = Program(built[0], environment=settings).answer(60, "device")
        return (answers or [{}])[-1], said

    assert device("")[0]["multiprocessors"] == device("500")[0]["multiprocessors"] == 132
    assert device("100")[0]["multiprocessors"] == 100
    for wrong in ("0", "-3", "many", "12x"):
        assert "RNNKERNELS_CUDA_MULTIPROCESSORS: expected a number" in device(wrong)[1]


@pytest.fixture
def stand_in(built: tuple[Path, Path], tmp_path: Path) -> StandIn:
    return StandIn(*built, tmp_path / "log")


def small(program: Path) -> list[str]:
    return [case.name for case in Program(program).cases() if not case.large]


@pytest.mark.parametrize("device", DEVICES)
def test_launches(stand_in: StandIn, device: str) -> None:
    """Of every case that a device has room for: what the layout says, and within its limits. A
    cluster of a size that only the driver knows to be too large is refused."""
    outcomes = {"absent": 0, "unwritten": 0, "refused": 0}
    most = int(DEVICES[device].split()[-1])
    for case in small(stand_in.program):
        if case.startswith("stepwise"):
            continue
        found = stand_in.run(case, device)
        assert found["outcome"] in outcomes, found
        outcomes[found["outcome"]] += 1
        too_large = case.startswith("cluster-16") and 1 < most < 16
        assert (found["outcome"] == "refused") == too_large, found
        if found["outcome"] == "absent":
            continue
        if too_large:
            (launch,) = stand_in.launches()
            assert launch["why"] == "the size of the cluster"
            continue
        (launch,) = stand_in.launches()
        assert (launch["error"], launch["why"]) == (0, ""), launch
        blocks, groups, stages, shared = (
            int(re.search(pattern, found["layout"])[1])  # type: ignore[index]
            for pattern in (r"of (\d+) block", r"(\d+) groups", r"(\d+) stages", r"(\d+) bytes")
        )
        directions = 2 if "options" in case else 1
        assert launch["grid"] == [blocks * groups * stages * directions, 1, 1]
        assert launch["block"] == [256, 1, 1]
        assert launch["dynamic"] == shared
        clusters = found["layout"].startswith("cluster")
        assert launch["cluster"] == (blocks if clusters else 1)
        assert launch["registers"] > 0
    assert outcomes["unwritten"] > 30
    assert outcomes["absent"] > 0 or most >= 8


def test_stepwise_launches(stand_in: StandIn) -> None:
    assert stand_in.run("stepwise/backward/bfloat16")["outcome"] == "unwritten"
    launches = stand_in.launches()
    assert len(launches) > 6
    assert all(launch["error"] == 0 and not launch["cooperative"] for launch in launches)


#: What a driver answers: refusals of a layout, exhausted memory, a spoiled context, an old driver.
CODES = [
    1,
    2,
    3,
    35,
    46,
    98,
    100,
    101,
    209,
    222,
    400,
    401,
    700,
    701,
    702,
    719,
    720,
    801,
    802,
    900,
    912,
    999,
]
FUNCTIONS = {
    "cudaGetDevice": "refused",
    "cudaDeviceGetAttribute": "refused",
    "cudaFuncSetAttribute": "refused",
    "cudaLaunchKernelExC": "refused",
    "cudaMalloc": "failed",
    "cudaMemcpy": "failed",
    "cudaDeviceSynchronize": "failed",
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_error_comes_out(stand_in: StandIn, function: str) -> None:
    """With its text, whichever it is, on either exchange."""
    for code in CODES:
        for case in ("grid-2/forward/bfloat16", "cluster-16/backward/tf32"):
            found = stand_in.run(case, fail=f"{function} {code} 1")
            assert found["outcome"] == FUNCTIONS[function], found
            assert f"error {code} of the stand-in" in found["detail"]


def test_every_error_of_a_step_comes_out(stand_in: StandIn) -> None:
    for code in CODES:
        for n in (1, 5):
            found = stand_in.run("stepwise/forward/float32", fail=f"cudaLaunchKernel {code} {n}")
            assert found["outcome"] == "refused"
            assert f"error {code} of the stand-in" in found["detail"]
            assert len(stand_in.launches() if stand_in.log.exists() else ()) == n - 1


# --- As Python sees it ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ops(built: tuple[Path, Path]) -> Any:
    """The CUDA backend's ops for CPU tensors, whose launches the stand-in answers."""
    made = objects()
    sources = ["tests/backends/cuda_runtime/ops.cpp", RUNTIME, "csrc/cuda/plan.cpp"]
    flags = ["-std=c++20", "-O1", "-g0", "-DRNNKERNELS_CUDA", prepare_gpu.toolkit_flags()[0]]
    flags += ["-Wno-unknown-pragmas"]
    folder = building.load_ops("rnnkernels_stand_in", sources, flags, [], list(map(str, made)))
    return torch.ops.rnnkernels_stand_in, ctypes.CDLL(str(folder / "rnnkernels_stand_in.so"))


#: Those that are asked for at every call; an attribute is set once per kernel.
CALLED = ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaLaunchKernelExC"]
#: By which a device says that it cannot hold a launch, where another layout may fit.
REFUSALS = {"invalid configuration": 9, "resources": 701, "cooperative launch too large": 720,
            "not supported": 801, "cluster size": 912}  # fmt: skip


@pytest.fixture
def run(
    ops: Any, built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """What one pass of an LSTM launches, with what the stand-in is to answer."""
    namespace, library = ops
    log = tmp_path / "log"
    monkeypatch.setenv("STAND_IN_RESOURCES", str(built[1]))
    monkeypatch.setenv("STAND_IN_LOG", str(log))

    def launches(
        fail: str, backward: bool, H: int = 40, dtype: torch.dtype = torch.bfloat16
    ) -> list[dict[str, Any]]:
        call = op_parity.make(op_parity.Case("lstm", H=H, B=20), dtype)
        out = op_parity.forward(torch.ops.rnnkernels, call)
        monkeypatch.setenv("STAND_IN_FAIL", fail)
        log.unlink(missing_ok=True)
        library.stand_in_configure()
        if backward:
            op_parity.backward(namespace, call, out, op_parity.random_gradients(call, out))
        else:
            op_parity.forward(namespace, call)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return launches


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("function", CALLED)
def test_errors_reach_python(run: Any, function: str, backward: bool) -> None:
    """Each as an exception that names the op, has the driver's words and says what to do."""
    (launch,) = run("", backward)
    assert "Pass" in launch["kernel"]  # the whole sequence
    name = "sequence_backward" if backward else "sequence_forward"
    for code in set(CODES) - set(REFUSALS.values()):
        with pytest.raises(RuntimeError) as caught:
            run(f"{function} {code} 1", backward)
        said = str(caught.value)
        assert f"rnnkernels::{name}: a CUDA kernel could not be launched" in said
        assert f"error {code} of the stand-in" in said and "ask for another backend" in said
    assert len(run("", backward)) == 1  # nothing of that is left


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("why", REFUSALS)
def test_a_refused_launch_goes_another_way(run: Any, why: str, backward: bool) -> None:
    """Step by step, where no other layout is taken either; and nobody asks for it again."""
    case = {"backward": backward, "dtype": torch.float16, "H": 40 + 8 * list(REFUSALS).index(why)}
    (launch,) = run("", **case)
    assert "Pass" in launch["kernel"]
    for fail in (f"cudaLaunchKernelExC {REFUSALS[why]} 1", ""):
        launches = run(fail, **case)
        assert len(launches) > 1
        assert not any("Pass" in launch["kernel"] for launch in launches)
