"""The layers as modules: the surface of ``torch.nn.RNN``, ``LSTM`` and ``GRU``, and more."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkernels import _backends, _ops
from rnnkernels._core import checks
from rnnkernels._core.checks import GradClip, Truncate
from rnnkernels.cells import CELLS
from rnnkernels.functional._spec import Spec, State
from rnnkernels.functional._stack import forward
from rnnkernels.nn import flat_weights, tracing

#: What the layers have and torch's have not, with the value at which they do the same.
ADDED = {
    "bias_mode": "double",
    "merge_mode": "concat",
    "backend": None,
    "truncate": None,
    "grad_clip": None,
    "recompute": None,
}


class RNNBase(flat_weights.Holder):
    """What the layers share: parameters named, ordered and initialised as in torch.nn.

    Inherits torch's base for its surface (``_flat_weights``, ``all_weights``, ``check_input``,
    pickling ...), not its ``__init__``, which knows only torch's own modes.
    """

    bias_mode: str
    merge_mode: str
    backend: str | None
    truncate: Truncate = None
    grad_clip: GradClip = None
    recompute: int | None = None
    qconfig = tracing.QConfig()

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_mode: str = "double",
        merge_mode: str = "concat",
        backend: str | None = None,
        truncate: Truncate = None,
        grad_clip: GradClip = None,
        recompute: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        checks.parameter_dtype(dtype)
        self.mode = mode
        self.bias = checks.flag("bias", bias)
        self.batch_first = checks.flag("batch_first", batch_first)
        self.bidirectional = checks.flag("bidirectional", bidirectional)
        self.input_size = checks.size("input_size", input_size)
        self.hidden_size = checks.size("hidden_size", hidden_size)
        self.num_layers = checks.size("num_layers", num_layers)
        self.dropout = checks.dropout(dropout, self.num_layers)
        self.proj_size = checks.proj_size(proj_size, self.hidden_size)
        self.bias_mode = checks.choice("bias_mode", bias_mode, checks.BIAS_MODES)
        self.merge_mode = checks.choice("merge_mode", merge_mode, checks.MERGE_MODES)
        _backends.check_name(backend)
        self.backend = backend
        self.truncate = checks.truncate(truncate, bidirectional)
        checks.grad_clip(grad_clip)
        self.grad_clip = grad_clip
        checks.recompute(recompute)
        self.recompute = recompute

        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        for layer in range(self.num_layers):
            for direction in range(2 if bidirectional else 1):
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                shapes = self._shapes(layer)
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    setattr(self, name + suffix, parameter)
                names = [name + suffix for name in shapes]
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)
        self._init_flat_weights()
        self.reset_parameters()

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of one layer and direction, in torch's order."""
        rows = CELLS[self.cell].G * self.hidden_size
        state = self.proj_size or self.hidden_size
        halves = 2 if self.bidirectional and self.merge_mode == "concat" else 1
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, self.input_size if layer == 0 else halves * state),
            "weight_hh": (rows, state),
        }
        if self.bias:
            shapes["bias_ih"] = (rows,)
            if self.bias_mode == "double":
                shapes["bias_hh"] = (rows,)
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        return shapes

    @property
    def cell(self) -> str:
        """The name of the cell in :data:`rnnkernels.cells.CELLS`."""
        return self.mode.lower()

    def flatten_parameters(self) -> None:
        """Does nothing: our kernels take parameters wherever they lie."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: torch.nn's layer, with a warning."""
        return tracing.scriptable(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_all_states: bool = False,
        truncate: Truncate | EllipsisType = ...,
        grad_clip: GradClip | EllipsisType = ...,
        recompute: int | EllipsisType | None = ...,
    ) -> Any:
        """Runs the layers; see :class:`LSTM` for arguments, shapes and errors."""
        windows = self.truncate if truncate is ... else truncate
        clip = self.grad_clip if grad_clip is ... else grad_clip
        every = self.recompute if recompute is ... else recompute
        drops = self.training and self.dropout > 0 and self.num_layers > 1
        plain = lengths is None and reset is None and not (return_all_states or drops)
        plain = plain and windows is None and clip is None and every is None
        if plain and _backends.undisturbed(self.backend):
            flat: Any = self._flat_weights
            if not _ops.same_weights(
                self._parameters, self._flat_weights_names, flat, self._flat_weight_refs
            ):
                flat = flat_weights.current(self)
            found = _ops.layers_call(
                self.mode.lower(),
                flat,
                self.input_size,
                self.hidden_size,
                self.proj_size,
                self.num_layers,
                2 if self.bidirectional else 1,
                self.merge_mode,
                self.batch_first,
                input,
                hx,
            )
            if found is not None:
                return found
        if type(input) is not Tensor or not (hx is lengths is reset is None):
            proxy = tracing.fx_proxy(input, hx, lengths, reset)
            if proxy is not None:
                return tracing.fx_leaf(
                    self,
                    proxy,
                    input,
                    hx=hx,
                    lengths=lengths,
                    reset=reset,
                    return_all_states=return_all_states,
                    truncate=truncate,
                    grad_clip=grad_clip,
                    recompute=recompute,
                )
        spec = Spec(
            self._kind,
            self.cell,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.proj_size,
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.merge_mode,
            self.backend,
            checks.truncate(windows, self.bidirectional),
            checks.grad_clip(clip),
            checks.recompute(every),
        )
        return forward(
            spec,
            input,
            hx,
            flat_weights.current(self),
            lengths=lengths,
            reset=reset,
            return_all_states=return_all_states,
        )

    @property
    def _kind(self) -> str:
        return self.mode.split("_")[0]

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, default in ADDED.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


