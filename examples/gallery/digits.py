"""Many to one: read a handwritten digit row by row, or pixel by pixel, and tell which it is.

    python examples/gallery/digits.py             # 8 steps of 8 pixels
    python examples/gallery/digits.py --pixels    # 64 steps of 1 pixel

The 1,797 digits of 8x8 pixels come with scikit-learn. The model reads one from top to bottom and is
asked after the last step alone. The baseline takes the digit whose mean image is closest. (A search
for the nearest of all images would be far better than that: the digits are few and small.)
"""

from __future__ import annotations

import argparse
import sys

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _gallery import Batch, Options, Program, Task, accuracy, package, recurrent, shuffled

HELD_OUT = 450


class Digits(nn.Module):
    """Recurrent layer over an image's steps, then a Linear layer on the final state."""

    def __init__(self, options: Options, features: int, hidden: int) -> None:
        """Read ``features`` pixels at a step into a state of size ``hidden``."""
        super().__init__()
        self.rnn = recurrent(options, features, hidden)
        self.output = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels ``[T, B, features]`` to logits ``[B, 10]``."""
        y, _ = self.rnn(x)
        return self.output(y[-1])


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this program alone has."""
    parser.add_argument("--pixels", action="store_true", help="one pixel a step, not one row")


def build(options: Options) -> Task:
    """Read the digits, hold some out, and build the model."""
    digits = package("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, learnt = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + 300 if options.quick else None]
    features = 1 if options.pixels else 8
    x = images.reshape(len(images), 64 // features, features)
    model = Digits(options, features, 32 if options.quick else 96)

    means = torch.stack([x[learnt][labels[learnt] == digit].mean(0) for digit in range(10)])
    distances = torch.cdist(x[held_out].flatten(1), means.flatten(1))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0].transpose(0, 1)), batch[1])

    def draw(axes: Axes) -> None:
        said = model(x[held_out].transpose(0, 1)).argmax(-1)
        confused = torch.zeros(10, 10)
        confused.index_put_((labels[held_out], said), torch.ones(len(said)), accumulate=True)
        axes.imshow(confused.log1p(), cmap="Blues")
        axes.set(xlabel="answer", ylabel="digit", xticks=range(10), yticks=range(10))

    return Task(
        data=f"scikit-learn's digits, {len(learnt)} to learn from, {len(held_out)} held out",
        model=model,
        batches=lambda: shuffled(32, x[learnt], labels[learnt]),
        loss=loss,
        evaluate=lambda model: accuracy(model(x[held_out].transpose(0, 1)), labels[held_out]),
        metric="accuracy",
        show=".1%",
        rises=True,
        baseline="the nearest mean image",
        baseline_value=accuracy(-distances, labels[held_out]),
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (30, 15), "lstm", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
