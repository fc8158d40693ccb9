"""Bach's chorales as tokens of four voices, and a MIDI file of such tokens."""

from __future__ import annotations

import importlib.util
import struct
import xml.etree.ElementTree as ElementTree
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import _path  # noqa: F401
from _cli import UsageError
from _gallery import missing

HOLD, REST, LOWEST, HIGHEST = 0, 1, 30, 90
TOKENS = 2 + HIGHEST - LOWEST + 1
"""A voice in an eighth goes on, is silent, or begins one of the pitches of MIDI in between."""

VOICES = ("soprano", "alto", "tenor", "bass")
EIGHTHS = 96
"""Of a chorale at most, from its beginning."""

STEPS = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))


def read_chorales(limit: int | None) -> list[tuple[int, Tensor]]:
    """Read chorales of four voices from music21: of each its tonic (0 is C, 1 C sharp) as its key
    signature has it, and tokens ``[4 T]``, soprano to bass in each eighth."""
    spec = importlib.util.find_spec("music21")
    if spec is None or spec.origin is None:
        raise UsageError(missing("music21"))
    chorales = []
    for path in sorted((Path(spec.origin).parent / "corpus/bach").glob("bwv*.mxl")):
        found = _read(path)
        if found is not None:
            chorales.append(found)
        if len(chorales) == limit:
            break
    return chorales


def _read(path: Path) -> tuple[int, Tensor] | None:
    """Read one file of compressed MusicXML; None where it is not of four plain voices."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("xml") and "META" not in n)
        root = ElementTree.fromstring(archive.read(name))
    parts = root.findall("part")
    if len(parts) != len(VOICES) or root.find(".//backup") is not None:
        return None
    voices = [_voice(part) for part in parts]
    length = min(EIGHTHS, *(len(voice) for voice in voices))
    if length < 16:
        return None
    fifths = int(root.findtext(".//key/fifths", "0"))
    return fifths * 7 % 12, torch.tensor([voice[:length] for voice in voices]).T.flatten()


def _voice(part: ElementTree.Element) -> list[int]:
    """Return a part's token for each eighth; of notes that are shorter, the first in it."""
    tokens: list[int] = []
    now, eighth = 0.0, 0.5
    for element in part.findall("./measure/*"):
        if element.tag == "attributes":
            eighth = float(element.findtext("divisions", str(2 * eighth))) / 2
        duration = element.findtext("duration")
        if element.tag != "note" or duration is None or element.find("chord") is not None:
            continue
        begin, now = now, now + float(duration) / eighth
        tied = any(tie.get("type") == "stop" for tie in element.findall("tie"))
        steps = range(len(tokens), -int(-now // 1))  # the eighths that begin before its end
        for step in steps:
            begins = not tied and step - begin < 1 and step == steps[0]
            tokens.append(_token(element) if begins else HOLD)
    return tokens


def _token(note: ElementTree.Element) -> int:
    """Return the token of a note or rest that begins."""
    pitch = note.find("pitch")
    if pitch is None:
        return REST
    octave, alter = (int(float(pitch.findtext(name, "0"))) for name in ("octave", "alter"))
    key = 12 * (octave + 1) + STEPS[pitch.findtext("step", "C")] + alter
    return 2 + min(max(key, LOWEST), HIGHEST) - LOWEST


def transpose(tokens: Tensor, by: Tensor | int) -> Tensor:
    """Move every pitch ``by`` semitones, which broadcasts; pitches stay in their range."""
    moved = (tokens + by).clamp(2, TOKENS - 1)
    return torch.where(tokens >= 2, moved, tokens)


def notes(tokens: Tensor) -> list[tuple[int, int, int, int]]:
    """List the notes of tokens ``[4 T]``: voice, pitch, first eighth, eighths."""
    found = []
    for voice in range(len(VOICES)):
        row = [*tokens[voice :: len(VOICES)].tolist(), REST]
        starts = [step for step, token in enumerate(row) if token != HOLD]
        for start, end in pairwise(starts):
            if row[start] >= 2:
                found.append((voice, row[start] - 2 + LOWEST, start, end - start))
    return found


def write_midi(path: Path, tokens: Tensor) -> None:
    """Write tokens ``[4 T]`` as a MIDI file of a track per voice, 80 quarters a minute."""

    def number(value: int) -> bytes:
        groups = [value & 127]
        while value := value >> 7:
            groups.insert(0, 128 | value & 127)
        return bytes(groups)

    chunks = [struct.pack(">4sIHHH", b"MThd", 6, 1, len(VOICES), 2)]  # two ticks a quarter
    for voice in range(len(VOICES)):
        events = [(0, b"\xff\x51\x03" + (750_000).to_bytes(3, "big"))]
        for owner, pitch, start, eighths in notes(tokens):
            if owner == voice:
                events.append((start, bytes((0x90 | voice, pitch, 80))))
                events.append((start + eighths, bytes((0x80 | voice, pitch, 0))))
        events.sort(key=lambda event: (event[0], event[1][0] & 0xF0 == 0x90))  # ends come first
        now, track = 0, b""
        for when, event in [*events, (events[-1][0], b"\xff\x2f\x00")]:
            track += number(when - now) + event
            now = when
        chunks.append(struct.pack(">4sI", b"MTrk", len(track)) + track)
    path.write_bytes(b"".join(chunks))
