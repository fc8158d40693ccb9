"""Packed weights that calls without gradients keep: never those of other values than the weights
have, whichever way they were changed, and never more than the limit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import require_backend, same_bits, tensors
from rnnkernels import _ops, serving

T, B, I, H = 3, 2, 19, 35  # ends of rows and of the last tile do not fall together with vectors


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    require_backend("cpu")
    limit = serving.packed_limit()
    serving.drop()
    yield
    serving.set_packed_limit(limit)
    serving.drop()


def call(layer: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return tensors(layer(x))


def unseen(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layer gives, by weights that no call has seen before."""
    return call(copy.deepcopy(layer), x)


def weights(layer: Any) -> list[Tensor]:
    return list(layer._flat_weights)


def kept(layer: Any) -> bool:
    return len(_ops.packed_bytes_of(weights(layer))) == layer.num_layers


def used(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layer gives by packs that it keeps."""
    for _ in range(2):
        call(layer, x)
    assert kept(layer)
    return call(layer, x)


def drawn(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype) / 4


Change = Callable[[rk.LSTM], None]


@torch.no_grad()
def in_place(layer: rk.LSTM) -> None:
    layer.weight_hh_l0.add_(0.25)


@torch.no_grad()
def copied_into(layer: rk.LSTM) -> None:
    layer.weight_ih_l0.copy_(drawn(layer.weight_ih_l0))


@torch.no_grad()
def negated(layer: rk.LSTM) -> None:
    layer.weight_hh_l0.neg_()


@torch.no_grad()
def two_signs(layer: rk.LSTM) -> None:
    layer.weight_hh_l0[0, 3::16].neg_()  # of two values that digests add up in the same place


@torch.no_grad()
def values_swapped(layer: rk.LSTM) -> None:
    layer.weight_hh_l0[0, 3::16] = layer.weight_hh_l0[0, 3::16].flip(0)


@torch.no_grad()
def rows_swapped(layer: rk.LSTM) -> None:
    layer.weight_hh_l0[[2, 18]] = layer.weight_hh_l0[[18, 2]]


@torch.no_grad()
def by_a_view(layer: rk.LSTM) -> None:
    layer.weight_ih_l0.view(-1)[-1:].fill_(2.0)


def by_data(layer: rk.LSTM) -> None:
    layer.weight_hh_l0.data[7, 3] = 1.5


def by_data_copied_into(layer: rk.LSTM) -> None:
    layer.weight_hh_l0.data.copy_(drawn(layer.weight_hh_l0))


def by_other_data(layer: rk.LSTM) -> None:
    layer.weight_hh_l0.data = drawn(layer.weight_hh_l0)


@torch.no_grad()
def by_set(layer: rk.LSTM) -> None:
    layer.weight_ih_l0.set_(drawn(layer.weight_ih_l0))


def by_numpy(layer: rk.LSTM) -> None:
    layer.weight_hh_l0.detach().numpy()[5:7] *= 3


def by_load_state_dict(layer: rk.LSTM) -> None:
    layer.load_state_dict({name: drawn(t) for name, t in layer.state_dict().items()})


def by_load_state_dict_assign(layer: rk.LSTM) -> None:
    state = {name: nn.Parameter(drawn(t)) for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def by_an_optimizer(layer: rk.LSTM) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(T, B, I))[0].sum().backward()
    optimizer.step()


def replaced(layer: rk.LSTM) -> None:
    layer.weight_hh_l0 = nn.Parameter(drawn(layer.weight_hh_l0))


def swapped(layer: rk.LSTM) -> None:
    layer._flat_weight_refs = [None] * 4  # torch swaps no tensor that somebody refers to weakly
    torch.utils.swap_tensors(layer.weight_hh_l0, nn.Parameter(drawn(layer.weight_hh_l0)))


def to_another_dtype_and_back(layer: rk.LSTM) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


@torch.no_grad()
def storage_freed_and_taken_again(layer: rk.LSTM) -> None:
    storage, other = layer.weight_hh_l0.untyped_storage(), drawn(layer.weight_hh_l0)
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    layer.weight_hh_l0.copy_(other)


CHANGES = [
    in_place, copied_into, negated, two_signs, values_swapped, rows_swapped, by_a_view, by_data,
    by_data_copied_into, by_other_data, by_set, by_numpy, by_load_state_dict,
    by_load_state_dict_assign, by_an_optimizer, replaced, swapped, to_another_dtype_and_back,
    storage_freed_and_taken_again,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_shows(change: Change) -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    before = used(layer, x)
    change(layer)
    wanted = unseen(layer, x)
    assert not same_bits(before, wanted)
    for _ in range(3):  # packed for this call, kept, used
        assert same_bits(call(layer, x), wanted)
    assert kept(layer)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"])
def test_every_value_counts(name: str) -> None:
    layer, x = rk.LSTM(5, 9, proj_size=3, bidirectional=True).eval(), torch.randn(2, 1, 5)
    used(layer, x)
    for each in (name, name + "_reverse"):
        flat = layer.get_parameter(each).detach().view(-1)
        for i in range(len(flat)):
            before = used(layer, x)
            flat[i] += 1
            now = call(layer, x)
            assert same_bits(now, unseen(layer, x)) and not same_bits(now, before), (each, i)
            flat[i] -= 1


def test_a_change_shows_to_whichever_thread_has_the_tile() -> None:
    layer, x = rk.GRU(I, 128).eval(), torch.randn(40, 1, I)  # enough work for two
    for row in range(0, 3 * 128, 8):  # the first rows of tiles, and rows far behind them
        before = used(layer, x)
        layer.weight_hh_l0.data[row, row % 16 + 100] += 1
        now = call(layer, x)
        assert same_bits(now, unseen(layer, x)) and not same_bits(now, before), row


def test_weights_that_share_a_storage_have_packs_of_their_own() -> None:
    layers, x = [rk.RNN(I, H, bias=False).eval() for _ in range(2)], torch.randn(T, B, I)
    flat = torch.cat([w.detach().view(-1) for layer in layers for w in weights(layer)])
    for layer, part in zip(layers, flat.chunk(2), strict=True):
        layer.weight_ih_l0 = nn.Parameter(part[: H * I].view(H, I))
        layer.weight_hh_l0 = nn.Parameter(part[H * I :].view(H, H))
    wanted = [unseen(layer, x) for layer in layers]
    for _ in range(3):
        assert [same_bits(call(m, x), w) for m, w in zip(layers, wanted, strict=True)] == [True] * 2
    assert kept(layers[0]) and kept(layers[1])


def test_a_change_of_an_upper_layer_shows() -> None:
    layer, x = rk.GRU(I, H, num_layers=2).eval(), torch.randn(T, B, I)
    before = used(layer, x)
    layer.weight_ih_l1.data[0, 0] += 1
    wanted = unseen(layer, x)
    assert same_bits(call(layer, x), wanted) and not same_bits(before, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_shows_in_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = rk.LSTM(I, H, dtype=dtype).eval(), torch.randn(T, B, I, dtype=dtype)
    before = used(layer, x)
    layer.weight_hh_l0.data[-1, -1] += 2
    wanted = unseen(layer, x)
    assert same_bits(call(layer, x), wanted) and not same_bits(before, wanted)


def test_a_write_through_other_memory_shows(tmp_path: Path) -> None:
    """Through another mapping of the same file, as another process would write."""
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    path = tmp_path / "weights"
    np.asarray(layer.weight_hh_l0.detach()).tofile(path)
    shared = torch.from_file(str(path), shared=True, size=layer.weight_hh_l0.numel())
    layer.weight_hh_l0 = nn.Parameter(shared.view_as(layer.weight_hh_l0))
    before = used(layer, x)
    np.memmap(path, np.float32, "r+")[11] = 2.0
    wanted = unseen(layer, x)
    assert same_bits(call(layer, x), wanted) and not same_bits(before, wanted)


def test_other_weights_at_the_same_address() -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    memory = drawn(layer.weight_hh_l0).numpy()
    layer.weight_hh_l0 = nn.Parameter(torch.from_numpy(memory))
    before = used(layer, x)
    del layer.weight_hh_l0
    memory *= -1
    layer.register_parameter("weight_hh_l0", nn.Parameter(torch.from_numpy(memory)))
    wanted = unseen(layer, x)
    assert same_bits(call(layer, x), wanted) and not same_bits(before, wanted)


def test_other_layers_on_the_same_memory() -> None:
    """The same numbers as the weights of other cells, sizes and types."""
    memory = (torch.rand(8 * H * (I + H)) + 0.5).to(torch.float16).view(torch.float32)

    def of(layer: nn.Module, ih: Tensor, hh: Tensor) -> nn.Module:
        layer.weight_ih_l0 = nn.Parameter(ih)
        layer.weight_hh_l0 = nn.Parameter(hh)
        return layer.eval()

    def parts(layer: Any, flat: Tensor) -> tuple[Tensor, Tensor]:
        ih, hh = layer.weight_ih_l0, layer.weight_hh_l0
        return flat[: ih.numel()].view_as(ih), flat[: hh.numel()].view_as(hh)

    layers: list[Any] = [
        *(cell(I, H, bias=False) for cell in (rk.LSTM, rk.GRU, rk.RNN)),
        rk.LSTM(H, I, bias=False),
        rk.LSTM(I, I, bias=False),
        rk.RNN(I, H, bias=False, nonlinearity="relu"),
        rk.RNN(I, H, bias=False, dtype=torch.float16),
        rk.RNN(I, H, bias=False, dtype=torch.bfloat16),
    ]
    for layer in layers:
        of(layer, *parts(layer, memory.view(layer.weight_ih_l0.dtype)))
    inputs = [torch.randn(T, B, m.input_size, dtype=m.weight_ih_l0.dtype) for m in layers]
    wanted = [unseen(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    for _ in range(3):
        for layer, x, right in zip(layers, inputs, wanted, strict=True):
            assert same_bits(call(layer, x), right)
    assert len(_ops.packed_bytes_of(weights(layers[0]))) == len(layers)


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


def test_threads_that_call_while_weights_are_loaded_between() -> None:
    layer, x = rk.LSTM(I, 80, num_layers=2).eval(), torch.randn(20, 1, I)
    states = [{k: drawn(t) for k, t in layer.state_dict().items()} for _ in range(2)]
    wanted = []
    for state in states:
        layer.load_state_dict(state)
        wanted.append(unseen(layer, x))
    with ThreadPoolExecutor(4) as pool:
        for turn in range(12):
            layer.load_state_dict(states[turn % 2])
            found = [pool.submit(call, layer, x) for _ in range(12)]
            assert all(same_bits(f.result(), wanted[turn % 2]) for f in found)
            if turn % 5 == 4:
                serving.drop()
    assert kept(layer)


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
    assert wanted in text
