"""One to many: describe an image in words, which may be few or many.

    python examples/gallery/captions.py

An image is three handwritten digits of scikit-learn's side by side; its caption is the number that
they make, spelled out: "four hundred thirty seven". Layers without memory turn the image into the
state that a recurrent layer starts from, and that writes the words. The images held out are made of
digits held out. The baseline reads each digit as the nearest mean image, and spells that number.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _digits import Digits, read_digits
from _gallery import Batch, Options, Program, Task, recurrent, with_cell_state
from _translation import BEGIN, END, PAD, State, search

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = ["<pad>", "<unk>", "<s>", "</s>", *ONES, *TENS, "hundred"]
STEPS = 5


def spell(number: int) -> list[str]:
    """Return the words of a number below 1000."""
    if number >= 100:
        rest = number % 100
        return [ONES[number // 100], "hundred", *(spell(rest) if rest else [])]
    if number < len(ONES):
        return [ONES[number]]
    return [TENS[number // 10 - 2], *(ONES[number % 10 : number % 10 + 1] if number % 10 else [])]


CAPTIONS = torch.tensor(
    [
        ([WORDS.index(word) for word in spell(number)] + [END] + [PAD] * STEPS)[:STEPS]
        for number in range(1000)
    ]
)
"""The words of each number, ``[1000, STEPS]``."""


class Captioner(nn.Module):
    """Linear layers on each digit and on all, then a recurrent layer that writes."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden``."""
        super().__init__()
        self.digit = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3))
        self.image = nn.Linear(3 * 64, hidden)
        self.words = nn.Embedding(len(WORDS), 32)
        self.rnn = recurrent(options, 32, hidden)
        self.output = nn.Linear(hidden, len(WORDS))
        self.cell = options.cell

    def start(self, images: Tensor) -> Any:
        """Map images ``[B, 3, 64]`` to the state before the first word."""
        return with_cell_state(self.cell, self.image(self.digit(images).flatten(1)).tanh()[None])

    def forward(self, before: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """Map the words before each ``[T, B]`` to logits ``[T, B, words]`` and the next state."""
        y, hx = self.rnn(self.words(before), hx)
        return self.output(y), hx


def draw_images(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw images ``[count, 3, 64]`` of random digits, and their numbers ``[count]``."""
    rows = torch.randint(len(images), [count, 3])
    return images[rows], labels[rows] @ torch.tensor([100, 10, 1])


def build(options: Options) -> Task:
    """Read the digits, compose the images held out, and build the model."""
    digits: Digits = read_digits(options.quick)
    rows = torch.randint(len(digits.unseen), [500, 3], generator=torch.Generator().manual_seed(1))
    places = torch.tensor([100, 10, 1])
    unseen, numbers = digits.unseen[rows], digits.truth[rows] @ places
    guessed = digits.nearest_mean()[rows] @ places
    model = Captioner(options, 48 if options.quick else 128)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        words = CAPTIONS[batch[1]].T
        before = torch.cat([torch.full_like(words[:1], BEGIN), words[:-1]])
        logits = model(before, model.start(batch[0]))[0]  # type: ignore[operator]
        return cross_entropy(logits.flatten(0, 1), words.flatten(), ignore_index=PAD)

    def write(images: Tensor) -> Tensor:
        def step(words: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
            logits, state = model(words, state)
            return logits[0].log_softmax(1), state

        return search(step, model.start(images), len(images), 1, STEPS)

    def evaluate(_: nn.Module) -> float:
        written, right = write(unseen), CAPTIONS[numbers]
        return ((written == right) | (right == PAD)).all(1).double().mean().item()

    def draw(axes: Axes) -> None:
        axes.imshow(1 - unseen[:4].view(4, 3, 8, 8).transpose(1, 2).reshape(32, 24), cmap="gray")
        for row, words in enumerate(write(unseen[:4]).tolist()):
            said = words[: words.index(END)] if END in words else words
            axes.text(25, 8 * row + 4, " ".join(WORDS[word] for word in said), va="center")
        axes.set(xlim=(-0.5, 70))
        axes.axis("off")

    count = 640 if options.quick else 3200
    return Task(
        data=f"numbers of three of scikit-learn's digits, {count:,} an epoch of "
        f"{len(digits.images)} digits, {len(unseen)} of {len(digits.unseen)} others held out",
        model=model,
        batches=lambda: [draw_images(digits.images, digits.labels, 64) for _ in range(count // 64)],
        loss=loss,
        evaluate=evaluate,
        metric="captions all right",
        show=".1%",
        rises=True,
        baseline="the nearest mean images, spelled",
        baseline_value=(guessed == numbers).double().mean().item(),
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (20, 4), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
