"""The network of silero-vad, which tells speech from other sound, with its real weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, relu

from _gallery import folder_of

SAMPLE_RATE = 16_000
STEP, CONTEXT = 512, 64
"""Samples of a step, 32 ms, and of those before it that it sees as well."""

FEATURES = 128


class VoiceActivity(nn.Module):
    """Spectrum -> four convolutions -> LSTM -> one logit a step.

    The layout is that of the network for 16 kHz of silero-vad 5 and 6 (Silero Team, 2024). There an
    ``LSTMCell`` runs step by step; the weights of a cell are those of a layer.
    """

    spectrum: Tensor

    def __init__(self) -> None:
        """Build it with random weights."""
        super().__init__()
        self.register_buffer("spectrum", torch.zeros(258, 1, 256))
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, FEATURES, 1))
        self.encoder = nn.ModuleList(
            [nn.Conv1d(a, b, 3, stride=stride, padding=1) for a, b, stride in sizes]
        )
        self.rnn = nn.LSTM(FEATURES, FEATURES)
        self.output = nn.Linear(FEATURES, 1)

    def encode(self, steps: Tensor) -> Tensor:
        """Map steps with their context ``[N, CONTEXT + STEP]`` to features ``[N, FEATURES]``."""
        waves = conv1d(pad(steps, (0, 64), mode="reflect")[:, None], self.spectrum, stride=128)
        x = waves.view(len(waves), 2, 129, -1).square().sum(1).sqrt()
        for convolution in self.encoder:
            x = relu(convolution(x))
        features: Tensor = x.squeeze(2)
        return features

    def answer(self, y: Tensor) -> Tensor:
        """Map outputs of the layer ``[..., FEATURES]`` to chances of speech ``[...]``."""
        chances: Tensor = self.output(relu(y)).squeeze(-1).sigmoid()
        return chances

    def forward(self, steps: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Map steps with their context ``[T, B, CONTEXT + STEP]`` and a state to chances of speech
        ``[T, B]`` and the next state."""
        features = self.encode(steps.flatten(0, 1)).view(*steps.shape[:2], FEATURES)
        y, hx = self.rnn(features, hx)
        return self.answer(y), hx


def load_shipped() -> Any:
    """Load the model that the package ships, a TorchScript one, which keeps its state itself."""
    path = folder_of("silero_vad") / "data/silero_vad.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.load(path)  # type: ignore[no-untyped-call]


def rebuild(shipped: Any) -> VoiceActivity:
    """Copy the weights of the shipped model into layers of torch.nn."""
    weights = shipped.state_dict()
    names = {"spectrum": "stft.forward_basis_buffer", "output.bias": "decoder.decoder.2.bias"}
    for index in range(4):
        for kind in ("weight", "bias"):
            names[f"encoder.{index}.{kind}"] = f"encoder.{index}.reparam_conv.{kind}"
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names[f"rnn.{name}_l0"] = f"decoder.rnn.{name}"
    state = {ours: weights[f"_model.{theirs}"] for ours, theirs in names.items()}
    state["output.weight"] = weights["_model.decoder.decoder.2.weight"].squeeze(2)
    model = VoiceActivity()
    model.load_state_dict(state)
    return model.eval()


def in_steps(samples: Tensor) -> Tensor:
    """Cut samples ``[B, N]`` into whole steps with their context: ``[T, B, CONTEXT + STEP]``."""
    whole = samples[:, : samples.shape[1] // STEP * STEP]
    return pad(whole, (CONTEXT, 0)).unfold(1, CONTEXT + STEP, STEP).transpose(0, 1)
