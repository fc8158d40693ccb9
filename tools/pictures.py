"""``python tools/pictures.py``: draws the pictures of the guides again, docs/guides/*.png.

Those that show data show runs of this library, small enough to take seconds; the others are
drawings. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import rnnkernels as rk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUT = Path(__file__).parents[1] / "docs" / "guides"
BLUE, ORANGE, GREEN, GREY = "#2a6fb0", "#d9822b", "#3c8d4f", "#6b7280"


def figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
                            "axes.spines.right": False, "svg.hashsalt": "rnnkernels"})  # fmt: skip
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", **options)


def drawing(ax: Axes, width: float, height: float) -> None:
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")


def box(ax: Axes, x: float, y: float, text: str, color: str, size: float = 1.0) -> None:
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(
        FancyBboxPatch((x - size / 2, y - 0.3), size, 0.6, boxstyle="round,pad=0.06", fc=color,
                       ec="none", alpha=0.9)
    )  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", color="white", fontsize=10)


def circle(ax: Axes, x: float, y: float, text: str) -> None:
    from matplotlib.patches import Circle

    ax.add_patch(Circle((x, y), 0.24, fc="white", ec=GREY, zorder=3))
    ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)


def line(ax: Axes, *points: tuple[float, float], color: str = GREY, head: bool = True) -> None:
    """Through these points; with an arrow's head at the last one."""
    xs, ys = zip(*points, strict=True)
    ax.plot(xs[:-1] if head else xs, ys[:-1] if head else ys, color=color, lw=1.4)
    if head:
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", points[-1], points[-2], arrowprops=style)


def unrolling() -> Figure:
    """One cell with a loop, and the same cell at each step."""
    fig, ax = figure(8.2, 2.3)
    drawing(ax, 14, 4)
    box(ax, 1.5, 2, "cell", BLUE)
    line(ax, (1.5, 0.6), (1.5, 1.6))
    line(ax, (1.5, 2.4), (1.5, 3.4))
    line(ax, (2.1, 2), (2.7, 2), (2.7, 2.9), (0.4, 2.9), (0.4, 2), (0.9, 2), color=ORANGE)
    ax.text(1.5, 0.3, "$x_t$", ha="center", va="center")
    ax.text(1.5, 3.65, "$y_t = h_t$", ha="center", va="center")
    ax.text(3.7, 2, "=", fontsize=16, ha="center", va="center")
    ax.text(4.6, 2, "$h_0$", ha="center", va="center")
    for i, name in enumerate(["1", "2", "3", "T"]):
        x = 6.1 + 2.2 * i
        box(ax, x, 2, "cell", BLUE)
        line(ax, (x, 0.6), (x, 1.6))
        line(ax, (x, 2.4), (x, 3.4))
        line(ax, (x - 1.6 if i else 4.9, 2), (x - 0.62, 2), color=ORANGE)
        ax.text(x, 0.3, f"$x_{name}$", ha="center", va="center")
        ax.text(x, 3.65, f"$h_{name}$", ha="center", va="center")
    ax.text(11.6, 2.35, "…", ha="center", va="center", fontsize=14)
    line(ax, (13.3, 2), (13.95, 2), color=ORANGE)
    return fig


