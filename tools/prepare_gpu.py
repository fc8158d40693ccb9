"""Builds what validation on a GPU needs (tools/validate_gpu.py), on a machine that has none.

    make validate-gpu-prepare PYTHON=python3.12 GPU_TORCH=torch==2.11.0

For a Python and a torch like those beside the GPU, and its architecture: the extension, the probe
(tools/probe) and the microbenchmarks. They lie in build/gpu and, the extension, in rnnkernels/; the
last lines say how much that is.

Exit status: 0 built, 1 something was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import probing
from timed_run import ROOT, Run

sys.path.append(str(ROOT))

from build_support import libraries
from build_support.torches import torches

FOLDER = ROOT / "build/gpu"
OBJECTS = ROOT / "build/gpu-objects"
MADE = FOLDER / "made.json"
BUILD_LIMIT = 150  # seconds, on the machine with the GPU and its many cores


def sources() -> str:
    """A digest of what is compiled: tells what was built for another state of the tree."""
    paths = [ROOT / "setup.py", *sorted((ROOT / "build_support").glob("*.py"))]
    for folder in ("csrc", "tools/probe"):
        paths += sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    parts = [f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() for path in paths]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".inc"}


def extension_files() -> list[Path]:
    """The extension for the torch and the Python here, whether it is there or not."""
    package = ROOT / "rnnkernels"
    (torch,) = torches()
    binding = package / libraries.NAMES["folder"](torch.minor)
    names = (libraries.OPS, libraries.NAMES["RECORD"], libraries.MODULE)
    return [package / libraries.KERNELS, *(binding / name for name in names)]


def extension_name() -> str:
    return extension_files()[-1].relative_to(ROOT).as_posix()


def made() -> dict[str, str]:
    """What was prepared, from which sources; empty where nothing was, or from others."""
    found: dict[str, str] = json.loads(MADE.read_text()) if MADE.exists() else {}
    return found if found.get("sources") == sources() else {}


def commit() -> str:
    """As it was noted where git was: empty where nothing was prepared of these sources."""
    return made().get("commit", "")


def nvcc() -> str:
    return shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def toolkit_flags() -> list[str]:
    """For the compiler and linker of the host, beside nvcc's own."""
    dry = subprocess.run([nvcc(), "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = next(line for line in dry.stderr.splitlines() if line.startswith("#$ TOP="))
    root = Path(top.removeprefix("#$ TOP=").strip()).resolve()
    target = root / "targets/x86_64-linux"
    include = next(p for p in (root / "include", target / "include") if p.is_dir())
    places = (root / "lib64", target / "lib")
    library = next(p for p in places if (p / "libcudart_static.a").exists())
    return [f"-I{include}", str(library / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]


def nvcc_command(arch: str, source: str, to: Path) -> list[str]:
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Icsrc", "-DRNNKERNELS_CUDA"]
    return [nvcc(), *flags, f"-arch=sm_{arch}", source, "-o", str(to)]


def build_probe(arch: str, objects: list[Path], jobs: int, limit: float | None = None) -> Path:
    """Linked with objects of the kernels, which are compiled where there are none.

    Args:
        limit: seconds that a compiler may take.
    """
    OBJECTS.mkdir(parents=True, exist_ok=True)
    if not objects:
        names = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        objects = [OBJECTS / f"{path.stem}.cu.o" for path in names]
        waiting = [
            [*nvcc_command(arch, str(path), to), "-c"]
            for path, to in zip(names, objects, strict=True)
        ]
        running: list[subprocess.Popen[bytes]] = []
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(subprocess.Popen(waiting.pop(), cwd=ROOT))
            if running.pop(0).wait(limit) != 0:
                raise RuntimeError("nvcc failed")
    machine = ["tools/probe/gpu.cpp", "csrc/cuda/plan.cpp", *map(str, objects)]
    built = probing.build(OBJECTS, machine, toolkit_flags())
    FOLDER.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(built, FOLDER / "probe"))


def build_micro(arch: str, limit: float | None = None) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    to = FOLDER / "micro"
    subprocess.run(nvcc_command(arch, "tools/micro.cu", to), cwd=ROOT, check=True, timeout=limit)
    return to


# --- On the machine with the GPU --------------------------------------------------------------


def architecture() -> str:
    """Of the GPU, as nvcc names it, by its driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    digits = found.strip().splitlines()[0].replace(".", "")
    return digits + "a" * (int(digits) >= 90)


def probe(run: Run) -> Path:
    """As it was prepared, or built now."""
    if "probe" in made():
        return FOLDER / "probe"
    begin = time.monotonic()
    found = build_probe(architecture(), [], os.cpu_count() or 1, run.left())
    run.note("build", "probe", "passed", time.monotonic() - begin)
    return found


def micro(run: Run) -> Path:
    if "micro" in made():
        return FOLDER / "micro"
    begin = time.monotonic()
    found = build_micro(architecture(), run.left())
    run.note("build", "micro", "passed", time.monotonic() - begin)
    return found


def extension(run: Run) -> bool:
    """Whether the package can be used: with the extension as it was prepared, or built now."""
    check = [sys.executable, "-c", "import rnnkernels; assert rnnkernels._ops.missing is None"]
    prepared = made().get("extension") == extension_name()
    prepared = prepared and all(path.exists() for path in extension_files())
    if not prepared:
        environment = {"RNNKERNELS_CUDA": "1", "RNNKERNELS_CUDA_ARCHS": architecture()}
        run.environment = {**run.environment, **environment}
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if run.command("build", "extension", build, BUILD_LIMIT).outcome != "passed":
            return False
    run.environment = {**run.environment, "PYTHONPATH": str(ROOT)}
    return run.command("install", "import", check, 60).outcome == "passed"


# --- On the machine without one ---------------------------------------------------------------


def build_extension(arch: str, jobs: int) -> list[Path]:
    """In place; returns the objects of the kernels."""
    environment = {"RNNKERNELS_CUDA": "1", "RNNKERNELS_CUDA_ARCHS": arch, "MAX_JOBS": str(jobs)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    return sorted((ROOT / libraries.build_folder() / libraries.CUDA_OBJECTS).glob("*.cu.o"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90a", help="of the GPU, as nvcc names it (default: 90a)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    parser.add_argument(
        "--without-torch", action="store_true", help="build the probe and the microbenchmarks alone"
    )
    args = parser.parse_args()
    begin = time.monotonic()
    found = {"sources": sources(), "arch": args.arch}
    objects: list[Path] = []
    if not args.without_torch:
        objects = build_extension(args.arch, args.jobs)
        found["extension"] = extension_name()
    build_probe(args.arch, objects, args.jobs)
    build_micro(args.arch)
    found |= {"probe": "probe", "micro": "micro"}
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    found["commit"] = described.stdout.strip()
    MADE.write_text(json.dumps(found, indent=1) + "\n")
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    extension = [] if args.without_torch else extension_files()
    files += extension
    size = sum(p.stat().st_size for p in files) / (1 << 20)
    print(f"{len(files)} files, {size:.1f} MiB, after {time.monotonic() - begin:.0f} s; carry:")
    print(*(path.relative_to(ROOT) for path in (FOLDER, *extension)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
