"""Builds three libraries, each resting on the one before; the metadata is in pyproject.toml.

  librnnkernels_kernels.so   the kernels, which know neither torch nor Python
  librnnkernels.so           the ops and their autograd, without Python: what a C++ program loads
  _C                         the Python module

Read from the environment:
  RNNKERNELS_EXTENSION=0   install the Python package alone
  RNNKERNELS_CUDA=0|1      leave out / insist on the CUDA kernels (default: where there are a GPU
                           and nvcc)
  RNNKERNELS_CUDA_ARCHS    GPU architectures to compile for (default: 80;90a), or all, for wheels:
                           those of EVERY_ARCH that nvcc knows
  RNNKERNELS_NATIVE=1      kernels for this machine's processor alone: a fraction of the time
  RNNKERNELS_SANITIZE      for instance address,undefined: the C++ part alone, instrumented
  MAX_JOBS                 how many compilers run at once
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

try:
    import ninja  # noqa: F401 -- run as a program below
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    sys.exit(
        f"rnnkernels: building needs {error.name}. First 'pip install torch setuptools wheel ninja "
        "pybind11', then 'pip install --no-build-isolation .'"
    )

EXTENSION = os.environ.get("RNNKERNELS_EXTENSION", "1") != "0"
CUDA = os.environ.get("RNNKERNELS_CUDA", "")
CUDA_ARCHS = os.environ.get("RNNKERNELS_CUDA_ARCHS") or "80;90a"
# Ampere and Ada, Hopper, and both families of Blackwell, whose code runs on all of a family.
EVERY_ARCH = ("80", "90a", "100f", "120f")
SANITIZE = os.environ.get("RNNKERNELS_SANITIZE", "")
NATIVE = os.environ.get("RNNKERNELS_NATIVE", "") == "1"


def find_cxx() -> str | None:
    return shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])


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


class Choice(NamedTuple):
    """Whether the CUDA kernels are built, and one line that says so and why."""

    cuda: bool
    line: str


def choose(setting: str, nvcc: str | None, gpu: bool) -> Choice:
    """By the value of RNNKERNELS_CUDA, and by what is here."""
    if setting not in ("", "0", "1"):
        sys.exit(f"rnnkernels: RNNKERNELS_CUDA must be 0, 1 or empty, got {setting!r}")
    if setting == "0":
        return Choice(False, "kernels for the CPU alone, since RNNKERNELS_CUDA=0")
    if nvcc is None:
        places = "CUDA_HOME/bin, PATH, /usr/local/cuda/bin"
        if setting == "1":
            sys.exit(f"rnnkernels: RNNKERNELS_CUDA=1, but nvcc was not found ({places})")
        return Choice(False, f"kernels for the CPU alone, since nvcc was not found ({places})")
    if setting == "1":
        return Choice(True, f"kernels for CPU and CUDA, since RNNKERNELS_CUDA=1, by {nvcc}")
    if gpu:
        return Choice(True, f"kernels for CPU and CUDA, by {nvcc}")
    # They take minutes, and nothing here could run them.
    advice = f"RNNKERNELS_CUDA=1 builds those for CUDA too, by {nvcc}"
    return Choice(False, f"kernels for the CPU alone, since no GPU is here ({advice})")


@cache
def choice() -> Choice:
    """For this machine, in this environment."""
    if not EXTENSION or find_cxx() is None:
        reason = "no C++ compiler found" if EXTENSION else "RNNKERNELS_EXTENSION=0"
        return Choice(False, f"pure Python, without kernels: {reason}")
    if SANITIZE:
        return Choice(False, f"kernels for the CPU alone, since RNNKERNELS_SANITIZE={SANITIZE}")
    # Where it was said what to build, nobody has to look for a GPU.
    return choose(CUDA, find_nvcc(), not CUDA and finds_gpu())


class Plan:
    """What is out of date, compiled by one ninja: as long as anything is left, no core is idle."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "build.ninja"
        self.lines = [f"builddir = {folder}"]

    def rule(self, name: str, command: list[str]) -> None:
        line = shlex.join(command).replace("$", "$$")
        self.lines += [
            f"rule {name}",
            f"  command = {line} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def add(self, rule: str, made: Path | str, source: Path | str, needs: str = "") -> None:
        """`made` from `source`, after `needs`."""
        self.lines.append(f"build {made}: {rule} {source}" + (f" | {needs}" if needs else ""))

    def run(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        # This Python's own: what another version, first on PATH, has noted of a build it cannot
        # read.
        command = [sys.executable, "-m", "ninja", "-v", *jobs, "-f", str(self.file)]
        subprocess.run(command, check=True)


class CudaToolkit:
    """nvcc with the headers and the static runtime that belong to it."""

    def __init__(self, nvcc: str, archs: str) -> None:
        self.nvcc = nvcc
        known = self._known() if archs == "all" else set()
        chosen = [arch for arch in EVERY_ARCH if arch in known] or archs.split(";")
        self.archs = [arch.strip() for arch in chosen if arch.strip()]
        if not self.archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in self.archs):
            sys.exit(
                f"rnnkernels: RNNKERNELS_CUDA_ARCHS must be all or look like 80;90a, got {archs!r}"
            )
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
        sys.exit(
            f"rnnkernels: {name} of {self.nvcc} not found in {looked}; "
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
def cuda_toolkit() -> CudaToolkit | None:
    nvcc = find_nvcc()
    return CudaToolkit(nvcc, CUDA_ARCHS) if choice().cuda and nvcc else None


def build_folder() -> Path:
    # Objects made for another Python or torch must not be taken for up to date.
    name = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    return Path("build") / ("sanitize" if SANITIZE else "ext") / name


KERNELS, OPS, MODULE = "librnnkernels_kernels", "librnnkernels", "_C"


#: What a cell that a user writes is compiled from: rnnkernels/_backends/headers.py.
HEADERS: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parent / "rnnkernels" / "_backends" / "headers.py")
)


