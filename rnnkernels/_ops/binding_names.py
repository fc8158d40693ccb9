"""Where the compiled part lies in the package, and what its files are called.

The build runs this file by itself, before the package can be imported: it imports nothing of it.
"""

from __future__ import annotations

#: The kernels, which know neither torch nor Python; in the folder of the package.
KERNELS = "librnnkernels_kernels.so"
#: The ops for one minor version of torch, without Python: what a C++ program loads. The module _C
#: lies beside it, under a name that Python gives.
OPS = "librnnkernels.so"
#: Notes beside these what they were built for.
RECORD = "built_for.json"
#: Below the package, one folder for each minor version of torch.
BINDINGS = "_bindings"


def folder(minor: str) -> str:
    """Of the binding for a minor version of torch such as ``2.13``, relative to the package."""
    return f"{BINDINGS}/torch{minor}"
