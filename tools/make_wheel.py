"""Builds one wheel for this platform and Python that runs beside several versions of torch.

    make wheel TORCH="2.13.0 2.14.1"

The kernels are compiled once, and for each torch the binding that calls them. Of a torch only the
headers and libraries are used, taken out of its wheel, so that it need not run here: one for GPUs
will do, on any machine, for the CPU builds of the same version too.

--twice builds it again from a copy of the sources in another folder and compares every file.

Exit status: 0 good, 1 not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from build_support.torches import read

ROOT = Path(__file__).resolve().parents[1]
#: Where what is taken out of wheels of torch is kept; `make clean` removes it.
TORCHES = ROOT / "build/torch"
#: Loaded by torch, or the system's: a second copy in a wheel would be a second runtime.
NOT_OURS = ("libtorch*", "libc10*", "libgomp*", "libcuda.so*")
TAKEN = re.compile(r"torch/(include/|lib/[^/]*\.so[^/]*$|version\.py$|__init__\.py$)")


def version(text: str) -> str:
    """``torch==2.13.0`` and ``2.13.0`` are the same."""
    found = text.removeprefix("torch==")
    if not re.fullmatch(r"\d+\.\d+[\w.+]*", found):
        raise argparse.ArgumentTypeError(f"expected versions such as 2.13.0, got {text!r}")
    return found


def take_out(wheel: Path, to: Path) -> None:
    """What a build needs of torch's wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if TAKEN.match(name) and not name.endswith("/"):
                archive.extract(name, to)


def find_torch(wanted: str) -> Path:
    """A folder with this torch: this environment's, one that was taken out, or out of its wheel."""
    places = [Path(entry) for entry in sys.path if entry] + [TORCHES / wanted]
    for place in places:
        found = read(place / "torch")
        if found and wanted in (found.version, found.version.partition("+")[0]):
            return found.folder
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*pip, "-q", "-d", folder, f"torch=={wanted}"], check=True)
        (wheel,) = Path(folder).glob("torch-*.whl")
        take_out(wheel, TORCHES / wanted)
    return TORCHES / wanted / "torch"


def epoch() -> str:
    """The time that files of the wheel get: that of the last commit, or of the environment."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "315532800"  # 1980, the first that a zip file can have


def build(tree: Path, torches: list[Path], to: Path, platform: str) -> Path:
    """The wheel from the sources in `tree`, tagged with a platform that it is checked against."""
    environment = {
        **os.environ,
        # Many who install it have no compiler.
        "RNNKERNELS_CELLS": os.environ.get("RNNKERNELS_CELLS", "1"),
        "RNNKERNELS_TORCH": os.pathsep.join(map(str, torches)),
        "SOURCE_DATE_EPOCH": epoch(),
        # Paths of headers, which are in messages, have to be those of a compiler without cache.
        "CCACHE_BASEDIR": "",
    }
    plain = tree / "build/wheel"
    shutil.rmtree(plain, ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(plain)]
    subprocess.run(command, cwd=tree, env=environment, check=True)
    (made,) = plain.glob("*.whl")
    to.mkdir(parents=True, exist_ok=True)
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "-w", str(to)]
    repair += [part for name in NOT_OURS for part in ("--exclude", name)]
    # Its programs lie beside this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    before = set(to.glob("*.whl"))
    subprocess.run([*repair, str(made)], cwd=tree, env=environment, check=True)
    new = sorted(set(to.glob("*.whl")) - before, key=lambda path: path.stat().st_mtime)
    return (new or sorted(to.glob("*.whl"), key=lambda path: path.stat().st_mtime))[-1]


def hashes(wheel: Path) -> dict[str, str]:
    """Of the files in it, and under '' of the wheel itself."""
    found = {"": sha256(wheel.read_bytes()).hexdigest()}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            found[name] = sha256(archive.read(name)).hexdigest()
    return found


def differences(first: Path, second: Path) -> list[str]:
    """The files that two wheels do not share, and '' where the wheels differ."""
    a, b = hashes(first), hashes(second)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def copy_sources(to: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("torch", nargs="+", type=version, help="versions, one of each minor one")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument(
        "--plat",
        default="auto",
        help="platform tag such as manylinux_2_28_x86_64, refused where a library needs more; "
        "default: the oldest that fits",
    )
    parser.add_argument("--twice", action="store_true", help="build it again and compare")
    args = parser.parse_args()
    torches = [find_torch(wanted) for wanted in args.torch]
    made = build(ROOT, torches, args.out, args.plat)
    print(f"{made}: {made.stat().st_size / (1 << 20):.1f} MiB, sha256 {hashes(made)['']}")
    if not args.twice:
        return 0
    os.environ["CCACHE_DISABLE"] = "1"  # which would hand out the first one's objects
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(Path(folder, "elsewhere"))
        again = build(Path(folder, "elsewhere"), torches, Path(folder, "dist"), args.plat)
        wrong = differences(made, again)
    if wrong:
        print("built twice, these differ:", *(name or "the wheel" for name in wrong), sep="\n  ")
        return 1
    print("built twice: the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
