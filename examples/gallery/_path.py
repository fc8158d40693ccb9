"""Imported for its effect: the modules that all examples share, a folder above, can be imported."""

import sys
from pathlib import Path

_SHARED = str(Path(__file__).parents[1])
if _SHARED not in sys.path:
    sys.path.append(_SHARED)
