"""What is out of date, compiled by ninja."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


class Plan:
    """What is out of date, compiled and linked by one ninja: as long as anything is left, no core
    is idle."""

    def __init__(self, folder: Path, name: str = "build") -> None:
        self.file = folder / f"{name}.ninja"
        self.lines = [f"builddir = {folder}"]

    def rule(self, name: str, command: list[str]) -> None:
        """A compiler, which writes down the headers it has read."""
        self.lines += [
            f"rule {name}",
            f"  command = {_text(command)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def link_rule(self, name: str, command: list[str]) -> None:
        """A linker. Inputs that are libraries follow after what needs them."""
        self.lines += [f"rule {name}", f"  command = {_text(command)} -o $out $in $libs"]

    def add(
        self,
        rule: str,
        made: Path | str,
        source: Path | str | Iterable[Path | str],
        needs: str = "",
        libs: Iterable[str] = (),
    ) -> None:
        """`made` from `source`, after `needs`."""
        inputs = [source] if isinstance(source, (str, Path)) else source
        after = f" | {needs}" if needs else ""
        self.lines.append(f"build {made}: {rule} {' '.join(map(str, inputs))}{after}")
        if libs:
            self.lines.append(f"  libs = {_text(libs)}")

    def run(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        # This Python's own: what another version, first on PATH, has noted of a build it cannot
        # read.
        command = [sys.executable, "-m", "ninja", "-v", *jobs, "-f", str(self.file)]
        subprocess.run(command, check=True)


def _text(command: Iterable[str]) -> str:
    return shlex.join(command).replace("$", "$$")
