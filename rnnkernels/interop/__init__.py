"""From other libraries to rnnkernels and back; torch.nn so far."""

from rnnkernels.interop._conversion import convert, from_torch, revert, to_torch
from rnnkernels.interop._survey import convertible

__all__ = ["convert", "convertible", "from_torch", "revert", "to_torch"]
