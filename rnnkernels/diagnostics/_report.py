"""What is installed here and what runs where, as text: for people and for reports of faults."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rnnkernels import _backends, _ops
from rnnkernels._backends import cache, user_cells
from rnnkernels.diagnostics._choices import explain
from rnnkernels.nn import LSTM, shipped

#: Of which the version matters to what runs.
PACKAGES = ("triton", "numpy", "onnx", "onnxscript", "onnxruntime")
#: How names begin of environment variables that the package or what it runs on reads.
VARIABLES = ("CXX", "CUDA_", "MKL_", "OMP_", "KMP_", "GOMP_", "RNNKERNELS_", "TRITON_", "XDG_CACHE")


def report(own_version: str) -> str:
    """Versions, how the kernels were built, processor and GPUs, and for each device which backend
    runs a layer in which dtype, and why the others do not."""
    parts = [_table(_versions(own_version)), _table(_build()), _table(_machine()), *_devices()]
    return "\n\n".join(parts)


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _versions(own: str) -> dict[str, str]:
    found = {"rnnkernels": f"{own}, from {Path(__file__).parents[1]}"}
    found["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    found["torch"] = torch.__version__  # its metadata may lack what it was built for
    return found | {package: _installed(package) for package in PACKAGES}


def _build() -> dict[str, str]:
    if _ops.missing is not None:
        return {"kernels": f"missing: {_ops.missing}"}
    info = _ops.build_info()
    compiler = user_cells.find_compiler()
    written = shlex.join(compiler) if compiler else "none: the slow reference runs such cells"
    nvcc = user_cells.find_compiler("cuda") if info["cuda_archs"] else None
    written += f"; {shlex.join(nvcc)}" if nvcc else ""
    return {
        "kernels for the CPU": f"{info['cpu_capability']}, built by {info['compiler']}",
        "kernels for CUDA": info["cuda_archs"] or "not in this build",
        "cells in the package": ", ".join(shipped.there()) or "compiled on first use, as others",
        "compiler of written cells": written,
        "cache folder": str(cache.folder()),
    }


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _products() -> str:
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return "with MKL" if mkl else "without MKL"


def _machine() -> dict[str, str]:
    found = {
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "threads": f"{torch.get_num_threads()} in an operation",
        "linear algebra": _products(),
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        size = properties.total_memory / 2**30
        found[f"GPU {i}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{size:.0f} GiB"
        )
    found["CUDA of torch"] = torch.version.cuda or "none"
    return found | {n: v for n, v in sorted(os.environ.items()) if n.startswith(VARIABLES)}


def _devices() -> list[str]:
    """Of each device who runs a small LSTM, in each dtype."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [_choices(device) for device in devices]


def _choices(device: str) -> str:
    runs: dict[str, str] = {}
    refused: dict[str, str] = {}
    for dtype in _backends.KERNEL_DTYPES:
        name = str(dtype).removeprefix("torch.")
        module = LSTM(4, 8, device=device, dtype=dtype)
        (choice,) = explain(module, torch.zeros(2, 1, 4, device=device, dtype=dtype)).choices
        runs[name] = choice.backend or "none"
        for backend, reason in choice.refusals.items():
            refused[f"not {backend}"] = reason
    by = {name: f"run by {backend}" for name, backend in runs.items()}
    return f"An LSTM on {device}:\n" + _table(by | refused)