class BuildPy(build_py):
    """Puts the sources of cells into the package, where it is not used in place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in HEADERS["files"](Path("csrc")):
            to = Path(self.build_lib, "rnnkernels", HEADERS["INSTALLED"], path)
            to.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(Path("csrc", path)), str(to))


class BuildExt(BuildExtension):
    """Links what one plan has compiled for all libraries."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Torch's use of ninja is a run for each library.
        super().__init__(*args, **options, use_ninja=False)
        self.objects: dict[str, list[str]] = {}  # by library

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install names a temporary folder here and would compile everything each time.
        self.build_temp = str(build_folder())
        self.force = True  # links, whatever is newer

    def run(self) -> None:
        print(f"rnnkernels: building {choice().line}", file=sys.stderr, flush=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        if name == MODULE:
            return super().get_ext_filename(fullname)
        return os.path.join(*package, f"{name}.so")

    def build_extension(self, ext: Extension) -> None:
        if not self.objects:
            self.compile()
        name = ext.name.rpartition(".")[2]
        below = {KERNELS: [], OPS: [KERNELS], MODULE: [OPS, KERNELS]}[name]
        ext.sources, ext.extra_objects = [], self.objects[name]
        if name == KERNELS and (toolkit := cuda_toolkit()):
            ext.extra_objects.append(str(toolkit.cudart))
        ext.extra_objects += [self.get_ext_fullpath(f"rnnkernels.{library}") for library in below]
        super().build_extension(ext)

    def compile(self) -> None:
        """The objects of all libraries, what takes longest first."""
        folder = build_folder()
        plan = Plan(folder)
        libraries = {ext.name.rpartition(".")[2]: ext for ext in self.extensions}
        self.objects = {name: [] for name in libraries}
        if toolkit := cuda_toolkit():
            plan.rule("cuda", [toolkit.nvcc, *toolkit.flags()])
            for source in sources("cuda/*.cu"):
                made = str(folder / "cuda" / f"{Path(source).name}.o")
                plan.add("cuda", made, source)
                self.objects[KERNELS].append(made)
        precompiled = self.precompiled(plan, libraries[OPS])
        for name, ext in libraries.items():
            uses = precompiled if name != KERNELS else None
            before = ["-include", str(uses), "-Winvalid-pch"] if uses else []
            plan.rule(name, [*self.compiler_command(ext), *before])
            for source in ext.sources:
                made = str(folder / f"{Path(source).stem}.o")
                plan.add(name, made, source, needs=f"{uses}.gch" if uses else "")
                self.objects[name].append(made)
        plan.run()

    def compiler_command(self, ext: Extension) -> list[str]:
        # Torch's name for a module would differ from library to library, and nothing here uses it.
        args = [a for a in ext.extra_compile_args if not a.startswith("-DTORCH_EXTENSION_NAME=")]
        includes = [f"-I{folder}" for folder in [*ext.include_dirs, *self.compiler.include_dirs]]
        defines = [
            f"-D{name}" if value is None else f"-D{name}={value}"
            for name, value in ext.define_macros
        ]
        cache = ["ccache"] if shutil.which("ccache") else []
        cxx = shlex.split(os.environ.get("CXX") or "c++")
        return [*cache, *cxx, *self.compiler.compiler_so[1:], *defines, *includes, *args]

    def precompiled(self, plan: Plan, ext: Extension) -> Path | None:
        """A header whose precompiled form has torch's headers, which g++ then parses but once."""
        cxx = shlex.split(os.environ.get("CXX") or "c++")
        predefined = subprocess.run(
            [*cxx, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
        )
        if sys.platform != "linux" or "__clang__" in predefined.stdout:
            return None
        header = Path("csrc/ops/torch_headers.h")
        copy = (build_folder() / "headers" / header.name).absolute()
        plan.rule("headers", [*self.compiler_command(ext), "-x", "c++-header"])
        plan.add("headers", f"{copy}.gch", header)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f'#include "ops/{header.name}"\n')
        return copy


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


#: The kernels of each instruction set, and what a processor must have to run them.
LEVELS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
}


