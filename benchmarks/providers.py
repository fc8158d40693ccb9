"""Who can run a case: ours on each backend, torch.nn, and others where they are installed.

A provider turns a :class:`~benchmarks.problem.Problem` into a runner with the same weights, or
raises :class:`Refused` with the reason why it cannot. Those that need a GPU have not been run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rnnkernels as rk
from benchmarks.problem import Problem, Runner
from rnnkernels._backends import BACKENDS

BASELINE = "torch.nn"
OURS = "rnnkernels"
COMPARABLE = (BASELINE, "torch.compile", "flashrnn", "haste")
BACKEND_NAMES = ("auto", *BACKENDS)

#: The device that libraries for GPUs need.
NEEDED = "cuda"

Tensors = list[Tensor]


class Refused(Exception):
    """A provider cannot run a case; the message says why."""


def ours_on(backend: str) -> str:
    """The name of our provider on a backend."""
    return OURS if backend == "auto" else f"{OURS}:{backend}"


def build(name: str, problem: Problem) -> Runner:
    """The runner of the provider of this name.

    Raises:
        Refused: with the reason.
    """
    if name == OURS or name.startswith(OURS + ":"):
        return _ours(problem, name.partition(":")[2] or "auto")
    return _BUILDERS[name](problem)


def our_module(problem: Problem, backend: str) -> nn.Module:
    """Our module with the weights of the problem.

    Raises:
        Refused: the backend cannot run it.
    """
    template, case = problem.template, problem.case
    options: dict[str, Any] = {"dtype": case.torch_dtype, "device": case.device}
    if not case.single_step:
        options.update(num_layers=case.layers, bidirectional=case.directions == 2)
    make: type[nn.Module] = getattr(rk, case.cell)
    module = make(case.shape.I, case.shape.H, backend=backend, **options)
    module.load_state_dict(template.state_dict())
    arguments = problem.checked.arguments
    if not case.single_step:
        arguments = (arguments[0][:1],)  # one step tells, and leaves no traces in memory
    require(module, *arguments)
    return module


def require(module: nn.Module, *arguments: Any) -> None:
    """
    Raises:
        Refused: the backend that a module of ours asks for cannot run it.
    """
    for choice in rk.explain(module, *arguments).choices:
        if choice.backend is None:
            raise Refused(choice.refusals[choice.asked_for])


def _ours(problem: Problem, backend: str) -> Runner:
    module = our_module(problem, backend)
    return Runner(module, module.parameters())


def _torch_nn(problem: Problem) -> Runner:
    return Runner(problem.template, problem.template.parameters())


def _compiled(problem: Problem) -> Runner:
    """torch.nn in one graph; its reason, if it breaks, is that of torch.compile."""
    import torch._dynamo

    torch._dynamo.reset()
    runner = Runner(torch.compile(problem.template, fullgraph=True), problem.template.parameters())
    try:
        runner.results(problem.checked, grad=False)
        runner.results(problem.checked, grad=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Refused(_reason(error)) from error
    return runner


def _weights(problem: Problem, name: str) -> Tensors:
    """W_ih, W_hh, b_ih, b_hh, for those that take one layer of one direction on a GPU."""
    case = problem.case
    if case.device != NEEDED:
        raise Refused("it runs on CUDA devices alone")
    if case.single_step or case.layers > 1 or case.directions > 1:
        raise Refused("it takes one layer of one direction over a sequence")
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"not installed ({error})") from error
    return [p.detach() for p in problem.template.parameters()]


def _haste(problem: Problem) -> Runner:
    """Weights [I, G*H]; its gates are i g f o and z r n, where torch.nn's are i f g o and r z n."""
    weights = _weights(problem, "haste_pytorch")
    cell, dtype = problem.case.cell, problem.case.dtype
    if cell not in ("LSTM", "GRU"):
        raise Refused(f"it has no {cell}")
    if dtype not in ("float32", "float64"):
        raise Refused(f"it has no {dtype}")
    order = [0, 2, 1, 3] if cell == "LSTM" else [1, 0, 2]

    def reordered(t: Tensor) -> Tensor:
        parts = t.chunk(len(order))
        return torch.cat([parts[gate] for gate in order]).t().contiguous()

    def gradients(grads: Tensors) -> Tensors:  # both biases of torch's LSTM have the same
        return [reordered(grad) for grad in (grads[:3] if cell == "LSTM" else grads)]

    w_ih, w_hh, b_ih, b_hh = weights
    biases = [b_ih + b_hh] if cell == "LSTM" else [b_ih, b_hh]
    make = getattr(importlib.import_module("haste_pytorch"), cell)
    module = make(problem.case.shape.I, problem.case.shape.H).to(w_ih)
    names = ["kernel", "recurrent_kernel", "bias", "recurrent_bias"]
    parameters = [getattr(module, name) for name in names[: 2 + len(biases)]]
    with torch.no_grad():
        for parameter, t in zip(parameters, [w_ih, w_hh, *biases], strict=True):
            parameter.copy_(reordered(t))

    def call(x: Tensor) -> Any:
        y, state = module(x)
        return y, state if cell == "GRU" else tuple(state)

    return Runner(call, parameters, gradients)


