"""Exploding gradients shown and cured, vanishing ones made visible: digits by pairs of pixels.

    python examples/gallery/exploding.py                  # bounds the gradient at every step
    python examples/gallery/exploding.py --cure norm      # bounds that of all parameters
    python examples/gallery/exploding.py --cure none      # see it fail

An Elman network whose recurrent weights start at 1.5 times an orthogonal matrix hands the gradient
of a handwritten digit back through 32 steps, and enlarges it on the way: gradient descent by a
fixed rate steps far away, and learns nothing. ``grad_clip=("norm", 0.01)`` bounds dL/dh_t of every
row at every step of the way; ``clip_grad_norm_`` bounds the gradient of all parameters that comes
out in the end. The baseline is the same training without either. The picture shows dL/dh_t on its
way back (``gradient_flow``): as it explodes, as it is bounded, as it vanishes where the weights
start at half an orthogonal matrix, and in an LSTM.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from _classify import classification, loss
from _digits import read_digits
from _gallery import Options, Program, Task, accuracy, recurrent, shuffled
from rnnkernels.diagnostics import gradient_flow

PIXELS = 2
GAIN, RATE = 1.5, 0.1
BOUND, TOTAL = ("norm", 0.01), 1.0
"""Of dL/dh_t of a row, a 32nd of which is each row's share in a loss; of all parameters."""


class PixelReader(nn.Module):
    """Recurrent layer over an image's pixels, then a Linear layer on the final state."""

    def __init__(self, options: Any, cell: str, hidden: int, gain: float, bound: Any) -> None:
        """Start the recurrent weights of each gate at ``gain`` times an orthogonal matrix; bound
        dL/dh_t by ``bound``."""
        super().__init__()
        chosen = Options(cell=cell, backend=options.backend)
        self.rnn = recurrent(chosen, PIXELS, hidden, grad_clip=bound)
        self.output = nn.Linear(hidden, 10)
        with torch.no_grad():
            for gate in torch.split(self.rnn.get_parameter("weight_hh_l0"), hidden):
                nn.init.orthogonal_(gate, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels ``[B, T, PIXELS]`` to logits ``[B, 10]``."""
        logits: Tensor = self.output(self.rnn(x.transpose(0, 1))[0][-1])
        return logits


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this program alone has."""
    parser.add_argument("--cure", choices=("step", "norm", "none"), default="step",
                        help="what is bounded: dL/dh_t at every step, the gradient of all "
                        "parameters, or nothing")  # fmt: skip


def train_without_bound(model: PixelReader, epochs: int, x: Tensor, y: Tensor) -> None:
    """Train as the program does, but by plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(epochs):
        for batch in shuffled(32, x, y):
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def build(options: Any) -> Task:
    """Read the digits, train without a bound, and build the model from the same start."""
    digits = read_digits(options.quick)
    x, unseen = (part.view(len(part), -1, PIXELS) for part in (digits.images, digits.unseen))
    hidden = 32 if options.quick else 64

    def fresh(bound: Any, cell: str = options.cell, gain: float = GAIN) -> PixelReader:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return PixelReader(options, cell, hidden, gain, bound)

    plain = fresh(None)
    train_without_bound(plain, options.epochs, x, digits.labels)
    model = fresh(BOUND if options.cure == "step" else None)

    def draw(axes: Axes) -> None:
        shown = {
            f"{options.cell}, weights times {GAIN}": fresh(None),
            f"the same, grad_clip={BOUND}": fresh(BOUND),
            "rnn, weights times 0.5": fresh(None, "rnn", 0.5),
            "lstm": fresh(None, "lstm", 1.0),
        }
        with torch.enable_grad(), gradient_flow(nn.ModuleDict(
            {str(index): reader.rnn for index, reader in enumerate(shown.values())}
        )) as flow:  # fmt: skip
            for reader in shown.values():
                loss(reader, (x[:32], digits.labels[:32])).backward()  # type: ignore[no-untyped-call]
        for index, name in enumerate(shown):
            axes.plot(flow.norms(str(index))[:, 0].tolist(), label=name)
        axes.set(xlabel="step t", ylabel="|dL/dh_t| before training", yscale="log")
        axes.legend(fontsize=8)

    return classification(
        model,
        (x, digits.labels),
        (unseen, digits.truth),
        batch_size=32,
        data=digits.described(),
        baseline="the same training without a bound",
        baseline_value=accuracy(plain(unseen).detach(), digits.truth),
        lr=RATE,
        decay=0.0,
        clip=TOTAL if options.cure == "norm" else None,
        optimizer=torch.optim.SGD,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (20, 8), "rnn", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
