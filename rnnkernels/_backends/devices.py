"""What a GPU is, and whether kernels can run on it at all: asked once per device and process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rnnkernels import _ops

#: Of the compute capability: older GPUs lack the asynchronous copies that the kernels use, and
#: Triton does not support them.
LEAST = (8, 0)


@dataclass(frozen=True)
class Facts:
    """What is known of a GPU.

    Attributes:
        name: of the model.
        capability: compute capability, major and minor; (0, 0) for GPUs that have none (AMD).
        probed: why the CUDA kernels of this build cannot run there, or ``''``.
    """

    name: str
    capability: tuple[int, int]
    probed: str


def ask(device: torch.device) -> Facts:
    """Asks driver and runtime about a device; tests put a stand-in here."""
    if not torch.cuda.is_available():  # a tensor without memory behind it
        return Facts("a GPU that is not here", (0, 0), "")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Facts(properties.name, (0, 0), "the kernels are for NVIDIA's GPUs")
    probed = ""
    if "cuda" in _ops.kernel_devices:
        with torch.cuda.device(device):
            probed = _ops.cuda_probe()
    return Facts(properties.name, (properties.major, properties.minor), probed)


_known: dict[int, Facts] = {}


def facts(device: torch.device) -> Facts | None:
    """Those of the GPU of a tensor, from the first call on; None where torch.compile meets it
    first, which can trace no such question."""
    found = _known.get(device.index)
    if found is None and not torch.compiler.is_compiling():
        found = _known[device.index] = ask(device)
    return found


def forget() -> None:
    """Asks anew from now on."""
    _known.clear()


def too_old(device: torch.device) -> str | None:
    """Why neither the CUDA kernels nor Triton's run on this GPU, or None."""
    found = facts(device)
    if found and (0, 0) < found.capability < LEAST:
        has = ".".join(map(str, found.capability))
        return f"it needs a GPU of compute capability 8.0 or later, and {found.name} has {has}"
    return None


def cannot_run(device: torch.device) -> str | None:
    """Why the CUDA kernels of this build cannot run on this GPU, or None."""
    old = too_old(device)
    if old is not None:
        return old
    found = facts(device)
    return f"it cannot run on {found.name}: {found.probed}" if found and found.probed else None
