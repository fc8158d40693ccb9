"""Layers that other frameworks have and the kernels have not, made of torch operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnnkernels._core import checks, option_checks
from rnnkernels._core.call import merge
from rnnkernels.nn.base import RNNBase

Lengths = Tensor | Sequence[int] | None


class GRUResetBefore(nn.Module):
    """A GRU whose reset gate acts before the recurrent product (Cho et al. 2014), as Keras has it
    with ``reset_after=False`` and ONNX with ``linear_before_reset=0``.

    It has no kernel: a loop of torch operations runs it, on every device and in every precision,
    slower than :class:`rnnkernels.GRU` by far. ``W_hn`` is multiplied by ``r * h`` here, so the
    weights of one formula are not those of the other::

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)
        h' = (1 - z) * n + z * h

    One layer; parameters have the names, shapes, order of gates (r z n) and initial distribution
    of :class:`torch.nn.GRU`.

    Args:
        input_size: I, the features of a step.
        hidden_size: H, the units of a layer.
        bias: whether there are biases.
        batch_first: whether input and output are ``[B, T, ...]``.
        bidirectional: whether a second direction runs from each row's end to its start; D is then
            2, else 1.
        device, dtype: of the parameters; dtype is floating point.
        bias_mode: ``'double'``, or ``'single'``: one bias vector per direction.
        merge_mode: ``'concat'``, ``'sum'``, ``'mean'`` or ``'mul'``.

    Call:
        ``layer(input, hx=None, *, lengths=None)`` with input ``[T, B, I]``, hx ``[D, B, H]``,
        lengths ``[B]`` as for :class:`rnnkernels.LSTM`.

    Returns:
        ``(output, h_n)``: output ``[T, B, D*H]`` (``[T, B, H]`` if merged), h_n ``[D, B, H]``.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`rnnkernels.GRU`; an input that is no
            tensor of three dimensions.

    Example::

        gru = rnnkernels.interop.GRUResetBefore(10, 20, batch_first=True)
        y, h_n = gru(torch.randn(3, 5, 10), lengths=[5, 2, 0])
    """

    weight_ih_l0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_mode: str = "double",
        merge_mode: str = "concat",
    ) -> None:
        super().__init__()
        checks.parameter_dtype(dtype)
        self.input_size = option_checks.size("input_size", input_size)
        self.hidden_size = option_checks.size("hidden_size", hidden_size)
        self.bias = option_checks.flag("bias", bias)
        self.batch_first = option_checks.flag("batch_first", batch_first)
        self.bidirectional = option_checks.flag("bidirectional", bidirectional)
        self.bias_mode = option_checks.choice("bias_mode", bias_mode, option_checks.BIAS_MODES)
        self.merge_mode = option_checks.choice("merge_mode", merge_mode, option_checks.MERGE_MODES)
        rows = 3 * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, self.input_size),
            "weight_hh": (rows, self.hidden_size),
        }
        if bias:
            shapes |= {"bias_ih": (rows,)}
            shapes |= {"bias_hh": (rows,)} if bias_mode == "double" else {}
        for direction in range(self._directions):
            for name, shape in shapes.items():
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                setattr(self, checks.parameter_name(name, 0, direction), parameter)
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def reset_parameters(self) -> None:
        """Draws the parameters as :class:`torch.nn.GRU` does."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, Tensor]:
        x = _steps_first("input", input, self.batch_first)
        checks.input_like_weight(x, self.weight_ih_l0, autocast=False)
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {x.size(-1)}"
            )
        T, B = x.shape[:2]
        shape = self._directions, B, self.hidden_size
        if hx is None:
            hx = x.new_zeros(shape)
        checks.state("hx", hx, x, shape, "Expected hidden size {}, got {}", autocast=False)
        there = torch.ones(T, B, 1, dtype=torch.bool, device=x.device)
        if lengths is not None:
            ends = checks.lengths(lengths, T, B, x.device).to(x.device)
            there = (torch.arange(T, device=x.device)[:, None] < ends)[:, :, None]
            x = x.masked_fill(~there, 0)  # what stands there reaches nothing
        ran = [self._run(d, x, h, there) for d, h in enumerate(hx)]
        y = torch.cat([y for y, _ in ran], dim=-1)
        y = merge(y, self.merge_mode) if self.bidirectional else y
        return y.transpose(0, 1) if self.batch_first else y, torch.stack([h for _, h in ran])

    def _run(self, direction: int, x: Tensor, h: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """One direction over x [T, B, I]; there [T, B, 1] tells which steps the rows have."""

        def weight(name: str) -> Tensor | None:
            return getattr(self, checks.parameter_name(name, 0, direction), None)

        w_ih, w_hh = weight("weight_ih"), weight("weight_hh")
        assert w_ih is not None and w_hh is not None
        gx = x @ w_ih.t()
        for bias in (weight("bias_ih"), weight("bias_hh")):
            gx = gx if bias is None else gx + bias
        H = self.hidden_size
        w_gates, w_n = w_hh[: 2 * H].t(), w_hh[2 * H :].t()
        outputs = [h] * x.size(0)
        for t in range(x.size(0))[:: -1 if direction else 1]:
            r, z = torch.sigmoid(gx[t, :, : 2 * H] + h @ w_gates).chunk(2, dim=-1)
            n = torch.tanh(gx[t, :, 2 * H :] + (r * h) @ w_n)
            h = torch.where(there[t], n + z * (h - n), h)
            outputs[t] = h.masked_fill(~there[t], 0)
        return torch.stack(outputs) if outputs else gx[:, :, :H], h

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}", "no kernel: a loop of torch operations"]
        plain = {
            "bias": True,
            "batch_first": False,
            "bidirectional": False,
            "bias_mode": "double",
            "merge_mode": "concat",
        }
        for name, value in plain.items():
            if getattr(self, name) != value:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


