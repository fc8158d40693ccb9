"""Written cells, those that the package brings among them, by the stepwise CUDA kernels on the CPU:
many gates and states, parameters of units, no recurrent weights, noise, heads, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import noise
import on_host
import op_parity
from op_parity import ALL, CLIPS, Case
from rnnkernels._core.call import Layer
from rnnkernels.cells import DefinedCell, find

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"D": 2, **ALL},
    "window": {"D": 2, "window": 2, "reset": True, "lengths": True},
    "packed-norm": {"packed": True, "window": 3, "clip": CLIPS[1]},
    "heads-dropped": {"D": 2, "H": 4, "heads": 2, "drop": True, "reset": True, "clip": CLIPS[0]},
}
each_cell = pytest.mark.parametrize("cell", on_host.WRITTEN, ids=lambda cell: cell.title)


@pytest.fixture(scope="session")
def ops() -> Any:
    return on_host.load()


def made(cell: DefinedCell, dtype: torch.dtype, **options: Any) -> Layer:
    if not cell.recurrent:
        options.pop("drop", None)
    call = op_parity.make(Case(cell.name, **options), dtype)
    return noise.drawing(call) if cell.noise else call


@pytest.mark.parametrize("option", OPTIONS)
@each_cell
def test_matches_reference(ops: Any, cell: DefinedCell, option: str) -> None:
    call = made(cell, torch.float64, **OPTIONS[option])
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= 1e-12
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(ops, call, out, grads)
    assert op_parity.backward_error(call, out, back, grads) <= 1e-12
    assert op_parity.padding_is_zero(call, [out[0], *out[3:], back[0], *back[3:5]])


@each_cell
def test_storage_of_16_bits(ops: Any, cell: DefinedCell) -> None:
    """Backward is held against itself in float64 on the same y, c and saved values."""
    call = made(cell, torch.bfloat16, D=2, reset=True)
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= 3e-2
    grads = op_parity.random_gradients(call, out)
    exact = [op_parity.converted(t, torch.float64) for t in (call, out, grads)]
    got, want = op_parity.backward(ops, call, out, grads), op_parity.backward(ops, *exact)
    assert max(map(op_parity.error, got, want)) <= 3e-2


@pytest.mark.parametrize(
    "cell", [cell for cell in on_host.WRITTEN if not cell.reads_own_h and cell.S > 1],
    ids=lambda cell: cell.title,
)  # fmt: skip
def test_projection(ops: Any, cell: DefinedCell) -> None:
    call = made(cell, torch.float64, D=2, R=3, drop=True, window=2, reset=True)
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= 1e-12
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(ops, call, out, grads)
    assert op_parity.backward_error(call, out, back, grads) <= 1e-12


@pytest.mark.parametrize(
    "cell", [cell for cell in on_host.WRITTEN if cell.K == cell.G + cell.A > 0],
    ids=lambda cell: cell.title,
)  # fmt: skip
def test_gates_written_over_saved_values(ops: Any, cell: DefinedCell) -> None:
    """The same bits as in memory of their own."""
    call = made(cell, torch.float64, D=2, reset=True, clip=CLIPS[1])
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    want = op_parity.backward(ops, call, out, grads)
    got = op_parity.backward_over_saved(ops, call, out, grads)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("cell", [noise.ZONED_LSTM, noise.ZONED_NOISY], ids=lambda c: c.title)
def test_the_same_masks_as_the_reference(ops: Any, cell: DefinedCell) -> None:
    """A unit whose h stays is where the reference has it, to the bit; and the expectation of it."""
    call = made(cell, torch.float64, D=2, T=9, H=21)
    h = op_parity.forward(ops, call)[0][..., :21]
    want = op_parity.exact(call).results[0][..., :21]
    stays = noise.kept(want, call.h0[0])
    assert torch.equal(noise.kept(h, call.h0[0]), stays) and stays.any() and not stays.all()
    expected = call._replace(draws=None)
    assert op_parity.forward_error(expected, op_parity.forward(ops, expected)) <= 1e-12


def test_a_cell_that_was_not_compiled(ops: Any) -> None:
    call = made(find(on_host.WRITTEN[0].name), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no kernels of mgu-"):
        op_parity.forward(ops, call)
