"""The cells as modules: the surface of ``torch.nn.RNNCell``, ``LSTMCell`` and ``GRUCell``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnkernels import _backends, _ops, functional
from rnnkernels._core import checks, option_checks
from rnnkernels._core.call import LayerWeights
from rnnkernels._core.option_checks import Zoneout
from rnnkernels.cells import find
from rnnkernels.functional import _normed, _step
from rnnkernels.functional._noise import Noise
from rnnkernels.functional._spec import State
from rnnkernels.nn import tracing

#: What the cells have and torch's have not.
ADDED_TO_CELLS = ("bias_mode", "backend", "zoneout", "layer_norm", "heads")


class RNNCellBase(nn.RNNCellBase):
    """What the cells share: torch's base for parameters, initial numbers and surface."""

    bias_mode: str
    backend: str | None
    zoneout: Zoneout = None
    layer_norm: bool = False
    heads: int = 1
    qconfig = tracing.QConfig()

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        cell: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias_mode: str,
        backend: str | None,
        zoneout: Zoneout,
        heads: int,
        layer_norm: bool = False,
    ) -> None:
        checks.parameter_dtype(dtype)
        option_checks.choice("bias_mode", bias_mode, option_checks.BIAS_MODES)
        _backends.check_name(backend)
        nn.RNNCellBase.__init__(  # whatever other base a subclass has
            self,
            option_checks.size("input_size", input_size, minimum=0),
            option_checks.size("hidden_size", hidden_size, minimum=0),
            option_checks.flag("bias", bias),
            num_chunks=find(cell).G,
            device=device,
            dtype=dtype,
        )
        if bias_mode == "single" or not find(cell).recurrent:
            self.register_parameter("bias_hh", None)
        if not find(cell).recurrent:
            self.register_parameter("weight_hh", None)
        self.cell = cell
        self.bias_mode = bias_mode
        self.backend = backend
        self.zoneout = self._zoneout(zoneout) or None
        self.heads = option_checks.heads(heads, self.hidden_size, 0)
        self.layer_norm = option_checks.layer_norm(
            layer_norm, _normed.takes(cell), type(self).__name__, self.heads, self.zoneout
        )
        if self.heads > 1 and find(cell).recurrent:
            rows, columns = self.weight_hh.size(0), self.hidden_size // self.heads
            self.weight_hh = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
            self.reset_parameters()
        if self.layer_norm:
            for name, shape in _normed.parameters(cell, self.hidden_size).items():
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                setattr(self, name, parameter)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn's cells, and norms as :class:`torch.nn.LayerNorm`."""
        super().reset_parameters()
        if self.layer_norm:  # not yet, when torch's own are made
            for name in _normed.parameters(self.cell, self.hidden_size):
                _normed.fill(name, getattr(self, name))

    def _zoneout(self, value: Zoneout) -> tuple[float, ...]:
        return option_checks.zoneout(value, find(self.cell).S, False)

    @property
    def _noise(self) -> tuple[float, ...]:
        """The probabilities of the cell's own noise."""
        return ()

    def _step(self, input: Tensor, hx: State | None) -> State:
        plain = self.zoneout is None and not self.layer_norm and self.heads == 1
        if plain and self.hidden_size and _backends.undisturbed(self.backend):
            state: State | None = _ops.cell_step(
                self.cell, self._parameters, self.input_size, self.hidden_size, input, hx
            )
            if state is not None:
                return state
        proxy = tracing.fx_proxy(input, hx)
        if proxy is not None:
            return tracing.fx_leaf(self, proxy, input, hx=hx)  # type: ignore[return-value]
        own = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        weights = LayerWeights(*own, params=self._params())
        kind, sizes = type(self).__name__, (self.input_size, self.hidden_size)
        options: dict[str, Any]
        if _step.is_overridden():
            cell = getattr(self, "definition", self.cell)
            options = {"backend": self.backend, "zoneout": self.zoneout}
            options |= {"training": self.training, "layer_norm": self.layer_norm}
            options |= {"heads": self.heads}
            return functional.cell(kind, cell, input, hx, weights, sizes=sizes, **options)
        noise = Noise(self._noise, self._zoneout(self.zoneout), self.training)
        options = {"layer_norm": self.layer_norm, "heads": self.heads}
        return _step.checked_cell(
            kind, self.cell, input, hx, weights, sizes, self.backend, noise, **options
        )

    def _params(self) -> tuple[Tensor, ...]:
        """Those of the cell itself, or of its norms."""
        if not self.layer_norm:
            return ()
        norms = _normed.parameters(self.cell, self.hidden_size)
        return tuple(getattr(self, name) for name in norms)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: torch.nn's cell, with a warning."""
        return tracing.scriptable(self)

    def extra_repr(self) -> str:
        extra = "" if self.bias_mode == "double" else f", bias_mode={self.bias_mode!r}"
        if self.zoneout is not None:
            extra += f", zoneout={self.zoneout!r}"
        if self.layer_norm:
            extra += ", layer_norm=True"
        if self.heads > 1:
            extra += f", heads={self.heads}"
        return super().extra_repr() + extra


