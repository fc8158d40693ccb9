"""One step of one cell, as a function of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from rnnkernels import _backends, _ops
from rnnkernels._core import checks, option_checks
from rnnkernels._core.call import Call, LayerWeights, Result
from rnnkernels._core.option_checks import Zoneout
from rnnkernels.cells import DefinedCell, find
from rnnkernels.functional import _normed, _sharded
from rnnkernels.functional._noise import Noise, cell_of
from rnnkernels.functional._spec import (
    State,
    apart_by_heads,
    each_state,
    given_states,
    side_by_side,
    zeros,
)


def cell(
    kind: str,
    cell: str | DefinedCell,
    input: Tensor,
    hx: State | None,
    weights: LayerWeights,
    *,
    sizes: tuple[int, int] | None = None,
    backend: str | None = None,
    zoneout: Zoneout = None,
    training: bool = False,
    layer_norm: bool = False,
    heads: int = 1,
) -> State:
    """One step of one cell.

    Args:
        kind: the name that errors use, such as ``'LSTMCell'``.
        cell: a name in :data:`rnnkernels.cells.CELLS`, or what :func:`rnnkernels.cell` returned.
        input: ``[B, I]`` or ``[I]``.
        hx: h ``[B, H]`` or ``[H]`` (a tuple of all states where there are several, as h and c of an
            LSTM), or None for zeros.
        weights: the cell's weights; biases may be None.
        sizes: I and H; read from the weights if None.
        backend: see :func:`rnnkernels.use_backend`.
        zoneout: as of :class:`rnnkernels.LSTMCell`.
        training: whether noise is drawn, that of zoneout and the cell's own.
        layer_norm: as of :class:`rnnkernels.LSTMCell`; the parameters of the norms are those of
            the weights that a cell has of its own.
        heads: as of :class:`rnnkernels.LSTMCell`.

    Returns:
        The next h, or the tuple of all next states, shaped like ``hx``.

    Raises:
        TypeError: input or hx is no tensor (hx no tuple of as many states as there are).
        ValueError: wrong number of dimensions, or c or a bias of another dtype.
        RuntimeError: wrong sizes or devices, or what a product multiplies has two dtypes.
    """
    name = cell.name if isinstance(cell, DefinedCell) else cell
    sizes = sizes or (weights.w_ih.size(-1), weights.w_ih.size(0) // find(name).G)
    if is_overridden():
        options: dict[str, Any] = {"sizes": sizes, "backend": backend, "zoneout": zoneout}
        options |= {"training": training, "layer_norm": layer_norm, "heads": heads}
        return handle_torch_function(_cell, (input,), kind, cell, input, hx, weights, **options)
    heads = option_checks.heads(heads, sizes[1], 0)
    option_checks.layer_norm(layer_norm, _normed.takes(name), kind, heads, zoneout)
    own = cell.probabilities if isinstance(cell, DefinedCell) else ()
    noise = Noise(own, option_checks.zoneout(zoneout, find(name).S, False), training)
    short = sizes[1] and not noise.probabilities and not layer_norm and heads == 1
    if short and _backends.undisturbed(backend):
        state: State | None = _ops.cell_step(name, weights[:4], *sizes, input, hx)
        if state is not None:
            return state
    return checked_cell(kind, name, input, hx, weights, sizes, backend, noise, layer_norm, heads)


_cell = cell  # which has an argument of that name


def is_overridden() -> bool:
    """Whether a mode is to see a call of :func:`cell`: one, as it sees of torch.nn's cells."""
    return not torch.compiler.is_compiling() and torch._C._is_torch_function_mode_enabled()


