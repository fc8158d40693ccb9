"""Calls with distributed tensors (``torch.distributed.tensor.DTensor``).

Rows of a batch know nothing of each other. So each process runs those that it has, with plain
tensors and whole weights: along a dimension of the mesh over which the input is sharded by rows,
states, lengths and resets are sharded likewise, and what a process has of the gradients of the
weights is its part of a sum (``Partial``), as of torch's own operators. Along any other dimension
of the mesh everything is replicated, and every process computes the same.

One call is one such region, not every op in it (which a sharding strategy per op would make of it):
backward of the whole layer, the products behind its loop included, then runs on plain tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from rnnkernels._core import checks
from rnnkernels._core.call import LayerWeights
from rnnkernels._core.compiling import constant_result
from rnnkernels.functional._noise import Noise
from rnnkernels.functional._spec import Spec, State

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@constant_result
def _loaded() -> bool:
    return "torch.distributed.tensor" in sys.modules


def involved(tensors: Iterable[Any]) -> bool:
    """Whether one of these is a DTensor; nothing is imported to find out."""
    if not _loaded():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in tensors)


class Rows(NamedTuple):
    """How the rows of a call lie on a mesh."""

    mesh: Any
    split: tuple[bool, ...]  # of each dimension of the mesh: whether rows are sharded over it
    total: int  # of all rows
    by: int | None  # the dimension of the input that has them

    def placements(self, dim: int | None) -> list[Placement]:
        """Those of a tensor whose rows are in this dimension, or that has none."""
        from torch.distributed.tensor import Replicate, Shard

        return [Shard(dim) if s and dim is not None else Replicate() for s in self.split]

    def local(self, t: DTensor, dim: int | None) -> Tensor:
        """What this process has of it."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        where = self.placements(dim)
        if dim is None:  # of all rows: each process has the part of its own
            slopes: list[Placement] = [Partial() if s else Replicate() for s in self.split]
        else:
            slopes = [Shard(dim) if s else Replicate() for s in self.split]
        found: Tensor = t.redistribute(self.mesh, where).to_local(grad_placements=slopes)
        return found

    def of_all(self, t: Tensor, dim: int | None, swapped: bool = False) -> Tensor:
        """A result of this process as its part of a distributed one. Its first two dimensions
        may lie in memory the other way round, which sizes of 1 do not show in strides."""
        from torch.distributed.tensor import DTensor

        shape = list(t.shape)
        if dim is not None:
            shape[dim] = self.total
        order = list(range(t.dim()))
        if swapped:
            order[:2] = 1, 0
        stride, size = [0] * t.dim(), 1
        for i in reversed(order):
            stride[i], size = size, size * max(shape[i], 1)
        return DTensor.from_local(
            t,
            self.mesh,
            self.placements(dim),
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )


def rows_of(input: Any, weights: Sequence[Any], by: int | None) -> Rows:
    """Of a call whose input has its rows in dimension ``by``; None where it is a single one.

    Raises:
        TypeError: input or weights are no DTensor while others are.
        ValueError: they are on different meshes.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(input, PackedSequence):
        raise TypeError(
            "input: a PackedSequence has no distributed form; pass a padded DTensor and lengths"
        )
    if not isinstance(input, DTensor):
        raise TypeError(
            f"input: expected a DTensor as the parameters are, got {type(input).__name__}. "
            "torch.distributed.tensor.distribute_tensor makes one."
        )
    for weight in weights:
        if weight is not None and not isinstance(weight, DTensor):
            raise TypeError(
                "parameters: expected DTensors as the input is, got a "
                f"{type(weight).__name__}. torch.distributed.tensor.distribute_module makes them."
            )
        if weight is not None and weight.device_mesh != input.device_mesh:
            raise ValueError(
                f"parameters: expected the mesh of the input, {input.device_mesh}, got "
                f"{weight.device_mesh}"
            )
    split = tuple(by is not None and p.is_shard(by) for p in input.placements)
    return Rows(input.device_mesh, split, 1 if by is None else input.size(by), by)


def states(rows: Rows, hx: Any, dim: int | None) -> Any:
    """Initial states as this process has them."""
    from torch.distributed.tensor import DTensor

    if isinstance(hx, (tuple, list)):
        return tuple(states(rows, each, dim) for each in hx)
    if isinstance(hx, Tensor) and not isinstance(hx, DTensor):
        raise TypeError("hx: expected DTensors as the input is, got a Tensor")
    return hx if hx is None else rows.local(hx, dim)


def option(rows: Rows, t: Any, dim: int) -> Any:
    """``lengths`` or ``reset``, which may be a plain tensor of all rows that all processes have."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(t, Tensor):
        return t
    if not isinstance(t, DTensor):
        whole = [Replicate()] * len(rows.split)
        t = DTensor.from_local(t, rows.mesh, whole, run_check=False)
    return rows.local(t, dim)


