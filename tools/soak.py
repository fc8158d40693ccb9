"""Runs a server of streams for long, short of memory, and with processes killed beneath it.

    python tools/soak.py                        # some minutes
    python tools/soak.py --chunks 2000 --kills 1
    python tools/soak.py --record benchmarks/results/soak.json

serve   threads run chunks of streams of their own, alone and in batches, while weights are loaded
        anew beneath them; then weights rest, and every stream has to go on as the layer does. The
        memory of the process may grow by no more than --growth MiB after the first fifth.
memory  a process that may not have more addresses calls layers of more and more units until one is
        refused: by an error that says so, after which small calls are right.
kill    processes that compile a cell are killed on their way, each a little later; the next one
        finds a cache folder that it can use, and the right numbers.

Exit status: 0 all held, 1 something did not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and not os.environ.get("PYTHONPATH"):
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import rnnkernels as rk  # noqa: E402
from rnnkernels.streaming import StreamRunner  # noqa: E402

I, H = 12, 48


def resident() -> float:
    """MiB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class Server:
    """A layer, its streams, and the threads that use them."""

    def __init__(self, kind: str, streams: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.layer = getattr(rk, kind)(I, H, num_layers=2).eval()
        self.other = {k: v * 0.9 for k, v in self.layer.state_dict().items()}
        self.first = {k: v.clone() for k, v in self.layer.state_dict().items()}
        self.runner = StreamRunner(self.layer)
        self.streams, self.done, self.faults = streams, 0, list[str]()
        self.lock = threading.Lock()

    def work(self, thread: int, threads: int, chunks: int) -> None:
        """Chunks of this thread's streams; some are closed and begin again."""
        rng = random.Random(thread)
        own = [n for n in range(self.streams) if n % threads == thread]
        try:
            for _ in range(chunks):
                if rng.random() < 0.3:
                    picked = rng.sample(own, min(4, len(own)))
                    ys = self.runner.batch({n: torch.randn(rng.randrange(6), I) for n in picked})
                else:
                    n = rng.choice(own)
                    ys = {n: self.runner(n, torch.randn(rng.randrange(1, 6), I))}
                if not all(bool(y.isfinite().all()) for y in ys.values()):
                    raise AssertionError("numbers that are not finite")
                if rng.random() < 0.02:
                    self.runner.close(next(iter(ys)))
                with self.lock:
                    self.done += 1
        except BaseException as error:
            self.faults.append(f"thread {thread}: {error!r}")

    def agree(self) -> float:
        """How far streams are from a call of the layer over the same steps; weights rest."""
        worst = 0.0
        for n in list(self.runner):
            x = torch.randn(7, I)
            before = self.runner.state(n)
            hx = (
                before.unsqueeze(1)
                if isinstance(before, torch.Tensor)
                else tuple(s.unsqueeze(1) for s in before)
            )
            with torch.no_grad():
                want = self.layer(x.unsqueeze(1), hx)[0].squeeze(1)
            got = torch.cat([self.runner(n, x[:3]), self.runner(n, x[3:])])
            worst = max(worst, float((got - want).abs().max()))
        return worst


def serve(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Threads x streams x reloads."""
    torch.set_num_threads(1)
    rows = []
    for kind in ("LSTM", "GRU"):
        server = Server(kind, args.streams, args.seed)
        each = args.chunks // args.threads // 2
        threads = [
            threading.Thread(target=server.work, args=(t, args.threads, each), daemon=True)
            for t in range(args.threads)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        total, reloads, after_warmup = each * args.threads, 0, 0.0
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.005)
            # Every so many chunks, so that there are as many however fast it is.
            if server.done * args.reloads >= reloads * total:
                server.layer.load_state_dict(server.other if reloads % 2 else server.first)
                reloads += 1
            if not after_warmup and server.done * 5 >= total:
                after_warmup = resident()
                tell(f"serve {kind}: {server.done} chunks, {after_warmup:.0f} MiB")
        growth, worst = resident() - after_warmup, server.agree()
        rows.append(
            {
                "layer": kind, "threads": args.threads, "streams": args.streams,
                "chunks": server.done, "reloads": reloads,
                "seconds": round(time.monotonic() - began, 1), "growth_mib": round(growth, 2),
                "off_by": worst, "faults": server.faults,
                "held": not server.faults and growth <= args.growth and worst < 1e-5,
            }
        )  # fmt: skip
        tell(f"serve {kind}: {server.done} chunks, {reloads} reloads, grew by {growth:.1f} MiB")
    return {"rows": rows, "held": all(row["held"] for row in rows)}


SHORT_OF_MEMORY = """
    import json, resource, sys, torch, rnnkernels as rk
    torch.manual_seed(0)
    small, x = rk.LSTM(3, 4), torch.randn(5, 2, 3)
    want, _ = small(x)
    torch.set_num_threads(2)
    rk.LSTM(8, 64)(torch.randn(9, 4, 8))[0].sum().backward()  # threads are there
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (int(sys.argv[1]) << 20),) * 2)
    calls = refused = 0
    kinds, clear = set(), True
    for kind in ("LSTM", "GRU", "RNN"):
        for units in range(64, 4096, 64):
            try:
                layer = getattr(rk, kind)(units, units)
                layer(torch.randn(64, 8, units))[0].sum().backward()
                calls += 1
            except (RuntimeError, MemoryError) as error:
                refused += 1
                kinds.add(type(error).__name__)
                text = str(error)
                clear = clear and ("memory" in text or "alloc" in text)
                layer = error = None
                if refused % 8 == 0:
                    break
            got, _ = small(x)
            assert torch.equal(got, want)
    print(json.dumps({"calls": calls, "refused": refused, "by": sorted(kinds), "clear": clear}))
