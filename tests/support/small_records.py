"""Records of benchmarks with made-up figures."""

from __future__ import annotations

from typing import Any

from benchmarks import record


def row(cell: str, mode: str, torch_ms: float | None, ours_ms: float | None, **more: Any) -> Any:
    figures = {"torch.nn": torch_ms, "rnnkernels": ours_ms}
    return {
        "suite": "suite",
        "cell": cell,
        "shape": "5,2,3,4",
        "dtype": "float32",
        "mode": mode,
        "gflop": 0.5,
        "results": {
            name: {"ms": ms, "spread": 0.1, "samples_ms": [0.9 * ms, ms, 1.1 * ms]}
            for name, ms in figures.items()
            if ms is not None
        },
        "refused": {},
        "wrong": {},
        **more,
    }


def a_record(*rows: Any) -> Any:
    return {
        "format": record.FORMAT,
        "command": "python -m benchmarks.run",
        "commit": "abc1234",
        "device": "cpu",
        "processor": "A Processor",
        "threads": 2,
        "torch": "9.9",
        "rnnkernels": "0.0",
        "build": {"cpu_capability": "avx9"},
        "rows": list(rows),
    }
