"""The persistent CUDA kernels in the emulator, once for all tests of a process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import building

EMULATOR = ("barriers", "fiber", "machine", "traffic", "warp")
#: Such as "address,undefined": the kernels and the emulator are instrumented, as by setup.py.
SANITIZE = os.environ.get("RNNKERNELS_SANITIZE", "")


@pytest.fixture(scope="session")
def ops() -> Any:
    # The slowest first. What no sanitizer runs, need not be compiled for it.
    storage = ["float", "bfloat16"] if SANITIZE else ["float", "bfloat16", "float16"]
    sources = [*(f"tests/emulator/simt/kernels/{name}" for name in (*storage, "ops"))]
    sources += [*(f"tests/emulator/simt/{name}" for name in EMULATOR)]
    sources += ["csrc/cuda/plan"]
    flags = ["-std=c++20", "-O1", "-g0", "-ffp-contract=fast", "-Wno-unknown-pragmas"]
    instrument = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"] if SANITIZE else []
    if SANITIZE:  # locals that are used after return would take a second stack for each thread
        flags.append("--param=asan-use-after-return=0")
    sources = [f"{source}.cpp" for source in sources]
    building.load_ops("rnnkernels_simt", sources, flags, instrument)
    return torch.ops.rnnkernels_simt
