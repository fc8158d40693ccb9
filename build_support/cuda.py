"""nvcc, what belongs to it, and whether a GPU is here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from build_support import settings
from build_support.settings import fail

# Ampere and Ada, Hopper, and both families of Blackwell, whose code runs on all of a family.
EVERY_ARCH = ("80", "90a", "100f", "120f")
#: Where nvcc is looked for, in words.
PLACES = "CUDA_HOME/bin, PATH, /usr/local/cuda/bin"


def find_nvcc() -> str | None:
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, os.path.join(home, "bin"))
    return shutil.which("nvcc", path=os.pathsep.join(places))


def finds_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, by its driver: the torch here may be one for CPUs."""
    if Path("/dev/nvidiactl").exists():
        return True
    try:  # WSL has no such device
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith("GPU ")


class CudaToolkit:
    """nvcc with the headers and the static runtime that belong to it."""

    def __init__(self, nvcc: str, archs: str) -> None:
        self.nvcc = nvcc
        known = self._known() if archs == "all" else set()
        chosen = [arch for arch in EVERY_ARCH if arch in known] or archs.split(";")
        self.archs = [arch.strip() for arch in chosen if arch.strip()]
        if not self.archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in self.archs):
            fail(f"RNNKERNELS_CUDA_ARCHS must be all or look like 80;90a, got {archs!r}")
        # The nvcc on PATH may be a link or a wrapper script; only nvcc knows where it lives.
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        root = Path(top[1].strip() if top else Path(nvcc).resolve().parents[1]).resolve()
        target = root / "targets" / "x86_64-linux"
        self.include = self._find("cuda_runtime.h", [root / "include", target / "include"])
        self.cudart = self._find("libcudart_static.a", [root / "lib64", target / "lib"])

    def _known(self) -> set[str]:
        """What this nvcc compiles for. It lists no letters: families came with sm_103."""
        done = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True)
        numbers = set(re.findall(r"sm_(\d+)", done.stdout))
        letters = ("", "a", "f") if "103" in numbers else ("", "a")
        return {number + letter for number in numbers for letter in letters}

    def _find(self, name: str, folders: list[Path]) -> Path:
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        looked = ", ".join(map(str, folders))
        fail(
            f"{name} of {self.nvcc} not found in {looked}; "
            "RNNKERNELS_CUDA=0 builds without the CUDA kernels"
        )

    def flags(self) -> list[str]:
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
        flags += ["-Xptxas", "-v,-warn-spills", "-Icsrc", "-DRNNKERNELS_CUDA"]
        for arch in self.archs:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        # PTX for cards that none of this code runs on, now or later: the oldest that has clusters,
        # or else the newest. Code for 90a runs on 9.0 alone, hence without a letter.
        numbers = sorted(int(arch.rstrip("af")) for arch in self.archs)
        ptx = next((number for number in numbers if number >= 90), numbers[-1])
        return [*flags, "-gencode", f"arch=compute_{ptx},code=compute_{ptx}"]


@cache
def toolkit(archs: str = settings.CUDA_ARCHS) -> CudaToolkit:
    """Of a build that has CUDA kernels: build_support.choice says whether."""
    nvcc = find_nvcc()
    if nvcc is None:
        fail(f"nvcc was not found ({PLACES})")
    return CudaToolkit(nvcc, archs)
