"""What becomes of a gradient where an output was changed in place: ours beside torch.nn's.

``python tests/support/in_place_report.py`` prints every output of every class, changed before
backward and after a first one that keeps the graph for another: ``ok`` where the gradients are
those of the same change out of place, ``error`` where torch says that a tensor was modified,
``WRONG`` where gradients are others in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels

T, B, I, H = 5, 3, 4, 6


def _in_silence(t: Tensor) -> None:
    with torch.no_grad():
        t.zero_()


#: Ways to change a tensor in place.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "relu_": torch.relu_,
    "mul_": lambda t: t.mul_(0.5),
    "[0] = 0": lambda t: t.__setitem__(0, 0.0),
    "of a view": lambda t: t.view(-1)[::2].add_(1.0) if t.is_contiguous() else t[0].add_(1.0),
    "under no_grad": _in_silence,
    "of the detached": lambda t: t.detach().zero_(),
}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "RNN relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "RNN of 2 layers": ("RNN", {"num_layers": 2}),
    "LSTM both ways, batch first": ("LSTM", {"bidirectional": True, "batch_first": True}),
    "LSTM projected": ("LSTM", {"proj_size": 2}),
    "GRU both ways, 2 layers": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "LSTM of one step": ("LSTM", {}),
    "RNN of one step": ("RNN", {}),
    "GRU packed": ("GRU", {}),
    "LSTM all states": ("LSTM", {"num_layers": 2}),
    "GRU all states": ("GRU", {}),
    "RNNCell": ("RNNCell", {}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


@dataclass(frozen=True)
class Case:
    name: str  # in CLASSES
    output: str
    change: str  # in CHANGES
    when: str  # before, or after backward

    def __str__(self) -> str:
        return f"{self.name}, {self.output} {self.change} {self.when}"


def outputs_of(name: str, result: Any) -> dict[str, Tensor]:
    """Every tensor that a call returns, by name."""
    if isinstance(result, Tensor):
        return {"h": result}
    if name.endswith("Cell"):
        return dict(zip("hc", result, strict=True))
    y, states, *every = result
    found = {"data" if isinstance(y, PackedSequence) else "y": getattr(y, "data", y)}
    if isinstance(states, Tensor):
        states = (states,)
    found |= dict(zip(("h_n", "c_n"), states, strict=False))
    for kind, layers in zip("hc", every[0], strict=True) if every else ():
        found |= {f"{kind}[{i}]": t for i, t in enumerate(layers or ())}
    return found


def cases() -> Iterator[Case]:
    for name in CLASSES:
        for output in outputs_of(name, _call(rnnkernels, name)[1]):
            for change in CHANGES:
                yield from (Case(name, output, change, when) for when in ("before", "after"))


def _call(package: Any, name: str) -> tuple[nn.Module, Any]:
    kind, options = CLASSES[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(package, kind)(I, H, dtype=torch.float64, **options)
    steps = 1 if name.endswith("one step") else T
    shape = (B, I) if name.endswith("Cell") else (steps, B, I)
    x: Any = torch.randn(*shape, dtype=torch.float64)
    if name.endswith("packed"):
        x = pack_padded_sequence(x, torch.tensor([2, T, 3]), enforce_sorted=False)
    extra = {"return_all_states": True} if name.endswith("all states") else {}
    return module, module(x, **extra)


def _gradients(package: Any, case: Case, in_place: bool) -> list[Tensor]:
    module, result = _call(package, case.name)
    out = outputs_of(case.name, result)
    if not in_place:
        out = {n: t * 1 for n, t in out.items()}
    if case.when == "before":
        CHANGES[case.change](out[case.output])
    loss = torch.stack(
        [(t * torch.linspace(1, 2, t.numel()).view(t.shape)).sum() for t in out.values()]
    )
    total = loss.sum()
    if case.when == "after":
        torch.autograd.grad(total, list(module.parameters()), retain_graph=True)
        CHANGES[case.change](out[case.output])
    return list(torch.autograd.grad(total, list(module.parameters())))


def outcome(package: Any, case: Case) -> str:
    want = _gradients(package, case, in_place=False)
    try:
        got = _gradients(package, case, in_place=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return "error"
    close = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(got, want, strict=True))
    return "ok" if close else "WRONG"


def has_torch(case: Case) -> bool:
    return not case.name.endswith("all states")


def main() -> None:
    print(f"{'class':28} {'output':6} {'change':16} {'when':7} torch.nn  rnnkernels")
    for case in cases():
        torchs = outcome(nn, case) if has_torch(case) else "-"
        ours = outcome(rnnkernels, case)
        print(f"{case.name:28} {case.output:6} {case.change:16} {case.when:7} {torchs:9} {ours}")


if __name__ == "__main__":
    main()
