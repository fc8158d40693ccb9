"""Rows of several lengths and resets inside a sequence, against simpler runs of the same layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels
from cases import CLOSE, NAMES, assert_equals_reference, make_call
from rnnkernels.cells import CELLS

T, B, INPUTS, H = 6, 5, 3, 4
LENGTHS = [4, 6, 1, 3, 6]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two-layers": {"bidirectional": True, "num_layers": 2},
    "projection": {"bidirectional": True, "num_layers": 2, "proj_size": 3},
}
CASES = [
    pytest.param(cell, variant, id=f"{cell}-{name}")
    for cell in NAMES
    for name, variant in VARIANTS.items()
    if CELLS[cell].S > 1 or name != "projection"
]


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_layer(cell: str, backend: str = "cpu", **arguments: Any) -> rnnkernels.nn.base.RNNBase:
    torch.manual_seed(3)
    return rnnkernels.nn.base.RNNBase(
        cell.upper(), INPUTS, H, dtype=torch.float64, backend=backend, **arguments
    )


class Run:
    """One batch with states, ready to be run in several ways; gradients are kept per way."""

    def __init__(self, cell: str, variant: dict[str, Any], seed: int = 1) -> None:
        self.layer = make_layer(cell, **variant)
        gen = torch.Generator().manual_seed(seed)
        layer = self.layer
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        self.x = torch.randn(T, B, INPUTS, generator=gen, dtype=torch.float64)
        widths = [layer.proj_size or H, H][: CELLS[cell].S]
        self.states = [torch.randn(rows, B, w, generator=gen, dtype=torch.float64) for w in widths]
        self.reset = torch.rand(T, B, generator=gen) < 0.3
        self.reset[0, 1] = True

    def hx(self, states: list[Tensor]) -> Any:
        return tuple(states) if len(states) > 1 else states[0]

    def gradients(self, run: Any, x: Tensor | None = None) -> dict[str, Tensor]:
        """y, final states and every gradient of ``run(x, states) -> (y, states)``."""
        x = (self.x if x is None else x).clone().requires_grad_()
        states = [s.clone().requires_grad_() for s in self.states]
        y, finals = run(x, states)
        finals = list(finals) if isinstance(finals, (tuple, list)) else [finals]
        gen = torch.Generator().manual_seed(2)
        loss = sum(
            (o * torch.randn(o.shape, generator=gen, dtype=o.dtype)).sum() for o in (y, *finals)
        )
        assert isinstance(loss, Tensor)
        named = {"x": x, **{f"state {i}": s for i, s in enumerate(states)}}
        named.update(self.layer.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        out = {"y": y, **{f"final {i}": s for i, s in enumerate(finals)}}
        return out | {f"d {name}": g for name, g in zip(named, grads, strict=True)}

    def whole(self, x: Tensor, states: list[Tensor], **options: Any) -> Any:
        return self.layer(x, self.hx(states), **options)

    def packed(self, x: Tensor, states: list[Tensor], lengths: list[int]) -> Any:
        given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        y, finals = self.layer(given, self.hx(states))
        return pad_packed_sequence(y, total_length=T)[0], finals

    def by_pieces(
        self, x: Tensor, states: list[Tensor], lengths: list[int], reset: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Every row alone and every piece between two resets alone, by the plain layer."""
        ys, finals = [], []
        reverse = torch.zeros(states[0].size(0), 1, 1, dtype=torch.bool)
        if self.layer.bidirectional:
            reverse[1::2] = True
        for b, n in enumerate(lengths):
            row = [s[:, b : b + 1] for s in states]
            cuts = [t for t in range(1, n) if reset[t, b]]
            bounds = list(zip([0, *cuts], [*cuts, n], strict=True))
            pieces, last = [x.new_zeros(0, 1, self.y_width)], row
            for start, end in bounds if n else []:
                keep_forward = start == 0 and not reset[0, b]
                keep_reverse = end == n
                keep = torch.where(reverse, keep_reverse, keep_forward)
                y, out = self.layer(
                    x[start:end, b : b + 1], self.hx([s.masked_fill(~keep, 0) for s in row])
                )
                out = list(out) if isinstance(out, tuple) else [out]
                pieces.append(y)
                # The forward direction ends in the last piece, the reverse one in the first.
                last = (
                    out
                    if start == 0
                    else [
                        torch.where(reverse, old, new) for old, new in zip(last, out, strict=True)
                    ]
                )
            y = torch.cat(pieces)
            ys.append(torch.cat([y, y.new_zeros(T - n, 1, self.y_width)]))
            finals.append(last)
        return torch.cat(ys, 1), [torch.cat(parts, 1) for parts in zip(*finals, strict=True)]

    @property
    def y_width(self) -> int:
        return (self.layer.proj_size or H) * (2 if self.layer.bidirectional else 1)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def with_nan_padding(x: Tensor, lengths: list[int]) -> Tensor:
    padding = torch.arange(T)[:, None] >= torch.tensor(lengths)
    return x.masked_fill(padding[:, :, None], math.nan)


