"""Checks of tensors that users pass, with torch.nn's exception types and, where clear, its text.

The compiled ops check every tensor once more at every call; these checks speak the user's terms.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkernels._core.call import Call, check_listed, is_batch


def parameter_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None:
        dtype = torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype.is_complex:
        raise NotImplementedError(f"dtype: complex cells are not implemented, got {dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")


#: Asked here: torch.compile of torch 2.11 cannot.
_AUTOCASTS = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def autocast(device: torch.device) -> bool:
    """Whether autocast casts on this device; never where it does not exist, as on ``meta``."""
    return device.type in _AUTOCASTS and torch.is_autocast_enabled(device.type)


#: As errors of torch's products name them.
_SCALARS = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex128: "ComplexDouble",
    torch.complex64: "ComplexFloat",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}


def factors(name: str, t: Tensor, weight_name: str, weight: Tensor, autocast: bool) -> None:
    """What a cell multiplies by a weight, by dtype: with the error of torch.nn's cells, which leave
    it to their products. Autocast casts floating tensors, but for float64."""

    def multiplied(t: Tensor) -> torch.dtype:
        casts = autocast and t.is_floating_point() and t.dtype != torch.float64
        return torch.get_autocast_dtype(t.device.type) if casts else t.dtype

    left, right = multiplied(t), multiplied(weight)
    if left != right:
        words = (_SCALARS.get(dtype, str(dtype)) for dtype in (left, right))
        raise RuntimeError(
            f"mat1 and mat2 must have the same dtype, but got {' and '.join(words)} "
            f"({name} and {weight_name}; convert one of them with .to(dtype))"
        )


def dense(name: str, t: Tensor) -> None:
    """That every number of a tensor has a place of its own."""
    if t.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor, got layout {t.layout}. Convert it: {name}.to_dense()"
        )


def same_device(input: Tensor, other: Tensor, what: str) -> None:
    if input.device != other.device:
        raise RuntimeError(
            f"Input and {what} tensors are not at the same device, found input tensor at "
            f"{input.device} and {what} tensor at {other.device}"
        )


def input_like_weight(input: Tensor, weight: Tensor, autocast: bool) -> None:
    """The input against the first weight: dtype (unless autocast casts both) and device."""
    if input.dtype != weight.dtype and not (autocast and input.is_floating_point()):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    same_device(input, weight, "parameter")


#: Of the weights of a layer and direction, in torch's order.
WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def parameters(call: Call) -> None:
    """Every weight of a call, with the errors of the compiled ops, for backends without checks."""
    heads, D, R = call.heads, call.directions, call.h0.size(2)
    rows = heads * call.cell.G * call.H
    if call.projected and call.cell.S == 1:
        raise ValueError(
            f"w_hr: a projection needs a cell with a state beside h, got {call.cell_name!r}"
        )
    for index in range(call.layers):
        own_input = 0 if call.cell.normed else call.x.size(-1)
        x = own_input if index == 0 else heads * R * (1 if call.merged else D)
        shapes = (rows, x), (rows, R), (rows,), (rows,), (R, call.H)
        layer = call.layer(index, call.x)
        lists = (layer.w_ih, layer.w_hh, layer.b_ih, layer.b_hh, layer.w_hr)
        every = list(zip(WEIGHT_NAMES, lists, shapes, strict=True))
        for k, own in enumerate(call.cell.params):
            every.append(
                (f"weight_{own}", [params[k] for params in layer.params], (heads * call.H,))
            )
        for name, tensors, shape in every:
            for d, t in enumerate(tensors):
                parameter(parameter_name(name, layer.number, d), t, shape, call.x)


def parameter_name(base: str, layer: int, direction: int) -> str:
    """As in torch.nn's ``state_dict``; the bare name for a cell, whose layer is -1."""
    return base if layer < 0 else f"{base}_l{layer}" + "_reverse" * direction


