"""Recordings of talk with music in its pauses, of which is known where there is speech."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from _speech import Speaker
from _voice import SAMPLE_RATE, STEP

WORDS = ("hello", "where is the station", "seven", "thank you", "it is going to rain", "yes")
NOISE = 0.03


def chord(seconds: float) -> Tensor:
    """Play three tones, ``[N]``."""
    at = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tones = torch.tensor([[1.0], [1.26], [1.5]]) * (150 + 300 * torch.rand([]))
    return (2 * torch.pi * tones * at).sin().mean(0)


def record(streams: int, seconds: int) -> tuple[Tensor, Tensor]:
    """Say words with pauses, some of which a chord fills, in a voice for each stream, in noise:
    samples ``[streams, N]`` and which steps are speech ``[T, streams]``."""
    speaker, total = Speaker(), seconds * SAMPLE_RATE
    samples, spoken = torch.zeros(streams, total), torch.zeros(streams, total)
    for row, voice in enumerate(speaker.variants()[:streams]):
        position = 0
        while position < total:
            pause = 0.3 + float(torch.rand([]))
            if torch.rand([]) < 0.5:
                sound = chord(pause)[: total - position]
                samples[row, position : position + len(sound)] = sound / 4
            position += int(SAMPLE_RATE * pause)
            word = WORDS[int(torch.randint(len(WORDS), []))]
            heard = speaker.say(word, f"en-us+{voice}")
            heard = interpolate(heard[None, None], size=len(heard) * SAMPLE_RATE
                                // speaker.sample_rate, mode="linear")[0, 0]  # fmt: skip
            heard = heard[: max(total - position, 0)]
            samples[row, position : position + len(heard)] = heard / 2
            loud = heard.abs().unfold(0, STEP, STEP).amax(1) if len(heard) >= STEP else heard[:0]
            for index in (loud > 0.02).nonzero().flatten().tolist():
                spoken[row, position + index * STEP : position + (index + 1) * STEP] = 1
            position += len(heard)
    share = spoken[:, : total // STEP * STEP].unfold(1, STEP, STEP).mean(2)
    return samples + NOISE * torch.randn_like(samples), share.T > 0.5
