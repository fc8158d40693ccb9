"""Hooks, modes, memory savers, profilers, optimisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile
from torch.utils import checkpoint as checkpoints
from torch.utils.flop_counter import FlopCounterMode

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

hooks = Section("Hooks, modes and training")
row = hooks.row


def x_of(kind: str = "LSTM") -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*((B, I) if kind in CELLS else (T, B, I)), requires_grad=True)


def only_output(module: nn.Module, after: Any) -> nn.Module:
    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return after(self.module(x)[0])

    return After()


@row("checkpoint, reentrant and not")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = only_output(library.make(kind), lambda y: y), x_of(kind)
        want = gradients(module, x)
        for reentrant in (False, True):
            module.zero_grad()
            total(checkpoints.checkpoint(module, x, use_reentrant=reentrant)).backward()
            same([p.grad for p in module.parameters()], want)


@row("checkpoint with dropout between layers: the same numbers fall out")
def _(library: Library) -> None:
    module, x = library.make("LSTM", num_layers=2, dropout=0.5), x_of()
    torch.manual_seed(2)
    want = gradients(module, x)
    torch.manual_seed(2)
    loss = total(checkpoints.checkpoint(module, x, use_reentrant=False))
    same(torch.autograd.grad(loss, list(module.parameters())), want)


@row("save_on_cpu, saved_tensors_hooks")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module, x = library.make(kind), x_of(kind)
        want = gradients(module, x)
        seen: list[int] = []

        def pack(t: Tensor, seen: list[int] = seen) -> Any:
            seen.append(t.numel())
            return t.detach().numpy().copy()

        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            same(gradients(module, x), want)
        assert seen
        with torch.autograd.graph.save_on_cpu():
            same(gradients(module, x), want)


@row("forward hooks, full backward hooks, pre-hooks")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module = library.make(kind)
        seen: list[str] = []
        module.register_forward_pre_hook(lambda *_, seen=seen: seen.append("before"))
        module.register_forward_hook(lambda *_, seen=seen: seen.append("after"))
        module.register_full_backward_pre_hook(lambda *_, seen=seen: seen.append("back"))
        module.register_full_backward_hook(lambda *_, seen=seen: seen.append("done"))
        first = tensors(module(x_of(kind)))[0]
        first.sum().backward()
        assert seen == ["before", "after", "back", "done"], seen


@row("retain_grad on outputs, retain_graph=True twice, hooks of tensors")
def _(library: Library) -> None:
    module, x = library.make("GRU"), x_of("GRU")
    seen: list[Tensor] = []
    y, h_n = module(x)
    y.retain_grad()
    y.register_hook(seen.append)
    loss = total((y, h_n))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in module.parameters()]
    loss.backward()
    same([p.grad for p in module.parameters()], [2 * g for g in once])
    assert y.grad is not None and len(seen) == 2


@row("an in-place change of an output before backward")
def _(library: Library) -> None:
    module, x = library.make("LSTM"), x_of()
    want = gradients(only_output(module, lambda y: y.relu()), x)
    same(gradients(only_output(module, lambda y: y.relu_()), x), want)


@row("anomaly mode: a NaN in backward is an error with the forward's line")
def _(library: Library) -> None:
    module, x = library.make("LSTM"), x_of()
    with torch.autograd.detect_anomaly(check_nan=True):
        y = module(x)[0]
        try:
            (y.sum() * float("nan")).backward()
        except RuntimeError as error:
            assert "nan" in str(error)
        else:
            raise AssertionError("no error")


@row("profiler: the ops of a layer have names")
def _(library: Library) -> None:
    module, x = library.make("LSTM"), x_of()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        module(x)
    names = {event.key for event in seen.key_averages()}
    assert names & {"rnnkernels::sequence_forward", "aten::lstm", "aten::mkldnn_rnn_layer"}, names


@row(
    "profiler with_flops counts a layer's forward",
    exception="the profiler counts a list of torch's own operators, in C++, to which nothing can "
    "be added. FlopCounterMode counts those of rnnkernels.",
)
def _(library: Library) -> None:
    module = library.make("GRU")
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        module(x_of("GRU"))
    counted = sum(event.flops or 0 for event in seen.key_averages())
    assert counted >= 2 * T * B * module.weight_ih_l0.numel(), counted


@row("FlopCounterMode counts forward and backward")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = library.make(kind), x_of(kind)
        weights = module.weight_ih_l0.numel() + module.weight_hh_l0.numel()
        with FlopCounterMode(display=False) as forward:
            y = module(x)[0]
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert forward.get_total_flops() == 2 * T * B * weights, forward.get_total_flops()
        assert backward.get_total_flops() > forward.get_total_flops()


@row("use_deterministic_algorithms, fill_uninitialized_memory")
def _(library: Library) -> None:
    module, x = library.make("LSTM"), x_of()
    want = gradients(module, x)
    torch.use_deterministic_algorithms(True)
    try:
        same(gradients(module, x), want)
    finally:
        torch.use_deterministic_algorithms(False)


@row("inference_mode; an inference tensor as hx in training")
def _(library: Library) -> None:
    module, x = library.make("GRU"), x_of("GRU")
    with torch.inference_mode():
        h_n = module(x)[1]
    assert h_n.is_inference()
    total(module(x, h_n.clone())).backward()


@row("frozen weights, only x, only biases, only hx want a gradient")
def _(library: Library) -> None:
    module, x = library.make("GRU"), x_of("GRU")
    wanted = dict(zip((n for n, _ in module.named_parameters()), gradients(module, x), strict=True))
    for name, p in module.named_parameters():
        module.requires_grad_(False)
        p.requires_grad_()
        same(torch.autograd.grad(total(module(x.detach())), p), wanted[name])
    module.requires_grad_(False)
    total(module(x)).backward()
    assert x.grad is not None
    hx = torch.zeros(1, B, 6, requires_grad=True)
    total(module(x.detach(), hx)).backward()
    assert hx.grad is not None


@row("Adam foreach and fused, SGD fused, LBFGS, clip_grad_norm_")
def _(library: Library) -> None:
    for build in (
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.SGD(p, 0.1, fused=True),
        lambda p: torch.optim.LBFGS(p, max_iter=2),
    ):
        module, x = library.model(), x_of()
        optimizer = build(module.parameters())

        def closure(module: Any = module, x: Tensor = x, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = total(module(x))
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            return loss

        before = float(closure())
        for _ in range(3):
            optimizer.step(closure)
        assert float(closure()) < before


@row("an optimiser step inside backward (post_accumulate_grad_hook)")
def _(library: Library) -> None:
    module = library.model()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in module.parameters()}
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = [p.detach().clone() for p in module.parameters()]
    total(module(x_of())).backward()
    assert all((p != q).any() for p, q in zip(module.parameters(), before, strict=True))


@row("AveragedModel")
def _(library: Library) -> None:
    module = library.model()
    average = AveragedModel(module)
    average.update_parameters(module)
    same(average(x_of()), module(x_of()))


@row("PackedSequence: pack_sequence, pack_padded_sequence, pad_packed_sequence")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, x = library.make(kind), x_of(kind)
        y, h_n = module(pack_padded_sequence(x, torch.tensor([2, T, 1]), enforce_sorted=False))
        padded, _ = pad_packed_sequence(y, total_length=T)
        one, h_one = module(x[:2, :1])
        same(padded[:2, 0], one[:, 0])
        same([t[:, 0] for t in tensors(h_n)], [t[:, 0] for t in tensors(h_one)])
        module(pack_sequence([x[:3, 0], x[:2, 1]]))


@row("non-contiguous, expanded and transposed inputs and states")
def _(library: Library) -> None:
    for kind in LAYERS:
        module = library.make(kind)
        wide = torch.randn(B, T, 2 * I)[:, :, ::2].transpose(0, 1)
        hx = torch.randn(1, 1, 6).expand(1, B, 6)
        state = (hx, hx) if kind == "LSTM" else hx
        copies = tuple(t.contiguous() for t in tensors(state))
        same(module(wide, state), module(wide.contiguous(), copies if len(copies) > 1 else hx + 0))


@row("expanded gradients: y.sum().backward()")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module = library.make(kind)
        found = tensors(module(x_of(kind)))
        torch.autograd.backward([t.sum() for t in found])
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
