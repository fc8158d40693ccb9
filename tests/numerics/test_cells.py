"""The two statements of every cell, in torch and in C++, against each other and against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rnnkernels
from cases import CLOSE, NAMES, assert_equals_reference, make_call, random_like
from op_calls import backward, forward
from rnnkernels import _C
from rnnkernels._core.call import Layer
from rnnkernels.cells import CELLS, Cell


def random_values(count: int, n: int = 50) -> list[Tensor]:
    return [torch.randn(n, dtype=torch.float64).mul(2).requires_grad_() for _ in range(count)]


def test_table() -> None:
    """Names, order and sizes are the same in both languages."""
    ours = [
        {
            "name": c.name,
            "gates": c.gates,
            "G": c.G,
            "S": c.S,
            "K": c.K,
            "A": c.A,
            "reads_h": c.reads_h,
        }
        for c in CELLS.values()
    ]
    assert _C.cell_table() == ours
    assert list(CELLS) == [c.name for c in CELLS.values()]


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    """Counts of states and saved values, and gradients that differ for the last A gates alone."""
    cell = CELLS[name]
    prev = random_values(cell.S)
    next, saved = cell.forward(random_values(cell.G), random_values(cell.G), prev)
    assert len(next) == cell.S and len(saved) == cell.K
    dgx, dgh, dprev = cell.backward(saved, prev, next, random_values(cell.S))
    assert len(dgx) == len(dgh) == cell.G and len(dprev) == cell.S
    same = [torch.equal(a, b) for a, b in zip(dgx, dgh, strict=True)]
    assert same == [True] * (cell.G - cell.A) + [False] * cell.A


@pytest.mark.parametrize("name", NAMES)
def test_backward_is_autograd(name: str) -> None:
    """The written backward equals autograd of the written forward, in every slot."""
    cell = CELLS[name]
    gx, gh, prev = random_values(cell.G), random_values(cell.G), random_values(cell.S)
    next, saved = cell.forward(gx, gh, prev)
    dnext = [d.detach() for d in random_values(cell.S)]
    expected = torch.autograd.grad(next, gx + gh + prev, dnext, materialize_grads=True)
    dgx, dgh, dprev = cell.backward(saved, prev, next, dnext)
    for got, want in zip([*dgx, *dgh, *dprev], expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def one_step(cell: Cell, gx: Tensor, gh: Tensor, h0: Tensor, c0: Tensor | None) -> list[Tensor]:
    """Outputs of the op for one step whose gates are given: gx [B, G*H], gh [G*H], h0 [B, H]."""
    rows, H = gx.size(1), h0.size(1)
    eye = torch.eye(rows, dtype=gx.dtype)
    w_hh = gx.new_zeros(rows, H)
    c0 = None if c0 is None else c0[None]
    b_ih = torch.zeros_like(gh)
    states = h0[None], c0
    call = Layer(cell.name, gx[None], [eye], [w_hh], [b_ih], [gh], [], *states, None, None, True)
    return list(forward(call))


@pytest.mark.parametrize("name", NAMES)
def test_cpp_equals_torch_in_one_step(name: str) -> None:
    """Without W_hh a step of the op is the cell alone: next, saved values and gradients."""
    cell, B, H = CELLS[name], 6, 11
    gx, gh = (torch.randn(n, cell.G * H, dtype=torch.float64) for n in (B, 1))
    h0, c0 = torch.randn(2, B, H, dtype=torch.float64)
    prev = [h0, c0][: cell.S]
    next, saved = cell.forward(gx.chunk(cell.G, -1), gh.chunk(cell.G, -1), prev)
    out = one_step(cell, gx, gh[0], h0, c0 if cell.S > 1 else None)
    y, h_n, c_n, c, _, kept = out
    for got, want in [(y[0], next[0]), (h_n[0], next[0])]:
        torch.testing.assert_close(got, want, **CLOSE)
    if cell.S > 1:
        torch.testing.assert_close(c_n[0], next[1], **CLOSE)
        torch.testing.assert_close(c[0, :, 0], next[1], **CLOSE)
    if cell.K:
        want = torch.cat([s.expand(B, H) for s in saved], -1)
        torch.testing.assert_close(kept[0, :, 0], want, **CLOSE)

    dnext = random_like(next)
    dgx, dgh, dprev = cell.backward(saved, prev, next, dnext)
    call = make_call(name, T=1, B=B, H=H, grad=False)._replace(
        w_hh=[gx.new_zeros(cell.G * H, H)], h0=h0[None], c0=c0[None] if cell.S > 1 else None
    )
    dc_n = dnext[1][None] if cell.S > 1 else None
    douts = [dnext[0][None], None, dc_n, None]
    dgates, dh0, dc0, _, _ = backward(call, out, douts)
    want = torch.cat([*dgx, *dgh[cell.G - cell.A :]], -1)
    torch.testing.assert_close(dgates[0, :, 0], want, **CLOSE)
    torch.testing.assert_close(dh0[0], dprev[0], **CLOSE)
    if cell.S > 1:
        torch.testing.assert_close(dc0[0], dprev[1], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_reads_h(name: str) -> None:
    """Backward of one step reads no h that it gave, in either language, where a cell says so."""
    cell = CELLS[name]
    gx, gh, prev, dnext = (random_values(n) for n in (cell.G, cell.G, cell.S, cell.S))
    next, saved = cell.forward(gx, gh, prev)
    found = [cell.backward(saved, prev, [h, *next[1:]], dnext)[0] for h in (next[0], 1 - next[0])]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) != cell.reads_h

    call = make_call(name, T=1, B=6, H=11, grad=False)
    outs = list(forward(call))
    douts = [*random_like(outs[:2]), None, None]
    want = backward(call, outs, douts)
    outs[0] = 1 - outs[0]
    got = backward(call, outs, douts)
    same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert same != cell.reads_h


@pytest.mark.parametrize("name", NAMES)
def test_cpp_equals_torch_over_steps(name: str) -> None:
    assert_equals_reference(make_call(name, T=6, B=3, H=7, D=2))


EXTREMES = [math.inf, -math.inf, math.nan, 1e4, -1e4, 88.5, -88.5, 1e-40, -1e-40, 0.0, -0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_extreme_values(name: str, dtype: torch.dtype) -> None:
    """Every extreme in every gate, one row each: saturates as torch does, and NaN stays in its row.

    A state is a sum of terms of size 1, each rounded to 2^-24 of it: the absolute tolerance.
    """
    exact = {"rtol": 1e-5, "atol": 1e-37 if dtype == torch.float64 else 2e-7, "equal_nan": True}
    cell, H = CELLS[name], 3
    places = [[g] for g in range(cell.G)] + [list(range(cell.G))]
    rows = [(value, place) for value in EXTREMES for place in places]
    gx = torch.randn(len(rows), cell.G, H, dtype=dtype)
    for row, (value, place) in enumerate(rows):
        gx[row, place] = value
    gx, gh = gx.flatten(1), torch.zeros(cell.G * H, dtype=dtype)
    h0, c0 = torch.randn(2, len(rows), H, dtype=dtype)
    # A product would spread inf and NaN over all gates; a bias takes any value to its own.
    out = [
        one_step_of_row(cell, gx[b], gh, h0[b], c0[b] if cell.S > 1 else None)
        for b in range(len(rows))
    ]
    next, _ = cell.forward(gx.chunk(cell.G, -1), gh.chunk(cell.G, -1), [h0, c0][: cell.S])
    h = torch.stack([o[0] for o in out])
    torch.testing.assert_close(h, next[0], **exact)
    if cell.S > 1:
        c = torch.stack([o[1] for o in out])
        torch.testing.assert_close(c, next[1], **exact)


def one_step_of_row(
    cell: Cell, gx: Tensor, gh: Tensor, h0: Tensor, c0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h and c after a step of one row whose input gates are the bias, which takes any value."""
    rows, H = gx.size(0), h0.size(0)
    x, w_ih, w_hh = gx.new_zeros(1, 1, 1), gx.new_zeros(rows, 1), gx.new_zeros(rows, H)
    c0 = None if c0 is None else c0.view(1, 1, H)
    states = h0.view(1, 1, H), c0
    call = Layer(cell.name, x, [w_ih], [w_hh], [gx], [gh], [], *states, None, None)
    _, h, c, *_ = forward(call, save=False)
    return h[0, 0], c[0, 0] if cell.S > 1 else c


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_row(name: str, T: int) -> None:
    """A NaN in x or in a state of one row changes no bit of the others, forward and backward."""
    for where in ("x", "h0", "c0"):
        call = make_call(name, T=T, B=7, H=19, D=2, grad=False)
        if getattr(call, where) is None:
            continue
        clean = forward(call)
        getattr(call, where)[:, 3] = math.nan
        dirty = forward(call)
        douts: list[Tensor | None] = list(random_like(clean[:4]))
        if call.c0 is None:
            douts[2:] = [None, None]
        clean_back = backward(call, clean, douts)
        dirty_back = backward(call, dirty, douts)
        others = [b for b in range(7) if b != 3]
        assert dirty[0][:, 3].isnan().any()
        for a, b in zip((*clean, *clean_back[:3]), (*dirty, *dirty_back[:3]), strict=True):
            if a.numel():
                assert torch.equal(a[:, others], b[:, others])


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_autocast_leaves_float64(kind: str) -> None:
    """Autocast casts no float64, in our cells as in torch's."""
    x = torch.randn(2, 3, dtype=torch.float64)
    ours, theirs = (getattr(m, kind)(3, 4, dtype=torch.float64) for m in (rnnkernels, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(ours(x), theirs(x), strict=True):
            assert got.dtype == want.dtype == torch.float64
            torch.testing.assert_close(got, want)


def activation(name: str, x: Tensor) -> Tensor:
    """The values of the function of a cell of one gate, by the kernels: a bias takes any value."""
    width = 1 << 9
    w, h = torch.zeros(width, 1), torch.zeros(1, 1, width)
    w_hh, b_hh = torch.zeros(width, width), torch.zeros(width)
    parts = []
    for b in torch.cat([x, x.new_zeros(-len(x) % width)]).view(-1, width):
        call = Layer(name, torch.zeros(1, 1, 1), [w], [w_hh], [b], [b_hh], [], h, None, None, None)
        parts.append(forward(call, save=False)[0].flatten())
    return torch.cat(parts)[: len(x)]


def ulps(got: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of float32."""
    near = exact.float()
    unit = (torch.nextafter(near.abs(), torch.tensor(math.inf)) - near.abs()).double()
    return float(((got.double() - exact).abs() / unit).max())


@pytest.mark.parametrize(
    ("name", "exact", "bound"),
    [("rnn_sigmoid", torch.sigmoid, 3.0), ("rnn_tanh", torch.tanh, 4.0)],
    ids=["sigmoid", "tanh"],
)
def test_activations_are_accurate(name: str, exact: object, bound: float) -> None:
    """Accuracy of float32 sigmoid and tanh over all of its range, in units of the last place: at
    most 2.8 and 3.7 were seen. sigmoid(x) is 0 where 1 + e^-x is no number of float32."""
    wide, near = torch.linspace(-80, 80, 500_000), torch.linspace(-2, 2, 200_000)
    edge = torch.linspace(-89, -87, 10_000)
    bits = torch.arange(0, 0x7F800000, 41_001, dtype=torch.int32).view(torch.float32)
    grid = torch.cat([wide, near, edge, bits, -bits])
    y = activation(name, grid)
    gone = grid.double().neg().exp() > torch.finfo(torch.float32).max
    if name == "rnn_sigmoid":
        assert gone.any() and not y[gone].any()
        grid, y = grid[~gone], y[~gone]
    assert ulps(y, exact(grid.double())) <= bound  # type: ignore[operator]


@pytest.mark.parametrize(("name", "least"), [("rnn_sigmoid", 0.0), ("rnn_tanh", -1.0)])
def test_activations_are_monotone(name: str, least: float) -> None:
    """Up to their accuracy; and they never leave their range, which a rounding might."""
    x = torch.linspace(-95, 95, 1_000_000)
    y = activation(name, x)
    falls = (y[:-1] - y[1:]).clamp(min=0) / y[1:].abs().clamp(min=1e-37)
    assert falls.max() <= 2**-21
    assert y.min() == least and y.max() == 1


@pytest.mark.parametrize("name", ["rnn_sigmoid", "rnn_tanh"])
def test_activations_saturate(name: str) -> None:
    """Far out they are 0, 1 or -1, and nothing near it: what a gate is shut to may be infinite."""
    far = torch.tensor([88.0, 104.0, 1e4, 3.4e38, math.inf])
    x = torch.cat([far, -far, torch.tensor([math.nan, 0.0, -0.0])])
    y = one_step_of_row(CELLS[name], x, torch.zeros(len(x)), torch.zeros(len(x)), None)[0]
    exact = torch.sigmoid(x) if name == "rnn_sigmoid" else torch.tanh(x)
    far_out = [i for i, v in enumerate(x) if v != -88]
    assert torch.equal(y[far_out].nan_to_num(nan=7), exact[far_out].nan_to_num(nan=7))
    torch.testing.assert_close(y[x == -88], exact[x == -88], rtol=1e-6, atol=0)
