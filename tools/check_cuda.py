"""Compiles csrc/cuda/*.cu for each GPU architecture and checks what the compiler made of it.

A kernel must keep its values in registers (no spills, no stack frame, no local memory) and may use
no atomics: results have the same bits in every run. A persistent kernel must multiply with the
instructions of its numbers, and a multiprocessor must hold a block of it beside the shared memory
that the plan gives away. No source may include torch's CUDA headers: the extension is to load
beside a torch without CUDA.

Instructions are read by nvdisasm, looked for beside nvcc, in PATH, and in the Python packages
nvidia-cuda-nvdisasm and triton. Code that setup.py has built (--built) is taken out of its objects
by cuobjdump, looked for in the same places.

Exit status: 0 all good, 1 something found or not compiled, 2 no nvcc on this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from cubin import Function, read_assembly, read_report, read_usage, short_names

sys.path.append(str(Path(__file__).resolve().parents[1]))

from build_support import libraries
from build_support.cuda import EVERY_ARCH, PLACES, find_nvcc

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

TORCH_CUDA = re.compile(r'^\s*#\s*include\s*[<"](?:c10|ATen|torch/csrc)/cuda/', re.MULTILINE)

#: What a warp multiplies with; IEEE products of float32 have no such instruction.
TENSOR_CORE = {
    "bfloat16": {"HMMA.16816.F32.BF16"},
    "float16": {"HMMA.16816.F32"},
    "tf32": {"HMMA.1688.F32.TF32"},
    "float32": set[str](),
}
LOCAL_MEMORY = re.compile(r"(?:LDL|STL)\b")
STORAGE = ("float", "bfloat16", "float16")
BRIEF_CELL = "LSTM"
ATOMIC = re.compile(r"U?(?:ATOM|RED(?!UX)|BLKRED)")
REGISTERS = 65536  # of a multiprocessor, since sm_80; given out to warps in units of 8 per thread
#: Seconds of processor time; three times what two architectures took with nvcc 13.0.
LIMIT = 660.0


def torch_cuda_includes(csrc: Path) -> Iterator[str]:
    for path in sorted(csrc.rglob("*")):
        if path.suffix in {".h", ".hpp", ".cuh", ".cpp", ".cu"}:
            text = path.read_text(encoding="utf-8")
            for match in TORCH_CUDA.finditer(text):
                line = text.count("\n", 0, match.end()) + 1
                yield f"{path.relative_to(csrc.parent)}:{line}: includes a CUDA header of torch"


def find_tool(name: str, nvcc: str) -> str | None:
    """A program of the toolkit: beside nvcc, in PATH, or in a Python package that brings it."""
    places = [str(Path(nvcc).resolve().parent), os.environ.get("PATH", "")]
    for package, below in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)  # does not import it
        for folder in (spec and spec.submodule_search_locations) or ():
            places += map(str, sorted(Path(folder).glob(below)))
    return shutil.which(name, path=os.pathsep.join(places))


@dataclass
class Compiled:
    """What became of one source on one architecture."""

    where: str
    functions: list[Function]
    seconds: float  # of processor time
    report: str
    failure: str = ""  # the program that did not come to a good end


def compile_one(
    nvcc: str, nvdisasm: str | None, source: Path, arch: str, cell: str = ""
) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "out.cubin"))
        command = [nvcc, "-cubin", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v,-warn-spills"]
        command += [f"-I{CSRC}", "-DRNNKERNELS_CUDA", "-o", cubin, str(source)]
        command += [f"-DRNNKERNELS_CUDA_CELL={cell}"] if cell else []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            report = process.stdout.read()
            # Its own and its children's: what a busy machine does besides does not count.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        functions = read_report(report, arch)
        name = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source.name
        compiled = Compiled(
            f"{name} for sm_{arch}" + (f", {cell} alone" if cell else ""),
            list(functions.values()),
            usage.ru_utime + usage.ru_stime,
            report,
        )
        if process.returncode != 0:
            compiled.failure = "nvcc"
        elif nvdisasm is not None:
            disassemble(nvdisasm, cubin, functions, compiled)
    return compiled


def disassemble(
    nvdisasm: str, cubin: str, functions: dict[str, Function], compiled: Compiled
) -> None:
    done = subprocess.run([nvdisasm, cubin], capture_output=True, text=True)
    if done.returncode != 0:
        compiled.failure, compiled.report = "nvdisasm", done.stdout + done.stderr
    read_assembly(done.stdout, functions)


def take_out(cuobjdump: str, nvdisasm: str, built: Path, source: Path) -> dict[str, Compiled]:
    """What is in an object, by architecture."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump, "-xelf", "all", str(built.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = cubin.name.split(".")[-2].removeprefix("sm_")
            usage = subprocess.run(
                [cuobjdump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
            )
            functions = read_usage(usage.stdout, arch)
            where = f"{source.relative_to(ROOT)} for sm_{arch}, as built"
            found[arch] = Compiled(where, list(functions.values()), 0.0, "")
            disassemble(nvdisasm, str(cubin), functions, found[arch])
    return found


def built_objects() -> dict[Path, Path]:
    """By source, what setup.py has made; empty where any of it is out of date."""
    folder = libraries.build_folder()
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    made = {source: folder / libraries.cuda_object(source) for source in sources}
    command = [sys.executable, "-m", "ninja", "-n", "-f", str(folder / "build.ninja")]
    done = subprocess.run(
        [*command, *map(str, made.values())], cwd=ROOT, capture_output=True, text=True
    )
    return {s: ROOT / o for s, o in made.items()} if "no work to do" in done.stdout else {}


def as_built(nvcc: str, nvdisasm: str | None) -> dict[tuple[Path, str], Compiled]:
    """What need not be compiled again, by source and architecture; says why where that is
    nothing."""
    cuobjdump = find_tool("cuobjdump", nvcc)
    if nvdisasm is None or cuobjdump is None:
        print("without cuobjdump and nvdisasm all is compiled again", file=sys.stderr)
        return {}
    objects = built_objects()
    if not objects:
        print("build/ext has no objects that are up to date: all is compiled again")
    return {
        (source, arch): compiled
        for source, built in objects.items()
        for arch, compiled in take_out(cuobjdump, nvdisasm, built, source).items()
    }


def wrong_instructions(f: Function, tf32: Function | None) -> Iterator[str]:
    """What must not be in a function, and what is missing; `tf32`: the same kernel in TF32."""
    for name in sorted(f.instructions):
        if LOCAL_MEMORY.match(name):
            yield f"reads or writes local memory ({name})"
        if ATOMIC.match(name):
            yield f"has an atomic operation ({name})"
    if (kernel := f.kernel) is None:
        return
    if kernel.family == "cluster" and int(re.sub(r"\D", "", f.arch)) < 90:
        return  # there are no clusters: the kernel is empty
    found = {name for name in f.instructions if name.startswith("HMMA")}
    if found != (wanted := TENSOR_CORE[kernel.numbers]):
        yield f"multiplies with {sorted(found) or 'no HMMA'}, not {sorted(wanted) or 'FFMA alone'}"
    if kernel.numbers == "float32":
        # Cells have FFMA too: the product's own come on top of those that its twin has.
        others = tf32.count("FFMA") if tf32 else 0
        if f.count("FFMA") <= others or not tf32:
            yield f"has {f.count('FFMA')} FFMA, no more than the {others} of the same in TF32"
    if f.threads is None:
        yield "has no launch bounds"
    elif f.registers is not None and (f.registers + 7) // 8 * 8 * f.threads > REGISTERS:
        yield f"{f.threads} threads with {f.registers} registers do not fit on a multiprocessor"


def faults_of(functions: list[Function], instructions: bool) -> Iterator[str]:
    names = short_names(sorted({f.symbol for f in functions}))
    kernels = {(f.arch, f.kernel): f for f in functions if f.kernel}
    if not kernels:
        yield "no persistent kernel found in csrc/cuda/*.cu"
    for f in functions:
        kernel, wrong = f.kernel, []
        if not f.in_registers:
            wrong.append("uses the stack or spills")
        if kernel and f.shared:
            wrong.append(
                f"has {f.shared} bytes of static shared memory, but the plan gives away all"
            )
        if instructions:
            tf32 = kernels.get((f.arch, kernel._replace(numbers="tf32"))) if kernel else None
            wrong += wrong_instructions(f, tf32)
        yield from (f"sm_{f.arch}: {names[f.symbol]} {what}" for what in wrong)


def print_table(functions: list[Function], width: int) -> None:
    names = short_names(sorted({function.symbol for function in functions}))
    head = ("kernel", "arch", "registers", "shared", "stack", "spills (st+ld)", "HMMA", "FFMA")
    rows: list[tuple[str, ...]] = [head]
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
                *(str(f.count(opcode)) if f.instructions else "-" for opcode in ("HMMA", "FFMA")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(size) for text, size in zip(rest, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def print_times(results: list[Compiled], limit: float) -> Iterator[str]:
    """Prints what nvcc took; a fault where that is too much."""
    total = sum(result.seconds for result in results)
    print("\nseconds of nvcc, processor time")
    for result in results:
        print(f"{result.seconds:7.1f}  {result.where}")
    print(f"{total:7.1f}  in all, of {limit:g} allowed")
    if total > limit:
        yield f"nvcc took {total:.1f} s of processor time, more than the {limit:g} of --limit"


def brief(text: str) -> tuple[str, str]:
    """The stem of a source and the architecture that it is compiled for."""
    arch, _, storage = text.partition("=")
    if (storage or "bfloat16") not in STORAGE:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(STORAGE)}, got {storage!r}")
    return f"persistent_{storage or 'bfloat16'}", arch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        action="append",
        help="an architecture such as 90a, may be repeated, or all that wheels have "
        "(default: RNNKERNELS_CUDA_ARCHS, or else 80 and 90a)",
    )
    parser.add_argument(
        "--brief",
        action="append",
        default=[],
        type=brief,
        metavar="ARCH[=TYPE]",
        help="an architecture for which the LSTM's kernels of one storage type alone are compiled, "
        "those with the most gates: float, bfloat16 (if it is left out) or float16; repeatable",
    )
    parser.add_argument(
        "--cells",
        action="append",
        default=[],
        metavar="ARCH",
        help="an architecture for which the written cells that the package brings are compiled as "
        "well, in float32 and bfloat16, as they would be on first use; repeatable",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1),
        help="compilers at once (default: MAX_JOBS, or else the number of cores)",
    )
    parser.add_argument("--width", type=int, default=64, help="longest name shown (default: 64)")
    parser.add_argument(
        "--instructions",
        action="store_true",
        help="fail where there is no nvdisasm (default: say so, and check without)",
    )
    parser.add_argument(
        "--built",
        action="store_true",
        help="look into the objects in build/ext in place of compiling again, where setup.py has "
        "built for one of the architectures, and they are up to date",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="SECONDS",
        help="of processor time that nvcc may take for all sources and architectures together "
        "(default: %(default)g, three times what was measured)",
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write the table of docs/compiled_kernels.md; needs nvdisasm and a built rnnkernels",
    )
    args = parser.parse_args()
    if args.markdown and args.brief:
        parser.error("--markdown needs the kernels of all storage types: leave out --brief")
    return args


