"""What several test files need: runs of a module with every gradient, and child processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnkernels
from rnnkernels import _ops
from rnnkernels.testing import assert_close

#: The directory that holds the package under test.
ROOT = Path(rnnkernels.__file__).parents[1]

State = Tensor | tuple[Tensor, Tensor]
Results = dict[str, Tensor | None]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers that depend on nothing but the arguments, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pull(outputs: Sequence[Tensor], precision: torch.dtype, seed: int = 100) -> None:
    """Backward with a random gradient for every output, the same for equal shapes."""
    wanted = [o for o in outputs if o.requires_grad]
    grads = [
        draw(*o.shape, seed=seed + i, dtype=precision).to(o.dtype) for i, o in enumerate(wanted)
    ]
    torch.autograd.backward(wanted, grads)


def tensors(result: Any) -> list[Tensor]:
    """All tensors inside nested sequences; a PackedSequence counts as its data, None as nothing."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in tensors(part)]


def outputs_and_gradients(
    module: nn.Module, args: Sequence[Any], precision: torch.dtype, **options: Any
) -> Results:
    """Runs ``module(*args)`` forward and backward; all outputs and gradients by name.

    Leaves among ``args`` (tensors, tuples of tensors) that require a gradient are reported too.
    """
    module.zero_grad()
    leaves = {f"argument {i}": t for i, t in enumerate(tensors(args))}
    for t in leaves.values():
        t.grad = None
    outputs = tensors(module(*args, **options))
    pull(outputs, precision)
    found: Results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, t in (*leaves.items(), *module.named_parameters()):
        found[f"gradient of {name}"] = t.grad if t.is_leaf else None
    return found


def compare(actual: Results, expected: Results, **options: Any) -> None:
    """Asserts that all outputs and gradients agree, and that the same ones exist."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name=name, **options)


def same_bits(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether all are equal to the bit; None is equal to None."""
    return all(
        s is t if s is None or t is None else torch.equal(s, t) for s, t in zip(a, b, strict=True)
    )


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """How often each op ran inside."""
    with torch.autograd.profiler.profile() as profile:
        run()
    return {event.key: event.count for event in profile.key_averages()}


def require_backend(name: str) -> None:
    """Skips the test where this build does not bring the backend."""
    if name in ("cpu", "cuda") and name not in _ops.kernel_devices:
        pytest.skip(f"this build has no kernels for {name} tensors")


def bfloat16_instructions() -> list[str]:
    """The instruction sets with products of bfloat16 that this process can use, the best last:
    of pairs (AVX512-BF16), and of tiles, which the system has to grant (AMX)."""
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    if "avx512_bf16" not in flags:
        return []
    tiles = "amx_bf16" in flags and bool(torch.cpu._init_amx())
    return ["avx512_bf16", *["amx"] * tiles]


def multiplies_itself(dtype: torch.dtype) -> bool:
    """Whether the kernels of the CPU take the products behind their loops themselves: those for
    AVX2 and AVX-512 do, but of 16 bits only where the processor has no instructions for such, by
    the names that Linux gives them."""
    if platform.machine() != "x86_64" or rnnkernels.build_info()["cpu_capability"] == "default":
        return False
    needed = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}.get(dtype)
    if needed is None:
        return True
    if sys.platform != "linux":
        pytest.skip("which instructions this processor has is not known here")
    return needed not in Path("/proc/cpuinfo").read_text().split()


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A child Python with the package under test and these environment variables."""
    ours = ("RNNKERNELS_", "OMP_WAIT_POLICY")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "2"} | environment
    # With -c, Python would look into the folder it runs in first: under sanitizers, another build.
    safe = ["-P"] if arguments[0] == "-c" else []
    return subprocess.run(
        [sys.executable, *safe, *arguments], env=env, capture_output=True, text=True, timeout=300
    )