def gates() -> Figure:
    """What an LSTM and a GRU compute in a step."""
    fig, axes = figure(8.6, 3.1, columns=2)
    ax = axes[0]
    drawing(ax, 9, 6.6)
    ax.set_title("LSTM")
    line(ax, (0.3, 5.6), (8.7, 5.6), color=ORANGE)
    line(ax, (0.3, 0.9), (6.2, 0.9), head=False)
    for x, text in ((1.5, "f"), (3.1, "i"), (4.7, "g"), (6.2, "o")):
        box(ax, x, 2.1, text, GREEN if text == "g" else BLUE, 0.7)
        line(ax, (x, 0.9), (x, 1.7))
    line(ax, (1.5, 2.5), (1.5, 5.32))
    line(ax, (3.1, 2.5), (3.1, 3.9), (3.62, 3.9))
    line(ax, (4.7, 2.5), (4.7, 3.9), (4.18, 3.9))
    line(ax, (3.9, 4.15), (3.9, 5.32))
    line(ax, (6.2, 2.5), (6.2, 3.2), (7.02, 3.2))
    line(ax, (7.3, 5.6), (7.3, 4.75))
    line(ax, (7.3, 4.15), (7.3, 3.48))
    line(ax, (7.3, 2.95), (7.3, 0.9), (8.7, 0.9))
    for x, y, text in ((1.5, 5.6, "×"), (3.9, 5.6, "+"), (3.9, 3.9, "×"), (7.3, 3.2, "×")):
        circle(ax, x, y, text)
    box(ax, 7.3, 4.45, "tanh", GREEN, 0.9)
    ax.text(0.3, 5.95, "$c_{t-1}$")
    ax.text(8.2, 5.95, "$c_t$")
    ax.text(0.1, 0.3, "$x_t,\\ h_{t-1}$")
    ax.text(8.2, 0.3, "$h_t$")
    ax = axes[1]
    drawing(ax, 9, 6.6)
    ax.set_title("GRU")
    line(ax, (0.3, 5.6), (8.7, 5.6), color=ORANGE)
    line(ax, (0.3, 0.9), (5.9, 0.9), head=False)
    for x, text in ((1.9, "r"), (3.9, "n"), (5.9, "z")):
        box(ax, x, 2.1, text, GREEN if text == "n" else BLUE, 0.7)
        line(ax, (x, 0.9), (x, 1.7))
    line(ax, (2.3, 2.1), (3.48, 2.1), color=BLUE)
    line(ax, (3.9, 2.5), (3.9, 4.1), (6.62, 4.1))
    line(ax, (5.9, 2.5), (5.9, 3.2), (6.9, 3.2), (6.9, 3.82))
    line(ax, (5.9, 3.2), (5.0, 3.2), (5.0, 5.32))
    line(ax, (6.9, 4.35), (6.9, 5.32))
    for x, y, text in ((5.0, 5.6, "×"), (6.9, 5.6, "+"), (6.9, 4.1, "×")):
        circle(ax, x, y, text)
    ax.text(5.1, 4.65, "$z$", fontsize=8)
    ax.text(7.2, 3.4, "$1-z$", fontsize=8)
    ax.text(2.45, 2.45, "of $W_h h$", fontsize=7, color=BLUE)
    ax.text(0.3, 5.95, "$h_{t-1}$")
    ax.text(8.2, 5.95, "$h_t$")
    ax.text(0.1, 0.3, "$x_t,\\ h_{t-1}$")
    return fig


