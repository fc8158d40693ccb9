"""Which code runs a layer: one table of backends, and how one is chosen.

A backend is asked for by argument, by :func:`use_backend`, or by the environment variable
``RNNKERNELS_BACKEND``, in this order of precedence. Otherwise the first of :func:`automatic`
that supports the call runs it. A backend asked for by name is never replaced by another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from rnnkernels import _ops
from rnnkernels._backends import gpu, in_graph, onnx, recompute, triton, user_cells, vetting
from rnnkernels._backends import torch_nn as torch_backend
from rnnkernels._core import checks, option_checks, reference
from rnnkernels._core.call import Call, Result, may_need_gradient
from rnnkernels._core.compiling import constant_result

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A way to run a call. ``refuses(call)`` is None where it can, else the reason why not, as far
    as that is known without running anything; ``ready(call)`` finds out the rest just before the
    call runs; ``detail(call)`` tells how it lays one out, where there are several ways, and
    ``checked(call)`` what is known of its kernels on the device, ``derivatives(call)`` which
    derivatives beyond gradients its kernels leave to others."""

    name: str
    refuses: Callable[[Call], str | None]
    run: Callable[[Call], Result]
    invariant: bool = False  # offers what batch_invariant asks for
    detail: Callable[[Call], str] = lambda call: ""
    ready: Callable[[Call], str | None] | None = None
    checked: Callable[[Call], str] = lambda call: ""
    derivatives: Callable[[Call], str] = lambda call: ""

    def refusal(self, call: Call) -> str | None:
        """None where it runs the call as things are set now, else the reason why not."""
        if _invariant and not self.invariant:
            return "batch_invariant is on, and its products depend on the size of the batch"
        return self.refuses(call)


def _kernels(
    device_type: str, more: Callable[[Call], str | None] | None = None
) -> Callable[[Call], str | None]:
    """What the compiled kernels for devices of a type refuse, and ``more``."""

    def refusal(call: Call) -> str | None:
        if _ops.missing is not None:
            return f"the compiled kernels are missing ({_ops.missing})"
        if device_type not in _ops.kernel_devices:
            return f"this build has no kernels for {device_type} tensors"
        if call.x.device.type != device_type:
            return f"it runs {device_type} tensors, and the input is on {call.x.device.type}"
        if call.x.dtype not in KERNEL_DTYPES:
            return f"it has no kernels for {call.x.dtype}"
        return None if more is None else more(call)

    return refusal


def _checked(run: Callable[[Call], Result]) -> Callable[[Call], Result]:
    """The compiled ops check every tensor; torch's LSTM would read past the end of a small one."""

    def checked(call: Call) -> Result:
        checks.parameters(call)
        return run(call)

    return checked


def _detail(call: Call) -> str:
    return "; ".join(filter(None, (user_cells.describe(call), _packed(call))))


def _packed(call: Call) -> str:
    """What is kept of the packed weights of a call."""
    packed = _ops.packed_of(call.weights)
    bytes_kept = sum(each for each, _, _ in packed)
    types = sorted({str(t).removeprefix("torch.") for _, t, _ in packed if t is not None})
    by_version = any(chosen for _, _, chosen in packed)
    if not bytes_kept and not types and not by_version:
        return ""
    of_type = f" as {' and '.join(types)}" if types else ""
    trusted = ", as long as torch counts no write to them" if by_version else ""
    return (
        f"packed weights kept for calls without gradients{of_type}{trusted}: {bytes_kept:,} bytes "
        f"of this call, {_ops.packed_bytes():,} of all, at most {_ops.packed_limit():,}"
    )


