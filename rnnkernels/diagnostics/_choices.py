"""Which backend runs each layer of a model on a given input, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rnnkernels import _backends
from rnnkernels._core.call import Call, Result
from rnnkernels.diagnostics import _module_hooks as watch
from rnnkernels.interop import _survey as survey


@dataclass(frozen=True)
class Choice:
    """The choice for one layer.

    Attributes:
        module: name of the module inside the model, ``''`` for the model itself.
        layer: number of the layer, -1 for a cell.
        call: what it was asked to do, in words.
        asked_for: the backend asked for, or ``'auto'``.
        backend: the backend that runs it; None where the one asked for refuses.
        refusals: the reason of every backend that cannot run it.
        detail: how the backend lays it out, where there are several ways; on a CPU, whether the
            kernels of a written cell came with the package, and the memory of the packed weights
            that :mod:`rnnkernels.serving` tells about, if any are kept.
        checked: on a GPU, what is known of each family of the backend's kernels there: not yet
            checked, passed, or refused and why.
        derivatives: which derivatives beyond gradients (double backward, forward mode) its kernels
            leave to the reference, and why; empty where they have them all.
    """

    module: str
    layer: int
    call: str
    asked_for: str
    backend: str | None
    refusals: dict[str, str]
    detail: str = ""
    checked: str = ""
    derivatives: str = ""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; prints as text.

    Attributes:
        choices: a :class:`Choice` per layer of ours that ran.
        others: the recurrent layers of the model that are not ours, as :func:`convertible` has
            them.
    """

    choices: list[Choice] = field(default_factory=list)
    others: tuple[survey.Layer, ...] = ()

    def __str__(self) -> str:
        lines = []
        for c in self.choices:
            chosen = c.backend or f"none: {c.asked_for!r} was asked for and refuses"
            lines.append(f"{watch.label(c.module, c.layer)}: {c.call} -> {chosen}")
            lines += [f"    {c.detail}"] * bool(c.detail)
            lines += [f"    check on first use: {c.checked}"] * bool(c.checked)
            lines += [f"    {c.derivatives}"] * bool(c.derivatives)
            lines += [f"    not {name}: {reason}" for name, reason in c.refusals.items()]
        lines = lines or ["no layer of rnnkernels was run"]
        for other in self.others:
            why = f"rnnkernels.convert(model) makes it {other.becomes}"
            lines.append(
                f"{other.name or 'the model itself'}: {other.type}, not run by rnnkernels: "
                + (why if other.becomes else other.reason)
            )
        return "\n".join(lines)


def explain(module: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``module(*args, **kwargs)`` once, without gradients, and tells who runs each layer.

    Args:
        module: a layer, a cell, or any model that holds some.
        args, kwargs: the arguments of its forward.

    Returns:
        An :class:`Explanation`; ``print`` it. It names the recurrent layers that are not ours as
        well, and on a GPU what is known of the kernels, which the call checks like any other first
        one. The random number generators are left as they were.

    Raises:
        TypeError: ``module`` is no module.

    Example::

        >>> print(rnnkernels.explain(rnnkernels.GRU(8, 16), torch.randn(5, 2, 8)))
        layer 0: gru [T=5, B=2, I=8, D=1, H=16] float32 on cpu -> cpu
            not cuda: this build has no kernels for cuda tensors
    """
    others = tuple(part for part in survey.convertible(module).layers if not part.ours)
    found = Explanation(others=others)

    def observer(call: Call, name: str | None) -> Result:
        asked_for = _backends.asked_for(name)
        backends = _backends.BACKENDS
        candidates = _backends.automatic() if asked_for == "auto" else (asked_for,)
        final: dict[str, str | None] = {}
        chosen = None
        for candidate in candidates:  # as they are asked when the call runs
            final[candidate] = _backends.final_refusal(backends[candidate], call)
            if final[candidate] is None:
                chosen = candidate
                break
        reasons = {n: final[n] if n in final else b.refusal(call) for n, b in backends.items()}
        refusals = {name: reason for name, reason in reasons.items() if reason is not None}
        result = backends[chosen or "reference"].run(call)
        detail = backends[chosen].detail(call) if chosen else ""
        checked = backends[chosen].checked(call) if chosen else ""
        derivatives = backends[chosen].derivatives(call) if chosen else ""
        module = running[-1] if running else ""
        for index, layer in enumerate(call.numbers):
            text = _describe(call, index)
            found.choices.append(
                Choice(
                    module, layer, text, asked_for, chosen, refusals, detail, checked, derivatives
                )
            )
        return result

    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        watch.running(module) as running,
        _backends.observe(observer),
    ):
        module(*args, **kwargs)
    return found


def _describe(call: Call, index: int) -> str:
    """What one layer of a call is asked to do."""
    layer = call.layer(index, call.x)
    sizes = f"T={call.T}, B={call.B}, I={layer.w_ih[0].size(1)}, D={call.directions}, H={call.H}"
    if call.projected:
        sizes += f", R={call.h0.size(2)}"
    options = [name for name in ("lengths", "reset") if getattr(call, name) is not None]
    options += ["recurrent_dropout"] * (call.h_mask is not None)
    options += [f"truncate={call.window}"] * (call.window > 0)
    options += [f"recompute={call.recompute}"] * (call.recompute > 0)
    options += [f"grad_clip=('{call.clip}', {call.bound:g})"] * (call.clip != "none")
    with_options = f" with {' and '.join(options)}" if options else ""
    dtype = str(call.x.dtype).removeprefix("torch.")
    return f"{call.cell_name} [{sizes}] {dtype} on {call.x.device.type}{with_options}"