def main() -> int:
    args = arguments()
    archs = args.arch or (os.environ.get("RNNKERNELS_CUDA_ARCHS") or "80;90a").split(";")
    if archs == ["all"]:
        archs = list(EVERY_ARCH)

    faults = list(torch_cuda_includes(CSRC))
    nvcc = find_nvcc()
    if nvcc is None:
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"nvcc not found ({PLACES})", file=sys.stderr)
        return 1 if faults else 2
    nvdisasm = find_tool("nvdisasm", nvcc)
    if nvdisasm is None:
        print("nvdisasm not found (see --help): instructions are not checked", file=sys.stderr)
        if args.instructions or args.markdown:
            return 1

    sources = sorted((CSRC / "cuda").glob("*.cu"))
    jobs = [(path, arch, "") for path in sources for arch in archs]
    jobs += [(CSRC / "cuda" / f"{stem}.cu", arch, BRIEF_CELL) for stem, arch in args.brief]
    known = as_built(nvcc, nvdisasm) if args.built else {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        if args.cells:
            from cells_in_one import BROUGHT, cuda_source  # which takes them from the package

            written = Path(folder, "written_cells.cu")
            written.write_text(cuda_source(BROUGHT, ("float", "BFloat16")), encoding="utf-8")
            jobs += [(written, arch, "") for arch in args.cells]
        results = list(
            pool.map(lambda job: known.get(job[:2]) or compile_one(nvcc, nvdisasm, *job), jobs)
        )
    for result in results:
        if result.failure:
            print(result.report, file=sys.stderr)
            faults.append(f"{result.where}: {result.failure} failed")
        for line in result.report.splitlines():
            if "warning" in line.lower():
                print(f"{result.where}: {line.strip()}")

    functions = [f for result in results for f in result.functions]
    print_table(functions, args.width)
    faults += print_times(results, args.limit)
    faults += faults_of(functions, nvdisasm is not None)
    for fault in faults:
        print(fault, file=sys.stderr)
    if args.markdown and not faults:
        from kernel_table import document  # which takes the plan from the package

        args.markdown.write_text(document(functions, nvcc), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
