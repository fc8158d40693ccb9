"""Parameters of Flax's recurrent cells, and ours.

Layouts and formulas: https://flax.readthedocs.io/en/latest/api_reference/flax.linen/layers.html
and https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/recurrent.html. A product is a
dict of ``kernel`` [in, out] and, where it has one, ``bias`` [out]. Cells that add up the parts of
input and state have one bias for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rnnkernels.cells import find
from rnnkernels.cells.orders import ORDERS
from rnnkernels.interop._weights import (
    Array,
    Weights,
    array,
    from_order,
    module_of,
    pair,
    summed,
    to_order,
    weights_of,
)

Tree = dict[str, dict[str, Array]]
#: Of the products of input or state: the gates that each has, and whether it has a bias.
Products = dict[str, tuple[str, bool]]


@dataclass(frozen=True)
class _Form:
    """How a class of Flax keeps a cell."""

    cell: str
    input: Products
    state: Products


def _each(side: str, gates: str, biased: str) -> Products:
    """A product for every gate."""
    return {side + gate: (gate, gate in biased) for gate in gates}


def _one(name: str, gates: str, biased: bool) -> Products:
    return {name: (gates, biased)}


_LSTM, _GRU = ORDERS["flax"]["lstm"], ORDERS["flax"]["gru"]
_ONE = "".join(find("rnn_tanh").gates)
_NAMED_LSTM = _Form("lstm", _each("i", _LSTM, ""), _each("h", _LSTM, _LSTM))
_FORMS = {
    "linen.LSTMCell": _NAMED_LSTM,
    "linen.OptimizedLSTMCell": _NAMED_LSTM,
    "linen.GRUCell": _Form("gru", _each("i", _GRU, _GRU), _each("h", _GRU, "n")),
    "linen.SimpleCell": _Form("rnn_tanh", _one("i", _ONE, True), _one("h", _ONE, False)),
    "nnx.LSTMCell": _Form(  # `if` is no name of an attribute
        "lstm",
        {"if_" if name == "if" else name: has for name, has in _NAMED_LSTM.input.items()},
        _NAMED_LSTM.state,
    ),
    "nnx.OptimizedLSTMCell": _Form(
        "lstm", _one("dense_i", _LSTM, False), _one("dense_h", _LSTM, True)
    ),
    "nnx.GRUCell": _Form("gru", _one("dense_i", _GRU, True), _one("dense_h", _GRU, False)),
    "nnx.SimpleCell": _Form("rnn_tanh", _one("dense_i", _ONE, True), _one("dense_h", _ONE, False)),
}


def from_flax(
    cell: str,
    params: Mapping[str, Any],
    reverse: Mapping[str, Any] | None = None,
    *,
    batch_first: bool = True,
) -> nn.Module:
    """A layer of ours with the parameters of a cell of Flax.

    Args:
        cell: its class: ``'linen.LSTMCell'``, ``'linen.OptimizedLSTMCell'``, ``'linen.GRUCell'``,
            ``'linen.SimpleCell'``, or ``'nnx.'`` and the same. Other functions than Flax's
            defaults (``gate_fn``, ``activation_fn``) and ``residual`` leave no trace in the
            parameters, and are not what the kernels compute.
        params: its parameters as nested mappings of arrays, ``kernel [in, H]`` and ``bias [H]`` by
            gate: ``ii if ig io hi hf hg ho`` (``if_`` in nnx), ``ir iz in hr hz hn``, ``i h``; or
            for all gates at once, ``dense_i`` and ``dense_h``, in the other cells of nnx. For
            linen, a tree with ``params`` on top, or ``cell``, as ``nn.RNN(cell)`` has it, will do;
            for nnx, ``nnx.to_pure_dict(nnx.state(cell, nnx.Param))``.
        reverse: those of the backward cell of a ``Bidirectional``, for a layer of both directions.
        batch_first: whether the module takes ``[B, T, I]``, as ``nn.RNN`` of Flax does.

    Returns:
        An :class:`rnnkernels.RNN`, :class:`~rnnkernels.LSTM` or :class:`~rnnkernels.GRU`, with one
        bias vector (``bias_mode="single"``), but for ``'linen.GRUCell'``, whose n gate has another
        for the state. An LSTM's ``hx`` is ``(h, c)``, Flax's carry ``(c, h)``.

    Raises:
        TypeError: ``params`` is no mapping; arrays that are not floating point, or of several
            dtypes.
        ValueError: another ``cell``; products or biases that are missing, or too many; arrays of a
            wrong shape.

    Example::

        ours = rnnkernels.interop.from_flax("linen.GRUCell", variables["params"])
    """
    form = _form(cell)
    trees = {"params": params} | ({} if reverse is None else {"reverse": reverse})
    directions = [_direction(cell, form, name, tree) for name, tree in trees.items()]
    return module_of(form.cell, directions, batch_first=batch_first)


def to_flax(
    module: nn.Module, cell: str | None = None, layer: int | None = None, *, reverse: bool = False
) -> Tree:
    """The parameters of one of our layers as a cell of Flax has them.

    Args:
        module: an RNN with tanh, an LSTM or a GRU, layer or cell.
        cell: the class of the cell in Flax, as in :func:`from_flax`; None for linen's.
        layer: which layer of a stack, from 0; None where there is one.
        reverse: whether to take the second direction of a bidirectional layer in place of the
            first.

    Returns:
        ``{name: {"kernel": [in, H], "bias": [H]}}`` in arrays of NumPy; the whole of
        ``variables["params"]`` of that cell. Where Flax has one bias for input and state it is
        their sum, zeros for a layer without.

    Raises:
        TypeError: ``module`` is something else.
        ValueError: a stack without ``layer``; ``proj_size``; ``reverse`` of one direction; a
            ``cell`` of another kind, or one that has no bias where the layer has one that is not
            zero (the n gate of ``'nnx.GRUCell'``).

    Example::

        y = flax.linen.GRUCell(16).apply({"params": rnnkernels.interop.to_flax(gru)}, h, x)
    """
    ours, directions = weights_of(module, layer)
    fits = [name for name, form in _FORMS.items() if form.cell == ours]
    if not fits:
        kinds = ", ".join(dict.fromkeys(form.cell for form in _FORMS.values()))
        raise ValueError(f"module: expected one of the cells {kinds}, which Flax has, got {ours}")
    if cell is not None and cell not in fits:
        raise ValueError(f"cell: expected one of {', '.join(fits)} for {ours}, got {cell!r}")
    if reverse and len(directions) == 1:
        raise ValueError("reverse: expected False for a layer of one direction, got True")
    name = cell or fits[0]
    form, w = _FORMS[name], directions[int(reverse)]
    biases = _biases(form, w)
    if biases[1].any() and not any(biased for _, biased in form.state.values()):
        raise ValueError(
            f"cell: expected a class whose n gate has a bias of its own for the state, such as "
            f"linen.GRUCell, since bias_hh of that gate is not zero, got {name!r}"
        )
    tree: Tree = {}
    for products, kernel, bias in zip(
        (form.input, form.state), (w.w_ih, w.w_hh), biases, strict=True
    ):
        rows, bias = (to_order(a, ours, "flax") for a in (kernel, bias))
        gates = "".join(gates for gates, _ in products.values())
        H, at = len(bias) // len(gates), 0
        for product, (own, biased) in products.items():
            part = slice(at * H, (at + len(own)) * H)
            at += len(own)
            tree[product] = {"kernel": np.ascontiguousarray(rows[part].T)}
            if biased:
                tree[product]["bias"] = bias[part]
    return tree


def _form(cell: str) -> _Form:
    if cell not in _FORMS:
        raise ValueError(f"cell: expected one of {', '.join(_FORMS)}, got {cell!r}")
    return _FORMS[cell]


def _direction(cell: str, form: _Form, argument: str, tree: Any) -> Weights:
    """The weights of one tree of parameters."""
    products = form.input | form.state
    where = argument
    while isinstance(tree, Mapping) and len(tree) == 1 and {"params", "cell"} & set(tree):
        ((key, tree),) = tree.items()
        where += f"[{key!r}]"
    if not isinstance(tree, Mapping):
        raise TypeError(f"{where}: expected a mapping of parameters, got {type(tree).__name__}")
    if set(tree) != set(products):
        raise ValueError(
            f"{where}: expected {', '.join(products)} for {cell}, got "
            f"{', '.join(map(str, tree)) or 'nothing'}"
        )
    for product, (_, biased) in products.items():
        wanted, found = ({"kernel", "bias"} if biased else {"kernel"}), tree[product]
        if not isinstance(found, Mapping) or set(found) != wanted:
            got = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(
                f"{where}[{product!r}]: expected {sorted(wanted)} for {cell}, got {got}"
            )

    def leaf(product: str, name: str, shape: tuple[int | None, ...]) -> Array:
        return array(f"{where}[{product!r}][{name!r}]", tree[product][name], shape)

    def side(products: Products, width: int) -> tuple[Array, Array | None]:
        """The kernels [G*H, width] of all gates, and their biases [G*H] if any has one."""
        rows, offsets = [], []
        for product, (gates, biased) in products.items():
            size = len(gates) * H
            kernel = leaf(product, "kernel", (width, size))
            bias = leaf(product, "bias", (size,)) if biased else np.zeros(size, kernel.dtype)
            rows.append(kernel.T)
            offsets.append(bias)
        some = any(biased for _, biased in products.values())
        w, b = (from_order(np.concatenate(a), form.cell, "flax") for a in (rows, offsets))
        return w, b if some else None

    I, H = (leaf(next(iter(p)), "kernel", (None, None)).shape[0] for p in (form.input, form.state))
    (w_ih, b_ih), (w_hh, b_hh) = side(form.input, I), side(form.state, H)
    # One bias vector is that of the input, in whichever product Flax has it.
    return Weights(w_ih, w_hh, b_hh) if b_ih is None else Weights(w_ih, w_hh, b_ih, b_hh)


def _biases(form: _Form, w: Weights) -> tuple[Array, Array]:
    """What is added to the products of input and of state, [G*H] each: where a gate sums both, all
    of it on one side."""
    b_ih, b_hh = pair(w)
    both, cell = summed(w), find(form.cell)
    if not any(biased for _, biased in form.input.values()):
        return np.zeros_like(both), both
    joined = len(both) // cell.G * (cell.G - cell.A)  # rows of gates that sum both
    state = np.concatenate([np.zeros_like(both[:joined]), b_hh[joined:]])
    return np.concatenate([both[:joined], b_ih[joined:]]), state
