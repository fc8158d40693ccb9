"""Many to one, unequal lengths: which digit is spoken?

    python examples/gallery/speech.py

Many voices of eSpeak NG (of the package espeakng-loader) say the digits in eight accents of
English, faster and slower, with noise. What is heard comes as 13 MFCCs (of kaldi-native-fbank)
every hundredth of a second, a few dozen times for a digit: the layer reads all as
they are, ``lengths=`` beside padded rows, without packing. The voices held out have not been heard
before. The baseline goes by the mean of a recording's MFCCs, and takes the digit whose own mean is
closest.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from _classify import classification, draw_confusion
from _gallery import Options, Program, Task, accuracy, package, recurrent
from _speech import Speaker

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = (
    "en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029", "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)  # fmt: skip
FEATURES = 13
NOISE = 0.02
Recordings = tuple[Tensor, Tensor, Tensor]


class Listener(nn.Module):
    """A recurrent layer in both directions over the frames, then a Linear layer on their mean."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden`` in each direction."""
        super().__init__()
        self.rnn = recurrent(options, FEATURES, hidden, bidirectional=True)
        self.output = nn.Linear(2 * hidden, len(DIGITS))

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Map frames ``[B, T, FEATURES]``, of which each row has as many as ``lengths`` ``[B]``
        says, to logits ``[B, 10]``."""
        y, _ = self.rnn(frames.transpose(0, 1), lengths=lengths)  # zeros behind each row's end
        logits: Tensor = self.output(y.sum(0) / lengths[:, None])
        return logits


class Ear:
    """From samples to MFCCs."""

    def __init__(self, sample_rate: int) -> None:
        """Hear samples of that rate."""
        self._kaldi = package("kaldi_native_fbank")
        self._options = self._kaldi.MfccOptions()
        self._options.frame_opts.samp_freq = sample_rate
        self._options.frame_opts.dither = 0  # noise of its own, which no seed decides on
        self._options.num_ceps = FEATURES

    def hear(self, samples: Tensor) -> Tensor:
        """Compute the MFCCs of samples ``[N]`` from -1 to 1: ``[frames, FEATURES]``."""
        mfcc = self._kaldi.OnlineMfcc(self._options)
        mfcc.accept_waveform(self._options.frame_opts.samp_freq, samples.tolist())
        mfcc.input_finished()
        return torch.stack([torch.tensor(mfcc.get_frame(i)) for i in range(mfcc.num_frames_ready)])


def record(speaker: Speaker, voices: list[str], accents: tuple[str, ...]) -> Recordings:
    """Have each voice say all digits once in each accent: frames ``[N, T, FEATURES]``, lengths and
    labels ``[N]``."""
    ear = Ear(speaker.sample_rate)
    chance = torch.Generator().manual_seed(0)
    frames, labels = [], []
    for voice in voices:
        for accent in accents:
            for label, word in enumerate(DIGITS):
                rate, pitch = (int(torch.randint(a, b, [], generator=chance))
                               for a, b in ((120, 260), (20, 80)))  # fmt: skip
                samples = speaker.say(word, f"{accent}+{voice}", rate, pitch)
                hiss = torch.randn(len(samples), generator=chance)
                frames.append(ear.hear(samples + NOISE * hiss))
                labels.append(label)
    lengths = torch.tensor([len(row) for row in frames])
    return pad_sequence(frames, batch_first=True), lengths, torch.tensor(labels)


@cache  # since a second time would be a little different
def recordings(quick: bool) -> tuple[str, Recordings, Recordings]:
    """Record the voices, every fourth of which is held out; tell how many they are."""
    speaker = Speaker()
    voices = speaker.variants()[:: 13 if quick else 2]
    accents = ACCENTS[:2] if quick else ACCENTS
    learnt = record(speaker, [voice for i, voice in enumerate(voices) if i % 4], accents)
    unseen = record(speaker, voices[::4], accents)
    count = len(voices[::4])
    told = (
        f"{len(learnt[0]):,} spoken digits of {len(voices) - count} voices of eSpeak NG to learn "
        f"from, {len(unseen[0]):,} of {count} others held out"
    )
    return told, learnt, unseen


def build(options: Options) -> Task:
    """Record the voices and build the model."""
    data, (x, lengths, y), (unseen, ends, truth) = recordings(options.quick)
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    mean, scale = x[valid].mean(0), x[valid].std(0)
    x, unseen = (x - mean) / scale, (unseen - mean) / scale

    def means(frames: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(frames.shape[1]) < lengths[:, None]
        return (frames * real[..., None]).sum(1) / lengths[:, None]

    centres = torch.stack([means(x, lengths)[y == digit].mean(0) for digit in range(10)])
    nearest = -torch.cdist(means(unseen, ends), centres)
    model = Listener(options, 24 if options.quick else 64)

    def draw(axes: Axes) -> None:
        draw_confusion(axes, model(unseen, ends).argmax(1), truth, DIGITS, "digit", turned=True)

    return classification(
        model,
        (x, lengths, y),
        (unseen, ends, truth),
        batch_size=64,
        data=data,
        baseline="the nearest mean MFCCs",
        baseline_value=accuracy(nearest, truth),
        lr=1e-2 if options.quick else 3e-3,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (12, 8), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
