"""What the compiler made of a kernel: the report of ptxas, or what cuobjdump has of the same in an
object; and the disassembly by nvdisasm."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

COMPILING = re.compile(r"Compiling entry function '(\S+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

SECTION = re.compile(r"\s*\.section\s+(?:\.(?:text|nv\.info)\.(\S+?),)?")
ATTRIBUTE = re.compile(r"\s*//-+ nvinfo : EIATTR_(\w+)")
WORD = re.compile(r"\s*/\*[0-9a-f]+\*/\s+\.word\s+(0x[0-9a-f]+)$")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")

PERSISTENT = re.compile(
    r"(?P<pass_>Forward|Backward)PassINS_(?P<length>\d+)(?P<cell>\w+?PersistentBlockI)"
    r"\w+?(?P<exchange>Cluster|Grid)ExchangeELi(?P<batch>\d+)E"
)


class Persistent(NamedTuple):
    """Which of the kernels of persistent.cuh."""

    cell: str  # "rnn" stands for the three that share a kernel
    backward: bool
    numbers: str  # a dtype, or "tf32"
    family: str
    batch: int  # eights of rows in a tile

    @classmethod
    def of(cls, symbol: str) -> Persistent | None:
        """By its mangled name; None where it is another kernel."""
        found = PERSISTENT.search(symbol)
        if found is None:
            return None
        names = {"BFloat16": "bfloat16", "7Float16": "float16", "TF32": "tf32"}
        numbers = next((n for part, n in names.items() if part in found[0]), "float32")
        name = found["cell"][: int(found["length"])]
        cell = {"OneOf": "rnn"}.get(name, name.lower())
        family = found["exchange"].lower()
        return cls(cell, found["pass_"] == "Backward", numbers, family, int(found["batch"]))


@dataclass
class Function:
    """A kernel, or a device function that was not inlined."""

    symbol: str
    arch: str
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int | None = None
    shared: int = 0  # static
    threads: int | None = None  # of a block, at most; None where the kernel does not say
    instructions: Counter[str] = field(
        default_factory=Counter
    )  # with modifiers: HMMA.1688.F32.TF32

    @property
    def in_registers(self) -> bool:
        return self.stack == self.spill_stores == self.spill_loads == 0

    @property
    def kernel(self) -> Persistent | None:
        return Persistent.of(self.symbol)

    def count(self, opcode: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] == opcode)


def read_report(report: str, arch: str) -> dict[str, Function]:
    """Functions by symbol, from what `ptxas -v` says."""
    functions: dict[str, Function] = {}
    entry = described = Function("?", arch)
    for line in report.splitlines():
        if match := COMPILING.search(line):
            entry = described = functions.setdefault(match[1], Function(match[1], arch))
        elif match := PROPERTIES.search(line):
            described = functions.setdefault(match[1], Function(match[1], arch))
        elif match := MEMORY.search(line):
            described.stack, described.spill_stores, described.spill_loads = map(
                int, match.groups()
            )
        elif match := REGISTERS.search(line):
            entry.registers = int(match[1])
            if match := SHARED.search(line):
                entry.shared = int(match[1])
    return functions


def read_usage(usage: str, arch: str) -> dict[str, Function]:
    """The same from what `cuobjdump -res-usage` says of an object: spills are part of its stack."""
    return {
        symbol: Function(symbol, arch, int(stack) + int(local), 0, 0, int(registers), int(shared))
        for symbol, registers, stack, shared, local in USAGE.findall(usage)
    }


def read_assembly(text: str, functions: dict[str, Function]) -> None:
    """Adds instructions and launch bounds from what `nvdisasm` prints of the same cubin."""
    function: Function | None = None
    attribute, words = "", [1]
    for line in text.splitlines():
        if match := SECTION.match(line):
            function, attribute = functions.get(match[1]), ""
        elif function is None:
            continue
        elif match := ATTRIBUTE.match(line):
            attribute, words = match[1], []
        elif match := WORD.match(line):
            words.append(int(match[1], 16))
            if attribute == "MAX_THREADS":
                function.threads = prod(words)
        elif match := INSTRUCTION.match(line):
            function.instructions[match[1]] += 1


@dataclass
class Step:
    """An instruction, and the places in its function's list of those that may follow it."""

    opcode: str
    next: list[int]


LABEL = re.compile(r"(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
GUARD = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+)\s")
#: Where no instruction follows.
ENDS = ("EXIT", "RET", "BPT")


def read_steps(text: str) -> dict[str, list[Step]]:
    """The control flow of each kernel, of what `nvdisasm` prints. A call is followed by what stands
    behind it."""
    functions: dict[str, list[Step]] = {}
    for section in text.split("\t.section\t.text.")[1:]:
        symbol = section.split(",", 1)[0]
        labels: dict[str, int] = {}
        lines: list[str] = []
        for line in section.splitlines():
            if match := LABEL.match(line):
                labels[match[1]] = len(lines)
            elif INSTRUCTION.match(line):
                lines.append(line)
        steps = []
        for n, line in enumerate(lines):
            match = INSTRUCTION.match(line)
            assert match is not None
            opcode, guarded = match[1], GUARD.match(line) is not None
            target = TARGET.search(line)
            follows = [n + 1] if n + 1 < len(lines) else []
            if opcode.startswith(("BRA", "BRX")) and target:
                # A branch that asks all lanes (BRA.DIV, BRA.U.ANY) has its condition in itself.
                also = guarded or opcode != "BRA" or "," in line.split("BRA", 1)[1]
                follows = [labels[target[1]], *(follows if also else [])]
            elif opcode.startswith(ENDS) and not guarded:
                follows = []
            steps.append(Step(opcode, follows))
        functions[symbol] = steps
    return functions


def short_names(symbols: list[str]) -> dict[str, str]:
    """Names without parameters and without the project's namespaces, where c++filt is there."""
    if not symbols or shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = (
        re.sub(r"\(anonymous namespace\)::|\b_GLOBAL__N_\w+::|\brnn::|\bcuda::", "", name)
        for name in done.stdout.splitlines()
    )
    return dict(zip(symbols, names, strict=True))
