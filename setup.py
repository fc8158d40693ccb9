"""Builds the extension module rnnkernels._C; the metadata is in pyproject.toml.

Read from the environment:
  RNNKERNELS_EXTENSION=0   install the Python package alone
  RNNKERNELS_CUDA=0|1      leave out / insist on the CUDA kernels (default: where nvcc is found)
  RNNKERNELS_CUDA_ARCHS    GPU architectures to compile for (default: 80;90a)
  RNNKERNELS_SANITIZE      for instance address,undefined: the C++ part alone, instrumented
  MAX_JOBS                 how many compilers run at once
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import ninja
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    sys.exit(
        f"rnnkernels: building needs {error.name}. First 'pip install torch setuptools wheel ninja "
        "pybind11', then 'pip install --no-build-isolation .'"
    )

# torch runs `ninja` from PATH, where a virtual environment that is not activated does not put it;
# without ninja it would compile every file anew each time, one after the other.
os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])

EXTENSION = os.environ.get("RNNKERNELS_EXTENSION", "1") != "0"
CUDA = os.environ.get("RNNKERNELS_CUDA", "")
CUDA_ARCHS = os.environ.get("RNNKERNELS_CUDA_ARCHS") or "80;90a"
SANITIZE = os.environ.get("RNNKERNELS_SANITIZE", "")


def find_cxx() -> str | None:
    return shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])


def find_nvcc() -> str | None:
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, os.path.join(home, "bin"))
    return shutil.which("nvcc", path=os.pathsep.join(places))


class CudaToolkit:
    """nvcc with the headers and the static runtime that belong to it."""

    def __init__(self, nvcc: str, archs: str) -> None:
        self.nvcc = nvcc
        self.archs = [arch.strip() for arch in archs.split(";") if arch.strip()]
        if not self.archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in self.archs):
            sys.exit(f"rnnkernels: RNNKERNELS_CUDA_ARCHS must look like 80;90a, got {archs!r}")
        # The nvcc on PATH may be a link or a wrapper script; only nvcc knows where it lives.
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        root = Path(top[1].strip() if top else Path(nvcc).resolve().parents[1]).resolve()
        target = root / "targets" / "x86_64-linux"
        self.include = self._find("cuda_runtime.h", [root / "include", target / "include"])
        self.cudart = self._find("libcudart_static.a", [root / "lib64", target / "lib"])

    def _find(self, name: str, folders: list[Path]) -> Path:
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        looked = ", ".join(map(str, folders))
        sys.exit(
            f"rnnkernels: {name} of {self.nvcc} not found in {looked}; "
            "RNNKERNELS_CUDA=0 builds without the CUDA kernels"
        )

    def flags(self) -> list[str]:
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
        flags += ["-Xptxas", "-v,-warn-spills", "-Icsrc", "-DRNNKERNELS_CUDA"]
        for arch in self.archs:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        # PTX for cards newer than any of these; code for 90a runs on 9.0 alone, hence without "a".
        newest = max(int(arch.rstrip("af")) for arch in self.archs)
        return [*flags, "-gencode", f"arch=compute_{newest},code=compute_{newest}"]

    def compile(self, sources: list[str], folder: Path) -> list[str]:
        """Compiles the sources that are out of date; returns the object files of all."""
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(source).stem}.cu.o") for source in sources]
        command = shlex.join([self.nvcc, *self.flags()]).replace("$", "$$")
        lines = [
            f"builddir = {folder}",
            "rule nvcc",
            f"  command = {command} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            *(f"build {out}: nvcc {source}" for out, source in zip(objects, sources, strict=True)),
        ]
        plan = folder / "build.ninja"
        plan.write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run(["ninja", "-v", *jobs, "-f", str(plan)], check=True)
        return objects


def cuda_toolkit() -> CudaToolkit | None:
    if CUDA == "0" or SANITIZE:
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if CUDA == "1":
            sys.exit(
                "rnnkernels: RNNKERNELS_CUDA=1, but nvcc was not found "
                "(CUDA_HOME/bin, PATH, /usr/local/cuda/bin)"
            )
        return None
    return CudaToolkit(nvcc, CUDA_ARCHS)


def build_folder() -> Path:
    # Objects made for another Python or torch must not be taken for up to date.
    name = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    return Path("build") / ("sanitize" if SANITIZE else "ext") / name


class BuildExt(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install names a temporary folder here and would compile everything each time.
        self.build_temp = str(build_folder())

    def build_extension(self, ext) -> None:
        if TOOLKIT and CU_SOURCES:
            objects = TOOLKIT.compile(CU_SOURCES, build_folder() / "cuda")
            ext.extra_objects = [*objects, str(TOOLKIT.cudart)]
        super().build_extension(ext)


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def has_avx512() -> bool:
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    return {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags)


def extension() -> CppExtension:
    compile_args = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-Wall"]
    # Vectors pass between inlined functions only: their calling convention concerns nobody.
    compile_args.append("-Wno-psabi")
    link_args = ["-fopenmp"]
    include_dirs = [os.path.abspath("csrc")]
    macros: list[tuple[str, str | None]] = []
    folders = ("", "autograd/", "ops/", "cpu/", "triton/")
    files = [path for folder in folders for path in sources(f"{folder}*.cpp")]
    files.append("csrc/cuda/plan.cpp")  # needs no CUDA, and answers anywhere
    if SANITIZE:
        # -g1 is enough for a report to name lines; with -g the kernels take minutes longer.
        instrument = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"]
        # Python's own flags say -fwrapv, with which an overflow of signed integers is no finding.
        compile_args += [*instrument, "-O1", "-fno-wrapv"]
        link_args += instrument
        if has_avx512():
            # Only what this machine runs can be found at fault, and the rest takes minutes.
            macros.append(("RNNKERNELS_ONLY_AVX512", None))
            unused = {"csrc/cpu/kernels_avx2.cpp", "csrc/cpu/kernels_default.cpp"}
            files = [path for path in files if path not in unused]
    else:
        # Python's own flags may ask for -g: most of it would describe torch's headers.
        compile_args.append("-g0")
    if TOOLKIT and CU_SOURCES:
        files += [path for path in sources("cuda/*.cpp") if path not in files]
        include_dirs.append(str(TOOLKIT.include.parent))
        macros += [
            ("RNNKERNELS_CUDA", None),
            ("RNNKERNELS_CUDA_ARCHS", f'"{";".join(TOOLKIT.archs)}"'),
        ]
        # A CUDA build of torch loads its own libcudart for the whole process; were ours visible
        # too, its functions would be bound to torch's, which may be of another version.
        link_args += ["-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
    return CppExtension(
        "rnnkernels._C",
        files,
        include_dirs=include_dirs,
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


def extensions() -> list[CppExtension]:
    if EXTENSION and find_cxx():
        return [extension()]
    reason = "no C++ compiler found" if EXTENSION else "RNNKERNELS_EXTENSION=0"
    built = f"rnnkernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale = f" (but {built} of an earlier build is there and used)" if Path(built).exists() else ""
    print(f"rnnkernels: {reason}: installing pure Python{stale}", file=sys.stderr, flush=True)
    return []


CU_SOURCES = sources("cuda/*.cu")
TOOLKIT = cuda_toolkit() if EXTENSION else None

setup(license="Apache-2.0", ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
