"""Cells that users write, in the compiled ops: those of torch.nn written anew against the built-in
ones, over all options, and others against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import OPTIONS, SIZES, TOLERANCES
from torch import Tensor

import drawn_cells
import written_cells
from cases import assert_equals_reference, convert, gradients, make_call, present
from helpers import same_bits
from op_calls import run
from rnnkernels._backends import user_cells
from rnnkernels._core import reference
from rnnkernels._core.call import Layer
from rnnkernels.cells import CELLS, DefinedCell

OTHERS = [
    written_cells.mgu,
    written_cells.peephole,
    written_cells.odd,
    written_cells.scaled,
    written_cells.crowd,
    written_cells.forgets,
]
#: How far float64 results of the same formula may be apart.
SAME: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-14}


def takes(states: int, option: str) -> bool:
    return states > 1 or not option.startswith(("projection", "all-c"))


PAIRS = [
    pytest.param(name, options, id=f"{name}-{option}")
    for name in written_cells.BUILT_IN
    for option, options in OPTIONS.items()
    if takes(CELLS[name].S, option)
]


@pytest.fixture(autouse=True, scope="session")
def compiled() -> None:
    for cell in (*written_cells.BUILT_IN.values(), *OTHERS):
        assert user_cells.prepare(cell.name, torch.float64) is None


def as_written(name: str, call: Layer) -> Layer:
    return call._replace(cell_name=written_cells.BUILT_IN[name].name)


Results = tuple[list[Tensor], list[Tensor]]


def assert_same(got: Results, want: Results, **tolerance: float) -> None:
    """Results and gradients."""
    torch.testing.assert_close(got, want, **(tolerance or SAME))


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_equals_the_built_in_cell(name: str, options: dict[str, Any]) -> None:
    call = make_call(name, **options)
    assert_same(gradients(run, as_written(name, call)), gradients(run, call))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("name", written_cells.BUILT_IN)
def test_sizes(name: str, sizes: tuple[int, int, int, int]) -> None:
    call = make_call(name, *sizes, D=2, lengths=True, reset=True)
    assert_same(gradients(run, as_written(name, call)), gradients(run, call))


@pytest.mark.parametrize("clip", ["value", "norm", "tanh"])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("name", written_cells.BUILT_IN)
def test_bounds_and_windows(name: str, window: int, clip: str) -> None:
    call = make_call(name, D=2, lengths=True, reset=True)
    call = call._replace(window=window, clip=reference.Clip(clip, 0.3))
    assert_same(gradients(run, as_written(name, call)), gradients(run, call))


@pytest.mark.parametrize("name", written_cells.BUILT_IN)
def test_saves_no_more_than_the_built_in_cell(name: str) -> None:
    cell, built_in = written_cells.BUILT_IN[name], CELLS[name]
    numbers = [(c.G, c.S, c.K, c.A, c.reads_h) for c in (cell, built_in)]
    assert numbers[0] == numbers[1]
    assert (written_cells.mgu.K, written_cells.mgu.A) == (3, 1)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", OTHERS, ids=lambda c: c.title)
def test_others_equal_the_reference(cell: DefinedCell, option: str) -> None:
    if not takes(cell.S, option) or (cell.reads_own_h and option.startswith("projection")):
        pytest.skip("not a cell for it")
    call = make_call(cell.name, **OPTIONS[option])
    assert_equals_reference(call)


@pytest.mark.parametrize("cell", OTHERS[3:], ids=lambda c: c.title)
@pytest.mark.parametrize("clip", ["value", "norm", "tanh"])
@pytest.mark.parametrize("window", [0, 2])
def test_bounds_and_windows_of_others(window: int, clip: str, cell: DefinedCell) -> None:
    """Bounds are those of gradients of gates: what reaches parameters is left as it is."""
    call = make_call(cell.name, D=2, lengths=True, reset=True)
    assert_equals_reference(call._replace(window=window, clip=reference.Clip(clip, 0.3)))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", written_cells.BUILT_IN)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """In 16 bits the same roundings in other places: of one unit in the last place."""
    call = make_call(name, T=4, B=6, H=21, D=2, lengths=True, reset=True, dtype=dtype, seed=1)
    rtol, atol = TOLERANCES[dtype]
    written, built_in = gradients(run, as_written(name, call)), gradients(run, call)
    assert_same(written, built_in, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes_of_many_gates(dtype: torch.dtype) -> None:
    """Panels of two parts, whose rows are several register tiles, and weights that are kept."""
    cell = written_cells.crowd
    call = make_call(cell.name, T=2, B=9, H=37, D=2, lengths=True, gain=0.5, dtype=dtype, seed=1)
    rtol, atol = TOLERANCES[dtype]
    assert_equals_reference(call, rtol=rtol, atol=atol)
    plain = convert(call, lambda t: t)._replace(all_states=False)
    with torch.no_grad():
        found = [run(plain) for _ in range(3)]
    assert same_bits(present(found[0]), present(found[1]))
    assert same_bits(present(found[0]), present(found[2]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_cells(seed: int) -> None:
    cell = drawn_cells.of_seed(seed)
    assert user_cells.prepare(cell.name, torch.float64) is None
    assert_equals_reference(make_call(cell.name, D=2, H=9, lengths=True, reset=True))


def test_a_name_that_nobody_defined_here() -> None:
    call = make_call("gru")._replace(cell_name="gone-12345678")
    with pytest.raises(ValueError, match=r"'gone-12345678' is not known in this process.*import"):
        run(call)
