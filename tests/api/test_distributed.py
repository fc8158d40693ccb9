"""Two processes under gloo train as one does: the cases of ``tools/compat/two_processes.py``,
which the table of compatibility tries with torch.nn's layers, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rnnkernels as rk
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.distributed, imported
def test_two_processes() -> None:
    """Started once for all cases: most of their time is spent on imports."""
    from compat import two_processes
    from compat.registry import LIBRARIES

    (ours,) = (library for library in LIBRARIES if library.ours)
    cases = [i for i, case in enumerate(two_processes.CASES) if not case.costly]
    assert len(cases) >= 11
    found = two_processes.started(ours, cases)
    assert {title: reason for title, reason in found.items() if reason} == {}


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of two processes, the other of which torch makes believe."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_distributed_tensors_that_do_not_fit(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module

    def spread(t: torch.Tensor, placement: Any) -> Any:
        return DTensor.from_local(t, mesh, [placement])

    x = torch.randn(5, 2, 3)
    plain = rk.GRU(3, 4, num_layers=2, dropout=0.5)
    module = distribute_module(rk.GRU(3, 4, num_layers=2, dropout=0.5), mesh)
    with pytest.raises(TypeError, match="input: expected a DTensor as the parameters are, got T"):
        module(x)
    with pytest.raises(TypeError, match="parameters: expected DTensors as the input is, got a Pa"):
        plain(spread(x, Shard(1)))
    with pytest.raises(TypeError, match="hx: expected DTensors as the input is, got a Tensor"):
        module(spread(x, Shard(1)), torch.zeros(2, 4, 4))
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    with pytest.raises(TypeError, match="a PackedSequence has no distributed form"):
        module(packed)
    with pytest.raises(NotImplementedError, match="dropout: between layers of replicated rows"):
        module(spread(x, Replicate()))
    with pytest.raises(ValueError, match=r"lengths: expected shape \[4\], one length per row"):
        module(spread(x, Shard(1)), lengths=[5, 5])
    y = module(spread(x, Shard(1)))[0]  # each process draws for its own rows
    assert y.shape == (5, 4, 4) and y.placements == (Shard(1),) and y.to_local().shape == (5, 2, 4)
    cell = distribute_module(rk.LSTMCell(3, 4), mesh)
    with pytest.raises(TypeError, match="input: expected a DTensor as the parameters are, got T"):
        cell(x[0])
    h, c = cell(spread(x[0], Shard(0)))
    assert h.shape == c.shape == (4, 4) and h.placements == (Shard(0),)
