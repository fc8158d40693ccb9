"""Recurrent models of other packages, for ``benchmarks.clients``: each is built the same after the
same seed, with a call of it. Weights are those that a package ships, where it ships any.

A package is often larger than its model: :func:`alone` imports the module that has it without those
that the package would import besides.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
import sys
import tarfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnkernels as rk

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Model:
    """A model of a client, and a call of it that gives a floating tensor."""

    module: nn.Module
    call: Callable[[nn.Module], Tensor]


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


def alone(module: str, *absent: str) -> Any:
    """Import a module of a package without the ``__init__`` of the folders that it is in; what of
    ``absent`` it imports is a stand-in, with ``nn.Module`` under every name, for what is not used.
    """
    before = dict(sys.modules)
    *folders, _ = module.split(".")
    names = [".".join(folders[: depth + 1]) for depth in range(len(folders))]
    root = folder(folders[0]).parent
    try:
        for name in names:
            stand_in = types.ModuleType(name)
            stand_in.__path__ = [str(root / name.replace(".", "/"))]
            sys.modules.setdefault(name, stand_in)
        for name in absent:
            sys.modules.setdefault(name, Anything(name))
        return importlib.import_module(module)
    finally:
        for name in (*names, *absent):
            if name not in before:
                sys.modules.pop(name, None)


class Anything(types.ModuleType):
    """A module with everything."""

    def __getattr__(self, name: str) -> type[nn.Module]:
        if name.startswith("__"):
            raise AttributeError(name)
        return nn.Module


def medaka() -> Model:
    kind = alone("medaka.architectures.gru", "medaka.architectures.base_classes").GRUModel
    file = next(folder("medaka").glob("data/*hac_v*_model_pt.tar.gz"))
    with tarfile.open(file) as archive:
        weights = archive.extractfile("model/weights.pt")
        assert weights is not None
        state = torch.load(io.BytesIO(weights.read()), map_location="cpu")
    layers = len([name for name in state if name.startswith("gru.weight_hh") and "rev" not in name])
    inputs = state["gru.weight_ih_l0"].shape[1]
    model = kind(inputs, gru_size=state["gru.weight_hh_l0"].shape[1], n_layers=layers)
    model.load_state_dict(state)
    model.normalise = False  # as in training: a sum of chances has no gradient
    counts = torch.rand(4, 500, inputs)
    return Model(model.eval(), lambda m: m(counts))


def beatnet() -> Model:
    model = alone("BeatNet.model").BDA(272, 150, 2, "cpu")
    model.load_state_dict(torch.load(folder("BeatNet") / "models/model_1_weights.pt"), strict=False)
    frames, zeros = torch.rand(1, 500, 272), torch.zeros(2, 1, 150)

    def call(m: Any) -> Tensor:
        m.hidden, m.cell = zeros, zeros  # it keeps its state from call to call
        scores: Tensor = m(frames)
        return scores

    return Model(model.eval(), call)


def denoiser() -> Model:
    samples = torch.randn(1, 1, 16_000)
    model = alone("denoiser.demucs").Demucs(hidden=16, depth=4)
    return Model(model.eval(), lambda m: m(samples))


def asteroid() -> Model:
    features = torch.randn(1, 64, 500)
    model = alone("asteroid.masknn.recurrent").DPRNN(64, 2, bn_chan=64, hid_size=64, n_repeats=2)
    return Model(model.eval(), lambda m: m(features))


def openunmix() -> Model:
    model = alone("openunmix.model", "torchaudio").OpenUnmix(nb_bins=513, hidden_size=256)
    spectra = torch.rand(1, 2, 513, 100)
    return Model(model.eval(), lambda m: m(spectra))


def deep_filter_net() -> Model:
    modules = alone("df.modules", "libdf", "loguru", "df.model", "df.utils")
    frames = torch.randn(1, 200, 256)
    return Model(modules.GroupedGRU(256, 256, 2, groups=8).eval(), lambda m: m(frames)[0])


class Settings(types.SimpleNamespace):
    """A configuration whose other entries are empty."""

    def __getattr__(self, name: str) -> None:
        return None


def neuralhydrology(kind: str) -> Model:
    absent = ("datautils.utils", "utils.samplingutils", "utils.config")
    names = [f"neuralhydrology.{name}" for name in absent]
    module = alone(f"neuralhydrology.modelzoo.{kind.lower()}", *names)
    config = Settings(
        dynamic_inputs=[f"x{i}" for i in range(5)], target_variables=["flow"], head="regression",
        hidden_size=64, nan_handling_pos_encoding_size=0, output_dropout=0.0, static_attributes=[],
        hydroatlas_attributes=[], evolving_attributes=[], output_activation="linear",
    )  # fmt: skip
    days = {f"x{i}": torch.randn(32, 365, 1) for i in range(5)}
    return Model(getattr(module, kind)(config), lambda m: m({"x_d": days})["y_hat"])


def pypots_grud() -> Model:
    rows, steps, size = 16, 48, 12
    model = alone("pypots.nn.modules.grud.backbone").BackboneGRUD(steps, size, 64)
    x, gaps, last = torch.randn(rows, steps, size), *torch.rand(2, rows, steps, size)
    there = (torch.rand(rows, steps, size) < 0.7).float()
    mean = torch.zeros(size)
    return Model(model, lambda m: m(x, there, gaps, mean, last)[0])


def pypots_brits() -> Model:
    rows, steps, size = 16, 48, 12
    model = alone("pypots.nn.modules.brits.backbone").BackboneRITS(steps, size, 64)
    there = (torch.rand(rows, steps, size) < 0.7).float()
    inputs = {"X": torch.randn(rows, steps, size) * there, "missing_mask": there,
              "deltas": torch.rand(rows, steps, size)}  # fmt: skip
    return Model(model, lambda m: m({"forward": inputs}, "forward")[0])


def kraken() -> Model:
    layers = alone("kraken.lib.vgsl.layers", "coremltools", "coremltools.proto")
    model = layers.TransposedSummarizingRNN(32, 64, "b", False, False)
    lines = torch.randn(4, 32, 1, 300)
    lengths = torch.tensor([300, 120, 280, 44])
    return Model(model, lambda m: m(lines, lengths)[0])


def rsl_rl(kind: str) -> Model:
    model = alone("rsl_rl.modules.rnn", "rsl_rl.utils").RNN(48, 256, 1, kind)
    seen = torch.randn(24, 64, 48)

    def call(m: Any) -> Tensor:
        m.reset()
        return torch.stack([m(step) for step in seen])

    return Model(model, call)


def attentive_fp() -> Model:
    kind = importlib.import_module("torch_geometric.nn.models").AttentiveFP
    model = kind(32, 64, 1, edge_dim=8, num_layers=2, num_timesteps=2)
    atoms, edges = torch.randn(600, 32), torch.randint(600, [2, 1300])
    bonds, molecule = torch.randn(1300, 8), torch.arange(600) // 20
    return Model(model, lambda m: m(atoms, edges, bonds, molecule))


def pytorch_forecasting() -> Model:
    layers = alone("pytorch_forecasting.models.nn.rnn")
    model = nn.ModuleDict({"rnn": layers.LSTM(32, 64, batch_first=True)})
    x, lengths = torch.randn(16, 90, 32), torch.randint(0, 91, [16])
    lengths[0] = 90

    def call(m: Any) -> Tensor:
        y: Tensor = m["rnn"](x, lengths=lengths, enforce_sorted=False)[0]
        return y

    return Model(model, call)


def mix_into_forecasting(model: nn.ModuleDict) -> nn.Module:
    """Put our layer under pytorch-forecasting's own methods."""
    theirs: Any = model["rnn"]
    kind = type("LSTM", (type(theirs), rk.torch_types.LSTM), {})
    ours = kind(theirs.input_size, theirs.hidden_size, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    model["rnn"] = ours
    return model
