"""From other libraries to rnnkernels and back: modules of torch.nn, weights of Keras, ONNX, Flax
and NumPy."""

from rnnkernels.interop._conversion import convert, from_torch, revert, to_torch
from rnnkernels.interop._flax import from_flax, to_flax
from rnnkernels.interop._keras import from_keras, to_keras
from rnnkernels.interop._layers import GRUResetBefore, Reversed
from rnnkernels.interop._numpy import from_numpy, to_numpy
from rnnkernels.interop._onnx import OnnxLayer, OnnxWeights, from_onnx, to_onnx_weights
from rnnkernels.interop._survey import convertible
from rnnkernels.nn import tracing

tracing.to_torch = to_torch

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
