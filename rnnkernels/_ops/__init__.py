"""The custom ops as Python sees them: how one is called, and fake kernels.

``torch.ops.rnnkernels.sequence_forward`` projects the input and runs the loops over time of all
layers; ``sequence_backward`` runs them backwards and returns the gradients of the gates;
``torch.ops.rnnkernels_triton`` has the same, on Triton. The autograd formula between them is C++
(``csrc/autograd``). Their arguments are listed once, in ``csrc/ops/calls.h``.

``lanes.py`` has their rules under ``torch.vmap``; ``by_reference.py`` has what the autograd formula
asks the reference for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core import checks
from rnnkernels._core.call import ARGUMENTS, Call, LayerWeights, Result, norms_dtype, units
from rnnkernels._core.users_line import users_level
from rnnkernels._ops import binding, by_reference, flops, lanes, tangents
from rnnkernels._ops.binding_names import OPS
from rnnkernels._ops.schema import FIRST_WEIGHT, arguments
from rnnkernels.cells import Cell, find, make_own_known

try:
    binding.load()
    from rnnkernels import _C
except binding.Missing as error:
    _C = None  # type: ignore[assignment]
    #: Why the compiled part is missing, or None.
    missing: str | None = str(error)
    warnings.warn(
        f"rnnkernels runs without its compiled kernels, on torch.nn's where these can do what is "
        f"asked for, else on the slow reference: {error}.",
        stacklevel=users_level(),
    )
else:
    missing = None

Shape = tuple[int | torch.SymInt, ...]

#: Why kernels have no tangents of a call: see there.
tangents_refusal = tangents.refusal


def build_info() -> dict[str, Any]:
    """How the compiled part was built: compiler, version of torch, CUDA architectures (None: no
    CUDA), a digest of the sources that cells of users are compiled with, the instruction sets that
    it has CPU kernels for, and the one they use on this machine. Empty where there is none."""
    return {} if _C is None else dict(_C.build_info())


def library_path() -> Path:
    """The library of the ops that belongs to this torch, ``librnnkernels.so``: what a C++ program
    loads to run exported models, without Python.

    Raises:
        RuntimeError: the compiled part is missing.
    """
    if missing is not None:
        raise RuntimeError(f"library_path: the compiled part is missing: {missing}")
    return binding.place() / OPS


if _C is not None:
    #: The short way of a cell: the state after one step, or None where anything is unusual.
    cell_step = _C.cell_step
    #: The short way of layers: output and last states, or None where anything is unusual.
    layers_call = _C.layers_call
    #: Whether the flat list of a module's weights is that of its parameters as they are.
    same_weights = _C.same_weights
    #: Chunks of many streams as one batch, and back, or None where anything is unusual.
    chunk_lengths = _C.chunk_lengths
    join_chunks = _C.join_chunks
    part_steps = _C.part_steps
    #: How a layer would be laid out over a GPU; see rnnkernels._backends.cuda_plan.
    cuda_plan = _C.cuda_plan
    #: What runs on a GPU once it was found right there; see rnnkernels._backends.vetting.
    force_cuda_kernels = _C.force_cuda_kernels
    settle_cuda_kernels = _C.settle_cuda_kernels
    forget_cuda_kernels = _C.forget_cuda_kernels
    set_cuda_inspector = _C.set_cuda_inspector
    open_short_ways = _C.open_short_ways
    #: Who compiles cells that users write; see rnnkernels._backends.user_cells.
    set_cell_compiler = _C.set_cell_compiler
    _C.set_cell_finder(lambda name: make_own_known())
    short_ways_open = _C.short_ways_open
    if hasattr(_C, "cuda_device"):  # only where there are kernels for it
        #: The limits of the current GPU.
        cuda_device = _C.cuda_device
        #: Why kernels cannot run on the current GPU, or an empty text.
        cuda_probe = _C.cuda_probe


def register_cell(cell: Cell) -> None:
    """Makes a cell that a user wrote known to the compiled ops."""
    if _C is not None:
        gates, params = " ".join(cell.gates), " ".join(cell.params)
        sizes = cell.G, cell.S, cell.K, cell.A, cell.P, cell.E
        _C.register_cell(cell.name, gates, params, *sizes, cell.recurrent, cell.reads_h)


def load_cell(name: str, path: str, backend: str) -> str:
    """Loads the kernels of such a cell for a backend; the reason where it cannot, or ``''``."""
    found: str = _C.load_cell(name, path, backend)
    return found


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast makes of a tensor: float64 stays, and a parameter is cast once per region."""
    if t.dtype in (dtype, torch.float64):
        return t
    if _C is not None and not torch.compiler.is_compiling():
        found = _C.cast(t, dtype)
        if found is not None:
            return found
    return t.to(dtype)


