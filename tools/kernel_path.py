"""What stands between the barriers, the waits and the messages of a persistent kernel's round.

    python tools/kernel_path.py csrc/cuda/persistent_bfloat16.cu --out FILE

compiles a source for one architecture, or takes a cubin, and counts instructions on the way from
one mark to another in the control flow of its LSTM kernels of eight rows. A way is the shortest
there is, unless it says otherwise: what stands on it, every round has to pass. The record holds
counts for each kernel:

send               from the last barrier before a round is sent to the first message
send_divisions     integer divisions on that way
wait_loads         reads of memory that were asked for before the wait for other blocks, at most
wait_conversions   floating-point instructions between the first of these and the wait, at most:
                   what they convert, a thread has to wait for
cell               from the barrier behind the product to the one before a round is sent, at most
cell_calls         of functions, in the whole kernel: IEEE divisions leave for one in odd cases
cell_branches      conditional branches on the way `cell`
exponentials       in the whole kernel
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from check_cuda import CSRC, find_nvcc, find_nvdisasm
from cubin import Persistent, Step, read_steps

WAITS = ("SYNCS.PHASECHK", "LDG.E.STRONG.GPU")
FLOATS = ("FADD", "FMUL", "FFMA", "IMAD.U32", "HADD2")


def is_send(step: Step) -> bool:
    """A vector of 16 bytes on its way to another block."""
    return step.opcode.startswith("STAS") or step.opcode == "STG.E.128"


@dataclass
class Counts:
    """Of one kernel; see the head of this file."""

    send: int
    send_divisions: int
    wait_loads: int
    wait_conversions: int
    cell: int
    cell_calls: int
    cell_branches: int
    exponentials: int


def shortest(steps: list[Step], start: int, ends: Callable[[Step], bool]) -> list[Step]:
    """The instructions between one and the nearest that `ends` says, along the control flow."""
    came_from = {start: start}
    row = [start]
    for at in row:
        if at != start and ends(steps[at]):
            way = []
            while (at := came_from[at]) != start:
                way.append(steps[at])
            return way[::-1]
        for after in steps[at].next:
            if after not in came_from:
                came_from[after] = at
                row.append(after)
    return []


def longest(steps: list[Step], start: int, end: int, weight: Callable[[Step], int]) -> list[Step]:
    """The heaviest way from one instruction to a later one that never goes back."""
    best: dict[int, tuple[int, int]] = {start: (0, start)}
    for at in range(start, end):
        if at not in best:
            continue
        for after in steps[at].next:
            total = best[at][0] + weight(steps[at])
            if at < after <= end and (after not in best or total > best[after][0]):
                best[after] = total, at
    if end not in best:
        return []
    way, at = [], end
    while (at := best[at][1]) != start:
        way.append(steps[at])
    return way[::-1]


def counted(way: Iterable[Step], *opcodes: str) -> int:
    return sum(step.opcode.startswith(opcodes) for step in way)


def path_of(steps: list[Step]) -> Counts:
    sends = [n for n, step in enumerate(steps) if is_send(step)]
    products = [n for n, step in enumerate(steps) if step.opcode.startswith("HMMA")]
    barriers = [n for n, step in enumerate(steps) if step.opcode.startswith("BAR.")]
    send = next(n for n in sends if n > products[-1])
    before_send = max(n for n in barriers if n < send)
    # A bound by norm has a barrier of its own: from the last that every round meets.
    way = shortest(steps, before_send, is_send)
    product = min(n for n in barriers if n > products[-1])
    left = min(n for n in barriers if n > product)
    cell = longest(steps, product, left, lambda _: 1)
    first = products[0]
    wait = max(n for n, step in enumerate(steps) if n < first and step.opcode.startswith(WAITS))
    start = max(  # of the loop over rounds and tiles
        to for n, step in enumerate(steps) for to in step.next if to < wait and send < n
    )
    loads = longest(steps, start, wait, lambda step: step.opcode.startswith("LDG"))
    begun = next((n for n, step in enumerate(loads) if step.opcode.startswith("LDG")), len(loads))
    return Counts(
        send=len(way),
        send_divisions=counted(way, "I2F"),
        wait_loads=counted(loads, "LDG"),
        wait_conversions=counted(loads[begun:], *FLOATS),
        cell=len(cell),
        cell_calls=counted(steps, "CALL"),
        cell_branches=sum(s.opcode.startswith("BRA") and len(s.next) > 1 for s in cell),
        exponentials=counted(steps, "MUFU.EX2"),
    )


def disassemble(source: Path, arch: str) -> str:
    nvcc = find_nvcc()
    if nvcc is None or (nvdisasm := find_nvdisasm(nvcc)) is None:
        sys.exit("nvcc or nvdisasm not found: see tools/check_cuda.py --help")
    with tempfile.TemporaryDirectory() as folder:
        cubin = source
        if source.suffix == ".cu":
            cubin = Path(folder, "out.cubin")
            command = [nvcc, "-cubin", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
            command += ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}"]
            subprocess.run([*command, "-o", str(cubin), str(source)], check=True)
        done = subprocess.run([nvdisasm, str(cubin)], check=True, capture_output=True, text=True)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a .cu file, or a cubin")
    parser.add_argument("--arch", default="90a", help="default: %(default)s")
    parser.add_argument("--name", default="after", help="of the entry (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file, in which other entries stay")
    args = parser.parse_args()
    found = {}
    for symbol, steps in read_steps(disassemble(args.source, args.arch)).items():
        kernel = Persistent.of(symbol)
        if kernel and kernel.cell == "lstm" and kernel.batch == 1:
            way = "backward" if kernel.backward else "forward"
            found[f"{way} {kernel.family}"] = asdict(path_of(steps))
    record = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    record[args.name] = dict(sorted(found.items()))
    text = json.dumps(record, indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
