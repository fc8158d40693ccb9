"""What training loops do around a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.profiler import ProfilerActivity, profile
from torch.utils import checkpoint as checkpoints

from compat.registry import (
    CELLS,
    LAYERS,
    B,
    I,
    Library,
    Section,
    T,
    gradients,
    same,
    tensors,
    total,
)

training = Section("Training")
row = training.row
X = torch.randn(T, B, I)


def falls(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    """The loss does, after some steps."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = total(model(X))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses


@row("Adafactor; Muon on the matrices and AdamW on the rest")
def _(library: Library) -> None:
    model = library.model()
    falls(model, torch.optim.Adafactor(model.parameters(), 0.1))
    model = library.model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, 0.01)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], 0.01)
    muon.register_step_post_hook(lambda *_: rest.step())
    falls(model, muon)


@row("gradients add up over calls; zero_grad(set_to_none=False)")
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)
        want = gradients(model, X)
        for _ in range(2):
            total(model(X)).backward()
        same([p.grad for p in model.parameters()], [2 * g for g in want])
        model.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        total(model(X)).backward()
        same([p.grad for p in model.parameters()], want)


@row("an exponential average of the weights; update_bn")
def _(library: Library) -> None:
    model = nn.Sequential(library.model(), nn.Flatten(0, 1), nn.BatchNorm1d(2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    falls(model, torch.optim.SGD(model.parameters(), 0.01), 2)
    average.update_parameters(model)
    update_bn([X, 2 * X], average)
    assert average.eval()(X).isfinite().all()


@row("LazyLinear before and after a layer")
def _(library: Library) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = (
                nn.LazyLinear(I),
                library.make("GRU"),
                nn.LazyLinear(2),
            )

        def forward(self, x: Tensor) -> Any:
            return self.last(self.layer(self.first(x))[0])

    model = Lazy()
    assert model(torch.randn(T, B, 9)).shape == (T, B, 2)
    total(model(torch.randn(T, B, 9))).backward()


@row("selective checkpoint (create_selective_checkpoint_contexts)")
def _(library: Library) -> None:
    ops = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    for kind in LAYERS:
        model = library.model(kind)
        want = gradients(model, X)

        def contexts() -> Any:
            return checkpoints.create_selective_checkpoint_contexts(ops)

        y = checkpoints.checkpoint(model, X, use_reentrant=False, context_fn=contexts)
        same(torch.autograd.grad(total(y), list(model.parameters())), want)


@row("saved_tensors_hooks see all that is saved")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module, x = library.make(kind), X[0] if kind in CELLS else X
        seen: list[Any] = []

        def pack(t: Tensor, seen: list[Any] = seen) -> Tensor:
            seen.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tensors(module(x.requires_grad_()))
        found = {t.data_ptr() for t in seen}
        assert x.data_ptr() in found, f"{kind}: the input"
        assert all(
            p.data_ptr() in found
            for p in (module.weight_hh if kind in CELLS else module.weight_hh_l0,)
        )


@row("register_multi_grad_hook over the weights of a layer")
def _(library: Library) -> None:
    module = library.make("GRU")
    seen: list[int] = []
    handle = torch.autograd.graph.register_multi_grad_hook(
        list(module.parameters()), lambda grads: seen.append(len(grads))
    )
    total(module(X)).backward()
    handle.remove()
    assert seen == [4]


@row("an in-place change of the input or of a weight before backward: an error, or right")
def _(library: Library) -> None:
    for kind in LAYERS:
        for name in ("input", "weight"):
            module = library.make(kind)
            x = X.clone()
            want = gradients(module, x)
            loss = total(module(x))
            with torch.no_grad():
                (x if name == "input" else module.weight_hh_l0).mul_(2)
            try:
                found = torch.autograd.grad(loss, list(module.parameters()))
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                same(found, want)


@row("profiler with_modules, with_stack")
def _(library: Library) -> None:
    for stack in (False, True):
        module = library.make("LSTM")
        cpu = [ProfilerActivity.CPU]
        with profile(activities=cpu, with_stack=stack, with_modules=not stack) as seen:
            total(module(X)).backward()
        assert seen.key_averages(group_by_stack_n=3 if stack else 0)
