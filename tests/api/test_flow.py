"""Norms of gradients through time against autograd's own, on a loop over single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels
from cases import NAMES, make_call
from flow_layers import F64, LENGTHS, B, H, I, T, build
from helpers import draw, pull, tensors
from rnnkernels import _backends
from rnnkernels._core.call import LayerWeights
from rnnkernels.cells import CELLS
from rnnkernels.diagnostics._flow import Record, _Norms, gradient_flow


def train(model: nn.Module, x: Tensor, **options: Any) -> None:
    pull(tensors(model(x, **options)), F64)


def loop(
    cell: str,
    x: Tensor,
    w: LayerWeights,
    state: list[Tensor],
    d: int,
    reset: Tensor | None = None,
    window: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """One row and direction: every h [R], which keeps its gradient, and the final state."""
    n, G = len(x), CELLS[cell].G
    hs: list[Tensor] = [torch.empty(0)] * n
    for s, t in enumerate(reversed(range(n)) if d else range(n)):
        first = t + 1 if d else t  # of the later side of the boundary that is crossed
        if reset is not None and first < n and reset[first]:
            state = [torch.zeros_like(v) for v in state]
        if window and s > 0 and first % window == 0:
            state = [v.detach() for v in state]
        gx, gh = w.w_ih @ x[t], w.w_hh @ state[0]
        gx, gh = gx if w.b_ih is None else gx + w.b_ih, gh if w.b_hh is None else gh + w.b_hh
        state = list(CELLS[cell].forward(gx.chunk(G), gh.chunk(G), state)[0])
        if w.w_hr is not None:
            state[0] = w.w_hr @ state[0]
        state[0].retain_grad()
        hs[t] = state[0]
    return hs, state


def expected(
    module: Any, x: Tensor, lengths: list[int] | None, reset: Tensor | None
) -> list[Tensor]:
    """The norms of every layer, [T, B, D] each, by ``retain_grad``, under the loss of ``pull``."""
    D, L, R = 1 + module.bidirectional, module.num_layers, module.proj_size or H
    weights = [LayerWeights.from_list(w, bool(module.proj_size)) for w in module.all_weights]
    kept: dict[tuple[int, int, int, int], Tensor] = {}
    ys, finals = [], [torch.zeros(L * D, B, size, dtype=F64) for size in (R, H)]
    finals = finals[: CELLS[module.cell].S]
    for b in range(B):
        y = x[: T if lengths is None else lengths[b], b]
        for layer in range(L):
            outputs = []
            for d in range(D):
                k = layer * D + d
                start = [torch.zeros_like(f[k, b]) for f in finals]
                row = None if reset is None else reset[:, b]
                hs, state = loop(module.cell, y, weights[k], start, d, row)
                kept |= {(layer, t, b, d): h for t, h in enumerate(hs)}
                outputs.append(hs)
                for f, value in zip(finals, state, strict=True):
                    f[k, b] = value
            if outputs[0]:
                y = torch.stack([torch.cat(both) for both in zip(*outputs, strict=True)])
            else:
                y = y.new_zeros(0, D * R)
        ys.append(torch.cat([y, y.new_zeros(T - len(y), D * R)]))
    pull([torch.stack(ys, 1), *finals], F64)
    norms = [torch.zeros(T, B, D, dtype=F64) for _ in range(L)]
    for (layer, t, b, d), h in kept.items():
        norms[layer][t, b, d] = 0.0 if h.grad is None else float(h.grad.norm())
    return norms


@pytest.mark.parametrize("rows", ["", "lengths", "reset", "lengths reset"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", [*NAMES, "lstm projected"])
def test_norms_are_those_of_autograd(
    backend: str, cell: str, layers: int, bidirectional: bool, rows: str
) -> None:
    name, _, projected = cell.partition(" ")
    options = {"proj_size": 2} if projected else {}
    module = build(name, layers, bidirectional=bidirectional, **options)
    x = draw(T, B, I, seed=1, dtype=F64)
    lengths = LENGTHS if "lengths" in rows else None
    reset = draw(T, B, seed=2, dtype=F64) > 0.7 if "reset" in rows else None
    with gradient_flow(module) as flow:
        train(module, x, lengths=lengths, reset=reset)
    wanted = expected(module, x, lengths, reset)
    assert [(r.module, r.layer) for r in flow.records] == [("", k) for k in reversed(range(layers))]
    for record in flow.records:
        norms = wanted[record.layer]
        torch.testing.assert_close(record.norms, norms, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(
            flow.norms(layer=record.layer), norms.norm(dim=1), rtol=1e-10, atol=1e-14
        )
        assert norms.max() > 0.1
        if lengths:
            assert not record.norms[:, 2].any() and not record.norms[5:, 3].any()


@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", NAMES)
def test_norms_inside_windows(backend: str, cell: str, D: int, window: int) -> None:
    call = make_call(cell, T=T, B=B, D=D, lengths=LENGTHS, reset=True)
    found = torch.zeros(T, B, D, dtype=F64)
    call = call._replace(window=window, flow=found)
    result = _backends.run(call.call())
    pull([result.y], F64)

    ys = torch.zeros_like(result.y)
    kept = []
    for b in range(B):
        for d in range(D):
            w = LayerWeights(call.w_ih[d], call.w_hh[d], call.b_ih[d], call.b_hh[d])
            state = [s[d, b] for s in (call.h0, call.c0) if s is not None]
            reset = call.reset[:, b]  # type: ignore[index]
            if LENGTHS[b] and d == 0 and reset[0]:  # the loop knows no boundary at either end
                state = [torch.zeros_like(s) for s in state]
            hs, _ = loop(cell, call.x[: LENGTHS[b], b], w, state, d, reset, window)
            for t, h in enumerate(hs):
                ys[t, b, d * 5 : d * 5 + 5] = h
                kept.append((t, b, d, h))
    pull([ys], F64)
    norms = torch.zeros(T, B, D, dtype=F64)
    for t, b, d, h in kept:
        norms[t, b, d] = float(h.grad.norm())
    torch.testing.assert_close(found, norms, rtol=1e-10, atol=1e-14)


def test_a_batch_of_any_magnitude() -> None:
    module = build("gru")
    for scale in (1e-250, 1.0, 1e250):
        with rnnkernels.use_backend("reference"), gradient_flow(module) as flow:
            module(draw(T, B, I, seed=1, dtype=F64))
        norms = draw(T, B, 1, seed=3, dtype=F64).abs()
        flow._latest["", 0] = Record("", 0, _Norms(norms[None] * scale, None))
        torch.testing.assert_close(flow.norms() / scale, norms.norm(dim=1), rtol=1e-14, atol=0)
    norms[2, 1] = torch.inf
    norms[3, 1] = torch.nan
    flow._latest["", 0] = Record("", 0, _Norms(norms[None], None))
    assert flow.norms()[2].isinf() and flow.norms()[3].isnan() and flow.norms()[4].isfinite()


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (1, 1)])
def test_empty_sequences_and_batches(backend: str, shape: tuple[int, int]) -> None:
    module = build("lstm")
    with gradient_flow(module) as flow:
        module(torch.ones(*shape, I, dtype=F64))[0].sum().backward()
    if flow.records:  # the reference has no h to look at where T is 0
        assert flow.norms().shape == (shape[0], 1)
        assert len(flow.table().splitlines()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(backend: str, dtype: torch.dtype) -> None:
    module, wide = build("lstm"), build("lstm")
    x = draw(T, B, I, seed=1, dtype=dtype)
    with gradient_flow(module.to(dtype)) as flow, gradient_flow(wide) as true:
        train(module, x)
        train(wide, x.double())
    assert flow.norms().dtype == F64
    rtol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(flow.norms(), true.norms(), rtol=rtol, atol=0)
