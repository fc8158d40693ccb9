"""What stands between the barriers, the waits and the messages of a persistent kernel's round.

    python tools/kernel_path.py csrc/cuda/persistent_bfloat16.cu --out FILE

compiles a source for one architecture, or takes a cubin, and counts instructions on the way from
one mark to another in the control flow of its LSTM kernels of eight rows. A way is the shortest
there is, unless it says otherwise: what stands on it, every round has to pass. The record holds
counts for each kernel:

send               from the last barrier before a round is sent to the first message
send_divisions     integer divisions on that way
signal_barriers    barriers from the first message to what others wait for, if that is another one
signal_fences      fences on that way
wait_loads         reads of memory that were asked for before the wait for other blocks, at most
wait_conversions   floating-point instructions between the first of these and the wait, at most:
                   what they convert, a thread has to wait for
taken_barriers     barriers from what is waited for to the product, at most
taken_copies       waits for copies to shared memory on that way
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

from build_support.cuda import find_nvcc
from check_cuda import CSRC, find_tool
from cubin import Persistent, Step, read_steps

LOOK = "LDG.E.128.STRONG.GPU"  # for a vector that says by itself whether it is there
WAITS = ("SYNCS.PHASECHK", "LDG.E.STRONG.GPU", LOOK)
FLOATS = ("FADD", "FMUL", "FFMA", "IMAD.U32", "HADD2")


def is_send(step: Step) -> bool:
    """A vector of 16 bytes on its way to another block."""
    return step.opcode.startswith(("STAS", "STG.E.128"))


def is_signal(step: Step) -> bool:
    """What others wait for."""
    return step.opcode.startswith("STAS") or (
        step.opcode.startswith("STG") and "STRONG.GPU" in step.opcode
    )


@dataclass
class Counts:
    """Of one kernel; see the head of this file."""

    send: int
    send_divisions: int
    signal_barriers: int
    signal_fences: int
    wait_loads: int
    wait_conversions: int
    taken_barriers: int
    taken_copies: int
    cell: int
    cell_calls: int
    cell_branches: int
    exponentials: int


def is_product(step: Step) -> bool:
    return step.opcode.startswith("HMMA")


def is_barrier(step: Step) -> bool:
    return step.opcode.startswith("BAR.")


def is_wait(step: Step) -> bool:
    return step.opcode.startswith(WAITS)


def is_look(step: Step) -> bool:
    return step.opcode.startswith(LOOK)


def is_early(step: Step) -> bool:
    """A read that may be asked for before the wait."""
    return step.opcode.startswith("LDG") and not is_wait(step)


def shortest(
    steps: list[Step], start: int, ends: Callable[[Step], bool], passes: Callable[[Step], bool]
) -> list[int]:
    """The instructions behind `start` up to the nearest that `ends` says, by those that may be
    passed; empty where there is no such way."""
    came_from = {start: start}
    row = [start]
    for at in row:
        if at != start and ends(steps[at]):
            way = [at]
            while (at := came_from[at]) != start:
                way.append(at)
            return way[::-1]
        if at == start or passes(steps[at]):
            for after in steps[at].next:
                if after not in came_from:
                    came_from[after] = at
                    row.append(after)
    return []


def longest(
    steps: list[Step],
    start: int,
    end: int,
    weight: Callable[[Step], int],
    passes: Callable[[Step], bool],
) -> list[Step]:
    """The heaviest way between two instructions by those that may be passed, around no loop."""
    best: dict[int, tuple[int, int] | None] = {end: (0, end)}
    on_way: set[int] = set()
    stack = [start]
    while stack:
        at = stack[-1]
        if at in best:
            stack.pop()
            continue
        open_to = at == start or passes(steps[at])
        after = [n for n in steps[at].next if n not in on_way] if open_to else []
        if at not in on_way:
            on_way.add(at)
            if missing := [n for n in after if n not in best]:
                stack += missing
                continue
        reached = [(found[0], n) for n in after if (found := best.get(n)) is not None]
        on_way.discard(at)
        best[at] = (max(reached)[0] + weight(steps[at]), max(reached)[1]) if reached else None
        stack.pop()
    way, at = [], start
    while at != end and (found := best[at]) is not None:
        at = found[1]
        way.append(steps[at])
    return way[:-1]


def counted(way: Iterable[Step], *opcodes: str) -> int:
    return sum(step.opcode.startswith(opcodes) for step in way)


def only(name: str, found: list[int]) -> int:
    if len(found) != 1:
        sys.exit(f"expected one {name} in a kernel, found {len(found)}: is this its round?")
    return found[0]


def path_of(steps: list[Step]) -> Counts:
    barriers = [n for n, step in enumerate(steps) if is_barrier(step)]

    def no_barrier(step: Step) -> bool:
        return not is_barrier(step)

    # Of the barriers in front of a send, that of a norm is nearer than the one every round meets.
    sends = {b: shortest(steps, b, is_send, no_barrier) for b in barriers}
    left = max(barriers, key=lambda b: len(sends[b]))
    # The product's barrier leads to that one by a cell.
    cells = {
        b: longest(steps, b, left, lambda _: 1, no_barrier)
        for b in barriers
        if b != left and shortest(steps, b, lambda step: step is steps[left], no_barrier)
    }
    product = only("cell", [b for b, way in cells.items() if counted(way, "MUFU.EX2")])
    cell = cells[product]
    # A stage waits for the one before it, and then for its own blocks.
    waits = {
        n: shortest(steps, n, lambda s: s is steps[product], lambda s: not is_wait(s))
        for n, step in enumerate(steps)
        if is_wait(step)
    }
    if any(is_look(steps[n]) for n in waits):
        waits = {n: way for n, way in waits.items() if is_look(steps[n])}
    wait = min((n for n, way in waits.items() if way), key=lambda n: len(waits[n]))
    send = sends[left][-1]
    # Through the grid a barrier stands behind the send.
    start = send
    if not shortest(steps, send, lambda s: s is steps[wait], no_barrier):
        start = shortest(steps, send, is_barrier, no_barrier)[-1]
    early = longest(steps, start, wait, is_early, no_barrier)
    begun = next((n for n, step in enumerate(early) if is_early(step)), len(early))
    way = [steps[n] for n in sends[left][:-1]]
    signal = [steps[n] for n in shortest(steps, send, is_signal, lambda _: True)]
    if is_signal(steps[send]):
        signal = []
    first = shortest(steps, wait, is_product, lambda s: not is_wait(s))[-1]
    taken = longest(
        steps,
        wait,
        first,
        lambda s: s.opcode.startswith(("BAR.", "LDGDEPBAR")),
        lambda s: not is_wait(s) and s is not steps[product],
    )
    return Counts(
        send=len(way),
        send_divisions=counted(way, "I2F"),
        signal_barriers=counted(signal, "BAR."),
        signal_fences=counted(signal, "MEMBAR"),
        wait_loads=sum(map(is_early, early)),
        wait_conversions=counted(early[begun:], *FLOATS),
        taken_barriers=counted(taken, "BAR."),
        taken_copies=counted(taken, "LDGDEPBAR"),
        cell=len(cell),
        cell_calls=counted(steps, "CALL"),
        cell_branches=sum(s.opcode.startswith("BRA") and len(s.next) > 1 for s in cell),
        exponentials=counted(steps, "MUFU.EX2"),
    )


def disassemble(source: Path, arch: str) -> str:
    nvcc = find_nvcc()
    if nvcc is None or (nvdisasm := find_tool("nvdisasm", nvcc)) is None:
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
