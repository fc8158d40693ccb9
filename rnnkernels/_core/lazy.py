"""Names of a package that are imported when somebody first asks for them, who then pays for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attributes(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package, by the module that each name comes from; a
    module that no names are taken from is itself the name."""
    places = {name: module for module, some in names.items() for name in some}
    places |= {module.rpartition(".")[2]: "" for module, some in names.items() if not some}

    def get(name: str) -> Any:
        place = places.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        if not place:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(place), name)
        # From now on without a call: torch.compile and whoever else looks into __dict__ finds it.
        sys.modules[package].__dict__[name] = value
        return value

    def listed() -> list[str]:
        return sorted({*sys.modules[package].__dict__, *places})

    return get, listed