"""


def program(text: str, *argv: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs this text."""
    command = [sys.executable, "-c", textwrap.dedent(text), *argv]
    surroundings = {**os.environ, **environment}
    surroundings["PYTHONPATH"] = os.environ.get("PYTHONPATH") or str(ROOT)
    return subprocess.Popen(
        command, env=surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def memory(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Layers of more and more units where memory ends."""
    process = program(SHORT_OF_MEMORY, str(args.memory))
    said, errors = process.communicate(timeout=args.patience)
    found: dict[str, Any] = {"limit_mib": args.memory, "exit": process.returncode}
    if process.returncode == 0:
        found |= json.loads(said)
    else:
        found["said"] = errors[-800:]
    found["held"] = bool(found.get("refused") and found["clear"])
    tell(f"memory: {found}")
    return found


COMPILES = """
    import torch, rnnkernels as rk

    @rk.cell
    def soaked(a, b, *, h):
        a = torch.sigmoid(a)
        return a * h + (1 - a) * torch.tanh(b.x + a * b.h)

    torch.manual_seed(0)
    layer = rk.layer(soaked)(3, 4)
    x = torch.randn(5, 2, 3)
    with rk.use_backend("reference"):
        want, _ = layer(x)
    print("begins", flush=True)
    with rk.use_backend("cpu"):
        got, _ = layer(x)
    assert (got - want).abs().max() < 1e-5, got - want
    print("right", flush=True)
"""


def kill(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Processes killed while they compile a cell, and one that is left to do so."""
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        for n in range(args.kills):
            process = program(COMPILES, XDG_CACHE_HOME=folder)
            assert process.stdout is not None
            process.stdout.readline()  # it begins
            time.sleep(0.05 + 1.5 * n)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
            process.communicate()
        process = program(COMPILES, XDG_CACHE_HOME=folder)
        said, errors = process.communicate(timeout=args.patience)
        right = process.returncode == 0 and said.split() == ["begins", "right"]
        again = program(COMPILES, XDG_CACHE_HOME=folder)  # loads what the one before has left
        loaded = again.communicate(timeout=args.patience)
        right = right and again.returncode == 0 and "compiled" not in loaded[1]
    found = {"killed": killed, "held": right} | ({} if right else {"said": errors[-800:]})
    tell(f"kill: {found}")
    return found


PARTS = {"serve": serve, "memory": memory, "kill": kill}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--threads", type=int, default=4, help="that serve (default: 4)")
    add("--streams", type=int, default=200, help="that they share (default: 200)")
    add("--chunks", type=int, default=200_000, help="in all (default: 200000)")
    add("--reloads", type=int, default=500, help="of weights, for each layer (default: 500)")
    add("--growth", type=float, default=8.0, help="MiB that memory may grow by (default: 8)")
    add("--memory", type=int, default=300, help="MiB of addresses to spare (default: 300)")
    add("--kills", type=int, default=6, help="of processes that compile (default: 6)")
    add("--patience", type=float, default=600, help="seconds for a process (default: 600)")
    add("--seed", type=int, default=0, help="of weights (default: 0)")
    add("--record", type=Path, metavar="FILE", help="write what was found, as JSON")
    args = parser.parse_args()
    unknown = sorted({*args.parts} - {*PARTS})
    if unknown or args.threads < 1 or args.streams < args.threads:
        parser.error(
            f"expected parts of {', '.join(PARTS)}, and a stream or more for each thread, got "
            f"{', '.join(unknown) or f'{args.streams} streams for {args.threads} threads'}"
        )

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = {name: PARTS[name](args, tell) for name in PARTS if name in args.parts}
    record = {
        "format": "soak 1",
        "command": " ".join(["python tools/soak.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "build": rk.build_info(),
        **found,
    }
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    held = all(part["held"] for part in found.values())
    print("all held" if held else "something did not hold", json.dumps(found))
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
