"""Pictures of a run as the documentation shows them: of few colours, in little space."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

COLOURS = 48


def publish(picture: Path, path: Path) -> None:
    """Write ``picture``, a PNG, to ``path`` with a palette."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