def _flashrnn(problem: Problem) -> Runner:
    """The input product is ours to do: a linear layer in front. Weights [G, heads=1, H, H]."""
    weights = _weights(problem, "flashrnn")
    case = problem.case
    function = {"RNN": "elman", "LSTM": "lstm", "GRU": "gru"}[case.cell]
    H, gates = case.shape.H, case.formula.G
    flash = importlib.import_module("flashrnn").flashrnn
    # Of a GRU its recurrent gates are n r z, and its biases those and that of x in n.
    recurrent = [2, 0, 1] if function == "gru" else list(range(gates))

    def hidden(t: Tensor) -> Tensor:
        return t.view(gates, 1, H, H)[recurrent].contiguous()

    def bias(b_ih: Tensor, b_hh: Tensor, gradient: bool) -> Tensor:
        ih, hh = b_ih.view(gates, 1, H), b_hh.view(gates, 1, H)
        both = ih if gradient else ih + hh  # the gradient of a sum is that of either part
        return torch.stack([hh[2], both[0], both[1], ih[2]]) if function == "gru" else both

    w_ih, w_hh, b_ih, b_hh = weights
    start = [w_ih.clone(), hidden(w_hh), bias(b_ih, b_hh, gradient=False)]
    parameters = [t.requires_grad_() for t in start]

    def call(x: Tensor) -> Any:
        gx = (x @ parameters[0].t()).transpose(0, 1)  # [B, T, G*H]
        gx = gx.reshape(*gx.shape[:2], gates, 1, H)
        states, last = flash(gx, parameters[1], parameters[2], function=function)
        y = states[0][:, :, 0].transpose(0, 1)  # [T, B, H]
        final = [state.reshape(1, -1, H) for state in last]
        return y, tuple(final) if len(final) > 1 else final[0]

    def gradients(grads: Tensors) -> Tensors:
        dw_ih, dw_hh, db_ih, db_hh = grads
        return [dw_ih, hidden(dw_hh), bias(db_ih, db_hh, gradient=True)]

    return Runner(call, parameters, gradients)


def _reason(error: Exception) -> str:
    """What kind of error it is and how torch.compile explains it, without the rest."""
    kind, *rest = str(error).strip().splitlines() or [type(error).__name__]
    explained = [line.strip() for line in rest if line.strip().startswith("Explanation: ")]
    return ". ".join([kind, *explained[:1]])


_BUILDERS: dict[str, Callable[[Problem], Runner]] = {
    BASELINE: _torch_nn,
    "torch.compile": _compiled,
    "haste": _haste,
    "flashrnn": _flashrnn,
}
