"""Many to many: forecast a real series several steps ahead, from every step of it.

    python examples/gallery/forecasting.py                      # weekly CO2, half a year ahead
    python examples/gallery/forecasting.py --series sunspots    # yearly sunspots, five years ahead

Both series come with statsmodels. The baseline is seasonal-naive: what was measured one period
before the week asked about (for CO2, which rises, plus the growth since). The model sees the same
and learns what to add. It reads a series from its beginning to its end: CO2, the long one, in
chunks that hand their state on (an update after each), and inside a chunk gradients flow back no
further than ``truncate`` steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from _gallery import Batch, Options, Program, Task, package, recurrent
from rnnkernels import streaming


@dataclass(frozen=True)
class Series:
    """How a series is read, in its own steps (weeks or years), and the model of it.

    ``noise`` is added to the standardised input in training, against learning by heart.
    """

    column: str
    unit: str
    period: int
    horizon: int
    chunk: int
    truncate: int | None
    grows: bool
    hidden: int
    noise: float


SERIES = {
    "co2": Series("co2", "ppm", 52, 26, 208, 52, True, 48, 0.3),
    "sunspots": Series("SUNACTIVITY", "spots", 11, 5, 10_000, None, False, 8, 0.8),
}


class Forecaster(nn.Module):
    """Recurrent layer, then a Linear layer for all steps ahead at once, zero to begin with."""

    def __init__(self, options: Options, series: Series, hidden: int) -> None:
        """Correct the naive forecast of ``series``, read into a state of size ``hidden``."""
        super().__init__()
        self.rnn = recurrent(options, 2 + series.horizon, hidden, truncate=series.truncate)
        self.output = nn.Linear(hidden, series.horizon)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Map features ``[T, 1, 2 + horizon]`` to corrections ``[T, 1, horizon]``."""
        y, hx = self.rnn(x, hx)
        return self.output(y), hx


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this program alone has."""
    parser.add_argument("--series", choices=tuple(SERIES), default="co2", help="what is forecast")


def build(options: Any) -> Task:
    """Read the series and lay out, for each step, what is known, the truth and the baseline."""
    series: Series = SERIES[options.series]
    frame = package(f"statsmodels.datasets.{options.series}").load_pandas().data
    values = torch.tensor(frame[series.column].interpolate().to_numpy(), dtype=torch.float32)
    ahead, period = series.horizon, series.period
    windows = values.unfold(0, period + 1 + ahead, 1)  # [N, period before, now, steps ahead]
    if options.quick:
        windows = windows[-800:]
    now, truth = windows[:, period], windows[:, period + 1 :]
    growth = (now - windows[:, 0]) * series.grows
    naive = windows[:, 1 : ahead + 1] + growth[:, None]
    learnt = len(windows) * 3 // 4
    scale = (truth - naive)[:learnt].std()
    features = torch.cat([now[:, None], growth[:, None], naive - now[:, None]], 1)
    features = (features - features[:learnt].mean(0)) / (features[:learnt].std(0) + 1e-6)
    x, target = features[:, None], ((truth - naive) / scale)[:, None]
    unseen = slice(learnt + ahead, None)  # a step whose truth was not learnt from, not even in part
    state: Any = None

    def batches() -> Iterator[Batch]:
        nonlocal state
        state = None
        parts = (streaming.chunks(t[:learnt], series.chunk) for t in (x, target))
        yield from zip(*parts, strict=True)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal state
        noisy = batch[0] + series.noise * torch.randn_like(batch[0])  # few years are soon known
        correction, state = model(noisy, state)
        state = streaming.detach(state)
        return l1_loss(correction, batch[1])

    def forecast(model: nn.Module) -> Tensor:
        correction: Tensor = model(x)[0][:, 0]
        return naive + scale * correction

    def draw(axes: Axes) -> None:
        steps = range(1, ahead + 1)
        for name, guess in (("model", forecast(model)), ("seasonal-naive", naive)):
            error = (guess - truth)[unseen].abs().mean(0)
            axes.plot(steps, error.tolist(), "o-" if name == "model" else "--", label=name)
        axes.set(xlabel="steps ahead", ylabel=f"mean absolute error, {series.unit}", ylim=(0, None))
        axes.legend()

    model = Forecaster(options, series, series.hidden)
    return Task(
        data=f"statsmodels' {options.series}, {len(values):,} values, of which the last "
        f"{len(windows[unseen])} are held out; {ahead} steps ahead",
        model=model,
        batches=batches,
        loss=loss,
        evaluate=lambda model: l1_loss(forecast(model)[unseen], truth[unseen]).item(),
        metric=f"error in {series.unit}",
        show=".3f",
        rises=False,
        baseline="seasonal-naive",
        baseline_value=l1_loss(naive[unseen], truth[unseen]).item(),
        lr=3e-3,
        decay=0.1,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (60, 20), "gru", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