@contextmanager
def same_weights_again() -> Iterator[None]:
    """Inside the block, the calls of this thread run the same weights again and again: on a CPU
    they keep packed weights also where they save for backward, of the weights as they are."""
    before = _C is not None and _C.set_runs_again(True)
    try:
        yield
    finally:
        if _C is not None:
            _C.set_runs_again(before)


def packed_bytes() -> int:
    """Memory of the packed weights that the CPU kernels keep."""
    return 0 if _C is None else _C.packed_bytes()


def packed_of(weights: Sequence[Tensor]) -> list[tuple[int, torch.dtype | None]]:
    """The same, and the type that was chosen for them, of each layer all of whose weights are among
    these and that a call has seen; 0 bytes where it has none now."""
    return [] if _C is None else _C.packed_of(list(weights))


def choose_packed_type(weights: Sequence[Tensor], dtype: torch.dtype | None) -> int:
    """What each of these layers that a call has seen is packed in from now on, ``None`` being their
    own type; returns how many layers there are."""
    return 0 if _C is None else _C.choose_packed_type(list(weights), dtype)


def packed_limit() -> int:
    """How much memory packed weights may take."""
    return 0 if _C is None else _C.packed_limit()


def set_packed_limit(limit: int) -> None:
    """Sets how much memory packed weights may take."""
    if _C is not None:
        _C.set_packed_limit(limit)


def drop_packed() -> None:
    """Frees the packed weights that are kept."""
    if _C is not None:
        _C.drop_packed()


def take_cuda_fault(index: int) -> str:
    """A fault that a kernel has recorded on the GPU of this number, or an empty text; it is
    forgotten then. Only in builds with kernels for GPUs."""
    return _C.take_cuda_fault(index)


def set_batch_invariant(on: bool) -> None:
    """See :func:`rnnkernels.set_batch_invariant`, which this is for the kernels alone."""
    _C.set_batch_invariant(on)


#: Types of device that the compiled part brings kernels for.
kernel_devices: frozenset[str] = frozenset(
    device
    for device in ("cpu", "cuda")
    if _C is not None
    and torch._C._dispatch_has_kernel_for_dispatch_key(
        "rnnkernels::sequence_forward", device.upper()
    )
)


def run(call: Call) -> Result:
    """Runs a call through the compiled op for the device of its input."""
    return result(call, torch.ops.rnnkernels.sequence_forward(*call[:ARGUMENTS]))


def run_triton(call: Call) -> Result:
    """Runs a call through the op whose kernels are Triton's."""
    return result(call, torch.ops.rnnkernels_triton.sequence_forward(*call[:ARGUMENTS]))


def result(call: Call, outputs: tuple[Tensor, ...]) -> Result:
    """What a call returns, from the outputs of ``sequence_forward``."""
    y, h_n, c_n, ys, c, _, _ = outputs
    has_c = call.c0 is not None
    if not call.all_states:
        return Result(y, h_n, c_n if has_c else None, None, None)
    # Not unbind: callers may write to its views no more than all at once.
    every = [ys[i] for i in range(len(ys))] if ys.dim() > 1 else []
    if not call.merged:
        every.append(y)
    h = [t.view(*t.shape[:-1], call.directions * call.heads, call.h0.size(2)) for t in every]
    return Result(
        y, h_n, c_n if has_c else None, h, [c[i] for i in range(len(c))] if has_c else None
    )


