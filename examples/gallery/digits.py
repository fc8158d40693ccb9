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

from matplotlib.axes import Axes
from torch import Tensor, nn

from _classify import classification, draw_confusion
from _digits import read_digits
from _gallery import Options, Program, Task, recurrent


class RowReader(nn.Module):
    """Recurrent layer over an image's steps, then a Linear layer on the final state."""

    def __init__(self, options: Options, features: int, hidden: int) -> None:
        """Read ``features`` pixels at a step into a state of size ``hidden``."""
        super().__init__()
        self.rnn = recurrent(options, features, hidden)
        self.output = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels ``[B, T, features]`` to logits ``[B, 10]``."""
        y, _ = self.rnn(x.transpose(0, 1))
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

    def draw(axes: Axes) -> None:
        said = model(unseen).argmax(-1)
        draw_confusion(axes, said, digits.truth, [str(digit) for digit in range(10)], "digit")

    return classification(
        model,
        (x, digits.labels),
        (unseen, digits.truth),
        batch_size=32,
        data=digits.described(),
        baseline="the nearest mean image",
        baseline_value=digits.baseline(),
        settles=True,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (30, 15), "lstm", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
