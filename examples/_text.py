"""Text for the character language model: reading files, numbering characters, cutting streams."""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rnnkernels.streaming import batchify

MAX_CHARACTERS = 4_000_000
"""Reading stops here, so that start-up stays quick however large the folder is."""

MAX_HELD_OUT = 131_072
"""Held-out characters used at most: each evaluation reads all of them."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for every character without a number of its own; always number 0."""

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages"}
_SKIPPED_STDLIB_FOLDERS = _SKIPPED_FOLDERS | {
    # Tests and tables of character codes: long, and little like everyday Python.
    "encodings",
    "idle_test",
    "pydoc_data",
    "test",
    "tests",
}


class TextError(Exception):
    """The text asked for cannot be used; the message says why and what would do."""


@dataclass(frozen=True)
class Corpus:
    """Text to train on, text held out to measure on, and a line saying where both come from."""

    train: str
    held_out: str
    origin: str


def read_corpus(path: Path | None = None) -> Corpus:
    """Read a text file, the text files of a folder, or (``None``) Python's standard library.

    Whole files are held out, about one in ten, chosen by their names alone, so the same folder
    always gives the same corpus. Of a single file, the last tenth is held out.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [
            file for file in _files_below(root, _SKIPPED_STDLIB_FOLDERS) if file.suffix == ".py"
        ]
    elif path.is_dir():
        root = path
        paths = _files_below(root, _SKIPPED_FOLDERS)
    elif path.is_file():
        root = path.parent
        paths = [path]
    else:
        what = "is neither" if path.exists() else "does not exist"
        raise TextError(f"expected a text file or a folder, but {str(path)!r} {what}")

    texts: list[tuple[Path, str]] = []
    total = 0
    for file in sorted(paths, key=lambda file: (_name_hash(file, root), file)):
        if total >= MAX_CHARACTERS:
            break
        text = _read_text(file, MAX_CHARACTERS - total)
        if text.strip():
            texts.append((file, text))
            total += len(text)

    if not texts:
        raise TextError(
            f"found no text in {str(path or root)!r}; name a text file, or a folder of text files"
        )
    if len(texts) == 1:
        file, text = texts[0]
        cut = len(text) - max(1, len(text) // 10)
        origin = f"{file} (its last tenth held out)"
        return Corpus(text[:cut], text[cut:][:MAX_HELD_OUT], origin)

    held_out = {file for file, _ in texts if _name_hash(file, root) % 10 == 0}
    if not 0 < len(held_out) < len(texts):
        held_out = {min(texts, key=lambda item: len(item[1]))[0]}
    return Corpus(
        train="\n".join(text for file, text in texts if file not in held_out),
        held_out="\n".join(text for file, text in texts if file in held_out)[:MAX_HELD_OUT],
        origin=f"{len(texts)} files below {root} ({len(held_out)} of them held out)",
    )


def _files_below(root: Path, skipped_folders: set[str]) -> list[Path]:
    """List the files below ``root``, without hidden ones and without the skipped folders."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in skipped_folders and name[0] != "."
        ]
        files += [Path(folder, name) for name in names if name[0] != "."]
    return files


def _name_hash(file: Path, root: Path) -> int:
    """Return a number that depends only on where ``file`` lies below ``root``."""
    return zlib.crc32(file.relative_to(root).as_posix().encode("utf-8", "surrogateescape"))


def _read_text(file: Path, limit: int) -> str:
    """Read at most ``limit`` characters; a binary, unreadable or special file gives ``""``."""
    if not file.is_file():
        return ""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(limit)
    except OSError:
        return ""
    return "" if "\0" in text else text


class Vocabulary:
    """Numbers for characters: 0 is :data:`UNKNOWN`, the others count up from 1."""

    def __init__(self, characters: str) -> None:
        """Number ``characters``, all different, in the order given."""
        self.characters = characters
        self._symbols = UNKNOWN + characters
        self._numbers = {character: number for number, character in enumerate(self._symbols)}

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """Collect the printable characters that make up at least 1 in 100 000 of ``text``."""
        counts = Counter(text)
        enough = len(text) / 100_000
        return cls(
            "".join(
                character
                for character in sorted(counts)
                if counts[character] >= enough
                and character != UNKNOWN
                and (character.isprintable() or character in "\n\t")
            )
        )

    def __len__(self) -> int:
        return len(self._symbols)

    def encode(self, text: str) -> Tensor:
        """Return the numbers of the characters of ``text``: int64 ``[len(text)]``."""
        return torch.tensor([self._numbers.get(character, 0) for character in text])

    def decode(self, tokens: list[int]) -> str:
        """Return the text that ``tokens`` number."""
        return "".join(self._symbols[token] for token in tokens)


class Streams:
    """A text cut into B contiguous streams that are read side by side, T characters at a time.

    Chunk ``i + 1`` continues every stream exactly where chunk ``i`` ended, so the final state of
    one chunk is the right initial state of the next: truncated backpropagation through time
    (BPTT) that still carries context across chunks.
    """

    def __init__(self, tokens: Tensor, batch_size: int, seq_len: int, name: str = "text") -> None:
        """Cut ``tokens`` ``[N]``; each stream must hold a chunk and the character after it."""
        needed = batch_size * (seq_len + 1)
        if len(tokens) < needed:
            raise TextError(
                f"the {name} has {len(tokens)} characters, but --batch-size {batch_size} with "
                f"--seq-len {seq_len} takes at least {needed}; give more text, or lower these"
            )
        self._streams = batchify(tokens, batch_size)
        self._seq_len = seq_len
        self.chunks = (len(self._streams) - 1) // seq_len

    def chunk(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs ``[T, B]`` and targets ``[T, B]``, the inputs one character later."""
        start = index * self._seq_len
        stop = start + self._seq_len
        return self._streams[start:stop], self._streams[start + 1 : stop + 1]
