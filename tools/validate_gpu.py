"""Tries rnnkernels on the NVIDIA GPU of this machine: two calls of minutes each, for a GPU that is
there for no longer.

    first    the kernels without torch (tools/probe): cases from the simplest on, a process each;
             then sanitizers on four of them, and how long steps and hand-offs take
    second   the tests on a GPU, in processes that take over from each other where one ends; some of
             Triton's; the layers beside torch.nn on cuDNN; a profile

Uses the Python that runs it: no virtual environment, no network. The second call needs a CUDA
build of torch, ninja, pybind11 and pytest. What was built before, on a machine without a GPU, is
used as it is (tools/prepare_gpu.py); the rest is built here, by nvcc.

Each call writes CALL.json after every step, CALL.log, and at its end CALL.tar.gz with what its
steps left behind, to --out. It ends within its seconds.

Exit status: 0 all steps passed, 1 one did not, 2 no GPU, or wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare_gpu
import probing
import pytest_limits
from probing import GOOD, Program
from timed_run import ROOT, Run, closing

SECONDS = {"first": 270, "second": 300}
PYTHON = sys.executable

# --- The first call ---------------------------------------------------------------------------

CASE_LIMIT = 12  # seconds; a case takes one, most of it to begin with the device
#: Of several blocks and of several tiles, over both exchanges.
SANITIZED = [
    "grid-2/forward/bfloat16",
    "grid-2-tiles/backward/bfloat16",
    "cluster-2/forward/bfloat16",
    "cluster-2-tiles/backward/bfloat16",
]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: Seconds that are left for what follows the cases, and what follows the sanitizers.
AFTER_CASES, AFTER_SANITIZERS = 120, 60


def first(run: Run, args: argparse.Namespace) -> None:
    program = Program(args.probe or prepare_gpu.probe(run))
    records = []
    cases = program.cases()
    for record in probing.run_cases(
        program, cases, CASE_LIMIT, left=lambda: run.left() - AFTER_CASES
    ):
        records.append(record)
        note_case(run, "probe", record)
    run.about["families"] = probing.summary(records)
    run.save()
    passed = {record["case"] for record in records if record["outcome"] == "passed"}
    for tool in SANITIZERS:
        before = ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9")
        for case in (case for case in cases if case.name in SANITIZED):
            if case.name not in passed:
                run.note(tool, case.name, "left out", 0, detail="did not pass by itself")
            elif run.left() < AFTER_SANITIZERS:
                run.note(tool, case.name, "left out", 0, detail="no time was left")
            else:
                command = [*before, str(program.path), "run", case.name]
                run.command(tool, case.name, command, 30)
    for name in program.measured():
        done = run.command("measure", name, [str(program.path), "measure", name], 20)
        lines = [line for line in done.said.splitlines() if line.startswith("{")]
        run.steps[-1]["measured"] = [json.loads(line) for line in lines]
    run.command("micro", "hand-offs", [str(args.micro or prepare_gpu.micro(run))], 30)


def note_case(run: Run, stage: str, record: dict[str, Any]) -> None:
    more = {name: record[name] for name in ("error", "layout", "detail") if record.get(name)}
    run.note(stage, record["case"], record["outcome"], record.get("seconds", 0), **more)


# --- The second call --------------------------------------------------------------------------

TESTS = "tests/backends/test_cuda.py"
#: Left for later: more rows than one grid covers take gigabytes, and float16 is bfloat16's twin.
LATER = "not B140000 and not B47000 and not -float16 and not .float16"


@dataclass(frozen=True)
class Share:
    """Tests that one process runs after the other, next to other shares."""

    name: str
    which: str  # pytest's -k
    needs: str = ""  # the family of the probe without which they would show nothing new


SHARES = [
    Share("stepwise", f"stepwise and {LATER}", "stepwise"),
    Share("cluster 16 bits", f"cluster and bfloat16 and not stack and {LATER}", "cluster-2"),
    Share("cluster others", f"cluster and not bfloat16 and not stack and {LATER}", "cluster-2"),
    Share("grid 16 bits", f"grid and bfloat16 and not stack and {LATER}", "grid-2"),
    Share("grid others", f"grid and not bfloat16 and not stack and {LATER}", "grid-2"),
    Share("stacks", f"stack and {LATER}", "cluster-2-wavefront"),
]
#: A few of each cell on Triton: both passes in each precision, and as a graph.
TRITON = [
    Share(
        f"triton {cell}",
        f"triton and {cell} and not -float16 and not float64 and ((matches_reference and"
        " D2T5B4H7R0 and bias and not lengths and not window and not 0.1 and not 0.3"
        " and not packed)"
        " or (tf32 and D2T5B4H7R0-bias-lengths-reset and not flow) or graph_capture)",
    )
    for cell in ("lstm", "gru", "rnn_tanh")
]
SHARE_LIMIT, TEST_LIMIT, RESTARTS = 130, 20, 6


def second(run: Run, args: argparse.Namespace) -> None:
    if not prepare_gpu.extension(run):
        return
    families = families_before(args.out)
    shares = [*SHARES, *TRITON]
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda share: run_share(run, share, families), shares))
    for name, options in (("bfloat16", ["--dtype", "bfloat16"]), ("tf32", ["--tf32", "on"])):
        record = str(run.work / f"gpu-{name}.json")
        command = [PYTHON, "-m", "benchmarks.run", "--device", "cuda", "--suite", "gpu"]
        run.command("cudnn", name, [*command, *options, "--out", record], 60)
    run.command("profile", "step", [PYTHON, "tools/gpu_profile.py"], 30)


def families_before(out: Path) -> dict[str, str]:
    """What the first call found of each family, if it ran."""
    path = out / "first.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    families: dict[str, str] = record.get("families", {})
    return families


def run_share(run: Run, share: Share, families: dict[str, str]) -> None:
    """Runs the tests of a share in one process, and what is left of them in another where it ends
    in the middle."""
    if families.get(share.needs, "passed") not in GOOD:
        detail = f"the probe found {share.needs} {families[share.needs]}"
        run.note("tests", share.name, "left out", 0, detail=detail)
        return
    begin = time.monotonic()
    record = run.work / f"tests-{share.name.replace(' ', '-')}.jsonl"
    record.unlink(missing_ok=True)
    settings = {
        "RNNKERNELS_TEST_RECORD": str(record),
        "RNNKERNELS_TEST_LIMIT": str(TEST_LIMIT),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools", ROOT / "tests/support"))),
    }
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_limits"]
    command += [TESTS, "-k", share.which]
    outcome = "no test"
    for _ in range(RESTARTS):
        left = SHARE_LIMIT - (time.monotonic() - begin)
        with record.with_suffix(".txt").open("a") as into:
            outcome = run.finish(run.start(command, stdout=into, env=settings), left)
        # Where a process ended in the middle of a test, or because of one, another takes over.
        if outcome not in (f"exit status {pytest_limits.SPOILED}", "ended by SIGALRM"):
            break
    outcomes = pytest_limits.read(record)
    counts = Counter(outcomes.values())
    bad = {test: o for test, o in outcomes.items() if o not in ("passed", "skipped")}
    if not bad and outcome == "passed" and not counts["passed"]:
        outcome = "no test"
    run.append(f"tests {share.name}", record.with_suffix(".txt").read_text(errors="replace"))
    run.note("tests", share.name, outcome, time.monotonic() - begin, counts=counts, bad=bad)


# --- Both -------------------------------------------------------------------------------------


def about() -> dict[str, str]:
    """What ran where, as far as this machine tells."""

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    gpu = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    versions = "import sys, torch; print(sys.version.split()[0], torch.__version__)"
    return {
        "commit": said("git", "describe", "--always", "--dirty") or prepare_gpu.commit(),
        "sources": prepare_gpu.sources(),
        "gpu": gpu,
        "nvcc": said("nvcc", "--version").rsplit("\n", 1)[-1],
        "python, torch": said(PYTHON, "-c", versions),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--call", action="append", choices=SECONDS, help="repeatable; default: first and second"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/validation", help="default: build/validation"
    )
    parser.add_argument("--seconds", type=float, help="of each call (default: 270 and 300)")
    parser.add_argument(
        "--probe", type=Path, help="a probe that was built otherwise, for a GPU or not"
    )
    parser.add_argument("--micro", type=Path, help="the microbenchmarks, likewise")
    args = parser.parse_args()
    args.out = args.out.resolve()
    found = about()
    if not found["gpu"] and args.probe is None:
        print("validate_gpu: nvidia-smi finds no GPU here", file=sys.stderr)
        return 2
    steps: list[dict[str, Any]] = []
    for name in args.call or SECONDS:
        run = Run(
            name, args.out, ROOT / "build/validation-work" / name, args.seconds or SECONDS[name]
        )
        with closing(run):
            run.about |= found
            try:
                {"first": first, "second": second}[name](run, args)
            except Exception as error:  # of many kinds; what was done before it is in the record
                run.append("error", traceback.format_exc())
                run.note("run", "error", f"{type(error).__name__}: {error}", 0)
        steps += run.steps
    return 0 if steps and all(step["outcome"] in GOOD for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