class Reversed(nn.Module):
    """A layer of one direction that runs from each row's end to its start, as ONNX's operators do
    with ``direction="reverse"``: rows are turned around for it, and so is its output.

    Args:
        layer: an :class:`rnnkernels.RNN`, :class:`~rnnkernels.LSTM` or :class:`~rnnkernels.GRU`
            or a :class:`GRUResetBefore`, not bidirectional. The kernels run it as ever.

    Call:
        ``reversed(input, hx=None, *, lengths=None)``; shapes, results and errors are those of
        ``layer``. Step t of the output belongs to step t of the input, and the final state is that
        at step 0.

    Raises:
        TypeError: ``layer`` is none of these; an input that is no tensor.
        ValueError: ``layer`` is bidirectional; an input without three dimensions.

    Example::

        backwards = rnnkernels.interop.Reversed(rnnkernels.LSTM(10, 20))
        y, (h_n, c_n) = backwards(torch.randn(5, 3, 10), lengths=[5, 2, 0])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, (RNNBase, GRUResetBefore)):
            raise TypeError(
                "layer: expected an RNN, LSTM or GRU of rnnkernels or a GRUResetBefore, got "
                f"{type(layer).__name__}"
            )
        if layer.bidirectional:
            raise ValueError(
                "layer: expected one direction, got a bidirectional layer, which runs both ways "
                "already. Use it as it is"
            )
        self.layer = layer

    def forward(self, input: Tensor, hx: Any = None, *, lengths: Lengths = None) -> tuple[Any, Any]:
        first = self.layer.batch_first
        x = _steps_first("input", input, first)
        T, B = x.shape[:2]
        if lengths is None:
            ends = torch.tensor([T], device=x.device).expand(B)
        else:
            ends = checks.lengths(lengths, T, B, x.device).to(x.device)
        steps = torch.arange(T, device=x.device)[:, None]  # [T, 1]
        places = torch.where(steps < ends, ends - 1 - steps, steps)[:, :, None]  # [T, B, 1]

        def turn(t: Tensor) -> Tensor:
            return t.gather(0, places.expand(-1, -1, t.size(2)))

        turned = turn(x)
        y, states = self.layer(turned.transpose(0, 1) if first else turned, hx, lengths=lengths)
        y = turn(y.transpose(0, 1) if first else y)
        return y.transpose(0, 1) if first else y, states


def _steps_first(name: str, value: Any, batch_first: bool) -> Tensor:
    """An input as [T, B, I]."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a Tensor, got {type(value).__name__}. Pad it, and pass lengths"
        )
    if value.dim() != 3:
        form = "[B, T, I]" if batch_first else "[T, B, I]"
        raise ValueError(f"{name}: expected shape {form}, got {list(value.shape)}")
    return value.transpose(0, 1) if batch_first else value
