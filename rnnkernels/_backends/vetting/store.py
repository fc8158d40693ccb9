"""What was found of kernels on a device, kept from process to process in the user's cache folder.

A file for every device, driver, torch and build: whatever changes among these asks anew. A folder
that cannot be read or written is no error, and what it would have held is found out again.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from rnnkernels._backends import cache
from rnnkernels._ops.binding_names import BINDINGS

PACKAGE = Path(__file__).parents[2]


def build() -> str:
    """Of this package: what its compiled part and its Triton kernels are."""
    parts = []
    for path in sorted(PACKAGE.glob("_backends/triton/*.py")):
        parts.append(f"{path.name} {crc32(path.read_bytes()):08x}")
    compiled = [*PACKAGE.glob("*.so"), *PACKAGE.glob(f"{BINDINGS}/*/*.so")]
    for path in sorted(compiled):
        # Tens of megabytes, which is long to read.
        name = path.relative_to(PACKAGE)
        parts.append(f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}")
    return "; ".join(parts)


def key(device: torch.device) -> dict[str, Any]:
    """What the kernels of a device depend on, beside their own sources."""
    found = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return {
        "name": found.name,
        "uuid": str(getattr(found, "uuid", "")),
        "capability": [found.major, found.minor],
        "processors": found.multi_processor_count,
        "driver": driver() if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "build": build(),
    }


class Store:
    """The file of one device: results by the names of kernels."""

    def __init__(self, key: dict[str, Any]) -> None:
        self._key = key
        name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        self._name = f"kernels-{name}.json"

    def path(self) -> Path:
        return cache.folder() / self._name

    def load(self) -> dict[str, str]:
        """Results by name: ``''`` for what was right, else the reason why it is refused."""
        try:
            found = json.loads(self.path().read_text(encoding="utf-8"))
            results = found["results"] if found["key"] == self._key else {}
            return {str(name): str(reason) for name, reason in results.items()}
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # nothing there, no home folder, or written by somebody else

    def clear(self) -> None:
        """Takes the file away."""
        try:
            self.path().unlink(missing_ok=True)
        except (OSError, RuntimeError):
            return

    def save(self, changes: dict[str, str]) -> None:
        """Adds results to those that are there."""
        content = {"key": self._key, "results": self.load() | changes}
        try:
            cache.write(self.path(), json.dumps(content, indent=1))
        except (OSError, RuntimeError):
            return  # the next process looks for itself
