"""Derivatives of any order, and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call

from compat.registry import LAYERS, B, I, Library, Section, T, same, total

autograd = Section("Autograd")
func = Section("torch.func")
row = autograd.row
DOUBLE = torch.float64


def small(library: Library, kind: str, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, Tensor]:
    module: nn.Module = library.make(kind, 2, 3, dtype=dtype)
    return module, torch.randn(3, 2, 2, dtype=dtype)


def output_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The output [T, B, H] as a function of the input [T, B, I]."""

    def output(x: Tensor) -> Tensor:
        result: Tensor = module(x)[0]
        return result

    return output


def loss_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: total(module(x)).to(x.dtype)


@row("gradcheck, gradgradcheck in float64")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        x.requires_grad_()
        inputs = (x, *module.parameters())
        assert torch.autograd.gradcheck(lambda x, *_, m=module: m(x)[0], inputs)
        assert torch.autograd.gradgradcheck(lambda x, *_, m=module: m(x)[0], inputs)


@row("autograd.functional: hvp, vhp, hessian, jacobian")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        loss, v = loss_of(module), torch.randn_like(x)
        hessian = functional.hessian(loss, x).reshape(x.numel(), -1)
        for product in (functional.hvp, functional.vhp):
            same(product(loss, x, v)[1].flatten(), hessian @ v.flatten(), 1e-4)
        functional.jacobian(lambda x, m=module: m(x)[0], x)


@row("jacobian(vectorize=True), grad(is_grads_batched=True)")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        f = output_of(module)
        same(functional.jacobian(f, x, vectorize=True), functional.jacobian(f, x))
        x.requires_grad_()
        y = f(x)
        batch = torch.randn(4, *y.shape, dtype=y.dtype)
        (found,) = torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
        want = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in batch]
        same(found, torch.stack(want))


@row("jacobian(strategy='forward-mode', vectorize=True)")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        f = output_of(module)
        found = functional.jacobian(f, x, vectorize=True, strategy="forward-mode")
        same(found, functional.jacobian(f, x))


@row("a step with a gradient penalty, float32")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind, torch.float32)
        x.requires_grad_()
        (slope,) = torch.autograd.grad(total(module(x)), x, create_graph=True)
        (slope.flatten(1).norm(dim=1) - 1).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@row("MAML: two inner steps, a gradient through both")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        parameters: dict[str, Any] = dict(module.named_parameters())
        fast = parameters
        for _ in range(2):
            loss = called(module, fast, x).square().sum()
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), slopes, strict=True)}
        loss = called(module, fast, x).square().sum()
        found = torch.autograd.grad(loss, list(parameters.values()))
        assert all(g.isfinite().all() and g.any() for g in found)


@row("a third derivative")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = small(library, kind)
        x.requires_grad_()
        value = module(x)[0].square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        assert value > 0


@row("one module called twice in a graph; tied weights")
def _(library: Library) -> None:
    one, two = library.make("GRU", I, I), library.make("GRU", I, I)
    two.weight_hh_l0 = one.weight_hh_l0
    x = torch.randn(T, B, I)
    total(two(one(one(x)[0])[0])).backward()
    assert one.weight_hh_l0.grad is two.weight_hh_l0.grad is not None


@row("grad_clip, truncate, lengths, reset under a second derivative", ours_only=True)
def _(library: Library) -> None:
    reset = torch.tensor([[False, True], [True, False], [False, False]])
    for option in ({"grad_clip": 0.1}, {"truncate": 2}, {"lengths": [3, 1]}, {"reset": reset}):
        for kind in LAYERS:
            module, x = small(library, kind)
            x.requires_grad_()
            y = module(x, **option)[0]
            (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found = torch.autograd.grad(slope.square().sum(), list(module.parameters()))
            assert all(g.isfinite().all() for g in found) and any(g.any() for g in found)


row = func.row


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def called(module: nn.Module, parameters: Any, x: Tensor) -> Tensor:
    result: Tensor = functional_call(module, parameters, (x,))[0]
    return result


def with_each(library: Library, check: Callable[[nn.Module, Tensor], None]) -> None:
    for kind in LAYERS:
        check(*small(library, kind))


@row("grad, vjp")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        def loss(x: Tensor) -> Tensor:
            result: Tensor = module(x)[0].square().sum()
            return result

        leaf = x.clone().requires_grad_()
        want = torch.autograd.grad(loss(leaf), leaf)
        same(torch.func.grad(loss)(x), want)
        y, pull, *_ = torch.func.vjp(lambda x: module(x)[0], x)
        same(pull(2 * y), want)

    with_each(library, check)


@row("jacrev, of inputs and of weights")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        want = functional.jacobian(lambda x: module(x)[0], x)
        same(torch.func.jacrev(lambda x: module(x)[0])(x), want)
        torch.func.jacrev(lambda p: called(module, p, x))(weights(module))

    with_each(library, check)


@row("jacfwd")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        want = functional.jacobian(lambda x: module(x)[0], x)
        same(torch.func.jacfwd(lambda x: module(x)[0])(x), want)

    with_each(library, check)


@row("jvp, of inputs and of weights")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        jacobian = functional.jacobian(lambda x: module(x)[0], x).flatten(-3)
        v = torch.randn_like(x)
        found = torch.func.jvp(lambda x: module(x)[0], (x,), (v,))[1]
        same(found, jacobian @ v.flatten())
        p = weights(module)
        torch.func.jvp(lambda p: called(module, p, x), (p,), (p,))

    with_each(library, check)


@row("dual numbers (torch.autograd.forward_ad), of inputs and of weights")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, torch.ones_like(x)))[0]
            assert forward_ad.unpack_dual(y).tangent is not None
            duals = {n: forward_ad.make_dual(p, p) for n, p in weights(module).items()}
            y = called(module, duals, x)
            assert forward_ad.unpack_dual(y).tangent is not None

    with_each(library, check)


@row("hessian")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        want = functional.hessian(loss_of(module), x)
        same(torch.func.hessian(loss_of(module))(x), want, 1e-4)

    with_each(library, check)


@row("Hessian-vector products: reverse over reverse, forward over reverse")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        loss, v = loss_of(module), torch.randn_like(x)
        want = functional.hvp(loss, x, v)[1]
        slope = torch.func.grad(loss)
        same(torch.func.grad(lambda x: (slope(x) * v).sum())(x), want, 1e-4)
        same(torch.func.jvp(slope, (x,), (v,))[1], want, 1e-4)

    with_each(library, check)


@row("linearize")
def _(library: Library) -> None:
    def check(module: nn.Module, x: Tensor) -> None:
        v = torch.randn_like(x)
        y, pushed = torch.func.linearize(lambda x: module(x)[0], x)
        same(y, module(x)[0])
        same(pushed(v), torch.func.jvp(lambda x: module(x)[0], (x,), (v,))[1])

    with_each(library, check)


@row("functionalize")
def _(library: Library) -> None:
    with_each(library, lambda m, x: same(torch.func.functionalize(m)(x), m(x)))
