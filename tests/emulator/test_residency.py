"""A device that holds few blocks at once, and devices that are not the largest: a launch that asks
for more than there is is refused, or told to hang, by the emulator as by the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from emulated import Layout, results, same
from op_parity import Case

#: Three groups of two blocks for each direction or stage.
CLUSTERS = Case("gru", 2, T=3, B=17, H=12)
STAGES = replace(CLUSTERS, D=1)


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("resident", [1, 4])
def test_clusters_take_turns(ops: Any, resident: int, shuffled: bool) -> None:
    """None waits for another: that many at once do not have to fit."""
    wanted = results(ops, CLUSTERS, Layout())
    got = results(ops, CLUSTERS, Layout(resident=resident, shuffled=shuffled))
    assert all(map(same, got, wanted))


def test_stages_begin_in_order(ops: Any) -> None:
    """A stage waits for those before it, whose blocks have smaller numbers, and for no later one:
    even one cluster at a time comes to the end, in order."""
    layout = Layout(stages=2)
    wanted = results(ops, STAGES, layout)
    assert all(map(same, results(ops, STAGES, replace(layout, resident=1)), wanted))
    assert all(map(same, results(ops, STAGES, replace(layout, resident=6, shuffled=True)), wanted))
    hangs = 0
    for seed in range(4):
        try:
            results(ops, STAGES, replace(layout, resident=1, shuffled=True, seed=seed))
        except RuntimeError as error:
            assert "gave up: block" in str(error)
            hangs += 1
    assert hangs > 0


def test_a_grid_needs_all_its_blocks(ops: Any) -> None:
    layout = Layout(cluster=False)
    wanted = results(ops, STAGES, layout)
    assert all(map(same, results(ops, STAGES, replace(layout, resident=6)), wanted))
    with pytest.raises(ValueError, match="at most 5 blocks of a cooperative launch, got 6"):
        results(ops, STAGES, replace(layout, resident=5))


@pytest.mark.parametrize(
    ("case", "layout", "error"),
    [
        (Case("gru", H=12), Layout(device=80), "clusters of 1 to 1 blocks .* in clusters of 2"),
        (Case("gru", H=12), Layout(device=89), "clusters of 1 to 1 blocks .* in clusters of 2"),
        (Case("gru", H=96), Layout(device=120), "clusters of 1 to 8 blocks .* in clusters of 12"),
        (Case("gru", H=136), Layout(), "clusters of 1 to 16 blocks .* in clusters of 17"),
        (
            Case("lstm", T=1, B=1, H=192),  # weights beyond the registers
            Layout(False, units=64, device=86),
            "0 to 101376 bytes of shared memory",
        ),
        (Case("gru"), Layout(device=70), "no device of compute capability 70"),
    ],
)
def test_devices_have_limits(ops: Any, case: Case, layout: Layout, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        results(ops, case, layout)
    if layout.device in (86, 120):  # what is too much for these
        results(ops, case, replace(layout, device=90), torch.float32)
