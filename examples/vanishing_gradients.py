"""Draw how the gradients of RNN, GRU and LSTM layers vanish or explode on their way back in time.

    python examples/vanishing_gradients.py                 # the picture in docs/gradient_flow.md
    python examples/vanishing_gradients.py --gates 0       # LSTM and GRU with the usual biases
    python examples/vanishing_gradients.py --truncate 25   # shorter windows

Three panels: plain backward from a loss at the last step; the same with every step's gradient
clipped; and truncated backward from a loss at every step. The gradient of each loss has norm 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"vanishing_gradients.py needs {error.name}: pip install tqdm matplotlib")

import rnnkernels as rk
from _cli import Parser, UsageError, exit_code, number, whole
from _results import write_atomically
from rnnkernels.diagnostics import GradientFlow, gradient_flow

CELLS = ("RNN tanh", "RNN relu", "GRU", "LSTM")
INPUTS = 16


class Options(argparse.Namespace):
    """The command line, typed."""

    steps: int
    hidden: int
    batch_size: int
    gain: float
    relu_gain: float
    gates: float
    bound: float
    truncate: int
    seed: int
    out: Path


@dataclass(frozen=True)
class Panel:
    """One part of the picture.

    Attributes:
        title: what is done to the gradient.
        every_step: whether there is a loss at every step, or at the last one alone.
        arguments: what the layers are called with.
    """

    title: str
    every_step: bool
    arguments: dict[str, Any]


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line; raise :class:`UsageError` where it makes no sense."""
    assert __doc__
    parser = Parser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    size = whole(1)
    parser.add_argument("--steps", type=whole(2), default=200, metavar="T", help="time steps")
    parser.add_argument("--hidden", type=size, default=64, metavar="N", help="size of the state")
    parser.add_argument("--batch-size", type=size, default=16, metavar="B", help="sequences")
    parser.add_argument(
        "--gain",
        type=number(0, 100),
        default=1.2,
        metavar="X",
        help="W_hh starts as a random orthogonal matrix times this",
    )
    parser.add_argument(
        "--relu-gain",
        type=number(0, 100),
        default=1.05,
        metavar="X",
        help="that of the relu RNN starts as the identity times this",
    )
    parser.add_argument(
        "--gates",
        type=number(-100, 100),
        default=3.0,
        metavar="X",
        help="added to the biases of the gates that keep the state: the LSTM's forget gate, the "
        "GRU's update gate",
    )
    parser.add_argument(
        "--bound", type=number(1e-9, 1e9), default=1.0, metavar="X", help="norm to clip to"
    )
    parser.add_argument(
        "--truncate", type=size, default=50, metavar="K", help="steps of a window of truncation"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of all numbers")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gradient_flow.png"),
        metavar="FILE",
        help="the picture, a PNG",
    )
    return parser.parse_args(argv, namespace=Options())


def build_layers(options: Options) -> nn.ModuleDict:
    """Build a float64 layer of every cell, with W_hh and gates started as ``options`` say."""
    sizes: dict[str, Any] = {
        "input_size": INPUTS,
        "hidden_size": options.hidden,
        "dtype": torch.float64,
    }
    layers = nn.ModuleDict(
        {
            "RNN tanh": rk.RNN(**sizes),
            "RNN relu": rk.RNN(**sizes, nonlinearity="relu"),
            "GRU": rk.GRU(**sizes),
            "LSTM": rk.LSTM(**sizes),
        }
    )
    keeping = slice(options.hidden, 2 * options.hidden)  # of the gates rzn and ifgo
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer.get_parameter("weight_hh_l0")
            for gate in torch.split(weight, options.hidden):
                if name == "RNN relu":
                    nn.init.eye_(gate).mul_(options.relu_gain)
                else:
                    nn.init.orthogonal_(gate, options.gain)
            if name in ("GRU", "LSTM"):
                layer.get_parameter("bias_ih_l0")[keeping] += options.gates
    return layers


def panels(options: Options) -> list[Panel]:
    """List what is compared."""
    clip = ("norm", options.bound)
    return [
        Panel("plain, loss at the last step", False, {}),
        Panel(f"grad_clip=('norm', {options.bound:g}), same loss", False, {"grad_clip": clip}),
        Panel(
            f"truncate={options.truncate}, loss at every step",
            True,
            {"truncate": options.truncate},
        ),
    ]


def record(options: Options, progress: tqdm[Any]) -> list[GradientFlow]:
    """Run every layer forward and backward for each panel."""
    torch.manual_seed(options.seed)
    layers = build_layers(options)
    x = torch.randn(options.steps, options.batch_size, INPUTS, dtype=torch.float64)
    dy = torch.randn(options.batch_size, options.hidden, dtype=torch.float64)
    dy /= dy.norm()  # the gradient of every loss
    flows = []
    for panel in panels(options):
        with gradient_flow(layers) as flow:
            for name in CELLS:
                y: Tensor = layers[name](x, **panel.arguments)[0]
                y = y if panel.every_step else y[-1:]
                torch.autograd.backward(y, dy.expand_as(y))
                progress.update()
        flows.append(flow)
    return flows


def draw(options: Options, flows: list[GradientFlow]) -> Figure:
    """Draw a panel per flow, with a line per cell."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, len(flows), sharey=True)
    for ax, panel, flow in zip(axes, panels(options), flows, strict=True):
        for name in CELLS:
            norms = flow.norms(name)[:, 0]
            ax.plot(norms.masked_fill(norms == 0, torch.nan).tolist(), label=name, linewidth=2)
        ax.axhline(1, color="gray", linewidth=0.8, linestyle=":")
        ax.set_yscale("log")
        ax.set_title(panel.title, fontsize=13)
        ax.set_xlabel("time step t", fontsize=12)
        ax.margins(x=0.02)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("|dL/dh_t|", fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    return figure


def run(options: Options) -> int:
    """Record, print and draw as ``options`` say; return the exit code."""
    with tqdm(total=len(panels(options)) * len(CELLS), unit="run", dynamic_ncols=True) as progress:
        flows = record(options, progress)
    for panel, flow in zip(panels(options), flows, strict=True):
        print(f"\n{panel.title}\n{flow.table()}")
    figure = draw(options, flows)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, lambda file: figure.savefig(file, format="png", dpi=100))
    except OSError as error:
        raise UsageError(
            f"argument --out: expected a file to write to, but {str(options.out)!r} cannot be "
            f"written ({error.strerror}); name another"
        ) from error
    print(f"\nwrote {options.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("vanishing_gradients.py", lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
