"""Throws random calls at layers, steps, functions, runners of streams and ops, and judges each.

    python tools/fuzz.py                             # 100 000 inputs, some minutes
    python tools/fuzz.py --count 3000 --seed 7 --quick
    python tools/fuzz.py --seed 7 --only 1234        # one input again, with its traceback
    python tools/fuzz.py --record benchmarks/results/fuzz.json

An input is drawn from its seed and number alone. Most are good calls, in which none, one or some
arguments are exchanged for others: of another size, dtype, device, stride, rank, value or type.
What is accepted is compared with the reference backend, as far as that can run it; what is refused
has to be refused by a TypeError, ValueError, RuntimeError or NotImplementedError whose text names
an argument.

Inputs run in a process of their own: one that ends it, or hangs in it, is a finding, and the next
goes on behind it. In a build with sanitizers (`make fuzz-sanitized`) so is what these report.

Exit status: 0 none found, 1 findings, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]
    if not os.environ.get("PYTHONPATH"):  # else that of a build elsewhere
        sys.path.insert(1, str(ROOT))

import torch  # noqa: E402

from fuzzing import modules, ops  # noqa: E402
from fuzzing.judge import Attempt, Verdict, judged  # noqa: E402
from fuzzing.spoil import Drawn  # noqa: E402
from rnnkernels import build_info  # noqa: E402

KINDS: tuple[Callable[[Drawn, bool], Attempt], ...] = (
    *[modules.layer] * 4, modules.step, modules.function, modules.stream, modules.serving,
    *[ops.forward] * 4, *[ops.backward] * 3, ops.input_gradient,
    ops.products, ops.window, ops.tangents,
)  # fmt: skip
PATIENCE = 120.0  # seconds for one input
MEMORY = 8 << 30  # bytes of addresses beyond what a fresh process has


def attempt(seed: int, number: int, written: bool) -> tuple[Drawn, Attempt]:
    """One input."""
    drawn = Drawn(seed, number)
    return drawn, drawn.pick(*KINDS)(drawn, written)


def tried(seed: int, number: int, written: bool = True) -> tuple[Drawn, Attempt, Verdict]:
    """One input, and what became of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn, made = attempt(seed, number, written)
        return drawn, made, judged(made)


def threads(number: int) -> int:
    """How many run it: mostly one, since more take longer to begin than the call."""
    return 3 if number // 64 % 8 == 7 else 1


def row(number: int, drawn: Drawn, made: Attempt, verdict: Verdict) -> dict[str, Any]:
    found = {"number": number, "kind": verdict.kind, "what": made.what.partition("(")[0]}
    if verdict.about:
        found["about"] = verdict.about
    if verdict.finding:
        found |= {"call": made.what[:600], "done": drawn.done, "trace": verdict.trace}
    return found


def work(args: argparse.Namespace) -> int:
    """The inputs one after the other, a line for each before it runs and after it has."""
    if not os.environ.get("LD_PRELOAD"):  # sanitizers reserve terabytes of addresses
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
    for number in range(args.first, args.first + args.count):
        torch.set_num_threads(threads(number))
        print(number, flush=True)
        verdict = row(number, *tried(args.seed, number, not args.quick))
        print(json.dumps(verdict), flush=True)
    return 0


