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
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _digits import read_digits
from _gallery import Batch, Options, Program, Task, accuracy, recurrent, shuffled


class RowReader(nn.Module):
    """Recurrent layer over an image's steps, then a Linear layer on the final state."""

    def __init__(self, options: Options, features: int, hidden: int) -> None:
        """Read ``features`` pixels at a step into a state of size ``hidden``."""
        super().__init__()
        self.rnn = recurrent(options, features, hidden)
        self.output = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels ``[T, B, features]`` to logits ``[B, 10]``."""
        y, _ = self.rnn(x)
        logits: Tensor = self.output(y[-1])
        return logits


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this program alone has."""
    parser.add_argument("--pixels", action="store_true", help="one pixel a step, not one row")


def build(options: Any) -> Task:
    """Read the digits, hold some out, and build the model."""
    digits = read_digits(options.quick)
    features = 1 if options.pixels else 8
    x, unseen = (part.view(len(part), -1, features) for part in (digits.images, digits.unseen))
    model = RowReader(options, features, 32 if options.quick else 96)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0].transpose(0, 1)), batch[1])

    def draw(axes: Axes) -> None:
        said = model(unseen.transpose(0, 1)).argmax(-1)
        confused = torch.zeros(10, 10)
        confused.index_put_((digits.truth, said), torch.ones(len(said)), accumulate=True)
        axes.imshow(confused.log1p(), cmap="Blues")
        axes.set(xlabel="answer", ylabel="digit", xticks=range(10), yticks=range(10))

    return Task(
        data=f"scikit-learn's digits, {len(x)} to learn from, {len(unseen)} held out",
        model=model,
        batches=lambda: shuffled(32, x, digits.labels),
        loss=loss,
        evaluate=lambda model: accuracy(model(unseen.transpose(0, 1)), digits.truth),
        metric="accuracy",
        show=".1%",
        rises=True,
        baseline="the nearest mean image",
        baseline_value=(digits.nearest_mean() == digits.truth).double().mean().item(),
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (30, 15), "lstm", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