def _on_one_device(like: Tensor, a: Any) -> None:
    """A meta tensor among the arguments brings a call here, whatever the device of the others."""
    for name, value in vars(a).items():
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for i, t in enumerate(tensors):
            if isinstance(t, Tensor) and t.device != like.device:
                users = _USERS_NAMES.get(name, name)
                shown = _name_of_weight(a, i) if name == "weights" else users
                raise RuntimeError(
                    f"{shown}: expected device {like.device} like the input, got {t.device}"
                )


def _arguments(op: str, like: str, values: Sequence[Any]) -> SimpleNamespace:
    """The arguments of a fake kernel: what shapes are made from is checked here, as the kernels do
    in ``csrc/ops/check.cpp``; ``like`` names the tensor that has all steps."""
    a = arguments(op, values)
    _check_tensors(**{like: getattr(a, like), "h0": a.h0})
    for name in ("layers", "directions", "heads"):
        if getattr(a, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(a, name)}")
    cell = find(a.cell)
    if (a.c0 is None) != (cell.C == 0):
        wanted = "an initial c" if cell.C else "no c"
        raise ValueError(
            f"c0: a cell '{a.cell}' takes {wanted}, got {'none' if a.c0 is None else 'one'}"
        )
    packed = a.starts is not None
    for name, dims in (("h0", 3), ("c0", 3), ("starts", 1), (like, 2 if packed else 3)):
        t = getattr(a, name)
        if t is not None and t.dim() != dims:
            raise RuntimeError(f"{name}: expected {dims} dimensions, got shape {list(t.shape)}")
    _on_one_device(getattr(a, like), a)
    return a


