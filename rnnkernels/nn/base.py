"""What the layers share: parameters, checks, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkernels import _backends, _ops
from rnnkernels._core import checks, option_checks
from rnnkernels._core.option_checks import GradClip, Truncate, Zoneout
from rnnkernels.cells import find
from rnnkernels.functional import _normed
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
    "heads": 1,
    "weight_drop": 0.0,
    "recurrent_dropout": 0.0,
    "input_dropout": 0.0,
    "zoneout": None,
    "layer_norm": False,
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
    heads: int = 1
    weight_drop: float = 0.0
    recurrent_dropout: float = 0.0
    input_dropout: float = 0.0
    zoneout: Zoneout = None
    layer_norm: bool = False
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
        heads: int = 1,
        weight_drop: float = 0.0,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        zoneout: Zoneout = None,
        layer_norm: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        checks.parameter_dtype(dtype)
        self.mode = mode
        self.bias = option_checks.flag("bias", bias)
        self.batch_first = option_checks.flag("batch_first", batch_first)
        self.bidirectional = option_checks.flag("bidirectional", bidirectional)
        self.input_size = option_checks.size("input_size", input_size)
        self.hidden_size = option_checks.size("hidden_size", hidden_size)
        self.num_layers = option_checks.size("num_layers", num_layers)
        self.dropout = option_checks.dropout(dropout, self.num_layers)
        self.proj_size = option_checks.proj_size(proj_size, self.hidden_size)
        self.bias_mode = option_checks.choice("bias_mode", bias_mode, option_checks.BIAS_MODES)
        self.merge_mode = option_checks.choice("merge_mode", merge_mode, option_checks.MERGE_MODES)
        _backends.check_name(backend)
        self.backend = backend
        self.truncate = option_checks.truncate(truncate, bidirectional)
        option_checks.grad_clip(grad_clip)
        self.grad_clip = grad_clip
        option_checks.recompute(recompute)
        self.recompute = recompute
        self.heads = option_checks.heads(heads, self.hidden_size, self.proj_size)
        self.weight_drop = option_checks.recurrent_drop("weight_drop", weight_drop, self.cell)
        self.recurrent_dropout = option_checks.recurrent_drop(
            "recurrent_dropout", recurrent_dropout, self.cell
        )
        self.input_dropout = option_checks.probability("input_dropout", input_dropout)
        self.zoneout = self._zoneout(zoneout) or None
        self.layer_norm = self._normed(layer_norm)

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
        cell = find(self.cell)
        rows = cell.G * self.hidden_size
        state = self.proj_size or self.hidden_size
        halves = 2 if self.bidirectional and self.merge_mode == "concat" else 1
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, self.input_size if layer == 0 else halves * state),
        }
        if cell.recurrent:
            shapes["weight_hh"] = (rows, state // self.heads)
        if self.bias:
            shapes["bias_ih"] = (rows,)
            if self.bias_mode == "double" and cell.recurrent:
                shapes["bias_hh"] = (rows,)
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        if self.layer_norm:
            shapes |= _normed.parameters(self.cell, self.hidden_size)
        return shapes

    def reset_parameters(self) -> None:
        """As torch.nn's layers, and norms as :class:`torch.nn.LayerNorm`."""
        super().reset_parameters()
        if self.layer_norm:
            norms = _normed.parameters(self.cell, self.hidden_size)
            for group in self._all_weights:
                for name in group[len(group) - len(norms) :]:
                    _normed.fill(name, getattr(self, name))

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
        reset: Tensor | Sequence[Any] | None = None,
        return_all_states: bool = False,
        truncate: Truncate | EllipsisType = ...,
        grad_clip: GradClip | EllipsisType = ...,
        recompute: int | EllipsisType | None = ...,
    ) -> Any:
        """Runs the layers; see :class:`LSTM` for arguments, shapes and errors."""
        if return_all_states is not False:
            option_checks.flag("return_all_states", return_all_states)
        windows = self.truncate if truncate is ... else truncate
        clip = self.grad_clip if grad_clip is ... else grad_clip
        every = self.recompute if recompute is ... else recompute
        drops = self.training and bool(
            (self.dropout and self.num_layers > 1)
            or self.weight_drop
            or self.recurrent_dropout
            or self.input_dropout
        )
        plain = not (return_all_states or drops)
        plain = plain and windows is None and clip is None and every is None and self.heads == 1
        plain = plain and self.zoneout is None and not self.layer_norm
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
                lengths,
                reset,
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
            option_checks.truncate(windows, self.bidirectional),
            option_checks.grad_clip(clip),
            option_checks.recompute(every),
            self.heads,
            option_checks.recurrent_drop("weight_drop", self.weight_drop, self.cell),
            option_checks.recurrent_drop("recurrent_dropout", self.recurrent_dropout, self.cell),
            option_checks.probability("input_dropout", self.input_dropout),
            self._noise,
            self._zoneout(self.zoneout),
            self._normed(self.layer_norm),
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

    def _zoneout(self, value: Zoneout) -> tuple[float, ...]:
        return option_checks.zoneout(value, find(self.cell).S, self.proj_size > 0)

    def _normed(self, value: bool) -> bool:
        takes = _normed.takes(self.cell)
        return option_checks.layer_norm(value, takes, self._kind, self.heads, self.zoneout)

    @property
    def _noise(self) -> tuple[float, ...]:
        """The probabilities of the cell's own noise."""
        return ()

    @property
    def _kind(self) -> str:
        return self.mode.split("_")[0]

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, default in ADDED.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)
