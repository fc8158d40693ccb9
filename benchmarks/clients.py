"""``python -m benchmarks.clients``: recurrent models of other packages, before and after convert.

A model runs with torch.nn's layers and, built a second time with the same weights, after
:func:`rnnkernels.convert`; outputs and gradients must agree, and times are taken in turns.
Packages that are not installed are left out, and named. The models with the package's weights come
with them: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rnnkernels as rk
from benchmarks import client_models as models
from benchmarks import providers, record, timing
from benchmarks.client_models import Model, example
from benchmarks.device import Cpu

REPEATS = 15


@dataclass(frozen=True)
class Client:
    """A package and what of it is run.

    Attributes:
        name: as pip knows the package.
        modules: what has to be installed, by the names of modules.
        what: the recurrent layers, and on what they run.
        how: by what the network comes about.
        build: builds the model, the same after the same seed.
        convert: converts it.
        tolerance: of outputs and gradients, relative to the largest.
    """

    name: str
    modules: tuple[str, ...]
    what: str
    how: str
    build: Callable[[], Model]
    convert: Callable[[Any], nn.Module] = rk.convert
    tolerance: float = 1e-4

    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    def pair(self) -> tuple[Model, Model]:
        """The model as it is, and converted; both of the same weights, on the same input."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages
            torch.manual_seed(0)
            plain = self.build()
            torch.manual_seed(0)
            ours = self.build()
            return plain, Model(self.convert(ours.module), ours.call)


AS_IT_IS, AGAIN = "as it is", "built again with its weights"
KEPT, LINE = "as it is, keep_type=True", "with reset= (one line)"
MIXED = "its subclass on our layer"
keep = partial(rk.convert, keep_type=True)
SB3 = ("sb3_contrib", "stable_baselines3", "gymnasium")
TORCHRL = ("torchrl", "tensordict")
CLIENTS = (
    Client("silero-vad", ("silero_vad", "matplotlib", "tqdm"), "LSTM 128-128, 100 steps of 32 ms",
           AGAIN, models.silero_vad),
    Client("resemblyzer", ("resemblyzer",), "LSTM 40-256, 3 layers, 4 x 160 frames", AS_IT_IS,
           models.resemblyzer),
    Client("g2p-fa", ("g2p_fa",), "LSTM 40-256, 2 layers, encoder and decoder; 16 words", AS_IT_IS,
           models.g2p_fa),
    Client("ribodetector", ("ribodetector",), "LSTM 4-128, two directions, 64 packed reads",
           AS_IT_IS, models.ribodetector),
    Client("g2pM", ("g2pM",), "LSTM 64-32, two directions, 16 x 40 characters", AGAIN, models.g2pm),
    Client("g2p-en", ("g2p_en",), "GRU and GRUCell 256-256, 16 words", AGAIN, models.g2p_en),
    Client("sb3-contrib", SB3, "RecurrentPPO: two LSTM 4-256, 8 x 64 steps, some begin episodes",
           AS_IT_IS, models.sb3_contrib),
    Client("sb3-contrib", SB3, "the same", LINE, models.sb3_contrib,
           lambda policy: example("_policies").reset_inside(policy)),
    Client("torchrl", TORCHRL, "LSTMModule 16-64, 8 x 64 steps, some begin episodes",
           KEPT, partial(models.torchrl, "LSTM"), keep),
    Client("torchrl", TORCHRL, "the same", LINE, partial(models.torchrl, "LSTM"),
           lambda module: example("_policies").ResetInside(module)),
    Client("torchrl", TORCHRL, "GRUModule 16-64, 8 x 64 steps, some begin episodes",
           KEPT, partial(models.torchrl, "GRU"), keep),
    Client("rsl-rl-lib", ("rsl_rl",), "RNN of type gru 48-256, 24 calls of one step, 64 rows",
           AS_IT_IS, partial(models.rsl_rl, "gru")),
    Client("rsl-rl-lib", ("rsl_rl",), "the same of type lstm", AS_IT_IS,
           partial(models.rsl_rl, "lstm")),
    Client("medaka", ("medaka",), "GRU 10-128, two layers and directions, 4 x 500 columns",
           AS_IT_IS, models.medaka),
    Client("BeatNet", ("BeatNet",), "LSTM 150-150, 2 layers, 500 frames", AS_IT_IS, models.beatnet),
    Client("kraken", ("kraken",), "LSTM 32-64, two directions, 4 packed lines", AS_IT_IS,
           models.kraken),
    Client("openunmix", ("openunmix",), "LSTM 256-128, 3 layers, two directions, 100 frames",
           AS_IT_IS, models.openunmix),
    Client("denoiser", ("denoiser",), "Demucs: LSTM 128-128, 2 layers, 1 s of sound", AS_IT_IS,
           models.denoiser),
    Client("DeepFilterNet", ("df",), "GroupedGRU: 16 GRU 32-32, 200 frames", AS_IT_IS,
           models.deep_filter_net),
    Client("asteroid", ("asteroid", "asteroid_filterbanks"), "DPRNN: 4 LSTM 64-64, two directions",
           AS_IT_IS, models.asteroid),
    Client("neuralhydrology", ("neuralhydrology",), "CudaLSTM: LSTM 5-64, 32 x 365 days", AS_IT_IS,
           partial(models.neuralhydrology, "CudaLSTM")),
    Client("neuralhydrology", ("neuralhydrology",), "GRU 5-64, 32 x 365 days", AS_IT_IS,
           partial(models.neuralhydrology, "GRU")),
    Client("pypots", ("pypots",), "GRU-D: GRUCell 88-64, 16 x 48 steps", AS_IT_IS,
           models.pypots_grud),
    Client("pypots", ("pypots",), "BRITS: LSTMCell 24-64, 16 x 48 steps", AS_IT_IS,
           models.pypots_brits),
    Client("torch-geometric", ("torch_geometric",), "AttentiveFP: 3 GRUCell 64-64, 600 atoms",
           AS_IT_IS, models.attentive_fp),
    Client("pytorch-forecasting", ("pytorch_forecasting",), "LSTM 32-64, rows of 0 to 90 steps",
           MIXED, models.pytorch_forecasting, models.mix_into_forecasting),
)  # fmt: skip


