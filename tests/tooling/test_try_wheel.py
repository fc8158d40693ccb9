"""What `make test-wheel` rests on: libraries that stand in for NVIDIA's, and what a trial sees."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stand_ins
import try_wheel

#: A library that was linked with others that are gone: one with a version, and one without.
GONE = {
    "libgone_a.so.1": ("long a(void) { return 0; } const char* aString(void) { return 0; }", "V1"),
    "libgone_b.so.1": ("long b(void) { return 0; }", ""),
}
USER = """
long a(void), b(void); const char* aString(void);
long sum(void) { return a() + b(); }
const char* text(void) { return aString(); }
"""


def compile(source: str, to: Path, *flags: str) -> None:
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", str(to), *flags]
    subprocess.run(command, input=source, text=True, check=True)


@pytest.mark.skipif(not shutil.which("cc") or not shutil.which("readelf"), reason="no C compiler")
def test_stand_ins(tmp_path: Path) -> None:
    """A library whose needs are missing loads by them, bound at once."""
    made, links = tmp_path / "lib", []
    made.mkdir()
    for name, (source, version) in GONE.items():
        flags = [f"-Wl,-soname,{name}"]
        if version:
            (tmp_path / "script").write_text(f"{version} {{ global: *; }};")
            flags.append(f"-Wl,--version-script={tmp_path / 'script'}")
        compile(source, tmp_path / name, *flags)
        links.append(str(tmp_path / name))
    compile(
        USER, made / "libuser.so", "-Wl,-z,now", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", *links
    )
    code = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); lib.text.restype = ctypes.c_char_p; "
        "print(lib.sum(), lib.text().decode())"
    )
    load = [sys.executable, "-c", code, str(made / "libuser.so")]
    before = subprocess.run(load, capture_output=True, text=True)
    assert before.returncode != 0 and "libgone" in before.stderr
    assert stand_ins.make(made) == sorted(GONE)
    after = subprocess.run(load, capture_output=True, text=True)
    assert after.stdout == f"{2 * stand_ins.NO_DEVICE} no GPU\n", after.stderr
    assert stand_ins.make(made) == []


def test_a_trial_has_no_compiler_and_reports_failures(tmp_path: Path) -> None:
    trial = try_wheel.Trial.__new__(try_wheel.Trial)
    trial.folder, trial.failed, trial.bin = tmp_path, [], Path(sys.executable).parent
    code = "import os, shutil, sys; sys.exit(bool(shutil.which('c++') or shutil.which('nvcc')))"
    trial.run("no compiler", "-c", code)
    trial.run("ours alone", "-c", "import os, sys; sys.exit('RNNKERNELS_TORCH' in os.environ)")
    assert trial.failed == []
    trial.run("wrong", "-c", "import sys; sys.exit(3)")
    assert trial.failed == ["wrong"]


def test_what_a_trial_leaves_out(tmp_path: Path) -> None:
    """The package: tests have to find the one that is installed."""
    try_wheel.copy_sources(tmp_path / "tree")
    assert (tmp_path / "tree/tests/conftest.py").is_file()
    assert not (tmp_path / "tree/rnnkernels").exists()
    for name in (*try_wheel.TESTS, try_wheel.DEMO[0]):
        assert (tmp_path / "tree" / name).exists()
