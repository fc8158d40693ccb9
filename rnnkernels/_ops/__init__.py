"""The custom ops as Python sees them: how one is called, and what the compiled part offers besides.

``torch.ops.rnnkernels.sequence_forward`` projects the input and runs the loops over time of all
layers; ``sequence_backward`` runs them backwards and returns the gradients of the gates;
``torch.ops.rnnkernels_triton`` has the same, on Triton. The autograd formula between them is C++
(``csrc/autograd``). Their arguments are listed once, in ``csrc/ops/calls.h``.

``fakes.py`` has their fake kernels, ``lanes.py`` their rules under ``torch.vmap``;
``by_reference.py`` has what the autograd formula asks the reference for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core.call import ARGUMENTS, Call, Result
from rnnkernels._core.users_line import users_level
from rnnkernels._ops import binding, by_reference, fakes, flops, lanes, tangents
from rnnkernels._ops.binding_names import OPS
from rnnkernels.cells import Cell, make_own_known

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


def packed_of(weights: Sequence[Tensor]) -> list[tuple[int, torch.dtype | None, bool]]:
    """The same, and what was chosen for them, a type and whether versions of weights are compared
    in place of their values, of each layer all of whose weights are among these and that a call has
    seen; 0 bytes where it has none now."""
    return [] if _C is None else _C.packed_of(list(weights))


def choose_packed(weights: Sequence[Tensor], dtype: torch.dtype | None, by_version: bool) -> int:
    """What each of these layers that a call has seen is packed in from now on, ``None`` being their
    own type, and whether versions of weights are compared in place of their values; returns how
    many layers there are."""
    return 0 if _C is None else _C.choose_packed(list(weights), dtype, by_version)


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


if _C is not None:
    fakes.register()
    for library in ("rnnkernels", "rnnkernels_triton"):
        lanes.register(library)
    _C.bring_reference(
        by_reference.forward_tangents, by_reference.gradient_tangents, by_reference.second_order
    )
    flops.register()
