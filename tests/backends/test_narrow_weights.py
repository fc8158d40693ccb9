"""Packed weights in bfloat16, float16 and int8: the results of the float32 layer whose weights are
rounded to that type, for whom it was asked for, and for nobody else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import same_bits
from packed import B, H, I, T, call, drawn, kept, unseen
from rnnkernels import serving
from rnnkernels.testing import rounded

pytestmark = pytest.mark.usefixtures("nothing_packed")

DTYPES = serving.WEIGHT_DTYPES
LAYERS = {
    "LSTM": lambda: rk.LSTM(I, H),
    "GRU": lambda: rk.GRU(I, H),
    "RNN": lambda: rk.RNN(I, H),
    "relu": lambda: rk.RNN(I, H, nonlinearity="relu", bias=False),
    "stack": lambda: rk.GRU(I, H, num_layers=3),
    "bidirectional": lambda: rk.LSTM(I, H, bidirectional=True, batch_first=True),
    "projection": lambda: rk.LSTM(I, H, proj_size=21, num_layers=2, bidirectional=True),
    "wide": lambda: rk.LSTM(I, 150, proj_size=70),
}


def with_rounded_weights(layer: Any, dtype: torch.dtype) -> Any:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for w in other.parameters():
            if w.dim() == 2:
                w.copy_(rounded(w, dtype))
    return other


def check(layer: Any, dtype: torch.dtype, *args: Any, **options: Any) -> list[Tensor]:
    """That the layer runs weights of this type, and gives what it should."""

    def of(module: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            y, state = module(*args, **options)
        return [y, *(state if isinstance(state, tuple) else (state,))]

    found, like = of(layer), of(with_rounded_weights(layer, dtype))
    torch.testing.assert_close(found, like, rtol=1e-5, atol=2e-6)
    if dtype is not torch.int8:  # the same factors, in the same order
        assert same_bits(found, like)
    assert not same_bits(found, of(copy.deepcopy(layer)))
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_results_are_those_of_rounded_weights(name: str, dtype: torch.dtype, threads: int) -> None:
    layer = LAYERS[name]().eval()
    took = serving.prepack(layer, weight_dtype=dtype)
    assert kept(layer) and took == serving.packed_bytes() == serving.packed_bytes(layer)
    for rows in (1, 4, 9, 40):
        shape = (rows, 30, I) if layer.batch_first else (30, rows, I)
        check(layer, dtype, torch.randn(shape))
    assert kept(layer) and took == serving.packed_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "projection"])
def test_lengths_resets_and_states(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().eval()
    serving.prepack(layer, weight_dtype=dtype)
    x, h0 = torch.randn(7, 3, I), torch.randn(layer.num_layers, 3, H)
    check(layer, dtype, x, lengths=[7, 0, 4])
    check(layer, dtype, x, reset=torch.rand(7, 3) < 0.3)
    if name == "GRU":
        check(layer, dtype, x, h0)
    x[:, 1] = torch.inf  # a row alone
    assert not torch.isnan(check(layer, dtype, x, lengths=[7, 0, 4])[0]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(5, 33, I)
    serving.prepack(layer, weight_dtype=dtype)
    with rk.batch_invariant():
        all_rows = call(layer, x)[0]
        for rows in (1, 2, 7):
            assert same_bits([call(layer, x[:, :rows].clone())[0]], [all_rows[:, :rows]])
        # A single step, too: it is that of the loop then.
        assert same_bits([call(layer, x[:1].clone())[0]], [all_rows[:1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_step_and_cells_have_the_weights_as_they_are(dtype: torch.dtype) -> None:
    layer, cell = rk.GRU(I, H).eval(), rk.GRUCell(I, H)
    serving.prepack(nn.Sequential(layer, cell), weight_dtype=dtype)
    for rows in (1, 4):
        x = torch.randn(1, rows, I)
        assert same_bits(call(layer, x), unseen(layer, x))
        assert same_bits(call(cell, x[0]), unseen(cell, x[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_ends_of_a_type(dtype: torch.dtype) -> None:
    layer = rk.RNN(I, H, nonlinearity="relu", bias=False).eval()
    with torch.no_grad():
        layer.weight_ih_l0[0] = 0  # has no scale
        layer.weight_ih_l0[1] = 1e-42
        layer.weight_ih_l0[2] *= 1e-30
        layer.weight_ih_l0[3] *= 1e4
        layer.weight_ih_l0[4, 3:5] = torch.tensor([127.0, -63.5])  # halfway, to even
    serving.prepack(layer, weight_dtype=dtype)
    check(layer, dtype, torch.randn(3, 2, I))
    layer.weight_ih_l0.data[7, 2] = torch.inf
    layer.weight_ih_l0.data[8, 2] = torch.nan
    y = call(layer, torch.ones(2, 1, I))[0][0, 0]
    lost = torch.isnan(y).nonzero().flatten().tolist()
    assert lost == ([7, 8] if dtype is torch.int8 else [8])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_change_is_packed_in_the_same_type(dtype: torch.dtype) -> None:
    layer, x = rk.LSTM(I, H, num_layers=2).eval(), torch.randn(T, B, I)
    took = serving.prepack(layer, weight_dtype=dtype)
    for change in (
        lambda: layer.weight_hh_l1.data[3, 5:6].add_(0.5),
        lambda: layer.weight_ih_l0.detach().numpy().__setitem__((0, 0), 1.5),
        lambda: layer.load_state_dict({k: drawn(t) for k, t in layer.state_dict().items()}),
    ):
        before = call(layer, x)
        change()
        for _ in range(3):
            assert not same_bits(check(layer, dtype, x), before)
        assert kept(layer)
    assert serving.packed_bytes(layer) == took


def test_other_weight_tensors_are_as_they_are() -> None:
    layer, x = rk.GRU(I, H).eval(), torch.randn(T, B, I)
    serving.prepack(layer, weight_dtype=torch.int8)
    layer.weight_hh_l0 = nn.Parameter(drawn(layer.weight_hh_l0))
    assert same_bits(call(layer, x), unseen(layer, x))


def test_only_those_that_were_chosen() -> None:
    chosen, other, x = rk.LSTM(I, H).eval(), rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    serving.prepack(chosen, weight_dtype=torch.int8)
    serving.prepack(other)
    assert same_bits(call(other, x), unseen(other, x))
    check(chosen, torch.int8, x)
    before = pickle.dumps(other)
    for copied in (copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))):
        assert same_bits(call(copied, x), unseen(copied, x)) and not kept(copied)
    assert pickle.dumps(other) == before


def test_gradients_take_the_weights_as_they_are() -> None:
    layer, x = rk.LSTM(I, H), torch.randn(T, B, I)
    serving.prepack(layer, weight_dtype=torch.int8)
    other = copy.deepcopy(layer)
    found, like = layer(x)[0], other(x)[0]
    assert same_bits([found.detach()], [like.detach()])
    found.sum().backward()
    like.sum().backward()
    for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_recompute_takes_the_weights_as_they_are() -> None:
    """Forward as well, though its windows save nothing."""
    layer, x = rk.LSTM(I, H), torch.randn(T, B, I)
    serving.prepack(layer, weight_dtype=torch.int8)
    found = layer(x, recompute=2)[0]
    torch.testing.assert_close(found.detach(), layer(x)[0].detach())
    grads, want = (
        torch.autograd.grad(y.sum(), [*layer.parameters()]) for y in (found, layer(x)[0])
    )
    torch.testing.assert_close(grads, want)


def test_it_is_undone() -> None:
    layer, x = rk.GRU(I, H).eval(), torch.randn(T, B, I)
    wanted = unseen(layer, x)
    sizes = []
    for dtype in (None, *DTYPES):
        sizes.append(serving.prepack(layer, weight_dtype=dtype))
        assert serving.packed_bytes() == sizes[-1]
    assert sizes[0] > sizes[1] >= sizes[2] > sizes[3]
    assert serving.prepack(layer) == sizes[0] and same_bits(call(layer, x), wanted)
    serving.prepack(layer, weight_dtype=torch.int8)
    serving.drop()
    assert serving.packed_bytes() == 0 and same_bits(call(layer, x), wanted)


def test_the_type_stays_where_packs_have_no_room() -> None:
    layer, x = rk.GRU(I, H).eval(), torch.randn(T, B, I)
    serving.prepack(layer, weight_dtype=torch.int8)
    wanted = check(layer, torch.int8, x)
    limit = serving.packed_limit()
    serving.set_packed_limit(0)
    assert serving.packed_bytes() == 0
    for _ in range(3):
        assert same_bits(check(layer, torch.int8, x), wanted)
    assert "as int8: 0 bytes of this call" in str(rk.explain(layer, x))
    serving.set_packed_limit(limit)
    call(layer, x)
    assert kept(layer) and same_bits(check(layer, torch.int8, x), wanted)


def test_explain_tells() -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    took = serving.prepack(layer, weight_dtype=torch.bfloat16)
    text = str(rk.explain(layer, x))
    assert f"kept for calls without gradients as bfloat16: {took:,} bytes of this call" in text


def test_it_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"weight_dtype: expected one of .*int8.* got torch.int16"):
        serving.prepack(rk.LSTM(I, H), weight_dtype=torch.int16)
    model = nn.Sequential(rk.LSTM(I, H), rk.LSTM(I, H, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"layer '1' to be of torch.float32, got torch.bfloat16"):
        serving.prepack(model, weight_dtype=torch.int8)
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    serving.set_packed_limit(100)
    with pytest.raises(RuntimeError, match="limit of 100 bytes"):
        serving.prepack(layer, weight_dtype=torch.int8)
    assert same_bits(call(layer, x), unseen(layer, x))  # and nothing was chosen
