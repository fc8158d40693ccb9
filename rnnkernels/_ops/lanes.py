"""The ops under ``torch.vmap``, whose lanes become rows of one batch.

Where the lanes share the weights, a call of n lanes of B rows is one call of B*n rows: row b of
lane i is row ``b * n + i``, so that packed rows still stand longest first, and what a lane has of
all steps is a matrix with strides. Lanes with weights of their own are heads of one layer where
they can be (``ensembles.py``), and run one after the other where not.

``sequence_gradients`` has a rule of its own, since each lane has its own gradients of weights that
all share: its argument ``lanes`` asks for them. The loop over time is one for all; the products
behind it are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_flatten, tree_unflatten

from rnnkernels._ops import ensembles
from rnnkernels._ops.schema import arguments, rows_of, rows_of_gradient, rows_of_mask

#: The key of kernels that torch.vmap calls.
_LANES = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
#: Of each argument or result that is a tensor the dimension of the lanes, or None.
Dims = Any
OF_FORWARD = ("y", "h_n", "c_n", "ys", "c", "h_raw", "saved")


def unfold(t: Tensor, rows: int, n: int) -> Tensor:
    """Lanes that are neighbours among the rows in a dimension of their own, ``rows + 1``."""
    return t.reshape(*t.shape[:rows], t.size(rows) // n, n, *t.shape[rows + 1 :])


def _fold(t: Tensor, dim: int | None, rows: int, n: int) -> Tensor:
    """The way there from lanes in dimension ``dim`` (None: all have the same)."""
    if t.dim() - (dim is not None) <= rows:  # it was not kept, and has no rows
        return t if dim is None else t.select(dim, 0)
    if dim is None:
        sizes = [-1] * (t.dim() + 1)
        sizes[rows + 1] = n
        apart = t.unsqueeze(rows + 1).expand(sizes)
    else:
        apart = t.movedim(dim, rows + 1)
    # Not flatten, which is unknown to the vmap that is_grads_batched takes.
    return apart.reshape(*apart.shape[:rows], apart.size(rows) * n, *apart.shape[rows + 2 :])


def _fold_mask(t: Tensor, dim: int | None, n: int) -> Tensor:
    return _fold(t, dim, rows_of_mask(t.dim() - (dim is not None)), n)


def _mapped(f: Callable[[Tensor, int | None], Tensor], value: Any, dim: Dims) -> Any:
    """f(tensor, dim) for a tensor, or for each of a list of them; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [_mapped(f, v, d) for v, d in zip(value, dim, strict=True)]
    return f(value, dim) if isinstance(value, Tensor) else value


def _folded(a: SimpleNamespace, dims: SimpleNamespace, n: int) -> Iterator[Any]:
    """The arguments of one call of all lanes."""
    packed = a.starts is not None
    for name, value in vars(a).items():
        rows = rows_of(name, packed)
        if rows is None:
            yield value * n if name == "starts" and packed else value
        elif name == "masks":
            yield _mapped(partial(_fold_mask, n=n), value, dims.masks)
        else:
            yield _mapped(partial(_fold, rows=rows, n=n), value, getattr(dims, name))


def _one_by_one(op: Any, n: int, dims: Dims, values: Sequence[Any]) -> Iterator[Any]:
    """The results of each lane, once they are asked for."""
    each = [_lanes(value, dim, n) for value, dim in zip(values, dims, strict=True)]
    return (op(*lane) for lane in zip(*each, strict=True))


def _lanes(value: Any, dim: Dims, n: int) -> Sequence[Any]:
    """An argument as each lane has it."""
    if isinstance(dim, (list, tuple)):
        parts = [_lanes(v, d, n) for v, d in zip(value, dim, strict=True)]
        return list(zip(*parts, strict=True)) if parts else (value,) * n
    return (value,) * n if dim is None else value.unbind(dim)