def forward(
    run: Callable[..., Any],
    spec: Spec,
    input: Any,
    hx: Any,
    weights: Sequence[Any],
    *,
    lengths: Any = None,
    reset: Any = None,
    return_all_states: bool = False,
) -> Any:
    """A call of layers, whose part of one process is ``run``; see there for what it takes.

    Raises:
        TypeError, ValueError: see :func:`rows_of`, and for what ``run`` refuses.
        NotImplementedError: dropout or zoneout of what several processes have.
    """
    batched = not isinstance(input, Tensor) or input.dim() == 3
    by = None if not batched else 0 if spec.batch_first else 1
    rows = rows_of(input, weights, by)
    for what, drawn in {
        "dropout: between layers": spec.drops and spec.num_layers > 1,
        "recurrent_dropout: in states": spec.drops_states,
        "input_dropout: in the input": spec.drops_inputs,
        "zoneout: in layers": Noise(spec.noise, spec.zoneout, spec.training).drawn,
    }.items():
        if drawn:
            _refuse_copies(rows, what)
    if spec.drops_weights and rows.mesh.size() > 1:
        raise NotImplementedError(
            "weight_drop: of weights that several processes have, each would draw its own mask. "
            "Set weight_drop to 0"
        )
    if lengths is not None and by is not None:
        lengths = checks.lengths(lengths, input.size(1 - by), input.size(by), input.device)
    y, h_n, *more = run(
        spec,
        rows.local(input, by),
        states(rows, hx, 1 if batched else None),
        [rows.local(w, None) for w in weights],
        lengths=lengths if by is None else option(rows, lengths, 0),
        reset=reset if by is None else option(rows, reset, by),
        return_all_states=return_all_states,
    )

    y, more = tree_map_only(Tensor, lambda t: rows.of_all(t, by, by == 0), (y, more))
    of_state = 1 if batched else None
    h_n = tree_map_only(Tensor, lambda t: rows.of_all(t, of_state), h_n)
    return (y, h_n, *more)


def _refuse_copies(rows: Rows, what: str) -> None:
    copies = math.prod(rows.mesh.size(i) for i, split in enumerate(rows.split) if not split)
    if copies > 1:
        raise NotImplementedError(
            f"{what} of replicated rows, each process would draw its own. Shard the input over the "
            f"batch along all dimensions of the mesh, or set {what.partition(':')[0]} to 0"
        )


def cell(run: Callable[..., Any], input: Any, hx: Any, weights: LayerWeights, drawn: bool) -> State:
    """A step of a cell, ``run(input, hx, weights)`` being that of one process.

    Raises:
        TypeError, ValueError: see :func:`rows_of`.
        NotImplementedError: it draws, for rows that are on several processes.
    """
    by = 0 if isinstance(input, Tensor) and input.dim() == 2 else None
    rows = rows_of(input, weights.tensors, by)
    if drawn:
        _refuse_copies(rows, "zoneout: in a cell")

    def local(w: Any) -> Tensor:
        return rows.local(w, None)

    own = weights.each(local)
    found = run(rows.local(input, by), states(rows, hx, by), own)
    result: State = tree_map_only(Tensor, lambda t: rows.of_all(t, by), found)
    return result
