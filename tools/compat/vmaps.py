"""torch.vmap, alone and with other transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from compat.registry import LAYERS, Library, Section, same, tensors
from compat.transforms import DOUBLE, called, small, weights, with_each

vmaps = Section("torch.vmap")
row = vmaps.row


def lanes(x: Tensor) -> Tensor:
    return torch.stack([x, 2 * x, -x])


def ensemble(module: nn.Module) -> dict[str, Tensor]:
    """Three sets of weights."""
    return {name: lanes(p) for name, p in weights(module).items()}


def member(stacked: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: p[i] for name, p in stacked.items()}


def loss(module: nn.Module, parameters: Any, x: Tensor) -> Tensor:
    return called(module, parameters, x).square().sum()


def listed(gradients: dict[str, Tensor]) -> list[Tensor]:
    return list(gradients.values())


@row("over inputs")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        found = vmap(lambda x: module(x)[0])(lanes(x))
        same(found, torch.stack([module(one)[0] for one in lanes(x)]))

    with_each(library, check)


@row("over the batch of calls that have none")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        found = vmap(lambda x: module(x)[0], in_dims=1, out_dims=1)(x)
        same(found, module(x)[0])

    with_each(library, check)


@row("over stacked weights")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        stacked = ensemble(module)
        found = vmap(lambda p: called(module, p, x))(stacked)
        same(found, torch.stack([called(module, member(stacked, i), x) for i in range(3)]))

    with_each(library, check)


@row("over weights and inputs")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        stacked, each = ensemble(module), lanes(x)
        found = vmap(lambda p, x: called(module, p, x))(stacked, each)
        same(found, torch.stack([called(module, member(stacked, i), each[i]) for i in range(3)]))

    with_each(library, check)


@row("over states alone")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        hx = torch.randn(4, 1, 2, 3, dtype=DOUBLE)

        def run(h: Tensor, module: nn.Module = module, x: Tensor = x) -> Any:
            return module(x, (h, h) if has_c(module) else h)[0]

        same(vmap(run)(hx), torch.stack([run(h) for h in hx]))


def has_c(module: nn.Module) -> bool:
    return getattr(module, "mode", "") == "LSTM"


@row("2 layers, both directions, batch_first")
def _(library: Library) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    for kind in LAYERS:
        module = library.make(kind, 2, 3, dtype=DOUBLE, **options)
        x = torch.randn(4, 2, 3, 2, dtype=DOUBLE)
        found = vmap(lambda x, m=module: tuple(tensors(m(x))))(x)
        each = [tensors(module(one)) for one in x]
        same(found, [torch.stack(parts) for parts in zip(*each, strict=True)])


@row("with dropout between layers, randomness='different'")
def _(library: Library) -> None:
    for kind in LAYERS:
        module = library.make(kind, 2, 8, num_layers=2, dropout=0.5, dtype=DOUBLE)
        x = torch.randn(3, 2, 2, dtype=DOUBLE)
        found = vmap(lambda x, m=module: m(x)[0], randomness="different")(torch.stack([x, x]))
        assert found.isfinite().all() and (found[0] != found[1]).any()


@row("lengths and resets of each lane", ours_only=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        xs, lengths = lanes(x), torch.tensor([[3, 1], [0, 2], [2, 3]])
        reset = torch.rand(3, 3, 2) < 0.4

        def run(x: Tensor, n: Tensor, r: Tensor, module: nn.Module = module) -> Any:
            return module(x, lengths=n, reset=r)[0]

        want = [run(*one) for one in zip(xs, lengths, reset, strict=True)]
        same(vmap(run)(xs, lengths, reset), torch.stack(want))


@row("vmap(grad): gradients of each sample")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        p = weights(module)
        one = grad(lambda p, x: loss(module, p, x))
        found = vmap(one, in_dims=(None, 0))(p, lanes(x))
        want = [one(p, x) for x in lanes(x)]
        same(listed(found), [torch.stack([w[n] for w in want]) for n in found])

    with_each(library, check)


@row("grad(vmap): an ensemble trains")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        stacked = ensemble(module)
        found = grad(lambda p: vmap(lambda p: loss(module, p, x))(p).sum())(stacked)
        want = [grad(lambda p: loss(module, p, x))(member(stacked, i)) for i in range(3)]
        same(listed(found), [torch.stack([w[n] for w in want]) for n in found])

    with_each(library, check)


@row("backward through a vmap, into weights that ask for a gradient")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        leaves = list(module.parameters())
        found = torch.autograd.grad(vmap(lambda x: module(x)[0])(lanes(x)).square().sum(), leaves)
        losses = [module(one)[0].square().sum() for one in lanes(x)]
        same(found, torch.autograd.grad(torch.stack(losses).sum(), leaves))

    with_each(library, check)


@row("vmap of vmap")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        many = torch.stack([lanes(x), lanes(x) + 1])
        found = vmap(vmap(lambda x: module(x)[0]))(many)
        same(found, torch.stack([torch.stack([module(one)[0] for one in row]) for row in many]))

    with_each(library, check)


@row("chunk_size=2")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        found = vmap(lambda x: module(x)[0], chunk_size=2)(lanes(x))
        same(found, torch.stack([module(one)[0] for one in lanes(x)]))

    with_each(library, check)


@row("vmap(jvp)")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        def pushed(v: Tensor) -> Tensor:
            result: Tensor = jvp(lambda x: module(x)[0], (x,), (v,))[1]
            return result

        same(vmap(pushed)(lanes(x)), torch.stack([pushed(v) for v in lanes(x)]))

    with_each(library, check)


@row("stack_module_state, functional_call")
def _(library: Library) -> None:
    models = [library.model("GRU").double() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(2)
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 2, 4, dtype=DOUBLE)

    def run(p: Any, b: Any) -> Any:
        return functional_call(models[0], (p, b), (x,))

    same(vmap(run)(parameters, buffers), torch.stack([model(x) for model in models]))


@row("vmap, jvp and hessian on the backend 'reference'", ours_only=True)
def _(library: Library) -> None:
    with library.module.use_backend("reference"):
        for kind in LAYERS:
            module, x = small(library, kind)
            same(vmap(lambda x, m=module: m(x)[0])(lanes(x))[0], module(x)[0])
            torch.func.jvp(lambda x, m=module: m(x)[0], (x,), (x,))
            torch.func.hessian(lambda x, m=module: m(x)[0].square().sum())(x)