def parameter(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A weight against the input: shape, dtype, device."""
    if t.shape == shape and t.dtype == x.dtype and t.device == x.device:
        return dense(name, t)
    if tuple(t.shape) != shape:
        raise RuntimeError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.dtype != x.dtype:
        raise ValueError(f"{name}: expected dtype {x.dtype} like the input, got {t.dtype}")
    raise RuntimeError(f"{name}: expected device {x.device} like the input, got {t.device}")


def state(
    name: str, t: Any, input: Tensor, shape: tuple[int, ...], message: str, autocast: bool
) -> None:
    """An initial state against the input: type, shape, dtype, device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if tuple(t.shape) != shape:
        raise RuntimeError(message.format(shape, list(t.shape)))
    if t.dtype != input.dtype and not (autocast and t.is_floating_point()):
        raise ValueError(
            f"{name}: expected dtype {input.dtype} like the input, got {t.dtype}. "
            f"Convert it: {name}.to({input.dtype})"
        )
    same_device(input, t, "hidden")


def packed(input: PackedSequence) -> None:
    """A PackedSequence, which anybody can make by hand: its batch sizes must fit its data."""
    sizes = input.batch_sizes
    data: Any = input.data
    if not isinstance(data, Tensor) or data.dim() == 0:
        kind = type(data).__name__ + (" without dimensions" if isinstance(data, Tensor) else "")
        raise TypeError(f"input: expected a PackedSequence of a Tensor, got one of {kind}")
    dense("input", data)
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64:
        got = sizes.dtype if isinstance(sizes, Tensor) else type(sizes).__name__
        raise TypeError(f"batch_sizes: expected an int64 tensor, got {got}")
    if sizes.dim() != 1 or sizes.numel() == 0 or sizes.device.type != "cpu":
        raise ValueError(
            f"batch_sizes: expected shape [T] with T > 0 on the CPU, got {list(sizes.shape)} "
            f"on {sizes.device}"
        )
    dense("batch_sizes", sizes)
    if sizes.numel() > data.size(0):
        raise ValueError(
            f"batch_sizes: expected at most {data.size(0)} steps, the rows of the packed data, got "
            f"{sizes.numel()}"
        )
    check_listed(sizes.numel(), "steps")
    listed = sizes.tolist()
    if min(listed) < 1:
        raise ValueError(f"batch_sizes: expected sizes above zero, got {min(listed)}")
    for t in range(1, len(listed)):
        if listed[t] > listed[t - 1]:
            raise ValueError(
                "batch_sizes: expected sizes that never increase, "
                f"got {listed[t]} after {listed[t - 1]} at step {t}"
            )
    if sum(listed) != input.data.size(0):
        raise ValueError(
            f"batch_sizes: expected a sum of {input.data.size(0)}, the rows of the packed data, "
            f"got {sum(listed)}. Make packed sequences with pack_padded_sequence."
        )
    for name in ("sorted_indices", "unsorted_indices"):
        _order(name, getattr(input, name), listed[0], data.device)


def _order(name: str, order: Any, B: int, device: torch.device) -> None:
    """The rows of a batch in another order."""
    if order is None:
        return
    if not isinstance(order, Tensor) or order.dtype not in (torch.int64, torch.int32):
        kind = order.dtype if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {kind}")
    dense(name, order)
    if tuple(order.shape) != (B,):
        raise ValueError(
            f"{name}: expected shape [{B}], the rows of the batch, got {list(order.shape)}"
        )
    if order.device != device:
        raise RuntimeError(f"{name}: expected device {device} like the data, got {order.device}")
    if device.type == "cpu" and not (order.min() >= 0 and order.max() < B):
        raise ValueError(f"{name}: expected rows from 0 to {B - 1}, got {order.tolist()}")


def jagged(input: Any, batch_first: bool, lengths: Any) -> None:
    """A nested tensor as input: [B, j, I] with its rows one after the other."""
    if input.layout != torch.jagged:
        raise ValueError(
            f"input: expected a nested tensor with layout=torch.jagged, got {input.layout}"
        )
    if input.dim() != 3 or getattr(input, "_ragged_idx", 1) != 1:
        raise ValueError(
            "input: expected a nested tensor [B, j, I], whose second dimension is the jagged one, "
            f"got shape {list(input.shape)}"
        )
    if not batch_first:
        raise ValueError(
            "batch_first: expected True for a nested tensor, whose rows come first, got False. "
            "Make the layer with batch_first=True, or set its attribute"
        )
    if lengths is not None:
        raise ValueError("lengths: a nested tensor brings its own lengths; pass one of them")
    if input.lengths() is not None:
        raise ValueError(
            "input: expected a nested tensor whose rows stand one after the other, got one with "
            "holes between them. Pass its contiguous()."
        )


def jagged_reset(value: Any, input: Any) -> Tensor:
    """``reset`` of the steps of a nested tensor, [N]: a nested tensor [B, j] with its offsets."""
    nested = isinstance(value, Tensor) and value.is_nested and value.layout == torch.jagged
    if not nested or not torch.equal(value.offsets(), input.offsets()):
        got = type(value).__name__ if not nested else "one with other offsets"
        raise ValueError(
            "reset: expected a nested tensor of bool [B, j] with the offsets of the input, got "
            f"{got}"
        )
    return reset(value.values(), (input.values().size(0),), input.device)


def lengths(value: Any, T: int, B: int, device: torch.device) -> Tensor:
    """``lengths`` as int64 [B], which can be moved to the input's device.

    Values are checked where they can be read without waiting for a device, and stand for those of
    no other call.
    """
    if is_array(value):
        value = torch.as_tensor(value)
    if isinstance(value, (list, tuple)):
        if any(isinstance(n, bool) or not isinstance(n, (int, numbers.Integral)) for n in value):
            raise TypeError(f"lengths: expected integers, got {list(value)}")
        value = torch.tensor(value, dtype=torch.int64)
    if not isinstance(value, Tensor):
        raise TypeError(f"lengths: expected a Tensor or a list, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer dtype, got {value.dtype}")
    dense("lengths", value)
    if tuple(value.shape) != (B,):
        raise ValueError(
            f"lengths: expected shape [{B}], one length per row of the batch, "
            f"got {list(value.shape)}"
        )
    if value.is_meta and device.type != "meta":
        raise RuntimeError(
            "lengths: expected values, got a tensor on the device meta, which has none, beside an "
            f"input on {device}"
        )
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if not recorded and value.device.type == "cpu" and not is_batch(value):
        low, high = (int(v) for v in value.aminmax()) if B else (0, 0)
        if low < 0 or high > T:
            raise ValueError(
                f"lengths: expected values from 0 to {T}, the length of the input, "
                f"got {low if low < 0 else high}"
            )
    return value.to(torch.int64)


def is_array(value: Any) -> bool:
    """Whether it is NumPy's, or of a library like it."""
    return hasattr(value, "__array__") and not isinstance(value, (Tensor, type))


def as_marks(value: Any, device: torch.device) -> Any:
    """``reset`` as a tensor, where it is a list or an array."""
    if is_array(value):
        return torch.as_tensor(value, device=device)
    if not isinstance(value, (list, tuple)):
        return value
    try:
        return torch.tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:  # texts, or lists of unequal lengths
        raise TypeError(
            f"reset: expected a Tensor, an array, or lists of bools of equal lengths: {error}"
        ) from error


def reset(value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``reset`` as a bool tensor with the leading dimensions of the input."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"reset: expected a Tensor, an array or lists of bools, got {type(value).__name__}"
        )
    dense("reset", value)
    if value.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"reset: expected dtype bool or uint8, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"reset: expected shape {list(shape)}, the input's without features, "
            f"got {list(value.shape)}"
        )
    if value.device != device:
        raise RuntimeError(
            "Input and reset tensors are not at the same device, found input tensor at "
            f"{device} and reset tensor at {value.device}"
        )
    return value.bool()