#: The kernels for bfloat16 alone, over those of "avx512" for all else: likewise, best first.
FOR_BFLOAT16 = {
    "amx": {"amx_bf16", "amx_tile", "avx512_bf16"},
    "avx512_bf16": {"avx512_bf16"},
}


def processor() -> set[str]:
    """What the processor of this machine has, as Linux names it."""
    return set(Path("/proc/cpuinfo").read_text().split()) if sys.platform == "linux" else set()


def without() -> list[str]:
    """The kernels that a build for this machine alone leaves out, as one under sanitizers is: only
    what runs here can be found at fault. Of the instruction sets it has, the widest stays."""
    flags = processor()
    level = next((level for level, needed in LEVELS.items() if needed <= flags), None)
    if not (NATIVE or SANITIZE) or level is None:
        return []
    others = [name for name in ("default", *LEVELS) if name != level]
    fitting = [name for name, needed in FOR_BFLOAT16.items() if needed <= flags]
    extra = fitting[:1] if level == "avx512" else []
    return others + [name for name in FOR_BFLOAT16 if name not in extra]


def in_one(name: str, files: list[str]) -> list[str]:
    """One file that includes the others: most of the time goes to what torch's headers have every
    file compile again."""
    return written(name, "".join(f'#include "{os.path.relpath(file, "csrc")}"\n' for file in files))


def written(name: str, text: str) -> list[str]:
    """A source file of this text in the build folder."""
    path = build_folder() / f"{name}.cpp"
    # One that has not changed is left as it is: ninja would compile it again.
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [str(path)]


