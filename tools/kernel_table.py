"""docs/compiled_kernels.md: what the persistent kernels take of a multiprocessor."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cubin import Function

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_estimates import CELLS, PRECISIONS, SIZES, STACKS, STEPS
from rnnkernels._backends.cuda_plan import DEVICES, Plan, plan

PASSES = ("forward", "backward")
NUMBERS = ("bfloat16", "float16", "tf32", "float32")

TEXT = """\
# The persistent kernels as compiled

Written by

    {command}

with nvcc {version}. CI compiles the kernels again, and fails where one spills, uses local
memory or an atomic operation, has static shared memory, does not multiply as its numbers ask for,
or does not fit on a multiprocessor. It does not rewrite this page.

## Registers and instructions

Registers of a thread · HMMA (products on tensor cores) · FFMA (float32 multiply-adds), counted in
the text of the kernel, however often they run. A range spans tiles of 8 and 16 rows. A block has
{threads} threads. Bytes of stack, spills and static shared memory of all {count} kernels: {memory}.

{kernels}

## The way of a round

Instructions of the LSTM kernels in bfloat16 for sm_90a, tiles of 8 rows, as counted by

    python tools/kernel_path.py csrc/cuda/persistent_bfloat16.cu --out {path_record}

*Send* is the shortest way from the last barrier to the first message, what every round passes;
*signal* goes on to what others wait for, a message or a flag; *taken* is the way from what a block
waits for to its product; *cell* the longest from the barrier behind the product to the next, for
two pairs of a unit and a row, with every option. *Read early* are the loads that are asked for
before the wait, at most, and what converts or adds there, for which a warp may have to stand still.
From commit 0459832 to commit 8db740f, where the grid handed on by flags, to now.

{paths}

## Shared memory

KiB of dynamic shared memory of a block, of the {limit:.0f} that it may have on an H100, as
[the plan](performance/gpu.md) lays out layers of one direction:
forward / backward. A dash runs step by step.

{shared}

Of stacks, whose layers run at the same time where a number stands before the family:

{stacks}
"""


def markdown(rows: Iterable[Iterable[str]]) -> str:
    first, *rest = ([*row] for row in rows)
    lines = [first, ["---"] * len(first), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return f"{ordered[0]}–{ordered[-1]}" if len(ordered) > 1 else str(ordered[0])


def kernel_table(functions: list[Function]) -> str:
    """A line per cell, pass and numbers; numbers that share one stand together."""
    places: dict[tuple[str, str], dict[tuple[str, bool, str], list[Function]]] = {}
    for f in functions:
        if k := f.kernel:
            of_place = places.setdefault((f.arch, k.family), {})
            of_place.setdefault((k.cell, k.backward, k.numbers), []).append(f)
    lines: dict[tuple[str, ...], list[str]] = {}
    for cell in ("rnn", *CELLS):
        for backward in (False, True):
            for numbers in NUMBERS:
                line = [cell, PASSES[backward]]
                for place in sorted(places):
                    found = places[place][cell, backward, numbers]
                    parts = (
                        [f.registers or 0 for f in found],
                        *([f.count(opcode) for f in found] for opcode in ("HMMA", "FFMA")),
                    )
                    line.append(" · ".join(map(span, parts)))
                lines.setdefault(tuple(line), []).append(numbers)
    heads = [f"sm_{arch}, {family}" for arch, family in sorted(places)]
    return markdown(
        [
            ["cell", "pass", "numbers", *heads],
            *([cell, way, ", ".join(n), *rest] for (cell, way, *rest), n in lines.items()),
        ]
    )


def shared_table(sizes: Sequence[tuple[int, int, int]]) -> str:
    """Of stacks of so many layers, B and H."""
    rows = [["cell", "layers", "B, H", *PRECISIONS]]
    for cell in CELLS:
        for layers, B, H in sizes:
            row = [cell, str(layers), f"{B}, {H}"]
            for precision in PRECISIONS:
                plans = [
                    plan(
                        cell, backward, precision, H, B, 1, DEVICES["H100"],
                        layers=layers, steps=STEPS,
                    )
                    for backward in (False, True)
                ]  # fmt: skip
                row.append(" / ".join(map(shared, plans)))
            rows.append(row)
    return markdown(rows)


ROOT = Path(__file__).resolve().parents[1]
PATH_RECORD = Path("docs/kernel_path.json")
PATH_ROWS = {
    "send": "send: instructions",
    "send_divisions": "send: integer divisions",
    "signal_barriers": "signal: barriers",
    "signal_fences": "signal: fences",
    "taken_barriers": "taken: barriers",
    "taken_copies": "taken: waits for copies",
    "wait_loads": "read early: loads",
    "wait_conversions": "read early: conversions and additions before the wait",
    "cell": "cell: instructions",
    "cell_branches": "cell: branches",
    "cell_calls": "calls of functions",
    "exponentials": "exponentials, in the text",
}


def path_table() -> str:
    """Counts of kernel_path.py, one after the other, of each kernel of its record."""
    record = json.loads((ROOT / PATH_RECORD).read_text())
    entries = [record[name] for name in ("before", "flags", "after")]
    kernels = sorted(entries[-1])
    rows = [["count", *kernels]]
    for key, name in PATH_ROWS.items():
        found = ([entry[k].get(key, "–") for entry in entries] for k in kernels)
        rows.append([name, *(" → ".join(map(str, counts)) for counts in found)])
    return markdown(rows)


def shared(p: Plan) -> str:
    if p.reason:
        return "–"
    at_once = f"{p.stages} x " if p.stages > 1 else ""
    return f"{p.shared_bytes / 1024:.1f} {at_once}{p.family}"


def document(functions: list[Function], nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"\bV(\d[\d.]+)", done.stdout)
    # Where there are no clusters, their kernels are empty.
    kernels = [f for f in functions if f.kernel and f.count("FFMA")]
    memory = sorted(
        {n for f in kernels for n in (f.stack, f.spill_stores, f.spill_loads, f.shared)}
    )
    return TEXT.format(
        command=shlex.join(["python", *sys.argv]),
        version=version[1] if version else "of an unknown version",
        threads=span(f.threads for f in kernels if f.threads),
        memory=span(memory),
        count=len(kernels),
        kernels=kernel_table(kernels),
        path_record=PATH_RECORD,
        paths=path_table(),
        limit=DEVICES["H100"].shared_bytes / 1024,
        shared=shared_table([(1, B, H) for B, H in SIZES]),
        stacks=shared_table(STACKS),
    )