def _check_tensors(**named: Any) -> None:
    """Schemas let ``None`` pass for a tensor, as which a further derivative hands on what it does
    not know of a forward: these have to be there."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


_USERS_NAMES = {"h0": "hx", "c0": "cx"}


def _name_of_weight(a: Any, index: int) -> str:
    each, rest = divmod(len(a.weights), a.layers * a.directions)
    if not each or rest:
        return "weights"
    group, place = divmod(index, each)
    cell = find(a.cell)
    own = a.weights[group * each :][:each]
    weights = LayerWeights.from_list(own, a.projected, cell.P, cell.recurrent)
    names = [n for n, w in zip(checks.WEIGHT_NAMES, weights, strict=False) if w is not None]
    names += [f"weight_{name}" for name in cell.params]
    layer = -1 if getattr(a, "step", False) else group // a.directions
    return checks.parameter_name(names[place], layer, group % a.directions)


class _Sizes:
    """Those of a call of the ops: steps are [T, B], or packed [N]."""

    def __init__(self, a: Any, steps: Shape) -> None:
        self.steps, self.L, self.B = steps, a.layers, a.h0.size(1)
        self.heads, self.D = a.heads, a.directions * a.heads
        self.H, self.R = units(a), a.h0.size(2)
        self.cell, self.has_c = find(a.cell), a.c0 is not None
        self.C = self.cell.C * self.H  # of all states beside h
        self.projected = a.projected
        self.merged = a.directions > 1 and a.merge_mode != "concat"

    def every(self, *after: int | torch.SymInt) -> Shape:
        """The shape of what all layers have at all steps."""
        return (self.L, *self.steps, self.D, *after)

    def states(self, size: int | torch.SymInt) -> Shape:
        return (self.L * self.D, self.B, size)


def _fake_forward(*values: Any) -> tuple[Tensor, ...]:
    a = _arguments("sequence_forward", "x", values)
    n = _Sizes(a, tuple(a.x.shape[:-1]))
    inner = n.L if n.merged else n.L - 1
    kept = a.save or a.all_states

    def empty(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        found: Tensor = a.x.new_empty(shape if yes else (0,))
        return found

    return (
        empty(True, *n.steps, n.heads * n.R if n.merged else n.D * n.R),
        empty(True, *n.states(n.R)),
        empty(n.has_c, *n.states(n.C)),
        empty(kept and inner > 0, inner, *n.steps, n.D * n.R),
        empty(kept and n.has_c, *n.every(n.C)),
        empty(a.save and n.projected, *n.every(n.H)),
        empty(a.save and n.cell.K > 0, *n.every(n.cell.K * n.H)),
    )


def _fake_backward(*values: Any) -> tuple[Tensor, ...]:
    a = _arguments("sequence_backward", "y", values)
    n = _Sizes(a, tuple(a.y.shape[:-1]))
    T = a.y.size(0) if a.starts is None else a.starts.size(0) - 1
    # One at least: where there are no steps, the rows are there all the same.
    windows = torch.sym_max(-(-T // a.window), 1) if a.window else 1  # type: ignore[no-untyped-call]

    def empty(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        found: Tensor = a.y.new_empty(shape if yes else (0,))
        return found

    return (
        empty(True, *n.every((n.cell.G + n.cell.A) * n.H)),
        empty(a.initial, *n.states(n.R)),
        empty(a.initial and n.has_c, *n.states(n.C)),
        empty(n.projected, *n.every(n.R)),
        empty(a.record, *n.every()).to(norms_dtype(a.y.dtype)),
        empty(n.cell.P > 0, n.L, windows * n.B, n.D, n.cell.P * n.H).to(norms_dtype(a.y.dtype)),
    )


def _fake_backward_over_saved(*values: Any) -> tuple[Tensor, ...]:
    return _fake_backward(*values)[1:]


def _fake_input_gradient(dgates: Tensor, w_ih: Sequence[Tensor]) -> Tensor:
    _check_tensors(dgates=dgates)
    if not w_ih or dgates.dim() < 2 or any(w.dim() != 2 for w in w_ih):
        raise ValueError(
            "dgates, w_ih: expected [.., D, G*H] and [G*H, I] of each of D directions, got "
            f"{list(dgates.shape)} and {[list(w.shape) for w in w_ih]}"
        )
    _on_one_device(dgates, SimpleNamespace(w_ih=w_ih))
    return dgates.new_empty((*dgates.shape[:-2], w_ih[0].size(1)))


def _fake_gradients(*values: Any) -> tuple[list[Tensor], Tensor]:
    a = _arguments("sequence_gradients", "x", values)
    inputs = [a.x, a.h0, a.c0, *a.weights]
    found = []
    for i in a.wanted:
        if not 0 <= i < len(inputs) or inputs[i] is None:
            raise ValueError(
                f"wanted: expected positions from 0 to {len(inputs) - 1}, of x, h0, c0 where there "
                f"is one, and the weights, got {i}"
            )
        lanes = (a.lanes,) if a.lanes and i >= FIRST_WEIGHT else ()
        found.append(a.x.new_empty((*lanes, *inputs[i].shape)))
    every = a.layers, *a.x.shape[:-1], a.directions * a.heads
    norms = a.x.new_empty(every if a.record else (0,))
    return found, norms.to(norms_dtype(a.x.dtype)) if a.record else norms


if _C is not None:
    for library in ("rnnkernels", "rnnkernels_triton"):
        torch.library.register_fake(f"{library}::sequence_forward", _fake_forward)
        torch.library.register_fake(f"{library}::sequence_backward", _fake_backward)
        torch.library.register_fake(f"{library}::sequence_backward_", _fake_backward_over_saved)
        torch.library.register_fake(f"{library}::sequence_gradients", _fake_gradients)
        lanes.register(library)
    torch.library.register_fake("rnnkernels::input_gradient", _fake_input_gradient)
    torch.library.register_fake("rnnkernels::rows_product", torch.mm)
    torch.library.register_fake("rnnkernels::steps_product", lambda a, b: torch.mm(a[0].t(), b[0]))
    _C.bring_reference(
        by_reference.forward_tangents, by_reference.gradient_tangents, by_reference.second_order
    )
    flops.register()