def common_options() -> dict[str, Any]:
    """How every library is compiled and linked."""
    compile_args = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-Wall"]
    # Vectors pass between inlined functions only: their calling convention concerns nobody.
    compile_args.append("-Wno-psabi")
    # Torch's headers turn this one off where they need to, which a precompiled header forgets.
    compile_args.append("-Wno-sign-compare")
    # The libraries lie in one folder, wherever that is.
    link_args = ["-fopenmp", "-Wl,-rpath,$ORIGIN"]
    # Torch's headers then declare those of its operations that a file names, in half the time.
    macros: list[tuple[str, str | None]] = [("AT_PER_OPERATOR_HEADERS", None)]
    if SANITIZE:
        # -g1 is enough for a report to name lines; with -g the kernels take minutes longer.
        instrument = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"]
        # Optimizing what is instrumented takes longer than the tests save by it. Python's own flags
        # say -fwrapv, with which an overflow of signed integers is no finding.
        compile_args += [*instrument, "-O0", "-fno-wrapv"]
        link_args += instrument
    else:
        # Python's own flags may ask for -g: most of it would describe torch's headers.
        compile_args.append("-g0")
    macros += [(f"RNNKERNELS_WITHOUT_{name.upper()}", None) for name in without()]
    include_dirs = [os.path.abspath("csrc")]
    if toolkit := cuda_toolkit():
        include_dirs.append(str(toolkit.include.parent))
        macros += [
            ("RNNKERNELS_CUDA", None),
            ("RNNKERNELS_CUDA_ARCHS", f'"{";".join(toolkit.archs)}"'),
        ]
    return {
        "include_dirs": include_dirs,
        "define_macros": macros,
        "extra_compile_args": compile_args,
        "extra_link_args": link_args,
    }


def kernels() -> Extension:
    options = common_options()
    options["extra_link_args"].append(f"-Wl,-soname,{KERNELS}.so")
    files = [path for path in sources("cpu/*.cpp") if Path(path).name not in KNOW_TORCH]
    files.append("csrc/cuda/plan.cpp")  # needs no CUDA, and answers anywhere
    left_out = without()
    files = [path for path in files if Path(path).stem.removeprefix("kernels_") not in left_out]
    files += written(
        "headers_digest",
        '#include "cpu/cell_libraries.h"\n'
        f'const char* const rnn::cpu::kHeadersDigest = "{HEADERS["digest"](Path("csrc"))}";\n',
    )
    options["extra_link_args"] += ["-ldl"]  # a part of the C library itself since glibc 2.34
    if cuda_toolkit():
        # A CUDA build of torch loads its own libcudart for the whole process; were ours visible
        # too, its functions would be bound to torch's, which may be of another version.
        options["extra_link_args"] += ["-Wl,--exclude-libs,libcudart_static.a"]
        options["extra_link_args"] += ["-lrt", "-lpthread"]
    return Extension(f"rnnkernels.{KERNELS}", files, language="c++", **options)


#: What registers the kernels of a backend, beside them.
KNOW_TORCH = ("packs.cpp", "products.cpp", "register.cpp", "single.cpp")


def ops() -> CppExtension:
    options = common_options()
    options["extra_link_args"].append(f"-Wl,-soname,{OPS}.so")
    files = [*sources("ops/*.cpp"), *sources("autograd/*.cpp")]
    files += [f"csrc/cpu/{name}" for name in KNOW_TORCH]
    if cuda_toolkit():
        files.append("csrc/cuda/register.cpp")
    extension = CppExtension(f"rnnkernels.{OPS}", in_one("ops", files), **options)
    extension.libraries.remove("torch_python")
    return extension


def extensions() -> list[Extension]:
    if EXTENSION and find_cxx():
        files = in_one("module", sources("python/*.cpp"))
        module = CppExtension(f"rnnkernels.{MODULE}", files, **common_options())
        return [kernels(), ops(), module]
    built = f"rnnkernels/{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale = f" (but {built} of an earlier build is there and used)" if Path(built).exists() else ""
    print(f"rnnkernels: building {choice().line}{stale}", file=sys.stderr, flush=True)
    return []


if __name__ == "__main__":
    setup(
        license="Apache-2.0",
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    )