class Progress:
    """A line that says how far it is, on a terminal; else one now and then."""

    def __init__(self, count: int) -> None:
        self.count, self.began, self.told = count, time.monotonic(), 0.0

    def __call__(self, done: int, findings: int) -> None:
        now = time.monotonic()
        live = sys.stderr.isatty()
        if now - self.told < (0.2 if live else 30) and done < self.count:
            return
        self.told, rate = now, done / max(now - self.began, 1e-9)
        left = (self.count - done) / max(rate, 1e-9)
        bar = "#" * (20 * done // self.count)
        text = f"[{bar:20}] {done}/{self.count}, {rate:.0f}/s, {left:.0f} s left, {findings} found"
        print(f"\r{text}  " if live else text, end="" if live and done < self.count else "\n",
              file=sys.stderr, flush=True)  # fmt: skip


def watched(process: subprocess.Popen[bytes], take: Callable[[str], None]) -> bool:
    """Reads what a worker says; whether it had to be ended, since it said nothing for long."""
    assert process.stdout is not None
    import selectors

    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        buffer = b""
        while True:
            if not selector.select(PATIENCE * (10 if os.environ.get("LD_PRELOAD") else 1)):
                process.send_signal(signal.SIGABRT)
                process.wait()
                return True
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                process.wait()
                return False
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                take(line.decode())


class Tally:
    """The rows of all inputs so far, which several workers add to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows, self.findings = args, list[dict[str, Any]](), 0
        self.lock, self.progress = threading.Lock(), Progress(args.count)

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows.append(row)
            if row["kind"] not in CALM:
                self.findings += 1
                tell(self.args, row)
            self.progress(len(self.rows), self.findings)


def supervise(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every input, as many at a time as there are jobs; rows in the order of their numbers."""
    tally, each = Tally(args), -(-args.count // args.jobs)
    starts = range(args.first, args.first + args.count, each)
    ends = [min(start + each, args.first + args.count) for start in starts]
    with ThreadPoolExecutor(len(starts)) as pool:
        list(pool.map(lambda start, end: supervise_part(args, start, end, tally), starts, ends))
    return sorted(tally.rows, key=lambda row: row["number"])


def supervise_part(args: argparse.Namespace, first: int, end: int, tally: Tally) -> None:
    """Inputs in a worker; a worker that ends early is followed by another."""
    last = first - 1
    while last + 1 < end:
        command = [sys.executable, "-P", __file__, "--worker", "--seed", str(args.seed)]
        command += ["--first", str(last + 1), "--count", str(end - last - 1)]
        command += ["--quick"] if args.quick else []
        started = last

        def take(line: str) -> None:
            nonlocal last
            if line.isdigit():
                last = int(line)
            elif line.startswith("{"):
                tally.add(json.loads(line))

        with open(os.devnull, "w") if not args.log else args.log.open("a") as log:
            process = _start(command, log)
            hung = watched(process, take)
        assert process.stdout is not None
        process.stdout.close()
        if hung or process.returncode != 0:
            if last == started:
                raise SystemExit(f"a worker ended with {process.returncode} before its first input")
            kind = "hang" if hung else f"ended the process: {process.returncode}"
            tally.add({"number": last, "kind": kind, "what": "", "done": []})


def tell(args: argparse.Namespace, finding: dict[str, Any]) -> None:
    quick = " --quick" * args.quick
    print(f"{finding['kind']}: {finding.get('about', '')}", *finding["done"], sep="\n    ")
    print(
        f"  python tools/fuzz.py --seed {args.seed} --only {finding['number']}{quick}", flush=True
    )


CALM = ("accepted", "compared", "refused", "memory")


def _start(command: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, bufsize=0)


def summary(
    args: argparse.Namespace, rows: list[dict[str, Any]], seconds: float, commit: str
) -> dict[str, Any]:
    refusals = Counter(r["about"] for r in rows if r["kind"] == "refused")
    return {
        "format": "fuzz 1",
        "command": f"python tools/fuzz.py --count {args.count} --seed {args.seed}"
        + " --quick" * args.quick
        + f" --jobs {args.jobs}" * (args.jobs > 1),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "build": build_info(),
        "sanitized": bool(os.environ.get("LD_PRELOAD")),
        "seed": args.seed,
        "inputs": len(rows),
        "seconds": round(seconds),
        "kinds": dict(Counter(r["kind"] for r in rows).most_common()),
        "calls": dict(Counter(r["what"] for r in rows).most_common()),
        "refusals": dict(refusals.most_common()),
        "findings": [r for r in rows if r["kind"] not in CALM],
    }


def _commit() -> str:
    """What is run: asked before, since others may work on it while it runs."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def again(args: argparse.Namespace) -> int:
    """One input, by itself."""
    torch.set_num_threads(threads(args.only))
    drawn, made, verdict = tried(args.seed, args.only, not args.quick)
    print(made.what, *drawn.done, f"-> {verdict.kind}: {verdict.about}", verdict.trace, sep="\n  ")
    return int(verdict.finding)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of all of them (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first one's number")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time")
    parser.add_argument("--only", type=int, metavar="N", help="this one alone, in this process")
    parser.add_argument("--quick", action="store_true", help="without cells that are compiled")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was found, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="add what workers say on stderr")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, least in (("count", 1), ("first", 0), ("jobs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if args.worker:
        return work(args)
    if args.only is not None:
        return again(args)
    began, commit = time.monotonic(), _commit()
    rows = supervise(args)
    found = summary(args, rows, time.monotonic() - began, commit)
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(found, indent=1) + "\n")
    kinds = ", ".join(f"{n} {kind}" for kind, n in found["kinds"].items())
    print(f"{found['inputs']} inputs in {found['seconds']} s: {kinds}")
    return int(bool(found["findings"]))


if __name__ == "__main__":
    sys.exit(main())
