"""Links of the documents that lead into the repository: the file is there, and the heading. The
variables that they give to make. And examples that stand by themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
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


EXAMPLES = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "docs/interop.md").read_text("utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.filterwarnings("ignore")  # of the other frameworks
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_interop(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they are written, where what they import is installed."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    for name in re.findall(r"\w+", EXAMPLES[number].splitlines()[0].removeprefix("import")):
        pytest.importorskip(name)
    exec(EXAMPLES[number], {})
