"""How torch lets float32 be multiplied: its settings, old and new, read in one place.

There are two generations of switches: ``torch.backends.cudnn.allow_tf32`` and
``torch.set_float32_matmul_precision``; and ``torch.backends.fp32_precision`` with those of the same
name below it, which say it for each operator. Reading an old one raises as soon as the new ones
hold what the old ones cannot say; the new ones also tell what was set by the old.
"""

from __future__ import annotations

import torch


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether recurrent layers may multiply numbers of this dtype as TF32: those of float32, where
    ``torch.backends.cudnn.rnn.fp32_precision`` says so. ``csrc/ops/float32.h`` asks the same."""
    switch = torch.backends.cudnn.rnn
    return dtype == torch.float32 and getattr(switch, "fp32_precision") == "tf32"  # noqa: B009


def numbers(dtype: torch.dtype) -> str:
    """What numbers of this dtype are in a product: its name, or ``'tf32'``."""
    return "tf32" if tf32_allowed(dtype) else str(dtype).removeprefix("torch.")


def in_words(precision: str, setting: str = "cudnn.rnn") -> str:
    """How float32 is multiplied, and which of torch's settings says so, in front of a layout."""
    return f"float32 multiplied as {precision} (torch.backends.{setting}.fp32_precision); "


def tf32_in_matmul() -> bool:
    """Whether torch's own matrix products of float32 may run as TF32 on a GPU."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