def _stacked(lanes: Iterator[Sequence[Tensor]], n: int, dropped: Sequence[int]) -> list[Tensor]:
    """The results of all lanes side by side, each as its lane is done with: the next one finds its
    memory free. Those that nobody asks for, at these places, are empty."""
    whole: list[Tensor] = []
    rest = []
    for i, results in enumerate(lanes):
        if i == 0:
            plain = not any(t.requires_grad for t in results)
            for place, t in enumerate(results):
                shape = (0,) if place in dropped else (n, *t.shape)
                whole.append(t.new_empty(shape if plain or place in dropped else (0,)))
        if plain:
            for place, (to, t) in enumerate(zip(whole, results, strict=True)):
                if place not in dropped:
                    to[i].copy_(t)
        else:
            rest.append(results)
    for place in range(len(whole)):
        if not plain and place not in dropped:
            whole[place] = torch.stack([results[place] for results in rest])
    return whole


def _shared(a: SimpleNamespace, dims: SimpleNamespace) -> bool:
    """Whether all lanes have the same weights, and the same places of packed steps."""
    own = [*dims.weights, *((dims.starts, dims.lengths) if a.starts is not None else ())]
    return all(dim is None for dim in own)


def _refuse_flow(flows: bool) -> None:
    if flows:
        raise NotImplementedError(
            "gradient_flow: torch.vmap, is_grads_batched and jacobians of a layer whose gradients "
            "are recorded are not implemented. Take them outside of its block."
        )


def forward(op: Any) -> Callable[..., tuple[Any, Dims]]:
    """The rule of ``sequence_forward``."""

    def rule(info: Any, in_dims: Dims, *values: Any) -> tuple[Any, Dims]:
        a, dims = arguments("sequence_forward", values), arguments("sequence_forward", in_dims)
        n = info.batch_size
        _refuse_flow(a.flow is not None)
        pairs: list[tuple[Tensor, int | None]] = []
        if _shared(a, dims):
            for name, t in zip(OF_FORWARD, op(*_folded(a, dims, n)), strict=True):
                rows = rows_of(name, a.starts is not None)
                assert rows is not None
                pairs.append((unfold(t, rows, n), rows + 1) if t.dim() > rows else (t, None))
            return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)
        # What only backward asks for, a node below this rule has kept for itself.
        last = len(OF_FORWARD) if a.save or a.all_states else OF_FORWARD.index("ys")
        dropped = range(last, len(OF_FORWARD))
        if ensembles.are_heads(a, dims):
            found = op(*ensembles.as_heads(a, dims, n))
            ensembles.show_freed(found)
            for place, (name, t) in enumerate(zip(OF_FORWARD, found, strict=True)):
                empty = t.new_empty(0) if place in dropped else t
                pairs.append(ensembles.of_lanes(name, empty, a, n))
        else:
            for t in _stacked(_one_by_one(op, n, in_dims, values), n, dropped):
                pairs.append((t, 0) if t.dim() > 2 else (t.new_empty(0), None))
        return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)

    return rule


def gradients(op: Any) -> Callable[..., tuple[Any, Dims]]:
    """The rule of ``sequence_gradients``."""

    def rule(info: Any, in_dims: Dims, *values: Any) -> tuple[Any, Dims]:
        a, dims = arguments("sequence_gradients", values), arguments("sequence_gradients", in_dims)
        n = info.batch_size
        _refuse_flow(a.record)
        pairs: list[tuple[Tensor, int]] = []
        if not _shared(a, dims):
            if ensembles.are_heads(a, dims):
                found, norms = op(*ensembles.as_heads(a, dims, n))
                inner = a.lanes > 0
                for position, t in zip(a.wanted, found, strict=True):
                    pairs.append(ensembles.gradient_of_lanes(position, t, a, n, inner))
                return ([t for t, _ in pairs], norms), ([dim for _, dim in pairs], None)
            lanes = (found for found, _ in _one_by_one(op, n, in_dims, values))
            whole = _stacked(lanes, n, ())
            return (whole, a.x.new_empty(0)), ([0] * len(whole), None)
        *folded, inner = _folded(a, dims, n)
        found, norms = op(*folded, max(inner, 1) * n)
        for position, t in zip(a.wanted, found, strict=True):
            rows = rows_of_gradient(position, a.starts is not None)
            if rows is not None:
                pairs.append((unfold(t, rows, n), rows + 1))
            else:  # lanes of an inner vmap stand before these
                pairs.append((unfold(t, 0, n), 1) if inner else (t, 0))
        return ([t for t, _ in pairs], norms), ([dim for _, dim in pairs], None)

    return rule