def _derivatives(call: Call) -> str:
    """Which of double backward and forward mode the ops leave to the reference, and why."""
    if _invariant:
        return "double backward and forward mode are refused: batch_invariant is on"
    of_gradients, of_outputs = (_ops.tangents_refusal(call, yes) for yes in (True, False))
    if of_gradients is None:
        return ""
    which = "double backward and forward mode" if of_outputs else "double backward"
    return f"{which} by the reference, which is slow: {of_gradients}"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", lambda call: None, _checked(reference.run)),
        Backend(
            "cpu",
            _kernels("cpu", user_cells.refusal),
            _ops.run,
            invariant=True,
            detail=_detail,
            ready=user_cells.ready,
            derivatives=_derivatives,
        ),
        Backend(
            "cuda",
            _kernels("cuda", gpu.cuda_refusal),
            gpu.cuda_run,
            detail=gpu.cuda_detail,
            ready=gpu.cuda_ready,
            checked=lambda call: vetting.describe("cuda", call.x.device),
            derivatives=_derivatives,
        ),
        Backend(
            "triton",
            gpu.triton_refusal,
            _ops.run_triton,
            detail=triton.describe,
            ready=gpu.triton_ready,
            checked=lambda call: vetting.describe("triton", call.x.device),
            derivatives=_derivatives,
        ),
        Backend("torch", torch_backend.refusal, _checked(torch_backend.run)),
    )
}

#: In place of kernels where a compiler does as well; nobody asks for it by name.
_IN_GRAPH = Backend("in_graph", lambda call: None, in_graph.run)

#: Tried in this order where no backend is asked for; see :func:`automatic`.
AUTOMATIC = ("cuda", "cpu", "triton", "reference")


def automatic() -> tuple[str, ...]:
    """:data:`AUTOMATIC`, and torch.nn's kernels before the reference where ours are missing, since
    they are several times faster. Under torch.func and forward mode, for which torch.nn's have no
    rules, the reference runs all the same."""
    if _ops.missing is None or _transformed() or forward_ad._current_level >= 0:
        return AUTOMATIC
    return (*AUTOMATIC[:-1], "torch", AUTOMATIC[-1])


