"""Recurrent layers and cells as functions of their weights, without modules.

``weights`` lists the tensors of each layer and direction in torch's order, as
``module.all_weights`` does: for every layer the forward direction, then the reverse one, each
``[w_ih, w_hh, b_ih, b_hh, w_hr]`` as far as they exist (one bias means ``bias_mode='single'``), and
behind them the parameters of the cell itself, ``[H]`` each, if it has any, or those of the norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkernels import _backends, _ops
from rnnkernels._core import option_checks
from rnnkernels._core.call import LayerWeights
from rnnkernels._core.option_checks import GradClip, Truncate, Zoneout
from rnnkernels.cells import DefinedCell, find
from rnnkernels.functional import _normed
from rnnkernels.functional._spec import AllStates, Spec, State
from rnnkernels.functional._stack import forward
from rnnkernels.functional._step import cell

Weights = Sequence[Sequence[Tensor]]

__all__ = ["AllStates", "cell", "gru", "layers", "lstm", "rnn"]


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Weights,
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> Any:
    """Elman RNN layers: ``h' = f(W_ih x + b_ih + W_hh h + b_hh)``.

    Arguments, shapes and errors are those of :func:`lstm` but for ``hx``, which is h_0 alone;
    ``nonlinearity`` is ``'tanh'``, ``'relu'`` or ``'sigmoid'``.
    """
    cell = "rnn_" + option_checks.nonlinearity(nonlinearity)
    return _layers("RNN", cell, input, hx, weights, **options)


def gru(input: Tensor | PackedSequence, hx: Tensor | None, weights: Weights, **options: Any) -> Any:
    """GRU layers, with the formula of :class:`torch.nn.GRU`.

    Arguments, shapes and errors are those of :func:`lstm` but for ``hx``, which is h_0 alone.
    """
    return _layers("GRU", "gru", input, hx, weights, **options)


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Weights,
    **options: Any,
) -> Any:
    """LSTM layers, with the formula of :class:`torch.nn.LSTM`.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]``, or a PackedSequence.
        hx: ``(h_0 [L*D, B, R], c_0 [L*D, B, H])``, or None for zeros.
        weights: see the top of this module. Sizes are read from them.
        options: ``bidirectional``, ``batch_first``, ``dropout``, ``training``, ``merge_mode``,
            ``backend``, ``lengths``, ``reset``, ``return_all_states``, ``truncate``,
            ``grad_clip``, ``recompute``, ``heads``, ``weight_drop``, ``recurrent_dropout``,
            ``input_dropout``, ``zoneout`` and ``layer_norm``, as in :class:`rnnkernels.LSTM`.

    Returns:
        ``(output, (h_n, c_n))``, and :class:`rnnkernels.AllStates` third if asked for.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`rnnkernels.LSTM`; RuntimeError for a
            weight of the wrong shape, naming it.

    Example::

        module = torch.nn.LSTM(8, 16, num_layers=2)
        y, (h_n, c_n) = rnnkernels.functional.lstm(x, None, module.all_weights)
    """
    return _layers("LSTM", "lstm", input, hx, weights, **options)


def layers(
    cell: DefinedCell,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Weights,
    **options: Any,
) -> Any:
    """Layers of a cell that :func:`rnnkernels.cell` made.

    Arguments, shapes and errors are those of :func:`lstm` where the cell has several states, which
    ``hx`` is a tuple of, else those of :func:`gru`; ``weights`` have the rows of the gates in the
    order of its signature.
    """
    if not isinstance(cell, DefinedCell):
        raise TypeError(
            f"cell: expected what rnnkernels.cell returned, got {type(cell).__name__}. For those "
            "of torch.nn there are rnn, gru and lstm"
        )
    own = cell.probabilities
    return _layers(cell.title, cell.name, input, hx, weights, own, **options)


def _layers(
    kind: str,
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Weights,
    noise: tuple[float, ...] = (),
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    merge_mode: str = "concat",
    backend: str | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | Sequence[Any] | None = None,
    return_all_states: bool = False,
    truncate: Truncate = None,
    grad_clip: GradClip = None,
    recompute: int | None = None,
    heads: int = 1,
    weight_drop: float = 0.0,
    recurrent_dropout: float = 0.0,
    input_dropout: float = 0.0,
    zoneout: Zoneout = None,
    layer_norm: bool = False,
) -> Any:
    D = 2 if option_checks.flag("bidirectional", bidirectional) else 1
    for given in (weights, *(weights if _is_list(weights) else ())):
        if not _is_list(given):
            raise TypeError(
                "weights: expected a list of tensors for each layer and direction, such as "
                f"module.all_weights, got {type(given).__name__} "
                f"{'in place of' if given is weights else 'in'} it"
            )
    if not weights or len(weights) % D:
        raise ValueError(
            f"weights: expected one list of tensors per layer and direction, {D} per layer, "
            f"got {len(weights)}"
        )
    layer_norm = option_checks.layer_norm(layer_norm, _normed.takes(cell), kind, heads, zoneout)
    params = len(_normed.parameters(cell, 1)) if layer_norm else find(cell).P
    kinds: dict[str, Any] = {"params": params, "recurrent": find(cell).recurrent}
    groups = [LayerWeights.from_list(group, **kinds) for group in weights]
    first = groups[0]
    for group in groups:
        if [w is None for w in group] != [w is None for w in first]:
            raise ValueError(
                "weights: expected as many tensors for each layer and direction, got "
                f"{[len(group) for group in weights]}"
            )
    if first.w_ih.dim() != 2:
        raise ValueError(f"weights: expected w_ih [G*H, I], got shape {list(first.w_ih.shape)}")
    num_layers = len(weights) // D
    hidden_size = first.w_ih.size(0) // find(cell).G
    proj_size = 0 if first.w_hr is None else first.w_hr.size(0)
    spec = Spec(
        kind,
        cell,
        input_size=first.w_ih.size(1),
        hidden_size=hidden_size,
        num_layers=num_layers,
        proj_size=proj_size,
        bidirectional=bidirectional,
        batch_first=option_checks.flag("batch_first", batch_first),
        dropout=option_checks.dropout(dropout, num_layers),
        training=option_checks.flag("training", training),
        merge_mode=option_checks.choice("merge_mode", merge_mode, option_checks.MERGE_MODES),
        backend=backend,
        truncate=option_checks.truncate(truncate, bidirectional),
        grad_clip=option_checks.grad_clip(grad_clip),
        recompute=option_checks.recompute(recompute),
        heads=option_checks.heads(heads, hidden_size, proj_size),
        weight_drop=option_checks.recurrent_drop("weight_drop", weight_drop, cell),
        recurrent_dropout=option_checks.recurrent_drop(
            "recurrent_dropout", recurrent_dropout, cell
        ),
        input_dropout=option_checks.probability("input_dropout", input_dropout),
        noise=noise,
        zoneout=option_checks.zoneout(zoneout, find(cell).S, first.w_hr is not None),
        layer_norm=layer_norm,
    )
    flat = [w for group in weights for w in group]
    return_all_states = option_checks.flag("return_all_states", return_all_states)
    if not return_all_states and _backends.undisturbed(backend) and spec.is_plain:
        found = _ops.layers_call(
            cell,
            flat,
            spec.input_size,
            hidden_size,
            proj_size,
            num_layers,
            D,
            merge_mode,
            batch_first,
            input,
            hx,
            lengths,
            reset,
        )
        if found is not None:
            return found
    return forward(
        spec,
        input,
        hx,
        flat,
        lengths=lengths,
        reset=reset,
        return_all_states=return_all_states,
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (Sequence, nn.ParameterList)) and not isinstance(value, str)