def of_vmap(rule: Callable[..., tuple[Any, Dims]], op: Any, values: Sequence[Any]) -> Any:
    """What a rule gives for lanes of torch.vmap. ``torch.library.register_vmap`` does the same, but
    flattens the arguments as a tree, several times: as much time as a short sequence takes."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    with torch._C._ExcludeDispatchKeyGuard(_LANES):
        own, dims = zip(*(_unwrapped(value, level) for value in values), strict=True)
        if not _any(dims):
            return op(*own)
        info = SimpleNamespace(batch_size=interpreter.batch_size())
        results, dims = rule(info, dims, *own)
    return _added(_add_batch_dim, results, dims, level)


def _unwrapped(value: Any, level: int) -> tuple[Any, Dims]:
    if isinstance(value, (list, tuple)):
        pairs = [_unwrapped(v, level) for v in value]
        return [v for v, _ in pairs], [dim for _, dim in pairs]
    if isinstance(value, Tensor):
        return _unwrap_batched(value, level)
    return value, None


def _any(dims: Dims) -> bool:
    return any(_any(dim) if isinstance(dim, (list, tuple)) else dim is not None for dim in dims)


def of_older_vmap(rule: Callable[..., tuple[Any, Dims]], op: Any, values: Sequence[Any]) -> Any:
    """What a rule gives for batches of gradients (``is_grads_batched``), which torch makes by a
    vmap of its own, older than that of torch.func; without any, what the op gives."""
    levels = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    for level in range(levels, 0, -1):
        # Of size 1 where a tensor is no batch at this level.
        flat, spec = tree_flatten([_removed(v, level) for v in values])
        sizes = [t.size(0) for t in flat if isinstance(t, Tensor)]
        n = next((size for size in sizes if size != 1), 1)
        dims = [0 if isinstance(t, Tensor) and t.size(0) == n > 1 else None for t in flat]
        pairs = zip(flat, dims, strict=True)
        flat = [t[0] if isinstance(t, Tensor) and dim is None else t for t, dim in pairs]
        values = tree_unflatten(flat, spec)
        if n > 1:
            info = SimpleNamespace(batch_size=n)
            results = rule(info, tree_unflatten(dims, spec), *values)
            return _added(torch._add_batch_dim, *results, level)
    return op(*values)


def _removed(value: Any, level: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_removed(v, level) for v in value]
    return torch._remove_batch_dim(value, level, 1, 0) if isinstance(value, Tensor) else value


def _added(add: Callable[[Tensor, int, int], Any], value: Any, dim: Dims, level: int) -> Any:
    if isinstance(value, (list, tuple)):
        pairs = zip(value, dim, strict=True)
        return type(value)(_added(add, v, d, level) for v, d in pairs)
    return value if dim is None else add(value, dim, level)


def register(library: str) -> None:
    """Gives the ops of a library their rules."""
    for name, rule_of in (("sequence_forward", forward), ("sequence_gradients", gradients)):
        op = getattr(getattr(torch.ops, library), name)
        rule = rule_of(op)
        of_each = {"FuncTorchBatched": of_vmap}
        if rule_of is gradients:
            of_each["Batched"] = of_older_vmap
        for key, of in of_each.items():
            torch.library.impl(f"{library}::{name}", key)(_kernel(of, rule, op))


def _kernel(of: Callable[..., Any], rule: Callable[..., Any], op: Any) -> Callable[..., Any]:
    return lambda *values: of(rule, op, values)
