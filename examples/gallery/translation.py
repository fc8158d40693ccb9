"""Many to many, of unequal lengths: translate the messages of a program with attention.

    python examples/gallery/translation.py                  # English to German
    python examples/gallery/translation.py --language fr

The sentence pairs are the message catalogues that come with gramps, a program for genealogists. A
bidirectional encoder reads a message; a decoder starts from its final state, learns with the right
words before each (teacher forcing), so that its steps too are one call, and attends to the
encoder's outputs (Luong et al. 2015, "global attention" with dot products). A word never seen in
training is copied from where the decoder attends to. The baseline answers with the translation of
the training message that shares the most words. Both are measured by sacrebleu.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from _gallery import Batch, Options, Program, Task, package, recurrent, shuffled
from _translation import BEGIN, END, MAX_WORDS, PAD, UNKNOWN, State, Words, each, read_pairs, search

STEPS = MAX_WORDS + 1


class Translator(nn.Module):
    """Bidirectional encoder; decoder; attention between their outputs."""

    def __init__(self, options: Options, source: Words, target: Words, hidden: int) -> None:
        """Read the words of ``source`` and write those of ``target``."""
        super().__init__()
        self.source = nn.Embedding(len(source.words), hidden)
        self.target = nn.Embedding(len(target.words), hidden)
        self.encoder = recurrent(options, hidden, hidden, bidirectional=True, merge_mode="sum")
        self.decoder = recurrent(options, hidden, hidden)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, len(target.words))
        self.dropout = nn.Dropout(0.3)

    def encode(self, source: Tensor) -> tuple[Tensor, State]:
        """Map words ``[S, B]`` to outputs ``[S, B, H]`` and the decoder's first state."""
        lengths = (source != PAD).sum(0)
        memory, state = self.encoder(self.dropout(self.source(source)), lengths=lengths)
        return memory, each(lambda s: s.sum(0, keepdim=True), state)

    def decode(
        self, words: Tensor, state: State, memory: Tensor, source: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """Map the words before each, ``[T, B]``, to logits ``[T, B, V]``, where in ``source`` they
        attend to, ``[B, T, S]``, and the next state."""
        y, state = self.decoder(self.dropout(self.target(words)), state)
        scores = torch.einsum("tbh,sbh->bts", y, memory)
        weights = scores.masked_fill((source == PAD).T[:, None], -torch.inf).softmax(2)
        context = torch.einsum("bts,sbh->tbh", weights, memory)
        combined = self.combine(torch.cat([y, context], 2)).tanh()
        return self.output(self.dropout(combined)), weights, state

    def translate(self, source: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Map words ``[S, B]`` to the best found, ``[B, T]``, and where these attend to."""
        memory, state = self.encode(source)

        def step(words: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
            logits, _, state = self.decode(words, state, memory[:, rows], source[:, rows])
            return logits[0].log_softmax(1), state

        found = search(step, state, source.shape[1], width, STEPS)
        before = torch.cat([torch.full_like(found[:, :1], BEGIN), found[:, :-1]], 1)
        return found, self.decode(before.T, state, memory, source)[1].argmax(2)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this program alone has."""
    parser.add_argument("--language", default="de", metavar="CODE", help="such as de, fr, nl, sv")


def build(options: Any) -> Task:
    """Read the pairs, hold some out, and build the model."""
    bleu = package("sacrebleu").corpus_bleu
    pairs = read_pairs(options.language)
    random.Random(0).shuffle(pairs)
    held_out, learnt = pairs[:400], pairs[400:]
    if options.quick:
        held_out, learnt = held_out[:50], learnt[:600]
    source, target = (Words(pair[side] for pair in learnt) for side in (0, 1))
    x, unseen = (source.encode([pair[0] for pair in part], STEPS) for part in (learnt, held_out))
    y = target.encode([pair[1] for pair in learnt], STEPS)
    truth = [" ".join(pair[1]) for pair in held_out]
    model = Translator(options, source, target, 32 if options.quick else 160)

    def score(sentences: list[str]) -> float:
        return float(bleu(sentences, [truth], force=True).score)

    def nearest() -> list[str]:
        bags = [
            one_hot(part, len(source.words)).amax(1)[:, END + 1 :].float() for part in (x, unseen)
        ]
        known, asked = (bag / bag.norm(dim=1, keepdim=True).clamp(min=1) for bag in bags)
        return [" ".join(learnt[row][1]) for row in (asked @ known.T).argmax(1).tolist()]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        source, words = (part.T for part in batch)
        before = torch.cat([torch.full_like(words[:1], BEGIN), words[:-1]])
        memory, state = model.encode(source)  # type: ignore[operator]
        logits = model.decode(before, state, memory, source)[0]  # type: ignore[operator]
        return cross_entropy(
            logits.flatten(0, 1), words.flatten(), ignore_index=PAD, label_smoothing=0.1
        )

    def translate(width: int) -> list[str]:
        sentences = []
        found, attended = model.translate(unseen.T, width)
        for words, places, (asked, _) in zip(
            found.tolist(), attended.tolist(), held_out, strict=True
        ):
            said = words[: words.index(END)] if END in words else words
            sentences.append(
                " ".join(
                    asked[min(place, len(asked) - 1)] if word == UNKNOWN else target.words[word]
                    for word, place in zip(said, places, strict=False)
                )
            )
        return sentences

    def draw(axes: Axes) -> None:
        row = max(range(len(held_out)), key=lambda index: len(held_out[index][0]))
        source, asked = unseen[row : row + 1].T, held_out[row][0]
        said = translate(1)[row].split()
        words = target.encode([said], len(said) + 1)
        before = torch.cat([torch.tensor([[BEGIN]]), words[:, :-1]], 1)
        memory, state = model.encode(source)
        weights = model.decode(before.T, state, memory, source)[1]
        axes.imshow(weights[0, :, : len(asked)], cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(asked)), asked, rotation=60, ha="right")
        axes.set_yticks(range(len(said) + 1), [*said, "(end)"])

    def finish() -> None:
        copied = [" ".join(pair[0]) for pair in held_out]
        beam = translate(4)
        for name, said in (("greedy", translate(1)), ("beam of 4", beam), ("the source", copied)):
            print(f"  {name + ':':12}{score(said):.1f}")
        for index in range(6):
            print(f"  {copied[index]}\n    {beam[index]}\n    (right: {truth[index]})")

    return Task(
        data=f"messages of gramps, English and {options.language!r}, {len(learnt):,} to learn "
        f"from, {len(held_out)} held out",
        model=model,
        batches=lambda: shuffled(64, x, y),
        loss=loss,
        evaluate=lambda _: score(translate(1)),
        metric="BLEU",
        show=".1f",
        rises=True,
        baseline="translation of the most similar message learnt",
        baseline_value=score(nearest()),
        draw=draw,
        finish=finish,
    )


PROGRAM = Program(__file__, __doc__, build, (25, 8), "gru", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
