"""From other libraries to rnnkernels and back: modules of torch.nn, weights of Keras, ONNX, Flax
and NumPy."""

from typing import TYPE_CHECKING

from rnnkernels._core import lazy

if TYPE_CHECKING:
    from rnnkernels.interop._conversion import convert, from_torch, revert, to_torch
    from rnnkernels.interop._flax import from_flax, to_flax
    from rnnkernels.interop._keras import from_keras, to_keras
    from rnnkernels.interop._layers import GRUResetBefore, Reversed
    from rnnkernels.interop._numpy import from_numpy, to_numpy
    from rnnkernels.interop._onnx import OnnxLayer, OnnxWeights, from_onnx, to_onnx_weights
    from rnnkernels.interop._survey import convertible
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "rnnkernels.interop._conversion": ("convert", "from_torch", "revert", "to_torch"),
            "rnnkernels.interop._flax": ("from_flax", "to_flax"),
            "rnnkernels.interop._keras": ("from_keras", "to_keras"),
            "rnnkernels.interop._layers": ("GRUResetBefore", "Reversed"),
            "rnnkernels.interop._numpy": ("from_numpy", "to_numpy"),
            "rnnkernels.interop._onnx": (
                "OnnxLayer",
                "OnnxWeights",
                "from_onnx",
                "to_onnx_weights",
            ),
            "rnnkernels.interop._survey": ("convertible",),
        },
    )

__all__ = [
    "GRUResetBefore",
    "OnnxLayer",
    "OnnxWeights",
    "Reversed",
    "convert",
    "convertible",
    "from_flax",
    "from_keras",
    "from_numpy",
    "from_onnx",
    "from_torch",
    "revert",
    "to_flax",
    "to_keras",
    "to_numpy",
    "to_onnx_weights",
    "to_torch",
]
