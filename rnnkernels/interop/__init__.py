"""From other libraries to rnnkernels and back; torch.nn so far."""

from rnnkernels.interop._conversion import convert, from_torch, revert, to_torch
from rnnkernels.interop._survey import convertible
from rnnkernels.nn import tracing

tracing.to_torch = to_torch

__all__ = ["convert", "convertible", "from_torch", "revert", "to_torch"]
