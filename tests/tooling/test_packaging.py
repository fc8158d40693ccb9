"""What wheels and source distributions hold and say of themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution, Extension

import make_wheel as packing
import rnnkernels
from build_support import commands, cuda, readme, sbom, settings
from build_support.torches import Torch

ROOT = Path(__file__).parents[2]


# --- The bill of materials ----------------------------------------------------------------------


def torch_in(folder: Path, version: str, pybind: str) -> Torch:
    header = folder / version / "include/pybind11/detail/common.h"
    header.parent.mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    lines = [
        f"#define PYBIND11_VERSION_{n} {v}" for n, v in zip(names, pybind.split("."), strict=True)
    ]
    header.write_text("\n".join(lines))
    return Torch(folder / version, version)


def test_bill_of_materials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What CycloneDX 1.6 asks for, each part once; the same text for the same contents."""
    torches = (torch_in(tmp_path, "2.13.0+cpu", "3.0.1"), torch_in(tmp_path, "2.14.1", "3.0.1"))
    toolkit = cuda.CudaToolkit.__new__(cuda.CudaToolkit)
    toolkit.nvcc = "nvcc"
    printed = "Cuda compilation tools, release 13.0, V13.0.88\n"
    done = subprocess.CompletedProcess([], 0, printed)
    monkeypatch.setattr(sbom.subprocess, "run", lambda *_, **__: done)
    text = sbom.describe("1.2.3", torches, toolkit)
    assert text == sbom.describe("1.2.3", torches, toolkit)
    assert text != sbom.describe("1.2.3", torches, None)

    found = json.loads(text)
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    number = r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    assert re.fullmatch(number, found["serialNumber"])
    parts = [found["metadata"]["component"], *found["components"]]
    assert [(part["name"], part["version"]) for part in parts] == [
        ("rnnkernels", "1.2.3"), ("torch", "2.13.0+cpu"), ("torch", "2.14.1"),
        ("pybind11", "3.0.1"), ("cuda-cudart-static", "13.0.88"),
    ]  # fmt: skip
    assert parts[1]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    for part in parts:
        assert part["type"] == "library"
        (license,) = part["licenses"]
        assert set(license["license"]) in ({"id"}, {"name"})
    refs = [part["bom-ref"] for part in parts]
    assert len(set(refs)) == len(refs)
    assert found["dependencies"] == [{"ref": refs[0], "dependsOn": refs[1:]}]
    path = sbom.write(tmp_path / "x.dist-info", text)
    assert path.relative_to(tmp_path).as_posix() == "x.dist-info/sboms/rnnkernels.cdx.json"


def test_headers_that_are_here() -> None:
    """Their version is found in the torch that tests run with."""
    import torch

    here = Torch(Path(torch.__file__).parent, torch.__version__)
    assert re.fullmatch(r"\d+\.\d+\.\w+", sbom.pybind11(here))


# --- Metadata and sources -----------------------------------------------------------------------