@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_lengths_equal_packing(cell: str, variant: dict[str, Any]) -> None:
    """lengths= over NaN padding gives what packing gives, gradients too; dx there is zero."""
    run = Run(cell, variant)
    packed = run.gradients(lambda x, s: run.packed(x, s, LENGTHS))
    padded = with_nan_padding(run.x, LENGTHS)
    got = run.gradients(lambda x, s: run.whole(x, s, lengths=LENGTHS), padded)
    assert_same(got, packed)
    assert not got["d x"][padded.isnan()].any()


@torch.no_grad()
@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_padding_is_not_read(cell: str, variant: dict[str, Any], backend: str) -> None:
    """Without a gradient nothing clears the padding: what stands there changes no bit."""
    run = Run(cell, variant)
    run.layer.backend = backend
    clean, dirty = (
        run.whole(x, run.states, lengths=LENGTHS) for x in (run.x, with_nan_padding(run.x, LENGTHS))
    )
    for a, b in zip((clean[0], *clean[1]), (dirty[0], *dirty[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_reset_equals_pieces(cell: str, variant: dict[str, Any]) -> None:
    """reset= gives what the pieces give one by one, cut at the same places in both directions."""
    run = Run(cell, variant)
    want = run.gradients(lambda x, s: run.by_pieces(x, s, [T] * B, run.reset))
    assert_same(run.gradients(lambda x, s: run.whole(x, s, reset=run.reset)), want)


@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_lengths_and_reset(cell: str, variant: dict[str, Any]) -> None:
    """Both at once, with rows of no steps and resets in the padding, which mean nothing."""
    run, lengths = Run(cell, variant), [4, 6, 0, 1, 5]
    for b, n in enumerate(lengths):
        run.reset[n:, b] = torch.arange(T - n) % 2 == 0
    want = run.gradients(lambda x, s: run.by_pieces(x, s, lengths, run.reset))
    padded = with_nan_padding(run.x, lengths)
    got = run.gradients(lambda x, s: run.whole(x, s, lengths=lengths, reset=run.reset), padded)
    assert_same(got, want)


@pytest.mark.parametrize("cell", NAMES)
def test_reset_of_packed_input(cell: str) -> None:
    """reset has the layout of the padded batch where the input is packed."""
    run = Run(cell, {"bidirectional": True})
    given = pack_padded_sequence(run.x, torch.tensor(LENGTHS), enforce_sorted=False)
    y, _ = run.layer(given, run.hx(run.states), reset=run.reset)
    want, _ = run.whole(run.x, run.states, lengths=LENGTHS, reset=run.reset)
    torch.testing.assert_close(pad_packed_sequence(y, total_length=T)[0], want)


@pytest.mark.parametrize("cell", NAMES)
def test_reset_at_the_start(cell: str) -> None:
    """A reset at t = 0 means a zero initial state, whatever hx holds, and no gradient for it."""
    run = Run(cell, {})
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0] = True
    got = run.gradients(lambda x, s: run.whole(x, s, reset=first))
    zero = run.gradients(lambda x, s: run.whole(x, [v * 0 for v in s]))
    assert_same(got, zero)
    for s in run.states:
        s.fill_(math.nan)
    assert_same(run.gradients(lambda x, s: run.whole(x, s, reset=first)), zero)


@pytest.mark.parametrize("cell", NAMES)
def test_rows_without_steps(cell: str) -> None:
    """Length 0: zero output, the final state is hx, and its NaN reaches no parameter."""
    run, lengths = Run(cell, {"bidirectional": True}), [0, 6, 0, 3, 1]
    clean = run.gradients(lambda x, s: run.whole(x, s, lengths=lengths))
    assert not clean["y"][:, [0, 2]].any()
    for i, s in enumerate(run.states):
        assert torch.equal(clean[f"final {i}"][:, [0, 2]], s[:, [0, 2]])
        s[:, [0, 2]] = math.nan

    def only_others(x: Tensor, s: list[Tensor]) -> Any:
        y, finals = run.whole(x, s, lengths=lengths)
        finals = finals if isinstance(finals, tuple) else [finals]
        return y, [f[:, [1, 3, 4]] for f in finals]

    dirty = run.gradients(only_others)
    for name, value in dirty.items():
        assert value.isfinite().all(), name


def test_forms_of_lengths() -> None:
    """A list, a tuple and tensors of every integer dtype say the same; so does any stride."""
    run = Run("lstm", {"bidirectional": True})
    want = run.whole(run.x, run.states, lengths=torch.tensor(LENGTHS))[0]
    forms: list[Any] = [list(LENGTHS), tuple(LENGTHS), torch.tensor([LENGTHS, LENGTHS]).t()[:, 0]]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        forms.append(torch.tensor(LENGTHS, dtype=dtype))
    for form in forms:
        assert torch.equal(run.whole(run.x, run.states, lengths=form)[0], want)


def test_layouts() -> None:
    """batch_first takes reset [B, T]; unbatched input takes reset [T] and one length."""
    run = Run("gru", {"bidirectional": True})
    want, h_n = run.whole(run.x, run.states, lengths=LENGTHS, reset=run.reset)
    run.layer.batch_first = True
    for reset in (run.reset.t(), run.reset.t().to(torch.uint8)):
        y, h = run.whole(run.x.transpose(0, 1), run.states, lengths=LENGTHS, reset=reset)
        assert torch.equal(y.transpose(0, 1), want) and torch.equal(h, h_n)
    run.layer.batch_first = False
    for b, n in enumerate(LENGTHS):
        for one in ([n], torch.tensor(n), torch.tensor([n])):
            y, h = run.layer(run.x[:, b], run.states[0][:, b], lengths=one, reset=run.reset[:, b])
            torch.testing.assert_close(y, want[:, b])
            torch.testing.assert_close(h, h_n[:, b])


@pytest.mark.parametrize(("cell", "variant"), CASES)
def test_nan_stays_in_its_row(cell: str, variant: dict[str, Any]) -> None:
    """NaN in one row, which the loss ignores, changes no bit of other rows: y, states, dx, dhx."""
    for row in range(B):
        run = Run(cell, variant)
        others = [b for b in range(B) if b != row]

        def ignoring(x: Tensor, s: list[Tensor], run: Run = run, kept: list[int] = others) -> Any:
            y, finals = run.whole(x, s, reset=run.reset)
            finals = finals if isinstance(finals, tuple) else [finals]
            return y[:, kept], [f[:, kept] for f in finals]

        clean = run.gradients(ignoring)
        run.x[3, row, 0] = math.nan
        dirty = run.gradients(ignoring)
        for name, value in dirty.items():
            if name.startswith(("d x", "d state")):
                assert torch.equal(value[:, others], clean[name][:, others]), name
            elif not name.startswith("d "):
                assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("cell", NAMES)
def test_reset_cuts_nan(cell: str) -> None:
    """A state that became NaN ends at the next reset, in both directions."""
    run = Run(cell, {"bidirectional": True})
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2, 1] = reset[4, 1] = True
    clean, _ = run.whole(run.x, run.states, reset=reset)
    run.x[3, 1] = math.nan  # the piece from 2 to 3
    dirty, finals = run.whole(run.x, run.states, reset=reset)
    assert dirty[2:4, 1].isnan().any()
    dirty[2:4, 1] = clean[2:4, 1]
    assert torch.equal(dirty, clean)
    assert all(f.isfinite().all() for f in finals)


@st.composite
def calls(draw: st.DrawFn) -> Any:
    cell = draw(st.sampled_from(NAMES))
    steps, rows = draw(st.integers(0, 7)), draw(st.integers(0, 18))
    hidden = draw(st.sampled_from([1, 2, 7, 8, 9, 16, 17, 33, 65]))
    proj = draw(st.integers(0, hidden - 1)) if CELLS[cell].S > 1 else 0
    masks = st.lists(st.booleans(), min_size=steps * rows, max_size=steps * rows)
    lengths = st.lists(st.integers(0, steps), min_size=rows, max_size=rows)
    some_lengths = draw(st.none() | lengths)
    some_mask = draw(st.none() | masks)
    return make_call(
        cell,
        steps,
        rows,
        draw(st.integers(1, 9)),
        hidden,
        draw(st.integers(1, 2)),
        proj=proj,
        bias=draw(st.sampled_from(["double", "single", "none"])),
        lengths=some_lengths or False,
        reset=torch.tensor(some_mask, dtype=torch.bool).view(steps, rows) if some_mask else False,
        all_states=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(call=calls(), threads=st.integers(1, 4))
def test_any_call_equals_reference(call: Any, threads: int) -> None:
    """Any sizes, lengths, resets, cell, directions, projection and threads: results, gradients."""
    torch.set_num_threads(threads)
    assert_equals_reference(call)
