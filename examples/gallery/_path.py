"""Imported for its effect: the modules that all examples share, a folder above, can be imported."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SHARED = str(ROOT / "examples")
if _SHARED not in sys.path:
    sys.path.append(_SHARED)
