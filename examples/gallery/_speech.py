"""Speech without a microphone: eSpeak NG says a text in one of its voices."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _gallery import package

RETRIEVAL, SYNCHRONOUS = 1, 2  # of espeak_AUDIO_OUTPUT: RETRIEVAL would do, too, but in a thread
RATE, PITCH = 1, 3  # of espeak_PARAMETER
CHARACTERS, UTF8 = 1, 1  # a position is counted in characters; the text is UTF-8
RECEIVER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Speaker:
    """eSpeak NG, as the package espeakng-loader brings it: a library and its voices.

    What it says depends a little on what it has said before in the same process.
    """

    def __init__(self) -> None:
        """Load the library; ``sample_rate`` is that of all that it says."""
        loader = package("espeakng_loader")
        self._library = ctypes.CDLL(loader.get_library_path())
        folder = str(loader.get_data_path()).encode()
        self.sample_rate: int = self._library.espeak_Initialize(SYNCHRONOUS, 0, folder, 0)
        self._heard: list[Tensor] = []
        self._receiver = RECEIVER(self._receive)  # kept, since the library calls it later
        self._library.espeak_SetSynthCallback(self._receiver)
        self._library.espeak_ng_SetRandSeed(1)  # of the noise in it
        self._voices = Path(loader.get_data_path()) / "voices/!v"

    def _receive(self, samples: Any, count: int, events: object) -> int:
        if samples and count > 0:
            array = np.ctypeslib.as_array(samples, (count,)).astype(np.float32)
            self._heard.append(torch.from_numpy(array))
        return 0  # go on

    def variants(self) -> list[str]:
        """List the throats in which every accent can be spoken."""
        return sorted(path.name for path in self._voices.iterdir())

    def say(self, text: str, voice: str, rate: int = 175, pitch: int = 50) -> Tensor:
        """Say ``text`` in a voice such as ``"en-us+f3"``: samples ``[N]`` from -1 to 1.

        ``rate`` is in words per minute, ``pitch`` from 0 to 100.
        """
        self._heard.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        self._library.espeak_SetParameter(RATE, rate, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, CHARACTERS, 0, UTF8, None, None)
        return torch.cat(self._heard) / 32768
