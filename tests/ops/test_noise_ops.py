"""Cells that draw noise, in the compiled ops: over all options against the reference, which takes
the draws by operations of its own; masks where a state shows them; errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_ops import OPTIONS, SIZES, TOLERANCES

import noise
from cases import assert_equals_reference, gradients, make_call
from helpers import same_bits
from noise import PROBABILITIES, ZONED_GRU, ZONED_LSTM, ZONED_NOISY, drawing
from op_calls import run
from rnnkernels._backends import user_cells
from rnnkernels._core import reference
from rnnkernels._core.noise import at_step, new_draws
from rnnkernels._core.philox import philox4x32
from rnnkernels.cells import DefinedCell

CELLS = [ZONED_LSTM, ZONED_NOISY]
each_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.title)


@pytest.fixture(autouse=True, scope="session")
def compiled() -> None:
    for cell in (*CELLS, ZONED_GRU):
        assert user_cells.prepare(cell.name, torch.float64) is None


ONES, PI = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
#: Those of the authors' implementation (Random123, kat_vectors): counter, key, answer.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter: Any, key: Any, answer: Any) -> None:
    """In torch, and in the NumPy of these tests; csrc/common/philox.h asserts its own."""
    of_torch = philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in of_torch) == answer
    of_numpy = noise.philox([np.array(c) for c in counter], key)
    assert tuple(int(word) for word in of_numpy) == answer


@pytest.mark.parametrize("option", OPTIONS)
@each_cell
def test_equals_the_reference(cell: DefinedCell, option: str) -> None:
    if option.startswith("projection") or (cell.S == 1 and option == "all-c"):
        pytest.skip("not a cell for it")
    assert_equals_reference(drawing(make_call(cell.name, **OPTIONS[option])))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
def test_sizes(sizes: tuple[int, int, int, int]) -> None:
    assert_equals_reference(drawing(make_call(ZONED_GRU.name, *sizes, D=2, lengths=True)))
    assert_equals_reference(drawing(make_call(ZONED_GRU.name, *sizes)))  # a single step is another


@pytest.mark.parametrize("clip", ["none", "norm"])
@pytest.mark.parametrize("window", [0, 2])
@each_cell
def test_bounds_and_windows(cell: DefinedCell, window: int, clip: str) -> None:
    call = drawing(make_call(cell.name, D=2, lengths=True, reset=True))
    assert_equals_reference(call._replace(window=window, clip=reference.Clip(clip, 0.3)))


@each_cell
def test_expectation(cell: DefinedCell) -> None:
    """Without draws the probabilities themselves."""
    assert_equals_reference(drawing(make_call(cell.name, D=2, reset=True))._replace(draws=None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """The same masks in every type: those that an h shows which is the one before it."""
    shape = {"T": 4, "B": 6, "H": 37, "lengths": False, "reset": False}
    call = drawing(make_call(ZONED_LSTM.name, dtype=dtype, seed=1, **shape))
    y = run(call)[0]
    p, seed = PROBABILITIES[ZONED_LSTM.name][0], int(call.draws[0, 0])  # type: ignore[index]
    want = torch.from_numpy(noise.masks(seed, p, 0, 4, 6, 37)) > 0
    got = noise.kept(y, call.h0[0])
    assert bool((got | ~want).all())
    if dtype.itemsize > 2:  # else others may be equal as rounded
        assert torch.equal(got, want)
    rtol, atol = TOLERANCES[dtype]
    assert_equals_reference(call, rtol=rtol, atol=atol)


def test_the_same_bits_with_any_threads() -> None:
    call = drawing(make_call(ZONED_LSTM.name, T=9, B=21, H=67, D=2, dtype=torch.float32))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs, grads = gradients(run, call)
            found.append([t.clone() for t in (*outs, *grads)])
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def test_how_often() -> None:
    """Means of the masks of leaves, rows, steps, units and streams, within 5 standard
    deviations; those of two leaves or streams have nothing to do with each other."""
    p, T, B, H = 0.3, 40, 20, 50
    of = torch.full((5,), p, dtype=torch.float64)
    torch.manual_seed(5)
    draws, like = new_draws(B, of.device), torch.empty(B, H)
    each = [[at_step(of, draws, t, d, like) for t in range(T)] for d in (0, 1)]
    leaves = [(k, d) for k in (0, 1, 4) for d in (0, 1)]
    whole = torch.stack([torch.stack([found[k] for found in each[d]]) for k, d in leaves]).numpy()
    for axes in ((1, 2, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2)):
        n = np.prod([whole.shape[a] for a in axes])
        assert np.abs(whole.mean(axes) - p).max() < 5 * (p * (1 - p) / n) ** 0.5
    flat = whole.reshape(6, -1)
    same = np.corrcoef(flat) - np.eye(6)
    assert np.abs(same).max() < 5 / flat.shape[1] ** 0.5


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"noise": None}, "noise: a cell '.*' takes 2 probabilities, got none"),
    "three": ({"noise": torch.zeros(3).double()}, r"noise: expected shape \[2\]"),
    "float": ({"noise": torch.zeros(2)}, "noise: expected dtype float64"),
    "rows": ({"draws": torch.zeros(2, 5).long()}, r"draws: expected shape \[3, 5\]"),
    "int": ({"draws": torch.zeros(3, 5).int()}, "draws: expected dtype int64"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    changes, message = ERRORS[error]
    call = drawing(make_call(ZONED_LSTM.name, B=3))._replace(**changes)
    with pytest.raises((ValueError, TypeError), match=message):
        run(call)
    plain = make_call("lstm")._replace(noise=torch.zeros(1).double())
    with pytest.raises(ValueError, match="noise: a cell 'lstm' takes none, got some"):
        run(plain)
