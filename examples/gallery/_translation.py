"""Sentence pairs of message catalogues, words and their numbers, and beam search."""

from __future__ import annotations

import gettext
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import _path  # noqa: F401
from _cli import UsageError
from _gallery import missing

PAD, UNKNOWN, BEGIN, END = range(4)
MAX_WORDS = 12

State = Tensor | tuple[Tensor, ...]


def read_messages(language: str) -> dict[str, str]:
    """Read the messages of gramps: of each in English that in ``language``, in order."""
    try:
        files = metadata.files("gramps") or []
    except metadata.PackageNotFoundError as error:
        raise UsageError(missing("gramps")) from error
    catalogue = f"/{language}/LC_MESSAGES/gramps.mo"
    paths = [path.locate() for path in files if str(path).endswith(catalogue)]
    if not paths:
        raise UsageError(f"argument --language: gramps has no messages in {language!r}; try 'de'")
    with open(str(paths[0]), "rb") as stream:
        found: dict[Any, str] = vars(gettext.GNUTranslations(stream))["_catalog"]
    return {
        message.split("\x04")[-1]: found[message]
        for message in sorted(key for key in found if isinstance(key, str))
        if not re.search(r"[%{}<>|\n]", message + found[message])
    }


def read_pairs(language: str) -> list[tuple[list[str], list[str]]]:
    """Read the messages of gramps in English and ``language``, of 2 to 12 words each."""
    pairs = {}
    for message, translated in read_messages(language).items():
        source, target = split(message), split(translated)
        if all(2 <= len(words) <= MAX_WORDS for words in (source, target)):
            pairs[" ".join(source)] = (source, target)
    return [pairs[key] for key in sorted(pairs)]


def split(text: str) -> list[str]:
    """Split a message into words and marks; an underscore only marks a menu's shortcut."""
    return re.findall(r"\w+|[^\w\s]", text.replace("_", ""))


class Words:
    """Numbers for the words that come at least twice, the most common first."""

    def __init__(self, sentences: Iterable[list[str]]) -> None:
        """Collect the words of ``sentences``."""
        counts = Counter(word for sentence in sentences for word in sentence)
        known = [word for word, count in counts.most_common() if count > 1]
        self.words = ["<pad>", "<unk>", "<s>", "</s>", *known]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def encode(self, sentences: Sequence[list[str]], steps: int) -> Tensor:
        """Return numbers ``[len(sentences), steps]``, padded behind the end mark of each."""
        rows = [
            [self.numbers.get(word, UNKNOWN) for word in sentence] + [END] for sentence in sentences
        ]
        return torch.tensor([row + [PAD] * (steps - len(row)) for row in rows])


def each(change: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply ``change`` to h, or to h and c."""
    return change(state) if isinstance(state, Tensor) else tuple(change(s) for s in state)


def select(state: State, rows: Tensor) -> State:
    """Take ``rows`` of a state, in this order."""
    return each(lambda s: s[:, rows], state)


def search(
    step: Callable[[Tensor, State, Tensor], tuple[Tensor, State]],
    state: State,
    rows: int,
    width: int,
    steps: int,
) -> Tensor:
    """Beam search; of width 1 it is greedy.

    Args:
        step: maps words ``[1, N]``, the state and rows ``[N]``, which say to what source each of N
            sentences belongs, to log-probabilities ``[N, V]`` and the next state.
        state: that of each row before its first word, ``[1, rows, H]``.
        rows: how many sentences to translate.
        width: sentences kept of each at every step.
        steps: words at most.

    Returns:
        Of each row the words whose mean log-probability is largest, ``[rows, steps]``.
    """
    owner = torch.arange(rows).repeat_interleave(width)
    state = select(state, owner)
    scores = torch.full([rows, width], -torch.inf)
    scores[:, 0] = 0  # to begin with, all of a row are the same
    words = torch.full([rows, width, 1], BEGIN)
    for _ in range(steps):
        ended = (words[:, :, 1:] == END).any(2)
        likely, state = step(words[:, :, -1].view(1, -1), state, owner)
        likely = likely.view(rows, width, -1)
        likely[ended] = -torch.inf
        likely[..., END][ended] = 0
        best = (scores[..., None] + likely).flatten(1).topk(width, dim=1)
        scores, parent = best.values, best.indices // likely.shape[2]
        chosen = torch.cat(
            [
                words.gather(1, parent[..., None].expand_as(words)),
                (best.indices % likely.shape[2])[..., None],
            ],
            dim=2,
        )
        kept = (torch.arange(rows)[:, None] * width + parent).flatten()
        words, state = chosen, select(state, kept)
    lengths = (words[:, :, 1:] != END).sum(2) + 1
    return words[torch.arange(rows), (scores / lengths).argmax(1), 1:]
