"""Packed weights that calls without gradients keep: the same bits as without, within a limit, ahead
of time, and told about."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import rnnkernels as rk
from helpers import same_bits
from packed import B, H, I, T, call, kept, unseen, used, weights
from rnnkernels import serving

pytestmark = pytest.mark.usefixtures("nothing_packed")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: rk.LSTM(I, 70, proj_size=21, bidirectional=True, dtype=dtype),
        lambda dtype: rk.GRU(I, 70, num_layers=2, dtype=dtype),
        lambda dtype: rk.RNN(I, 70, bidirectional=True, dtype=dtype),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
def test_same_bits_as_without(make: Any, dtype: torch.dtype, threads: int) -> None:
    layer, x = make(dtype).eval(), torch.randn(40, 1, I, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        serving.set_packed_limit(0)
        wanted = call(layer, x)
        serving.set_packed_limit(1 << 20)
        for _ in range(3):
            assert same_bits(call(layer, x), wanted)
        assert kept(layer)
    finally:
        torch.set_num_threads(before)


def test_what_is_kept_and_what_is_not() -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    for _ in range(3):
        layer(x)  # saves for backward
    assert serving.packed_bytes() == 0
    call(layer, x)
    assert serving.packed_bytes() == 0  # weights that are seen once may never come again
    call(layer, x)
    size = sum(w.nbytes for w in weights(layer) if w.dim() == 2)
    assert size < serving.packed_bytes() < 2 * size
    rows = layer.weight_hh_l0.detach()
    layer.weight_hh_l0 = nn.Parameter(rows.t().contiguous().t())
    serving.drop()
    for _ in range(3):
        call(layer, x)
    assert serving.packed_bytes() == 0  # a contiguous copy is made at each call
    layer.requires_grad_(False)
    layer.weight_hh_l0 = nn.Parameter(rows.clone(), requires_grad=False)
    for _ in range(2):
        layer(x)
    assert kept(layer)


def test_packs_go_with_their_weights() -> None:
    x = torch.randn(T, B, I)
    layers = [rk.GRU(I, H).eval() for _ in range(2)]
    for layer in layers:
        used(layer, x)
    both = serving.packed_bytes()
    layers.pop()
    del layer
    assert 0 < serving.packed_bytes() == both // 2
    layers.clear()
    assert serving.packed_bytes() == 0


def test_copies_and_pickles_have_none() -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    before = pickle.dumps(layer)
    used(layer, x)
    kept_bytes = serving.packed_bytes()
    other = copy.deepcopy(layer)
    assert pickle.dumps(layer) == before and serving.packed_bytes() == kept_bytes
    assert not kept(other) and kept(layer)


def test_memory_is_bounded() -> None:
    layers, x = [rk.GRU(I, H).eval() for _ in range(4)], torch.randn(T, B, I)
    each = serving.prepack(layers[0])
    serving.set_packed_limit(2 * each + each // 2)
    for layer in layers:
        used(layer, x)
        assert serving.packed_bytes() <= serving.packed_limit()
    assert [kept(layer) for layer in layers] == [False, False, True, True]
    used(layers[2], x)
    used(layers[0], x)  # takes the place of what was used the longest time ago
    assert [kept(layer) for layer in layers] == [True, False, True, False]
    serving.set_packed_limit(each)
    assert serving.packed_bytes() == each and kept(layers[0])
    serving.set_packed_limit(each - 1)
    assert serving.packed_bytes() == 0
    for _ in range(3):
        call(layers[0], x)
    assert serving.packed_bytes() == 0


@pytest.mark.parametrize(("limit", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_a_wrong_limit(limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="limit"):
        serving.set_packed_limit(limit)


def test_prepack() -> None:
    model = nn.Sequential(rk.LSTM(I, H, num_layers=2, batch_first=True, dropout=0.5), nn.Tanh())
    seed = torch.get_rng_state()
    took = serving.prepack(model)
    assert took == serving.packed_bytes() > 0 and kept(model[0])
    assert torch.equal(seed, torch.get_rng_state())
    model[0].weight_hh_l1.data[0, 0] += 1
    assert serving.prepack(model) == took
    x = torch.randn(B, T, I)
    assert same_bits(call(model[0].eval(), x), unseen(model[0], x))


def test_prepack_says_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        serving.prepack(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model: expected one with .* got LSTM without any"):
        serving.prepack(nn.LSTM(I, H))
    with pytest.raises(ValueError, match="model"):
        serving.prepack(rk.LSTM(I, H, backend="reference"))
    serving.set_packed_limit(100)
    with pytest.raises(RuntimeError, match=r"layers of '0' were not kept.* limit of 100 bytes"):
        serving.prepack(nn.Sequential(rk.LSTM(I, H)))


def test_explain_tells() -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    assert rk.explain(layer, x).choices[0].detail == ""
    took = serving.prepack(layer)
    beside = rk.GRU(I, H)
    other = serving.prepack(beside)
    text = str(rk.explain(layer, x))
    wanted = f"{took:,} bytes of this call, {took + other:,} of all, at most 268,435,456"
    assert wanted in text and "as long as torch counts no write to them" not in text
    serving.prepack(layer, compare="versions")
    assert "as long as torch counts no write to them" in str(rk.explain(layer, x))
