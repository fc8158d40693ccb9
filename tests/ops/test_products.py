"""rows_product and steps_product: the products behind the loops, of any matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkernels import _ops
from rnnkernels.testing import assert_close

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels


def matrix(rows: int, columns: int, lies: str = "rows", dtype: Any = torch.float64) -> Tensor:
    """One whose rows lie together, or apart in a wider one, or whose columns do."""
    if lies == "columns":
        return torch.randn(columns, rows, dtype=dtype).t()
    wide = torch.randn(rows, columns + 5 * (lies == "apart"), dtype=dtype)
    return wide[:, :columns]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lies", ["rows", "apart", "columns"])
@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 1, 1), (15, 40, 3), (4, 1, 33), (3, 0, 2), (0, 2, 2), (20, 9, 70)]
)
def test_products_are_those(M: int, K: int, N: int, lies: str, dtype: Any) -> None:
    a, w = matrix(M, K, lies, dtype), matrix(K, N, lies, dtype)
    assert_close(kernels.rows_product(a, w), a.double() @ w.double())
    pairs = [(matrix(k, M, lies, dtype), matrix(k, N, lies, dtype)) for k in (K, 7)]
    want = sum(left.double().t() @ right.double() for left, right in pairs)
    assert_close(kernels.steps_product(*map(list, zip(*pairs, strict=True))), want)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [(3, 2)], "^a, b: expected as many of both, and one or more, got 0 and 1"),
        ([(3, 2)], [(3, 2)] * 2, "^a, b: expected as many of both, and one or more, got 1 and 2"),
        ([(3, 2)], [(4, 2)], r"^a, b: .* one inner size, got shapes \[3, 2\] and \[4, 2\]"),
        ([(3, 2)] * 2, [(3, 2), (3, 1)], r"^a, b: expected products of one shape .*\[3, 1\]"),
        ([(3,)], [(3, 2)], r"^a, b: expected two matrices .* got shapes \[3\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_pairs(a: list[Any], b: list[Any], message: str, device: str) -> None:
    with torch.device(device), pytest.raises(ValueError, match=message):
        kernels.steps_product([torch.ones(s) for s in a], [torch.ones(s) for s in b])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_factors(device: str) -> None:
    with torch.device(device):
        floats, others = torch.ones(2, 3), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"^a, w: .* got shapes \[2, 3\] and \[2, 3\]"):
        kernels.rows_product(floats, floats)
    with pytest.raises(
        ValueError, match=r"(?i)^a, w: .* floating dtype, got .*float.* and .*(double|float64)"
    ):
        kernels.rows_product(floats, others.double())
    with pytest.raises(
        ValueError, match=r"(?i)^a, w: .* floating dtype, got .*(long|int64) and .*(long|int64)"
    ):
        kernels.rows_product(floats.long(), others.long())


def test_values_beside_none() -> None:
    there, without = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"^a, w: .* one device, got cpu and meta"):
        kernels.rows_product(there, without)
    with pytest.raises(ValueError, match=r"^a, b: .* one device, got meta and cpu"):
        kernels.steps_product([there, without], [there, there])


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor")
    for op, args in (
        (kernels.rows_product.default, (matrix(3, 4), matrix(4, 5))),
        (kernels.steps_product.default, ([matrix(3, 4)] * 2, [matrix(3, 5)] * 2)),
    ):
        torch.library.opcheck(op, args, test_utils=tests)