def test_readme_of_an_index() -> None:
    text = "[a](docs/a.md#b) [`b` c](https://x.y) ![p](p.png)\n[d](#here)\n```\n[e](f)\n```\n[g](h)"
    assert readme.for_index(text) == ("a [`b` c](https://x.y) \n[d](#here)\n```\n[e](f)\n```\ng")
    there = readme.for_index(text, "https://s/", "https://f/")
    assert there.startswith("[a](https://s/docs/a.md#b) [`b` c](https://x.y) ![p](https://f/p.png)")
    ours = readme.for_index((ROOT / "README.md").read_text("utf-8"))
    blocks = re.sub(r"^```.*?^```", "", ours, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\]\((?!https://|#)", blocks) == []
    assert "hand-written C++ and CUDA kernels" in ours


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metadata as setuptools makes them, with the list of files of a source distribution."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "rnnkernels.egg-info"


def test_one_version(sources: Path) -> None:
    text = (sources / "PKG-INFO").read_text("utf-8")
    assert f"\nVersion: {rnnkernels.__version__}\n" in text
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py"):
        assert rnnkernels.__version__ not in re.findall(r"\d+\.\d+\.\d+", path.read_text())


def test_sources_are_complete(sources: Path) -> None:
    """All that git has."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("no git, or these sources are not in a repository")
    known = {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}
    packed = set((sources / "SOURCES.txt").read_text("utf-8").splitlines())
    assert known - packed == set()
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


# --- make wheel ---------------------------------------------------------------------------------


def test_what_is_taken_out_of_torch(tmp_path: Path) -> None:
    """Headers and libraries, by which it is known again."""
    names = (
        "torch/version.py", "torch/include/ATen/ATen.h", "torch/lib/libc10.so",
        "torch/lib/libgomp.so.1", "torch/nn/modules.py", "torch/lib/note.txt", "functorch/a.so",
    )  # fmt: skip
    with zipfile.ZipFile(tmp_path / "torch.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "__version__ = '2.99.0'\n")
    packing.take_out(tmp_path / "torch.whl", tmp_path / "out")
    found = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")]
    assert sorted(found) == sorted(names[:4])


def test_torch_that_is_here_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(packing.subprocess, "run", None)
    here = Path(torch.__file__).parent
    for wanted in (torch.__version__, torch.__version__.partition("+")[0]):
        assert packing.find_torch(packing.version(f"torch=={wanted}")) == here


def test_a_wheel_is_asked_to_have_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless the environment says which."""
    asked = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> None:
        asked.append(env["RNNKERNELS_CELLS"])
        assert env["CCACHE_BASEDIR"] == ""  # or a cache would change what is compiled
        (tmp_path / "build/wheel").mkdir(parents=True, exist_ok=True)
        (tmp_path / "build/wheel/x.whl").touch()

    monkeypatch.setattr(packing.subprocess, "run", run)
    monkeypatch.setattr(packing, "epoch", lambda: "315532800")
    for setting, found in ((None, "1"), ("0", "0"), ("float32", "float32")):
        monkeypatch.delenv("RNNKERNELS_CELLS", raising=False)
        if setting is not None:
            monkeypatch.setenv("RNNKERNELS_CELLS", setting)
        packing.build(tmp_path, [], tmp_path / "build/wheel", "auto")
        assert set(asked) == {found}
        asked.clear()


@pytest.mark.parametrize(("setting", "found"), [("1", ["cell.so"]), ("", [])])
@pytest.mark.filterwarnings("ignore:setup.py install is deprecated")
def test_cells_in_a_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, found: list[str]
) -> None:
    """Those that it was asked for; none that an earlier build has left there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rnnkernels").mkdir()
    (tmp_path / "rnnkernels/__init__.py").touch()
    monkeypatch.setattr(settings, "CELLS", setting)
    monkeypatch.setattr(commands, "check", lambda: None)
    monkeypatch.setattr(commands, "line", lambda: "nothing")
    monkeypatch.setattr(commands, "torches", lambda: ())
    monkeypatch.setattr(commands.libraries, "build", lambda chosen: [])
    monkeypatch.setattr(commands.sbom, "describe", lambda *_: "{}")

    def compile(root: Path, to: Path) -> None:
        assert (root / "rnnkernels/__init__.py").exists()  # what runs the compiler
        to.mkdir()
        (to / "cell.so").touch()

    monkeypatch.setattr(commands.cells, "build", compile)
    made = Distribution({
        "name": "rnnkernels", "version": "1.0", "packages": ["rnnkernels"],
        "script_name": "setup.py", "ext_modules": [Extension("rnnkernels._C", [])],
        "cmdclass": {
            "build_ext": commands.BuildExt, "build_py": commands.BuildPy,
            "bdist_wheel": commands.Wheel,
        },
    })  # fmt: skip
    build = made.get_command_obj("build_ext")
    build.ensure_finalized()
    left = Path(build.build_lib, "rnnkernels", commands.cells.FOLDER, "of_an_earlier_build.so")
    left.parent.mkdir(parents=True)
    left.touch()
    made.run_command("build_ext")  # which may be run by itself
    made.run_command("bdist_wheel")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = [name for name in archive.namelist() if name.endswith(".so")]
    assert packed == [f"rnnkernels/_cells/{name}" for name in found]
    assert [Path(name).name for name in build.get_outputs()] == found


def test_two_wheels(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, content in zip(paths, ("1", "1", "2"), strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("same"), "x")
            archive.writestr(zipfile.ZipInfo("file"), content)
    assert packing.differences(*paths[:2]) == []
    assert packing.differences(*paths[1:]) == ["", "file"]


def test_versions_that_are_none() -> None:
    with pytest.raises(Exception, match=r"expected versions such as 2\.13\.0, got 'latest'"):
        packing.version("latest")