class RNNCell(RNNCellBase):
    """One step of an Elman RNN, a drop-in for :class:`torch.nn.RNNCell`.

    Args:
        input_size: I, which may be 0.
        hidden_size: H, which may be 0.
        bias: whether there are biases.
        nonlinearity: ``'tanh'``, ``'relu'`` or ``'sigmoid'``.
        device, dtype: of the parameters; dtype is floating point.
        bias_mode: ``'double'`` as in torch, or ``'single'``: one bias vector.
        backend: see :func:`rnnkernels.use_backend`; None for the automatic choice.
        zoneout: as of :class:`rnnkernels.LSTM`: a probability, or one for each state.
        heads: as of :class:`rnnkernels.LSTM`; ``weight_hh`` is ``[heads*G*Hh, Hh]`` then.

    Call:
        ``h = cell(input, hx=None)`` with input ``[B, I]`` or ``[I]`` and h, hx ``[B, H]`` or
        ``[H]``.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`rnnkernels.functional.cell`.
        NotImplementedError: a complex dtype.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_mode: str = "double",
        backend: str | None = None,
        zoneout: Zoneout = None,
        heads: int = 1,
    ) -> None:
        name = "rnn_" + option_checks.nonlinearity(nonlinearity)
        options = bias_mode, backend, zoneout, heads
        super().__init__(input_size, hidden_size, bias, name, device, dtype, *options)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, hx)  # type: ignore[return-value]


class GRUCell(RNNCellBase):
    """One step of a GRU, a drop-in for :class:`torch.nn.GRUCell`.

    Arguments, call, shapes and errors are those of :class:`RNNCell` without ``nonlinearity``, and
    ``layer_norm`` as of :class:`rnnkernels.GRU`, with parameters of the same names without their
    ``_l0``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_mode: str = "double",
        backend: str | None = None,
        zoneout: Zoneout = None,
        layer_norm: bool = False,
        heads: int = 1,
    ) -> None:
        options = bias_mode, backend, zoneout, heads, layer_norm
        super().__init__(input_size, hidden_size, bias, "gru", device, dtype, *options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._step(input, hx)  # type: ignore[return-value]


class LSTMCell(RNNCellBase):
    """One step of an LSTM, a drop-in for :class:`torch.nn.LSTMCell`.

    Arguments, shapes and errors are those of :class:`RNNCell` without ``nonlinearity``; states
    are pairs: ``h, c = cell(input, (h, c))``. ``layer_norm`` is as of :class:`rnnkernels.LSTM`,
    with parameters of the same names without their ``_l0``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_mode: str = "double",
        backend: str | None = None,
        zoneout: Zoneout = None,
        layer_norm: bool = False,
        heads: int = 1,
    ) -> None:
        options = bias_mode, backend, zoneout, heads, layer_norm
        super().__init__(input_size, hidden_size, bias, "lstm", device, dtype, *options)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._step(input, hx)  # type: ignore[return-value]
