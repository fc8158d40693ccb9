"""The compiled part; importing it registers ``torch.ops.rnnkernels.*``."""

from typing import Any

def build_info() -> dict[str, Any]:
    """How this module was built, and the instruction set that its CPU kernels use here."""

def cell_table() -> list[dict[str, Any]]:
    """The cells as C++ knows them: name, gates and the sizes of the cell contract."""