class RNN(RNNBase):
    """Elman RNN, a drop-in for :class:`torch.nn.RNN`: ``h' = f(W_ih x + b_ih + W_hh h + b_hh)``.

    Arguments, shapes and errors are those of :class:`LSTM` without ``proj_size``; ``hx`` is h_0
    alone. ``nonlinearity`` is ``'tanh'``, ``'relu'`` or ``'sigmoid'``.

    Example::

        rnn = rnnkernels.RNN(10, 20, num_layers=2, nonlinearity="relu")
        y, h_n = rnn(torch.randn(5, 3, 10))  # y [5, 3, 20], h_n [2, 3, 20]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        _refuse_projection(options)
        self.nonlinearity = checks.nonlinearity(nonlinearity)
        super().__init__(
            "RNN_" + nonlinearity.upper(),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )


class GRU(RNNBase):
    """GRU, a drop-in for :class:`torch.nn.GRU`, whose formula it takes (Cho et al. 2014, with the
    reset gate after the recurrent product).

    Arguments, shapes and errors are those of :class:`LSTM` without ``proj_size``; ``hx`` is h_0
    alone.

    Example::

        gru = rnnkernels.GRU(10, 20, bidirectional=True, merge_mode="sum")
        y, h_n = gru(torch.randn(5, 3, 10), lengths=[5, 2, 0])  # y [5, 3, 20], h_n [2, 3, 20]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        _refuse_projection(options)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **options,
        )


class LSTM(RNNBase):
    """LSTM, a drop-in for :class:`torch.nn.LSTM`, whose formula it takes (Hochreiter and
    Schmidhuber 1997; forget gate of Gers et al. 2000; projection of Sak et al. 2014).

    T is time, B batch, I ``input_size``, H ``hidden_size``, L ``num_layers``, D the number of
    directions, R the size of h: ``proj_size`` where it is not zero, else H.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L, each layer taking the output of the one below.
        bias: whether there are biases.
        batch_first: whether input and output are ``[B, T, ...]``; states never are.
        dropout: probability of zeroing an output between layers, in training.
        bidirectional: whether a second direction runs from each row's end to its start.
        proj_size: size of the projected h; 0 for none.
        device, dtype: of the parameters; dtype is floating point.
        bias_mode: ``'double'`` as in torch, or ``'single'``: one bias vector per layer and
            direction.
        merge_mode: how both directions become one output: ``'concat'``, ``'sum'``, ``'mean'`` or
            ``'mul'``.
        backend: see :func:`rnnkernels.use_backend`; None for the automatic choice.
        truncate: truncated BPTT. With ``k``, no gradient flows from one window of k steps
            ``[0, k), [k, 2k), ...`` into the window before, as if the state had been detached
            there; all windows run through backward at once. With ``(k1, k2)``, k2 >= k1, the
            losses of each block of k1 steps flow back over the last k2 steps that end with the
            block (BPTT(h; h') of Williams and Peng 1990), not for bidirectional layers. None for
            full BPTT. Results are the same bits in any case.
        grad_clip: a bound b on the gradients g of the gates' pre-activations at every step of
            backward (Graves 2013, section 2.1): ``b`` or ``('value', b)`` for
            ``max(-b, min(b, g))``, ``('norm', b)`` for ``g * min(1, b / |g|)`` over all gates of a
            row, ``('tanh', b)`` for ``b * tanh(g / b)``. None for no bound.
        recompute: less memory for backward. With ``k``, only the states of every k-th step are
            kept, and backward computes the rest again, a window of k steps at a time
            (checkpointing, Chen et al. 2016): docs/recompute.md. Gradients are the same but for
            the order of sums. None to keep everything.

    Call:
        ``lstm(input, hx=None, *, lengths=None, reset=None, return_all_states=False,
        truncate=..., grad_clip=..., recompute=...)``

        * ``input``: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]``, or a
          PackedSequence. T and B may be 0. With batch_first also a nested tensor ``[B, j, I]``
          with ``layout=torch.jagged``, whose offsets are the lengths, and which outputs and every
          state of a step are like. DTensors where the parameters are: docs/design.md.
        * ``hx``: ``(h_0 [L*D, B, R], c_0 [L*D, B, H])``, without B for unbatched input; zeros
          if None.
        * ``lengths``: ``[B]`` integers from 0 to T, in any order, on any device: row b ends
          after ``lengths[b]`` steps. The output is zero past the end, the final state is the one
          at the end, and what stands in the padding is never read. On a device other than the
          CPU the values are clamped to [0, T] instead of checked.
        * ``reset``: bool, the input's shape without features, nested like it: the state is zeroed
          before x_t is consumed, and no gradient passes there. In the reverse direction the cut
          falls on the same boundary.
        * ``return_all_states``: whether to return :class:`rnnkernels.AllStates` third.
        * ``truncate``, ``grad_clip``, ``recompute``: for this call, in place of the constructor's.

    Returns:
        ``(output, (h_n, c_n))``: output ``[T, B, D*R]`` (``[T, B, R]`` if merged, in the form of
        the input), h_n ``[L*D, B, R]``, c_n ``[L*D, B, H]``.

    Raises:
        TypeError: an argument is of the wrong type, ``hx`` is no pair, lengths are not integers.
        ValueError: an argument is out of range; input of a wrong number of dimensions or dtype.
        RuntimeError: input, states or parameters of the wrong shape or device.
        NotImplementedError: a complex dtype.

    Example::

        lstm = rnnkernels.LSTM(10, 20, num_layers=2)
        y, (h_n, c_n) = lstm(torch.randn(5, 3, 10))  # y [5, 3, 20], h_n and c_n [2, 3, 20]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            **options,
        )

    # torch gives LSTM its own versions of these, for a pair of states.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


def _refuse_projection(options: dict[str, Any]) -> None:
    if "proj_size" in options:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
