"""What the blocks of the persistent CUDA kernels send each other, and what becomes of a block that
waits in vain: by the emulator."""

from __future__ import annotations

import re
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch

import op_parity
import stack_parity
from emulated import GAVE_UP, PRECISIONS, Layout, backward, errors, forward, results
from op_parity import Case
from rnnkernels._core.call import Clip


@pytest.mark.parametrize(
    ("place", "layout", "awaited"),
    [
        ("exchange.cuh send", Layout(True, units=16), "the other blocks"),
        ("exchange.cuh put", Layout(False, units=16), "the other blocks"),
        ("upstream.cuh publish", Layout(True, units=16, stages=2), "the layer before it"),
        ("upstream.cuh publish", Layout(False, units=16, stages=2), "the layer before it"),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
def test_a_message_that_never_comes(
    ops: Any, place: str, layout: Layout, awaited: str, backwards: bool
) -> None:
    """Every block leaves, and what is left is a record of where it waited."""
    case = Case("lstm", 1, T=4, B=9, H=36)
    outs, _ = results(ops, case, layout)
    name, primitive = place.split()
    found = (site.split() for site in ops.sites())
    (site,) = [at for at, what in found if name in at and what == primitive]
    ops.configure(*astuple(replace(layout, skip=site)))
    calls = stack_parity.make(case, layout.stages, torch.float32)
    with pytest.raises(RuntimeError) as error:
        backward(ops, calls, outs) if backwards else forward(ops, calls)
    said = re.match(GAVE_UP, str(error.value))
    assert said, error.value
    assert said[1] == ("back" if backwards else "for")
    assert said[2] == ("cluster" if layout.cluster else "grid")
    assert said[4].startswith(awaited)
    assert int(said[3]) < 2 * 3 * layout.stages
    assert int(said[5]) < 2
    assert int(said[6]) <= 1
    assert "choose another backend" in str(error.value)


@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
@pytest.mark.parametrize("stages", [1, 2])
def test_one_block_sends_nothing(ops: Any, cluster: bool, stages: int) -> None:
    """What its cells leave is what it multiplies next; with a norm and several tiles, too."""
    case = Case("gru", T=5, B=19, H=36, clip=Clip("norm", 0.3))
    layout = Layout(cluster, units=40, tiles=2, stages=stages)
    assert max(errors(ops, case, layout, torch.float32)) <= 1e-6
    assert ops.visits("sync_block") > 0
    for primitive in ("send", "expect", "open", "sync_cluster"):
        assert ops.visits(primitive) == 0, primitive
    sent = {site.split()[1] for site in ops.sites() if "exchange.cuh" in site}
    assert not sent & {"put", "look", "empty", "await", "settle"}


@pytest.mark.parametrize(
    ("cluster", "primitive"), [(True, "send"), (False, "put"), (False, "look")]
)
def test_only_rows_of_the_batch_travel(ops: Any, cluster: bool, primitive: str) -> None:
    """Of a tile of eight, and of the last of several."""
    travelled = {}
    for B in (1, 3, 8, 11):
        results(ops, Case("lstm", 1, T=3, B=B, H=32), Layout(cluster, units=16, tiles=2))
        travelled[B] = ops.visits(primitive)
    assert travelled == {B: B * travelled[1] for B in travelled}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_of_all_bits_travels(ops: Any, precision: str) -> None:
    """Which is what a vector that nobody has sent holds. A row without a step sends its state."""
    dtype, tf32, _ = PRECISIONS[precision]
    ops.configure(*astuple(Layout(False, tf32=tf32)))
    call = op_parity.make(Case("rnn_tanh", T=4, B=3, H=16, lengths=True), dtype)
    assert call.lengths is not None
    call.lengths[1] = 0
    wanted = op_parity.forward(ops, call)
    call.h0.view(torch.int32 if dtype.itemsize == 4 else torch.int16)[:, 1] = -1
    y, h_n, *_ = op_parity.forward(ops, call)
    assert ops.visits("put") > 0
    assert h_n[:, 1].isnan().all()
    assert torch.equal(y, wanted[0])
    assert torch.equal(h_n[:, ::2], wanted[1][:, ::2])


def test_what_a_device_can_launch(ops: Any) -> None:
    """Groups that wait for each other all have to run at once; of others, one. Answers are kept."""
    for cluster, blocks, groups, stages, at_once, said in (
        (True, 16, 9, 1, 1, ""),  # a cluster waits for no other
        (True, 16, 9, 1, 0, "clusters of 16 blocks: the device runs 0 of the 1 at the same time"),
        (True, 8, 2, 3, 5, "clusters of 8 blocks: the device runs 5 of the 6 at the same time"),
        (True, 8, 2, 3, 6, ""),
        (False, 32, 4, 1, 4, ""),
        (False, 32, 4, 1, 3, "groups of 32 blocks: the device runs 3 of the 4 at the same time"),
        (False, 1, 300, 1, 132, ""),  # a block by itself waits for nobody
        (True, 1, 300, 1, 132, ""),
        (
            False,
            1,
            2,
            70,
            132,
            "single blocks: the device runs 132 of the 140 at the same time",
        ),
    ):
        assert ops.refused(cluster, blocks, groups, stages, at_once, "") == said
    assert ops.refused(True, 16, 1, 1, 8, "too large") == "clusters of 16 blocks: too large"
