"""One to one, the simplest case: a sequence of one step is a feed-forward layer.

    python examples/gallery/one_to_one.py

A handwritten digit of scikit-learn's is read in a single step from a state of zeros. What is left
of an Elman network, ``tanh(W_ih x + b_ih + b_hh)``, is computed beside it by torch's own
operations, and so is what is left of an LSTM or a GRU: the largest difference is printed. The
baseline takes the digit whose mean image is closest.
"""

from __future__ import annotations

import sys

from matplotlib.axes import Axes
from torch import Tensor, nn

import _path  # noqa: F401
from _classify import classification
from _cli import UsageError
from _digits import read_digits
from _gallery import Options, Program, Task, recurrent


class OneStep(nn.Module):
    """A recurrent layer on one step, then a Linear layer."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden``."""
        super().__init__()
        self.rnn = recurrent(options, 64, hidden)
        self.output = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, 64]`` to logits ``[B, 10]``."""
        logits: Tensor = self.output(self.rnn(x[None])[0][0])
        return logits


def feed_forward(rnn: nn.Module, x: Tensor, cell: str) -> Tensor:
    """Map ``[B, 64]`` to ``[B, hidden]``: the layer's formula where the state before is zero."""
    w, b, c = (rnn.get_parameter(f"{name}_l0") for name in ("weight_ih", "bias_ih", "bias_hh"))
    z = x @ w.T + b
    if cell == "rnn":
        return (z + c).tanh()
    if cell == "lstm":
        i, _, g, o = (z + c).chunk(4, 1)
        return o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    (r, u, n), (cr, cu, cn) = z.chunk(3, 1), c.chunk(3)
    return (1 - (u + cu).sigmoid()) * (n + (r + cr).sigmoid() * cn).tanh()


def build(options: Options) -> Task:
    """Read the digits and build the model."""
    if options.cell not in ("rnn", "lstm", "gru"):
        raise UsageError(
            "argument --cell: expected 'rnn', 'lstm' or 'gru', whose formulas are here"
        )
    digits = read_digits(options.quick)
    model = OneStep(options, 32 if options.quick else 64)

    def finish() -> None:
        plain = feed_forward(model.rnn, digits.unseen, options.cell)
        difference = (model.rnn(digits.unseen[None])[0][0] - plain).abs().max().item()
        print(f"  largest difference from the feed-forward layer: {difference:.1e}")

    def draw(axes: Axes) -> None:
        image = digits.unseen[:1]
        axes.plot(model.rnn(image[None])[0][0, 0], "o", fillstyle="none", label="recurrent layer")
        plain = feed_forward(model.rnn, image, options.cell)[0]
        axes.plot(plain, "x", label="feed-forward layer")
        axes.set(xlabel="hidden unit", ylabel="h of the first image held out")
        axes.legend(fontsize=8)

    return classification(
        model,
        (digits.images, digits.labels),
        (digits.unseen, digits.truth),
        batch_size=32,
        data=digits.described(),
        baseline="the nearest mean image",
        baseline_value=digits.baseline(),
        draw=draw,
        finish=finish,
    )


PROGRAM = Program(__file__, __doc__, build, (30, 5), "rnn")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
