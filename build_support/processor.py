"""Which of the CPU kernels a build for this machine alone has."""

from __future__ import annotations

import sys
from pathlib import Path

from build_support import settings

#: The kernels of each instruction set, and what a processor must have to run them.
LEVELS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
}


#: The kernels for bfloat16 alone, over those of "avx512" for all else: likewise, best first.
FOR_BFLOAT16 = {
    "amx": {"amx_bf16", "amx_tile", "avx512_bf16"},
    "avx512_bf16": {"avx512_bf16"},
}


def processor() -> set[str]:
    """What the processor of this machine has, as Linux names it."""
    return set(Path("/proc/cpuinfo").read_text().split()) if sys.platform == "linux" else set()


def without() -> list[str]:
    """The kernels that a build for this machine alone leaves out, as one under sanitizers is: only
    what runs here can be found at fault. Of the instruction sets it has, the widest stays."""
    flags = processor()
    level = next((level for level, needed in LEVELS.items() if needed <= flags), None)
    if not (settings.NATIVE or settings.SANITIZE) or level is None:
        return []
    others = [name for name in ("default", *LEVELS) if name != level]
    fitting = [name for name, needed in FOR_BFLOAT16.items() if needed <= flags]
    extra = fitting[:1] if level == "avx512" else []
    return others + [name for name in FOR_BFLOAT16 if name not in extra]
