"""Libraries that stand in for NVIDIA's, so that a torch for GPUs can be imported and used on its
CPU where these, gigabytes of them, are not installed.

    python tools/stand_ins.py FOLDER_OF_TORCH

Each has the names and versions that torch's libraries ask for, and functions that answer what a
machine without a GPU does. They are for trials of wheels, not for use.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

#: cudaErrorNoDevice, which torch takes for no GPU.
NO_DEVICE = 100
#: What has no version and is Python's, of C++ or of the compiler: none of NVIDIA's.
OTHERS = re.compile("_|Py")
#: What returns a text: somebody may print it.
TEXT = re.compile(r"(String|Name|string)$")


def listed(path: Path, *what: str) -> str:
    command = ["readelf", "-W", *what, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def needed(path: Path) -> list[str]:
    """The libraries that one asks for."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listed(path, "-d"))


def is_here(name: str, beside: Path) -> bool:
    """Whether the loader would find a library; a process of its own keeps it out of this one."""
    if (beside / name).exists():
        return True
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True)
    return done.returncode == 0


def versions(path: Path) -> dict[str, str]:
    """By version: the library that has to define it."""
    found, library = {}, ""
    for line in listed(path, "-V").splitlines():
        if named := re.search(r"Version: 1 +File: (\S+)", line):
            library = named[1]
        elif wanted := re.search(r"Name: (\S+) +Flags: \S+ +Version:", line):
            found[wanted[1]] = library
    return found


def symbols(path: Path, where: str) -> list[tuple[str, str]]:
    """Names that one takes from others (``UND``) or has (a number), and the version of each."""
    pattern = rf"\b(?:GLOBAL|WEAK|UNIQUE) +\w+ +{where} +([\w.$]+)(?:@+(\S+))?"
    return re.findall(pattern, listed(path, "--dyn-syms"))


def source(names: list[str]) -> str:
    lines = []
    for name in names:
        result = (
            "const char* %s(void) { return %s; }"
            if TEXT.search(name)
            else "long %s(void) { return %s; }"
        )
        lines.append(result % (name, '"no GPU"' if TEXT.search(name) else NO_DEVICE))
    return "\n".join(lines) + "\n"


def make(folder: Path) -> list[str]:
    """Makes those that are missing, beside torch's own libraries; returns their names."""
    libraries = sorted(path for path in folder.glob("*.so*") if path.is_file())
    missing = {name for path in libraries for name in needed(path)}
    missing = {name for name in missing if not is_here(name, folder)}
    wanted: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    has = {name for path in libraries for name, _ in symbols(path, r"\d+")}
    for path in libraries:
        of = versions(path)
        # What has no version says not whose it is: of those that have none, any will do.
        others = [name for name in needed(path) if name in missing and name not in of.values()]
        for name, version in symbols(path, "UND"):
            if of.get(version) in missing:
                wanted[of[version]][version].add(name)
            elif not version and others and name not in has and not OTHERS.match(name):
                wanted[others[0]][""].add(name)
    for library, by_version in wanted.items():
        with tempfile.TemporaryDirectory() as build:
            code, script = Path(build, "stand_in.c"), Path(build, "versions")
            code.write_text(source(sorted(set().union(*by_version.values()))))
            nodes = (
                f"{v} {{ global: {'; '.join(sorted(n))}; }};" for v, n in by_version.items() if v
            )
            script.write_text("\n".join(nodes))
            flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}"]
            if set(by_version) - {""}:
                flags.append(f"-Wl,--version-script={script}")
            command = ["cc", *flags, str(code), "-o", str(folder / library)]
            subprocess.run(command, check=True)
    return sorted(missing)


if __name__ == "__main__":
    print("stand-ins:", *make(Path(sys.argv[1], "lib")))
