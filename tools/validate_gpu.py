"""Builds rnnkernels for the NVIDIA GPU of this machine, tests it there, and measures it.

Uses the Python that runs it: no virtual environment, no network. Needs a CUDA build of torch, nvcc,
ninja and pytest. Each stage ends within its limit and can be run alone; what it printed, and a
record, go to --out.

Exit status: 0 all stages passed, 1 one failed or ran out of time, 2 no GPU, or wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
#: The smallest cases that have every primitive: several blocks, both exchanges.
SMALL = "matches_reference and (D1T5B4H7R0 or norm) and float32 and not triton"


#: Stages whose steps run at once: they wait for compilers more than for the GPU.
TOGETHER = ("triton",)
CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru")


@dataclass(frozen=True)
class Step:
    """One command of a stage."""

    name: str
    command: list[str]
    limit: int  # seconds


@dataclass
class Outcome:
    """What became of a step."""

    stage: str
    name: str
    status: str
    seconds: float
    last: str


def architecture() -> str:
    """Of the GPU that torch sees, as nvcc names it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def pytest(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def gpu_tests(which: str) -> list[str]:
    return pytest("--maxfail=30", "tests/backends/test_cuda.py", "-k", which)


def sanitizer(tool: str) -> list[str]:
    return [
        "compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--launch-timeout=120",
        *pytest("-x", "tests/backends/test_cuda.py", "-k", SMALL),
    ]  # fmt: skip


def bench(out: Path, suite: str, name: str, *arguments: str) -> list[str]:
    record = str(out / f"{suite}-{name}.json")
    return [
        PYTHON, "-m", "benchmarks.run", "--device", "cuda", "--suite", suite, *arguments,
        "--out", record,
    ]  # fmt: skip


def stages(out: Path) -> dict[str, list[Step]]:
    numbers = {
        "bfloat16": ["--dtype", "bfloat16"],
        "float16": ["--dtype", "float16"],
        "tf32": ["--tf32", "on"],
        "float32": ["--tf32", "off"],
    }
    return {
        "build": [Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 480)],
        "test": [Step("test", gpu_tests("not triton"), 480)],
        "triton": [
            *(Step(cell, gpu_tests(f"triton and {cell}"), 480) for cell in CELLS),
            Step("others", gpu_tests(f"triton and not ({' or '.join(CELLS)})"), 480),
        ],
        "sanitize": [
            Step(tool, sanitizer(tool), 160) for tool in ("memcheck", "racecheck", "synccheck")
        ],
        "micro": [
            Step("compile", ["nvcc", "-O3", "-std=c++20", "--expt-relaxed-constexpr",
                             "-Icsrc", f"-arch=sm_{architecture()}",
                             "-o", str(out / "micro"), "tools/micro.cu"], 120),
            Step("micro", [str(out / "micro")], 60),
        ],
        "bench": [
            Step(name, bench(out, "gpu", name, *arguments), 120)
            for name, arguments in numbers.items()
        ],
        "bench-stacks": [
            Step(name, bench(out, "gpu-stacks", name, *arguments), 120)
            for name, arguments in numbers.items()
        ],
        "bench-triton": [
            Step(name, bench(out, "gpu", f"triton-{name}", "--backend", "triton", *arguments), 120)
            for name, arguments in numbers.items()
        ],
    }  # fmt: skip


def run(stage: str, step: Step, out: Path) -> Outcome:
    """Runs one step; what it prints goes to a file and to this process's output."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]),
        "RNNKERNELS_CUDA": "1",
        "RNNKERNELS_CUDA_ARCHS": architecture(),
    }
    title = f"\n=== {stage}: {shlex.join(step.command)}\n"
    if stage not in TOGETHER:
        print(title, end="", flush=True)
        title = ""
    start = time.monotonic()
    log = out / f"{stage}-{step.name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, timeout=step.limit,
            ).returncode  # fmt: skip
            status = "passed" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.limit} s"
        except FileNotFoundError:
            status = f"{step.command[0]} is not there"
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    print(title + "\n".join(lines[-12:] if status == "passed" else lines[-60:]), flush=True)
    return Outcome(stage, step.name, status, time.monotonic() - start, lines[-1][:200])


def outcomes(chosen: list[str], out: Path) -> Iterator[Outcome]:
    """Of all steps; where building fails, nothing else can be run."""
    for stage, steps in stages(out).items():
        if stage not in chosen:
            continue
        if stage in TOGETHER:
            with ThreadPoolExecutor(len(steps)) as pool:
                yield from pool.map(partial(run, stage, out=out), steps)
            continue
        for step in steps:
            found = run(stage, step, out)
            yield found
            if stage == "build" and found.status != "passed":
                return


def about() -> dict[str, str]:
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> int:
    names = ["build", "test", "triton", "sanitize", "micro", "bench", "bench-stacks"]
    names.append("bench-triton")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", action="append", choices=names, help="repeatable; default: all, in this order"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/validation", help="default: build/validation"
    )
    args = parser.parse_args()
    try:
        import torch
    except ModuleNotFoundError:
        parser.error("needs torch: run it with a Python that has a CUDA build of torch")
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        print("validate_gpu: torch sees no GPU here, or nvcc is not on PATH", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    found = about()
    results = []
    for outcome in outcomes(args.stage or names, out):
        results.append(outcome)
        record = {**found, "steps": [asdict(each) for each in results]}
        (out / "validation.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + ", ".join(found.values()))
    for each in results:
        print(f"{each.stage:12} {each.name:10} {each.seconds:6.0f} s  {each.status}  {each.last}")
    return 0 if all(each.status == "passed" for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