_chosen: str | None = None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every layer inside the block on this backend; ``None`` means the automatic choice.

    The choice holds for the whole process, like ``torch.backends`` flags.

    Raises:
        ValueError: no backend has this name.

    Example::

        with rnnkernels.use_backend("reference"):
            y, h_n = gru(x)
    """
    global _chosen
    check_name(name)
    before, _chosen = _chosen, "auto" if name is None else name
    try:
        yield
    finally:
        _chosen = before


#: Read by :meth:`Backend.refusal`, so that torch.compile guards on it; the kernels have a copy.
_invariant = False


def set_batch_invariant(mode: bool) -> None:
    """Sets whether a row's results may not depend on the batch that it is in.

    While this is on, a row has the same bits alone and in any batch, in any place of it, padded or
    not, with any number of threads, and its first steps have the same bits however many follow:
    all outputs of forward, and the gradients of the input and of the initial states where forward
    ran so. Gradients of weights are sums over the batch.

    The setting holds for the whole process, like :func:`torch.use_deterministic_algorithms`. Only
    the ``cpu`` backend offers it; a layer that it cannot run raises. See docs/batch_invariance.md
    for what it costs, and for ``torch.compile``.
    """
    global _invariant
    mode = option_checks.flag("mode", mode)
    if _ops.missing is None:
        _ops.set_batch_invariant(mode)
    _invariant = mode


def is_batch_invariant() -> bool:
    """What :func:`set_batch_invariant` or :func:`batch_invariant` has set."""
    return _invariant


@contextmanager
def batch_invariant(mode: bool = True) -> Iterator[None]:
    """:func:`set_batch_invariant` for the inside of a block, or of a function that it decorates.

    Example::

        with rnnkernels.batch_invariant():
            y, h_n = gru(x)
            assert torch.equal(gru(x[:, 3:4])[0], y[:, 3:4])
    """
    before = _invariant
    set_batch_invariant(mode)
    try:
        yield
    finally:
        set_batch_invariant(before)


def check_name(name: str | None, source: str = "backend") -> None:
    if name is not None and name not in ("auto", *BACKENDS):
        known = ", ".join(repr(n) for n in ("auto", *BACKENDS))
        raise ValueError(f"{source}: expected one of {known}, got {name!r}")


#: What the environment asks for, read once.
_environment: str | None = os.environ.get("RNNKERNELS_BACKEND") or None
check_name(_environment, "RNNKERNELS_BACKEND")


def asked_for(name: str | None) -> str:
    """The backend that argument, context or environment ask for, or ``'auto'``."""
    wishes = (name, _chosen, _environment)
    return next((wish for wish in wishes if wish is not None), "auto")


def undisturbed(name: str | None) -> bool:
    """Whether kernels may run without a :class:`Call`: nobody compiles, asks for one backend or
    looks on."""
    return (
        not torch.compiler.is_compiling()
        and (name == "auto" or (name is None and _chosen is None and _environment is None))
        and _observer is None
        and _ops.missing is None
    )


def final_refusal(backend: Backend, call: Call) -> str | None:
    """Why it does not run a call that is about to run."""
    reason = backend.refusal(call)
    return reason if reason is not None or backend.ready is None else backend.ready(call)


def select(call: Call, name: str | None = None) -> Backend:
    """The backend that runs this call.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend asked for by name cannot run the call.
    """
    name = asked_for(name)
    check_name(name)
    if name not in ("torch", "reference") and _leaves_for_onnx():
        return _for_onnx(call)
    if name == "auto":
        if not _invariant and in_graph.takes(call):
            return _IN_GRAPH
        reasons = {}
        for candidate in automatic():
            reasons[candidate] = final_refusal(BACKENDS[candidate], call)
            if reasons[candidate] is None:
                if candidate == "reference":
                    user_cells.tell(call.cell_name, call.x.dtype, call.x.device.type)
                return BACKENDS[candidate]
        because = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise RuntimeError(f"backend: none can run this layer ({because})")
    backend = BACKENDS[name]
    reason = final_refusal(backend, call)
    if reason is not None:
        raise RuntimeError(
            f"backend: {name!r} was asked for and cannot run this layer: {reason}. "
            "Ask for 'auto' or another backend; rnnkernels.explain(module, input) shows which."
        )
    return backend


def _leaves_for_onnx() -> bool:
    """Whether torch.onnx.export runs the model."""
    traced = torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    return traced and _exports_onnx()


@constant_result  # else it compiles False
def _exports_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _for_onnx(call: Call) -> Backend:
    """The backend whose functions torch.onnx.export has operators for.

    Raises:
        RuntimeError: it cannot run the call.
    """
    if torch._C._get_tracing_state() is None:
        backend, terms, more = Backend("onnx", onnx.refusal, onnx.run), "ONNX's operators", ""
        reason = backend.refusal(call)
    else:
        backend, terms = BACKENDS["torch"], "torch.nn's functions, since dynamo=False"
        packed = call.starts is not None
        reason = "a PackedSequence; pass lengths" if packed else backend.refusal(call)
        more = "" if onnx.refusal(call) else ". With dynamo=True it can"
    if reason is not None:
        raise RuntimeError(
            f"torch.onnx.export: this layer cannot be written in {terms}: {reason}{more}"
        )
    return backend


Run = Callable[[Call, str | None], Result]

#: Stands in for :func:`run` while somebody looks on.
_observer: Run | None = None


@contextmanager
def observe(observer: Run) -> Iterator[Run]:
    """Hands every call inside the block to ``observer(call, name)`` instead of running it.

    Yields what would run the calls without this observer: another around it, or the backends.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield _run if before is None else before
    finally:
        _observer = before


def run(call: Call, name: str | None = None) -> Result:
    """Runs the call on the backend that :func:`select` gives."""
    return _run(call, name) if _observer is None else _observer(call, name)


def _run(call: Call, name: str | None) -> Result:
    backend = select(call, name)
    recomputes = call.recompute and may_need_gradient(call.tensors)
    if recomputes and not (_transformed() or _leaves_for_onnx()):  # whose model has no backward
        return recompute.run(call, backend.name)
    return backend.run(call)


def _transformed() -> bool:
    """Whether functions of torch.func look on, which keep all that leads to a gradient."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