def checked_cell(
    kind: str,
    cell: str,
    input: Tensor,
    hx: State | None,
    weights: LayerWeights,
    sizes: tuple[int, int],
    backend: str | None,
    noise: Noise,
    layer_norm: bool = False,
    heads: int = 1,
) -> State:
    """:func:`cell` by the way that takes whatever is allowed, and tells what is wrong."""
    if _sharded.involved((input, *weights.tensors)):

        def run(x: Tensor, hx: Any, own: LayerWeights) -> State:
            return checked_cell(kind, cell, x, hx, own, sizes, backend, noise, layer_norm, heads)

        return _sharded.cell(run, input, hx, weights, noise.drawn)
    C = find(cell).C
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    checks.dense("input", input)
    if input.dim() not in (1, 2):
        raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    autocast = checks.autocast(input.device)
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    I, H = sizes
    if x.size(1) != I:
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {I}")
    states = _cell_states(kind, cell, hx, x, H, batched)
    checks.same_device(x, weights.w_ih, "parameter")
    checks.factors("input", x, "weight_ih", weights.w_ih, autocast)
    names = [f"hx[{i}]" for i in range(C + 1)] if C else ["hx"]
    for i, s in enumerate(states):
        if i == 0 and weights.w_hh is not None:
            checks.factors(names[i], s, "weight_hh", weights.w_hh, autocast)
        else:  # which no weight is multiplied by
            checks.state(names[i], s, x, (x.size(0), H), "", autocast)
    if H > 0:
        states = [apart_by_heads(s.unsqueeze(0), heads) for s in states]
    states = side_by_side(states)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, states = _ops.cast(x, dtype), [_ops.cast(s, dtype) for s in states]
        weights = weights.each(lambda w: _ops.cast(w, dtype))
    if H == 0:
        return _without_units(x, states, weights, batched, C)
    if weights.b_ih is None and weights.b_hh is not None:  # a single bias is b_ih
        weights = weights._replace(b_ih=torch.zeros_like(weights.b_hh))
    probabilities, draws = noise.of_call(x, x.size(0))
    call = Call(
        cell_of(cell, tuple(p > 0 for p in noise.zoneout)),
        layers=1,
        directions=1,
        heads=heads,
        projected=False,
        merge_mode="concat",
        window=0,
        clip="none",
        bound=1.0,
        x=x.unsqueeze(0),
        weights=weights.tensors,
        h0=states[0],
        c0=states[1] if C else None,
        noise=probabilities,
        draws=draws,
        step=True,
    )

    def run_layer(call: Call) -> Result:
        return _backends.run(call, backend)

    result = _normed.run(call, run_layer) if layer_norm else run_layer(call)
    found = each_state(cell, [t for t in (result.h_n, result.c_n) if t is not None], heads)
    if isinstance(found, Tensor):
        return found[0] if batched else found[0, 0]
    return tuple(t[0] if batched else t[0, 0] for t in found)


def _without_units(
    x: Tensor, states: list[Tensor], weights: LayerWeights, batched: bool, others: int
) -> State:
    """The next states of a cell that has no units, [B, 0] each, which the kernels do not take;
    gradients are zeros, and reach everything that they reach in a cell with units."""
    h = nn.functional.linear(x, weights.w_ih, weights.b_ih)
    if weights.w_hh is not None:
        h = h + nn.functional.linear(states[0], weights.w_hh, weights.b_hh)
    for s in states:
        h = h + s
    for p in weights.params:
        h = h + p
    h = h if batched else h[0]
    return (h, *(h.clone() for _ in range(others))) if others else h


def _cell_states(kind: str, cell: str, hx: Any, x: Tensor, H: int, batched: bool) -> list[Tensor]:
    """The states that enter the step, [B, H] each, of any dtype."""
    B, S = x.size(0), find(cell).S
    if hx is None:
        return [zeros(x, B, H) for _ in range(S)]
    states = given_states(cell, hx)
    for i, s in enumerate(states):
        name = f"hx[{i}]" if S > 1 else "hidden"
        if not isinstance(s, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(s).__name__}")
        checks.dense("hx", s)
        if s.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {s.dim()}D instead")
        if not batched and s.dim() == 1:
            s = states[i] = s.unsqueeze(0)
        if s.size(0) != B:
            raise RuntimeError(
                f"Input batch size {B} doesn't match hidden{i} batch size {s.size(0)}"
            )
        if s.dim() == 1:
            raise ValueError(f"{kind}: Expected {name} to be 2D like the input, got 1D instead")
        if s.size(1) != H:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {s.size(1)}, expected {H}"
            )
        checks.same_device(x, s, "hidden")
    return states