def recall() -> tuple[rk.LSTM, Tensor]:
    """An LSTM that has learnt to remember the value at the one marked step; and an input."""
    torch.manual_seed(3)
    lstm, head = rk.LSTM(2, 6), nn.Linear(6, 1)
    parameters = [*lstm.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    T, B = 24, 64
    for _ in range(400):
        value = torch.randn(T, B).sign()
        at = torch.randint(0, T - 4, (B,))
        mark = torch.zeros(T, B).scatter_(0, at[None], 1.0)
        answer = value.gather(0, at[None])[0]
        y, _ = lstm(torch.stack([value * 0.8, mark], dim=2))
        loss = nn.functional.soft_margin_loss(head(y[-1])[:, 0], answer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    mark = torch.zeros(T)
    mark[8] = 1.0
    return lstm, torch.stack([torch.randn(T).sign() * 0.8, mark], dim=1)[:, None]


def memory() -> Figure:
    """The gates and the cells of a trained LSTM, from its weights and every h of a run."""
    lstm, x = recall()
    with torch.no_grad():
        y, _, states = lstm(x, return_all_states=True)
        before = torch.cat([torch.zeros(1, 1, 6), y[:-1]])
        w_ih, w_hh, b_ih, b_hh = lstm.all_weights[0]
        i, f, _, o = (x @ w_ih.T + b_ih + before @ w_hh.T + b_hh).chunk(4, dim=2)
    fig, axes = figure(8.2, 2.5, columns=4, sharey=True)
    shown = {"input gate i": i.sigmoid(), "forget gate f": f.sigmoid(),
             "output gate o": o.sigmoid(), "cell c": states.c[0]}  # fmt: skip
    for ax, (title, values) in zip(axes, shown.items(), strict=True):
        bound = 1.0 if "gate" in title else float(values.abs().max())
        low, colors = (0.0, "viridis") if "gate" in title else (-bound, "RdBu")
        image = ax.imshow(
            values.reshape(24, 6).T.numpy(), aspect="auto", vmin=low, vmax=bound, cmap=colors
        )
        ax.axvline(7.5, color=ORANGE, lw=1)
        ax.axvline(8.5, color=ORANGE, lw=1)
        ax.set(title=title, xlabel="t")
        fig.colorbar(image, ax=ax, shrink=0.8)
    axes[0].set(ylabel="unit")
    return fig


def reach(T: int, **options: Any) -> Tensor:
    """``|d loss_s / d x_t|`` for every two steps, [s, t], of a loss at each step of an LSTM."""
    torch.manual_seed(0)
    lstm = rk.LSTM(4, 16)
    with torch.no_grad():
        lstm.all_weights[0][2][16:32] = (
            2.0  # forget gates that are open, so that gradients reach far
        )
    found = torch.zeros(T, T)
    x = torch.randn(T, 1, 4, requires_grad=True)
    weights = torch.randn(16)
    y, _ = lstm(x, **options)
    for s in range(T):
        (dx,) = torch.autograd.grad(y[s, 0] @ weights, x, retain_graph=True)
        found[s] = dx[:, 0].norm(dim=1)
    return found


def reaches(shown: dict[str, Tensor]) -> Figure:
    from matplotlib.colors import LogNorm

    fig, axes = figure(2.75 * len(shown), 2.9, columns=len(shown), sharey=True, squeeze=False)
    for ax, (title, values) in zip(axes[0], shown.items(), strict=True):
        colors = LogNorm(1e-3, 1)
        drawn = values.masked_fill(values == 0, torch.nan)
        image = ax.imshow(drawn.numpy(), norm=colors, cmap="viridis", origin="upper")
        ax.set(title=title, xlabel="input of step t")
    axes[0, 0].set(ylabel="loss of step s")
    fig.colorbar(image, ax=axes, shrink=0.8, label="size of the gradient")
    return fig


def truncation() -> Figure:
    return reaches({
        "full": reach(32), "truncate=8": reach(32, truncate=8),
        "truncate=(4, 12)": reach(32, truncate=(4, 12)),
    })  # fmt: skip


def resets() -> Figure:
    reset = torch.zeros(32, 1, dtype=torch.bool)
    reset[[9, 14, 25]] = True
    return reaches({"no reset": reach(32), "reset at 9, 14, 25": reach(32, reset=reset)})


def lengths() -> Figure:
    """Outputs of rows of unequal lengths, forward and reverse."""
    torch.manual_seed(0)
    ends = [20, 13, 0, 7]
    gru = rk.GRU(4, 8, bidirectional=True)
    with torch.no_grad():
        y, _ = gru(torch.randn(20, 4, 4), lengths=ends)
    fig, axes = figure(8.2, 2.1, columns=4, sharey=True)
    for b, ax in enumerate(axes):
        values = y[:, b].T.masked_fill(torch.arange(20) >= ends[b], torch.nan)
        ax.set_facecolor("#e5e7eb")
        ax.imshow(values.numpy(), aspect="auto", cmap="RdBu", vmin=-0.8, vmax=0.8)
        ax.set(title=f"lengths[{b}] = {ends[b]}", xlabel="t")
        ax.axhline(7.5, color="black", lw=0.8)
    axes[0].set(yticks=[3.5, 11.5], yticklabels=["forward", "reverse"])
    return fig


def regularisers() -> Figure:
    """Which numbers each of them takes away, as runs show them."""
    torch.manual_seed(1)
    T, N, p = 24, 16, 0.3
    x = torch.ones(T, 1, N, requires_grad=True)
    dropped = nn.functional.dropout(x, p)
    (each_step,) = torch.autograd.grad(dropped.sum(), x)
    y, _ = rk.GRU(N, N, input_dropout=p)(x)
    (all_steps,) = torch.autograd.grad(y.sum(), x)
    with rk.use_backend("reference"), torch.no_grad():  # a picture need not compile kernels
        h, _ = rk.RNN(N, N, zoneout=p)(torch.randn(T, 1, N))
    kept = torch.cat([h[:1] * 0 + 1, h.diff(dim=0)])
    shown = {"dropout, anew at each step": each_step, "input_dropout, the same at all": all_steps,
             "zoneout, a unit keeps its value": kept}  # fmt: skip
    fig, axes = figure(8.2, 2.3, columns=3)
    from matplotlib.colors import ListedColormap

    for ax, (title, values) in zip(axes, shown.items(), strict=True):
        ax.imshow(
            (values[:, 0].T == 0).numpy(), aspect="auto", cmap=ListedColormap(["#dbeafe", BLUE])
        )
        ax.set(title=title, xlabel="t")
    axes[0].set(ylabel="feature or unit")
    return fig


PICTURES: dict[str, Callable[[], Figure]] = {
    "unrolling": unrolling,
    "gates": gates,
    "memory": memory,
    "truncation": truncation,
    "resets": resets,
    "lengths": lengths,
    "regularisers": regularisers,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", choices=[*PICTURES, []], help="default: all of them")
    parser.add_argument("--out", type=Path, default=OUT, help="a folder (default: %(default)s)")
    wanted = parser.parse_args(arguments)
    try:
        import matplotlib
    except ModuleNotFoundError:
        parser.error("matplotlib is missing: pip install matplotlib")
    matplotlib.use("agg")
    wanted.out.mkdir(parents=True, exist_ok=True)
    for name in wanted.name or PICTURES:
        path = wanted.out / f"{name}.png"
        PICTURES[name]().savefig(path, dpi=120, metadata={"Software": None})
        print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
