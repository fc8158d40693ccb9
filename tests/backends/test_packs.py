"""Packed weights that calls without gradients keep are never those of other values than the weights
have, whichever way these were changed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import same_bits
from packed import B, H, I, T, call, drawn, kept, unseen, used, weights
from rnnkernels import _ops, serving

pytestmark = pytest.mark.usefixtures("nothing_packed")

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
UNCOUNTED = [by_data, by_data_copied_into, by_numpy]  # by torch, in a weight's version


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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_versions_show_what_torch_counts(change: Change) -> None:
    layer, x = rk.LSTM(I, H).eval(), torch.randn(T, B, I)
    serving.prepack(layer, compare="versions")
    before = call(layer, x)
    change(layer)
    wanted = unseen(layer, x)
    if change in UNCOUNTED:
        assert same_bits(call(layer, x), before)
        serving.prepack(layer, compare="versions")
    for _ in range(3):  # packed for this call, kept, used
        assert same_bits(call(layer, x), wanted)
    assert not same_bits(before, wanted) and kept(layer)


def test_versions_count_every_weight() -> None:
    layer = rk.LSTM(5, 9, proj_size=3, num_layers=2, bidirectional=True).eval()
    x = torch.randn(2, 1, 5)
    serving.prepack(layer, compare="versions")
    for name, weight in layer.named_parameters():
        before = call(layer, x)
        with torch.no_grad():
            weight[-1] += 1
        now = call(layer, x)
        assert same_bits(now, unseen(layer, x)) and not same_bits(now, before), name


@pytest.mark.parametrize("choose_again", [serving.prepack, lambda layer: serving.drop()])
def test_versions_are_trusted_until_values_are_compared_again(choose_again: Change) -> None:
    layer, x = rk.GRU(I, H).eval(), torch.randn(T, B, I)
    serving.prepack(layer, compare="versions")
    with torch.no_grad():
        layer.weight_hh_l0.mul_(1)  # another version of the same values
    before = call(layer, x)
    by_data(layer)
    assert same_bits(call(layer, x), before)
    choose_again(layer)
    for _ in range(3):
        assert same_bits(call(layer, x), unseen(layer, x))
    by_data_copied_into(layer)
    assert same_bits(call(layer, x), unseen(layer, x))


def test_versions_are_for_weights_that_have_some() -> None:
    with torch.inference_mode():
        layer = nn.Sequential(rk.GRU(I, H))
    with pytest.raises(ValueError, match="compare: expected weights of the layer '0' that count"):
        serving.prepack(layer, compare="versions")
    serving.prepack(layer)
    unknown: Any = "hashes"
    with pytest.raises(ValueError, match="compare: expected one of 'values', 'versions', got 'has"):
        serving.prepack(layer, compare=unknown)


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


def test_windows_that_run_again_keep_packs_and_others_that_save_do_not() -> None:
    layer, x = rk.LSTM(I, H), torch.randn(6, B, I)
    for _ in range(3):
        layer(x)[0].sum().backward()
    assert not kept(layer)
    y = layer(x, recompute=2)[0]
    _ops.drop_packed()
    y.sum().backward()
    assert kept(layer)
    layer.zero_grad()
    _ops.drop_packed()
    for _ in range(3):  # what holds for windows ends with them
        layer(x)[0].sum().backward()
    assert not kept(layer)


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
    assert len(_ops.packed_of(weights(layers[0]))) == len(layers)


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
