"""Installs a wheel into an environment of its own and tries it there as a user would: with no
compiler on PATH, and with nothing of these sources in reach but tests and examples.

    make test-wheel WHEEL=dist/rnnkernels-... TORCH=2.13.0 PYTHON=python3.11

It imports the package, runs its check of itself, an example and the tests, and removes it again.

A torch for GPUs is installed without NVIDIA's libraries by --stand-ins: see stand_ins.py.

Exit status: 0 good, 1 not.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import stand_ins

ROOT = Path(__file__).resolve().parents[1]
#: The sources but for the package, which has to be the one that is installed.
COPIED = (
    "benchmarks", "build_support", "docs", "examples", "tests", "tools", "pyproject.toml",
    "README.md",
)  # fmt: skip
#: What these need; of torch what a torch without its dependencies needs.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "tqdm", "matplotlib")
OF_TORCH = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions", "setuptools")
#: Tests of what a wheel holds that need no compiler. Those of cells that users write, of
#: torch.compile and the emulator do; others read sources that are not in a wheel.
TESTS = (
    "tests/tooling/test_main.py", "tests/api/test_modules.py", "tests/api/test_convert.py",
    "tests/api/test_options.py", "tests/ops/test_stack_errors.py", "tests/ops/test_layers_call.py",
    "tests/backends/test_backends.py", "tests/backends/test_packs.py",
)  # fmt: skip
#: A cell whose kernels come with the package; that they are missing would be a warning.
CELL = "import torch, rnnkernels as r; r.MGU(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()"
DEMO = ("examples/char_lm.py", "--steps", "40")


class Trial:
    """One environment, in a folder of its own."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.failed = folder, list[str]()
        self.bin = folder / "venv/bin"
        self.tree = folder / "tree"
        self.step("venv", [python, "-m", "venv", str(folder / "venv")])
        code = "import sysconfig; print(sysconfig.get_path('platlib'))"
        done = subprocess.run([self.bin / "python", "-c", code], capture_output=True, text=True)
        self.site = Path(done.stdout.strip())

    def step(self, name: str, command: list[str], env: Mapping[str, str] | None = None) -> None:
        begin = time.perf_counter()
        status = subprocess.run(command, env=env, cwd=self.folder).returncode
        seconds = time.perf_counter() - begin
        print(
            f"--- {name}: {'good' if status == 0 else f'exit {status}'}, {seconds:.1f} s",
            flush=True,
        )
        if status != 0:
            self.failed.append(name)

    def pip(self, name: str, *arguments: str) -> None:
        command = [str(self.bin / "pip"), "--disable-pip-version-check", "-q"]
        self.step(name, [*command, *arguments])

    def run(self, name: str, *arguments: str) -> None:
        """With what was installed there on PATH, and nothing else."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        env = {"PATH": str(self.bin), "HOME": str(home), "OMP_WAIT_POLICY": "passive"}
        self.step(name, [str(self.bin / "python"), *arguments], env)

    def installed(self) -> set[Path]:
        """All that is there, but for what Python compiles."""
        return {path for path in self.site.rglob("*") if "__pycache__" not in path.parts}

    def megabytes(self) -> float:
        """What the package's own record lists."""
        (record,) = self.site.glob("rnnkernels-*.dist-info/RECORD")
        with record.open(newline="") as file:
            return sum(int(row[2] or 0) for row in csv.reader(file)) / 1e6


def copy_sources(to: Path) -> None:
    without = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=without)
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="2.13.0", help="version, or path of a wheel of it")
    parser.add_argument("--python", default=sys.executable, help="what to make the environment of")
    parser.add_argument("--stand-ins", action="store_true", help="no libraries of NVIDIA")
    parser.add_argument("--keep", type=Path, help="a new folder for it, which is left there")
    parser.add_argument("--workers", default="2", help="processes that share the tests")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="default: %(default)s")
    args = parser.parse_args()
    if not args.wheel.is_file():
        parser.error(f"wheel: expected a file, got {args.wheel}: make wheel builds one")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        trial = Trial(folder.resolve(), args.python)
        try_it(trial, args)
    print("failed: " + ", ".join(trial.failed) if trial.failed else "all good")
    return 1 if trial.failed else 0


def try_it(trial: Trial, args: argparse.Namespace) -> None:
    torch = args.torch if Path(args.torch).is_file() else f"torch=={args.torch}"
    if args.stand_ins:
        trial.pip("torch, by itself", "install", "--no-deps", torch)
        trial.pip("what it needs", "install", "numpy", *OF_TORCH)
        print("stand-ins:", *stand_ins.make(trial.site / "torch/lib"))
    else:
        trial.pip("torch", "install", torch, "numpy")
    before = trial.installed()
    trial.pip("install", "install", "--no-deps", str(args.wheel.resolve()))
    print(f"wheel {args.wheel.stat().st_size / 1e6:.2f} MB, installed {trial.megabytes():.1f} MB")
    trial.run("import", "-P", "-W", "error", "-c", "import rnnkernels; print(rnnkernels.__file__)")
    trial.run("check", "-P", "-m", "rnnkernels", "--check")
    trial.run("a cell without a compiler", "-P", "-W", "error", "-c", CELL)
    ours = trial.installed() - before
    trial.pip("tools", "install", *TOOLS)
    copy_sources(trial.tree)
    trial.run("demo", str(trial.tree / DEMO[0]), *DEMO[1:])
    paths = [str(trial.tree / name) for name in args.tests]
    trial.run(
        "tests", "-P", "-m", "pytest", "-q", "-n", args.workers, "--dist", "worksteal", *paths
    )
    trial.pip("uninstall", "uninstall", "-y", "rnnkernels")
    left = sorted(map(str, ours & trial.installed()))
    if left:
        trial.failed.append("uninstall")
        print("left there:", *left, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
