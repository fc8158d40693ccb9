"""Links of the documents that lead into the repository: the file is there, and the heading. The
variables that they give to make. The code that they show runs. The reference has every name."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import pictures
import rnnkernels
from rnnkernels import serving

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`|<!--.*?-->", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them; one that comes again gets a number."""
    found: set[str] = set()
    blocks = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for title in HEADING.findall(blocks):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = plain = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = 0
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found.add(name)
    return found


def broken(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    wrong = []
    for first, second in LINK.findall(CODE.sub("", text)):
        link = first or second
        if re.match(r"[a-z][a-z+.-]*:", link):  # of the web
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        known = target.suffix != ".md" or not anchor
        if not target.exists() or not (known or anchor in anchors(target.read_text("utf-8"))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links(path: Path) -> None:
    assert not broken(path)


def test_broken_links(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `b` & [c](d), (twice)\n## Twice\n## Twice\n")
    (tmp_path / "it.md").write_text(
        "[a](other.md#a-b--c-twice) [b](other.md#twice-1) [c](#here) [d](https://x.y/z) `[e](no)`\n"
        "# Here\n```\n# there\n[f](no)\n```\n"
        "[1](no.md) [2](other.md#twice-2) [3](#there)\n[4]: gone.png\n"
    )
    assert broken(tmp_path / "it.md") == ["no.md", "other.md#twice-2", "#there", "gone.png"]


MAKE = re.compile(r"\bmake ([a-z][a-z-]*)((?: +[A-Z_]+=(?:\"[^\"]*\"|[^\s`\"]+))+)")


def test_variables_of_make() -> None:
    """Each is one that its target uses."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    texts = [path.read_text("utf-8") for path in (*DOCUMENTS, *sorted(ROOT.glob("tools/*.py")))]
    commands = {found for text in texts for found in MAKE.findall(text)}
    used = {
        (target, name) for target, given in commands for name in re.findall(r" ([A-Z_]+)=", given)
    }
    assert ("validate-gpu-prepare", "GPU_TORCH") in used
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    for target, name in used:
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", target, f"{name}=so-it-is-said"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "so-it-is-said" in done.stdout, f"make {target} has no use for {name}"


CODE_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+): (?P<said>[^>\n]+) -->\n+)?^```python\n(?P<shown>.*?)^```$"
    r"|^<!-- setup\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
WITH_CODE = [path for path in DOCUMENTS if "```python" in path.read_text("utf-8")]


class Block(NamedTuple):
    """Python that a document shows, or that it hides in a comment because it is of no interest."""

    line: int
    code: str
    needs: tuple[str, ...] = ()
    not_run: str = ""


def blocks(text: str) -> list[Block]:
    found = []
    for match in CODE_BLOCK.finditer(text):
        group = "shown" if match["hidden"] is None else "hidden"
        assert match["mark"] in (None, "needs", "not run"), f"no mark: {match['mark']}"
        needs = match["said"].split(", ") if match["mark"] == "needs" else ()
        reason = match["said"] if match["mark"] == "not run" else ""
        line = text.count("\n", 0, match.start(group))
        found.append(Block(line, match[group], tuple(needs), reason))
    shown = sum(1 for line in text.splitlines() if re.match(r"\s*(```+|~~~+) *(py|python)\b", line))
    assert shown == text.count("\n```python\n"), "a fence of Python is not at the start of its line"
    return found


def run(path: Path) -> list[str]:
    """All code of a document from top to bottom, as somebody who reads it would run it; returns the
    modules that were missing for some of it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    missing: list[str] = []
    for block in blocks(path.read_text("utf-8")):
        missing += (absent := [name for name in block.needs if find_spec(name) is None])
        if not absent and not block.not_run:
            exec(compile("\n" * block.line + block.code, str(path), "exec"), names)
    return missing


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of others
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")  # of torch.onnx
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_code(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as it is written, but for the compiler behind torch.compile, which takes a minute a
    page; tests/api/test_compile.py runs that."""
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    limit = serving.packed_limit()
    try:
        with rnnkernels.use_backend(None), mock.patch.dict(os.environ):
            missing = run(path)
    finally:
        serving.set_packed_limit(limit)
    if missing:
        pytest.skip(f"ran but for what needs {', '.join(missing)}")


def test_code_that_is_wrong(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    text = "<!-- setup\na = 1\n-->\n\n```python\nb = a\n```\n"
    text += "<!-- not run: of a GPU -->\n```python\nc\n```\n"
    text += "<!-- needs: no_such_module -->\n\n```python\nc\n```\n"
    document.write_text(text)
    assert run(document) == ["no_such_module"]
    document.write_text(text + "```python\nassert b == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(document)
    assert (error.traceback[-1].path, error.traceback[-1].lineno) == (document, 17)
    document.write_text(text + "* a list\n  ```python\n  c\n  ```\n")
    with pytest.raises(AssertionError, match="not at the start of its line"):
        run(document)


def test_every_page_is_in_one_contents_list() -> None:
    """`make docs` refuses others, too; they are named here where Sphinx is not installed."""
    docs = ROOT / "docs"
    pages = {path.resolve() for end in ("md", "rst") for path in docs.glob(f"**/*.{end}")}
    listed = [docs / "index.md"]
    for page in pages:
        text = page.read_text("utf-8")
        for entries in re.findall(
            r"\{toctree\}\n(.*?)```|toctree::\n(.*?)\n(?=\S)", text, re.DOTALL
        ):
            for entry in re.findall(r"^ *([\w./-]+)$", "".join(entries), re.MULTILINE):
                path = (page.parent / entry).resolve()
                listed += [path.with_name(f"{path.name}.{end}") for end in ("md", "rst")]
    assert not {path.relative_to(docs) for path in pages - set(listed)}
    assert not {path.relative_to(docs) for path in pages if listed.count(path) > 1}


def public_names() -> set[str]:
    rooms = ["functional", "interop", "nn", "serving", "streaming", "torch_types", "diagnostics"]
    names = {f"rnnkernels.{name}" for name in rnnkernels.__all__} - {
        f"rnnkernels.{r}" for r in rooms
    }
    for room in [*rooms, "testing"]:
        listed = import_module(f"rnnkernels.{room}").__all__
        same = {name for name in listed if f"rnnkernels.{name}" in names}
        names |= {f"rnnkernels.{room}.{name}" for name in set(listed) - same}
        if room == "torch_types":
            names |= {f"rnnkernels.{room}.{name}" for name in listed}
    return names


def test_reference_has_every_public_name() -> None:
    pages = [path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.rst")]
    documented = re.findall(r"^\.\. auto\w+:: (\S+)", "\n".join(pages), re.MULTILINE)
    assert not public_names() - set(documented)


def test_pictures_of_the_guides(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = sorted(path.stem for path in (ROOT / "docs/guides").glob("*.png"))
    assert drawn == sorted(pictures.PICTURES)
    assert pictures.main(["lengths", "unrolling", "--out", str(tmp_path)]) == 0
    written = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {"lengths", "unrolling"}
    assert all(data.startswith(b"\x89PNG") and len(data) < 100_000 for data in written.values())
