"""``python -m benchmarks.clients``: recurrent models of other packages, before and after convert.

A model runs with torch.nn's layers and, built a second time with the same weights, after
:func:`rnnkernels.convert`; outputs and gradients must agree, and times are taken in turns.
Packages that are not installed are left out, and named. The models with the package's weights come
with them: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnkernels as rk
from benchmarks import providers, record, timing
from benchmarks.device import Cpu

ROOT = Path(__file__).parents[1]
REPEATS = 15


@dataclass(frozen=True)
class Model:
    """A model of a client, and a call of it that gives a floating tensor."""

    module: nn.Module
    call: Callable[[nn.Module], Tensor]


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


def folder(module: str) -> Path:
    """Of an installed package, without importing it."""
    found = importlib.util.find_spec(module)
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def example(name: str) -> Any:
    """A module of examples/gallery."""
    for path in (ROOT / "examples", ROOT / "examples/gallery"):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    return importlib.import_module(name)


def without(module: str, *absent: str) -> Any:
    """Import a module of a package that imports others, for what is not used here."""
    for name in absent:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    try:
        return importlib.import_module(module)
    finally:
        for name in absent:
            if getattr(sys.modules.get(name), "__spec__", name) is None:
                del sys.modules[name]


def silero_vad() -> Model:
    voice = example("_voice")
    steps = voice.in_steps(0.1 * torch.randn(1, 100 * voice.STEP)).contiguous()
    return Model(voice.rebuild(voice.load_shipped()), lambda m: m(steps)[0])


def resemblyzer() -> Model:
    encoder = without("resemblyzer.voice_encoder", "webrtcvad", "librosa").VoiceEncoder
    mels = torch.rand(4, 160, 40)
    return Model(encoder("cpu", verbose=False).eval(), lambda m: m(mels))


def g2p_fa() -> Model:
    package = importlib.import_module("g2p_fa.g2p_fa")
    letters, sounds = torch.randint(3, 41, [30, 16]), torch.randint(3, 33, [30, 16])
    return Model(package.G2P_Fa().model.eval(), lambda m: m(letters, sounds, 1.0))


def ribodetector() -> Model:
    kind = importlib.import_module("ribodetector.model.model").SeqModel
    model = kind(4, 128, 1, 2)
    file = folder("ribodetector") / "data/model_len70_101.pth"
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=False)["state_dict"])
    bases = torch.eye(4)
    reads = [bases[torch.randint(4, [70 + i % 32])] for i in range(64)]
    packed = pack_sequence(reads, enforce_sorted=False)
    return Model(model.eval(), lambda m: m(packed))


class CharacterTagger(nn.Module):
    """g2pM's network, which the package itself computes in NumPy."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        (count, size), hidden = (
            weights["embedding.weight"].shape,
            weights["lstm.weight_hh_l0"].shape,
        )
        answer = weights["logit_layer.2.weight"].shape
        self.embedding = nn.Embedding(count, size)
        self.lstm = nn.LSTM(size, hidden[1], batch_first=True, bidirectional=True)
        self.logit_layer = nn.Sequential(
            nn.Linear(2 * hidden[1], answer[1]), nn.ReLU(), nn.Linear(*reversed(answer))
        )
        self.load_state_dict({name: torch.as_tensor(array) for name, array in weights.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.logit_layer(self.lstm(self.embedding(tokens))[0])
        return logits


def g2pm() -> Model:
    weights = pickle.loads((folder("g2pM") / "np_ckpt.pkl").read_bytes())
    model = CharacterTagger(weights)
    tokens = torch.randint(1, model.embedding.num_embeddings, [16, 40])
    return Model(model.eval(), lambda m: m(tokens))


class Speller(nn.Module):
    """g2p-en's network, which the package itself computes in NumPy."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        letters, sounds = (torch.tensor(weights[name]) for name in ("enc_emb", "dec_emb"))
        size = letters.shape[1]
        self.letters = nn.Embedding(len(letters), size, _weight=letters)
        self.sounds = nn.Embedding(len(sounds), size, _weight=sounds)
        self.encoder, self.decoder = nn.GRU(size, size), nn.GRUCell(size, size)
        self.output = nn.Linear(size, len(weights["fc_w"]))
        state = {"output.weight": weights["fc_w"], "output.bias": weights["fc_b"]}
        for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
            full = name.replace("w", "weight").replace("b_", "bias_")
            state |= {f"encoder.{full}_l0": weights[f"enc_{name}"],
                      f"decoder.{full}": weights[f"dec_{name}"]}  # fmt: skip
        self.load_state_dict({n: torch.tensor(a) for n, a in state.items()}, strict=False)

    def forward(self, words: Tensor) -> Tensor:
        h = self.encoder(self.letters(words))[1][0]
        said, answers = torch.full([words.shape[1]], 2), []
        for _ in range(20):
            h = self.decoder(self.sounds(said), h)
            answers.append(self.output(h))
            said = answers[-1].argmax(1)
        return torch.stack(answers)


def g2p_en() -> Model:
    model = Speller(np.load(folder("g2p_en") / "checkpoint20.npz"))
    words = torch.cat([torch.randint(3, 29, [10, 16]), torch.full([1, 16], 2)])
    return Model(model.eval(), lambda m: m(words))


def sb3_contrib() -> Model:
    ppo = importlib.import_module("sb3_contrib").RecurrentPPO
    states = importlib.import_module("sb3_contrib.common.recurrent.type_aliases").RNNStates
    rows, steps = 8, 64
    zeros = (torch.zeros(1, rows, 256), torch.zeros(1, rows, 256))
    seen, pushes = torch.randn(rows * steps, 4), torch.randint(2, [rows * steps])
    starts = (torch.rand(rows * steps) < 0.03).float()
    policy = ppo("MlpLstmPolicy", "CartPole-v1", n_steps=16, seed=0, device="cpu").policy

    def call(m: Any) -> Tensor:
        value, likely, _ = m.evaluate_actions(seen, pushes, states(zeros, zeros), starts)
        return torch.cat([value.flatten(), likely])

    return Model(policy, call)


def torchrl(kind: str) -> Model:
    modules = importlib.import_module("torchrl.modules")
    rows, steps, states = 8, 64, ("h", "c") if kind == "LSTM" else ("h",)
    module = getattr(modules, f"{kind}Module")(
        input_size=16, hidden_size=64, in_keys=["seen", *states],
        out_keys=["embed", *(("next", state) for state in states)],
    )  # fmt: skip
    experience = importlib.import_module("tensordict").TensorDict(
        {"seen": torch.randn(rows, steps, 16), "is_init": torch.rand(rows, steps, 1) < 0.03}
        | {state: torch.zeros(rows, steps, 1, 64) for state in states},
        [rows, steps],
    )

    def call(m: nn.Module) -> Tensor:
        with modules.set_recurrent_mode(True):
            embedded: Tensor = m(experience.clone())["embed"]
        return embedded

    return Model(module, call)


AS_IT_IS, AGAIN = "as it is", "built again with its weights"
KEPT, LINE = "as it is, keep_type=True", "with reset= (one line)"
keep = partial(rk.convert, keep_type=True)
SB3 = ("sb3_contrib", "stable_baselines3", "gymnasium")
TORCHRL = ("torchrl", "tensordict")
CLIENTS = (
    Client("silero-vad", ("silero_vad", "matplotlib", "tqdm"), "LSTM 128-128, 100 steps of 32 ms",
           AGAIN, silero_vad),
    Client("resemblyzer", ("resemblyzer",), "LSTM 40-256, 3 layers, 4 x 160 frames", AS_IT_IS,
           resemblyzer),
    Client("g2p-fa", ("g2p_fa",), "LSTM 40-256, 2 layers, encoder and decoder; 16 words", AS_IT_IS,
           g2p_fa),
    Client("ribodetector", ("ribodetector",), "LSTM 4-128, two directions, 64 packed reads",
           AS_IT_IS, ribodetector),
    Client("g2pM", ("g2pM",), "LSTM 64-32, two directions, 16 x 40 characters", AGAIN, g2pm),
    Client("g2p-en", ("g2p_en",), "GRU and GRUCell 256-256, 16 words", AGAIN, g2p_en),
    Client("sb3-contrib", SB3, "RecurrentPPO: two LSTM 4-256, 8 x 64 steps, some begin episodes",
           AS_IT_IS, sb3_contrib),
    Client("sb3-contrib", SB3, "the same", LINE, sb3_contrib,
           lambda policy: example("_policies").reset_inside(policy)),
    Client("torchrl", TORCHRL, "LSTMModule 16-64, 8 x 64 steps, some begin episodes",
           KEPT, partial(torchrl, "LSTM"), keep),
    Client("torchrl", TORCHRL, "the same", LINE, partial(torchrl, "LSTM"),
           lambda module: example("_policies").ResetInside(module)),
    Client("torchrl", TORCHRL, "GRUModule 16-64, 8 x 64 steps, some begin episodes",
           KEPT, partial(torchrl, "GRU"), keep),
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
