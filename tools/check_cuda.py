"""Compiles csrc/cuda/*.cu for each GPU architecture and checks what the compiler made of it.

A kernel must keep its values in registers (no spills, no stack frame), and no source may include
torch's CUDA headers: the extension is to load beside a torch without CUDA.

Exit status: 0 all good, 1 something found or not compiled, 2 no nvcc on this machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

TORCH_CUDA = re.compile(r'^\s*#\s*include\s*[<"](?:c10|ATen|torch/csrc)/cuda/', re.MULTILINE)
COMPILING = re.compile(r"Compiling entry function '(\S+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Function:
    """What ptxas reports of a kernel or of a device function that was not inlined."""

    symbol: str
    arch: str
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int | None = None
    shared: int = 0

    @property
    def in_registers(self) -> bool:
        return self.stack == self.spill_stores == self.spill_loads == 0


def find_nvcc() -> str | None:
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, os.path.join(home, "bin"))
    return shutil.which("nvcc", path=os.pathsep.join(places))


def torch_cuda_includes(csrc: Path) -> Iterator[str]:
    for path in sorted(csrc.rglob("*")):
        if path.suffix in {".h", ".hpp", ".cuh", ".cpp", ".cu"}:
            text = path.read_text(encoding="utf-8")
            for match in TORCH_CUDA.finditer(text):
                line = text.count("\n", 0, match.end()) + 1
                yield f"{path.relative_to(csrc.parent)}:{line}: includes a CUDA header of torch"


def parse(report: str, arch: str) -> list[Function]:
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
    return list(functions.values())


def compile_one(nvcc: str, source: Path, arch: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v,-warn-spills"]
        command += [f"-I{CSRC}", "-DRNNKERNELS_CUDA", "-o", str(Path(folder, "out.cubin"))]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def short_names(symbols: list[str]) -> dict[str, str]:
    """Names without parameters and without the project's namespaces, where c++filt is there."""
    if not symbols or shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    names = (
        re.sub(r"\(anonymous namespace\)::|\b_GLOBAL__N_\w+::|\brnnkernels::|\bcuda::", "", name)
        for name in done.stdout.splitlines()
    )
    return dict(zip(symbols, names, strict=True))


def print_table(functions: list[Function], width: int) -> None:
    names = short_names(sorted({function.symbol for function in functions}))
    rows = [("kernel", "arch", "registers", "shared", "stack", "spills (st+ld)", "")]
    for f in sorted(functions, key=lambda f: (names[f.symbol], f.arch)):
        name = names[f.symbol]
        rows.append(
            (
                name if len(name) <= width else name[: width - 3] + "...",
                f"sm_{f.arch}",
                "-" if f.registers is None else str(f.registers),
                str(f.shared),
                str(f.stack),
                f"{f.spill_stores}+{f.spill_loads}",
                "" if f.in_registers else "FAIL",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(size) for text, size in zip(rest, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        action="append",
        help="an architecture such as 90a, may be repeated "
        "(default: RNNKERNELS_CUDA_ARCHS, or else 80 and 90a)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1),
        help="compilers at once (default: MAX_JOBS, or else the number of cores)",
    )
    parser.add_argument("--width", type=int, default=64, help="longest name shown (default: 64)")
    args = parser.parse_args()
    archs = args.arch or (os.environ.get("RNNKERNELS_CUDA_ARCHS") or "80;90a").split(";")

    faults = list(torch_cuda_includes(CSRC))
    nvcc = find_nvcc()
    if nvcc is None:
        for fault in faults:
            print(fault, file=sys.stderr)
        print("nvcc not found (CUDA_HOME/bin, PATH, /usr/local/cuda/bin)", file=sys.stderr)
        return 1 if faults else 2

    jobs = [(path, arch) for path in sorted((CSRC / "cuda").glob("*.cu")) for arch in archs]
    functions: list[Function] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda job: compile_one(nvcc, *job), jobs)
        for (path, arch), (status, report) in zip(jobs, results, strict=True):
            where = f"{path.relative_to(ROOT)} for sm_{arch}"
            found = parse(report, arch)
            functions += found
            if status != 0:
                print(report, file=sys.stderr)
                faults.append(f"{where}: nvcc failed")
            else:
                for line in report.splitlines():
                    if "warning" in line.lower():
                        print(f"{where}: {line.strip()}")
    if not functions and not faults:
        faults.append("no kernel found in csrc/cuda/*.cu")

    print_table(functions, args.width)
    spilled = sum(not function.in_registers for function in functions)
    if spilled:
        faults.append(f"{spilled} of {len(functions)} compiled functions use the stack or spill")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
