"""One to many: from a key alone, write a chorale of four voices after Bach's.

    python examples/gallery/music.py     # runs/gallery/music.mid is one that it wrote

The chorales come with music21. One is a sequence of tokens: in each eighth what soprano, alto,
tenor and bass do, which is go on, pause, or begin a pitch. The key becomes the state that the layer
starts from; there is no other input but the tokens so far. Every time a chorale is learnt from it
is moved to another key. The baseline counts which token of a voice follows which (bigrams).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import _path  # noqa: F401
from _chorales import HOLD, TOKENS, VOICES, notes, read_chorales, transpose, write_midi
from _gallery import Batch, Options, Program, Task, bits, recurrent, shuffled, with_cell_state
from _results import write_atomically

IGNORED = -100
COLOURS = ("tab:red", "tab:orange", "tab:green", "tab:blue")


class Composer(nn.Module):
    """A key becomes the first state; embeddings of token and voice -> layer -> Linear."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden``."""
        super().__init__()
        self.key = nn.Embedding(12, hidden)
        self.token = nn.Embedding(TOKENS, 64)
        self.voice = nn.Embedding(len(VOICES), 64)
        self.rnn = recurrent(options, 64, hidden)
        self.cell = options.cell
        self.output = nn.Linear(hidden, TOKENS)
        self.dropout = nn.Dropout(0.2)

    def start(self, key: Tensor) -> Any:
        """Map keys ``[B]`` to the state before the first token."""
        return with_cell_state(self.cell, self.key(key).tanh()[None])

    def forward(self, tokens: Tensor, hx: Any, first: int = 0) -> tuple[Tensor, Any]:
        """Map the tokens before each ``[T, B]``, of voices from ``first`` on, to logits
        ``[T, B, tokens]`` and the next state."""
        voices = (torch.arange(len(tokens)) + first) % len(VOICES)
        y, hx = self.rnn(self.dropout(self.token(tokens) + self.voice(voices)[:, None]), hx)
        return self.output(self.dropout(y)), hx


def bigram_bits(learnt: list[Tensor], held_out: list[Tensor]) -> float:
    """Measure counts of what follows a token in the same voice, each starting at one."""
    counts = torch.ones(len(VOICES), TOKENS, TOKENS, dtype=torch.double)
    for tokens in learnt:
        for voice, row in enumerate(tokens.view(-1, len(VOICES)).T):
            ones = torch.ones(len(row) - 1, dtype=torch.double)
            counts[voice].index_put_((row[:-1], row[1:]), ones, accumulate=True)
    chances = (counts / counts.sum(2, keepdim=True)).log2()
    found = [
        chances[voice][row[:-1], row[1:]]
        for tokens in held_out
        for voice, row in enumerate(tokens.view(-1, len(VOICES)).T)
    ]
    return -torch.cat(found).mean().item()


def build(options: Options) -> Task:
    """Read the chorales, hold every tenth out, and build the model."""
    chorales = read_chorales(30 if options.quick else None)
    keys = torch.tensor([key for key, _ in chorales])
    rows = pad_sequence([tokens for _, tokens in chorales], True, IGNORED)
    if options.quick:
        rows = rows[:, :128]
    unseen = torch.arange(len(chorales)) % 10 == 5
    model = Composer(options, 32 if options.quick else 192)

    def batches() -> Iterator[Batch]:
        for key, tokens in shuffled(16, keys[~unseen], rows[~unseen]):
            by = torch.randint(-3, 4, [len(key)])
            yield (key + by) % 12, transpose(tokens, by[:, None])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        key, tokens = batch[0], batch[1].T
        before = torch.cat([torch.full_like(tokens[:1], HOLD), tokens[:-1].clamp(min=0)])
        logits = model(before, model.start(key))[0]  # type: ignore[operator]
        return cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED)

    def write(key: int, temperature: float = 0.8) -> Tensor:
        generator = torch.Generator().manual_seed(options.seed)
        hx, token, written = model.start(torch.tensor([key])), torch.tensor([[HOLD]]), []
        for step in range(len(VOICES) * 64):
            logits, hx = model(token, hx, step)
            chances = (logits[0] / temperature).softmax(1)
            token = torch.multinomial(chances, 1, generator=generator)
            written.append(token[0])
        return torch.cat(written)

    def draw(axes: Axes) -> None:
        for voice, pitch, start, eighths in notes(write(7)):
            axes.broken_barh([(start, eighths - 0.1)], (pitch - 0.4, 0.8), color=COLOURS[voice])
        axes.set(xlabel="eighth", ylabel="pitch (MIDI)", title="written by the model, in G")

    def finish() -> None:
        path = options.plot.with_suffix(".mid")
        write_atomically(path, partial(write_midi, tokens=write(7)))
        print(f"wrote {path}")

    seen, held_out = ([t for (_, t), u in zip(chorales, unseen, strict=True) if bool(u) == which]
                      for which in (False, True))  # fmt: skip
    return Task(
        data=f"music21's chorales of Bach, {len(seen)} to learn from, {len(held_out)} held out, "
        f"{sum(map(len, seen)):,} and {sum(map(len, held_out)):,} tokens",
        model=model,
        batches=batches,
        loss=loss,
        evaluate=lambda model: bits(loss(model, (keys[unseen], rows[unseen]))),
        metric="bits per voice and eighth",
        show=".3f",
        rises=False,
        baseline="bigrams of each voice",
        baseline_value=bigram_bits(seen, held_out),
        draw=draw,
        finish=finish,
    )


PROGRAM = Program(__file__, __doc__, build, (25, 5), "lstm")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