def recurrent_layers(module: nn.Module) -> int:
    """How many layers of ours a model has."""
    kinds = (rk.RNN, rk.LSTM, rk.GRU, rk.RNNCell, rk.LSTMCell, rk.GRUCell)
    return sum(isinstance(part, kinds) for part in module.modules())


def gradients(model: Model) -> dict[str, Tensor]:
    """Of the sum of what a call gives, by the names of parameters."""
    model.module.zero_grad()
    model.call(model.module).sum().backward()  # type: ignore[no-untyped-call]
    named = model.module.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def difference(client: Client, plain: Model, ours: Model) -> float:
    """The largest one of outputs, relative to the largest output.

    Raises:
        AssertionError: it, or that of a gradient that both have under one name, is beyond the
            client's tolerance; or nothing was converted.
    """
    if not recurrent_layers(ours.module):
        raise AssertionError(f"{client.name}: no layer was converted")

    def relative(a: Tensor, b: Tensor, what: str) -> float:
        found = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        if not found <= client.tolerance:
            raise AssertionError(f"{client.name}: {what} differ by {found:.1e}")
        return found

    with torch.no_grad():
        found = relative(ours.call(ours.module), plain.call(plain.module), "outputs")
    theirs = gradients(plain)
    for name, gradient in gradients(ours).items():
        if name in theirs:
            relative(gradient, theirs[name], f"gradients of {name}")
    return found


def measure(client: Client) -> list[dict[str, Any]]:
    """Rows of a record, one for each mode."""
    plain, ours = client.pair()
    off, rows = difference(client, plain, ours), []
    for mode in ("inference", "training"):
        samplers = {}
        for name, model in ((providers.BASELINE, plain), (providers.OURS, ours)):
            run = partial(gradients, model) if mode == "training" else partial(inference, model)
            samplers[name] = timing.sampler(run, Cpu())
        times = timing.in_turns(samplers, REPEATS, lambda: None)
        results = {name: timing.summary(taken) for name, taken in times.items()}
        rows.append({
            "suite": "clients", "cell": client.name, "shape": client.what, "dtype": "float32",
            "mode": mode, "how": client.how, "layers": recurrent_layers(ours.module),
            "difference": off, "results": results, "refused": {}, "wrong": {},
        })  # fmt: skip
    return rows


@torch.no_grad()
def inference(model: Model) -> Tensor:
    return model.call(model.module)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--only", metavar="PACKAGE", help="leave the others out")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for client in CLIENTS:
        if args.only not in (None, client.name):
            continue
        if missing := client.missing():
            print(f"{client.name}: left out, {', '.join(missing)} not installed", file=sys.stderr)
            continue
        print(f"{client.name}: {client.how}", file=sys.stderr, flush=True)
        rows += measure(client)
    from benchmarks import report  # which knows this module's table

    found = {**record.environment("cpu", Cpu(), args.threads), "rows": rows}
    found["command"] = " ".join(["python -m benchmarks.clients", *(argv or sys.argv[1:])])
    print(report.markdown(found))
    if args.out is not None:
        record.write(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
