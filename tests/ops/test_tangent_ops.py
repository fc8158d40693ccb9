"""forward_tangents, backward_record and backward_tangents: what they refuse, and what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rnnkernels import _ops
from rnnkernels._core.call import ARGUMENTS, Call

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels
T, B, I, H, R = 3, 2, 4, 5, 2


def names(op: str) -> list[str]:
    return [a.name for a in getattr(kernels, op).default._schema.arguments]


def problem(dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Any]]:
    """The arguments of each op, for one projected layer of LSTM with lengths."""
    torch.manual_seed(0)

    def new(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype)

    weights = [new(4 * H, I), new(4 * H, R), new(4 * H), new(4 * H), new(R, H)]
    call = Call(
        "lstm", 1, 1, 1, True, "concat", 0, "none", 1.0, new(T, B, I), weights, new(1, B, R),
        new(1, B, H), lengths=torch.tensor([T, 1]), save=True, all_states=True,
    )  # fmt: skip
    y, _, _, _, c, _, saved = kernels.sequence_forward(*call[:ARGUMENTS])
    forward = dict(zip(names("sequence_forward"), call[:ARGUMENTS], strict=True))
    at = {"h0_at": call.h0, "c0_at": call.c0, "y_at": y, "c_at": c, "saved_at": saved}
    added = {"of_gx": new(T, B, 1, 4 * H), "of_gh": None, "of_h": new(T, B, R)}
    backward = {name: forward.get(name) for name in names("sequence_backward")}
    backward |= {"y": y, "ys": y.new_empty(0), "c": c, "saved": saved, "dy": new(T, B, R)}
    backward |= {"record": False, "initial": True, "invariant": False}
    dnext = kernels.backward_record(*backward.values())[-1]
    tangents = {"h0_t": new(1, B, R), "c0_t": new(1, B, H), "y_t": y, "c_t": c, "saved_t": saved}
    return {
        "forward_tangents": {**forward, **at, **added},
        "backward_record": backward,
        "backward_tangents": {**backward, "dnext": dnext, **tangents, "of_raw": new(T, B, 1, H)},
    }


def run(op: str, given: dict[str, Any]) -> Any:
    assert list(given) == names(op)
    return getattr(kernels, op)(*given.values())


@pytest.mark.parametrize("op", problem())
def test_padding_is_zero(op: str) -> None:
    first = run(op, problem()[op])[0]  # y, or dgates
    steps = first.view(T, B, -1)
    assert not steps[1:, 1].any() and steps[:, 0].all(-1).all()


OTHERS = {
    "forward_tangents": ("h0_at", "c0_at", "y_at", "c_at", "saved_at", "of_gx", "of_h"),
    "backward_tangents": ("dnext", "h0_t", "c0_t", "y_t", "c_t", "saved_t", "of_raw"),
}


@pytest.mark.parametrize(("op", "name"), [(op, n) for op, every in OTHERS.items() for n in every])
def test_further_tensors_that_do_not_fit(op: str, name: str) -> None:
    given = problem()[op]
    good = given[name]
    for bad, message in (
        (good[..., :-1], r"expected shape .*, got"),
        (good.float(), "expected dtype Double, got Float"),
        (good.to("meta"), None),  # goes to no kernel
    ):
        error = NotImplementedError if message is None else ValueError
        with pytest.raises(error, match=message and f"^{name}: {message}"):
            run(op, given | {name: bad})
    wide = torch.stack([good, good], -1)[..., 0]
    for got, want in zip(run(op, given | {name: wide}), run(op, given), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("forward_tangents", {"merge_mode": "sum", "layers": 2}, ValueError, "^weights: "),
        (
            "forward_tangents",
            {"c0_at": None},
            ValueError,
            "^c0_at: a cell 'lstm' takes one, got no",
        ),
        ("forward_tangents", {"cell": "gru"}, ValueError, "^c0: a cell 'gru' takes no c"),
        ("forward_tangents", {"lengths": torch.tensor([T + 1, 1])}, ValueError, "^lengths: "),
        ("backward_record", {"window": 1}, ValueError, "^window, clip, record: .* got 1, none"),
        ("backward_record", {"clip": "norm"}, ValueError, "^window, clip, record: .* got 0, norm"),
        (
            "backward_tangents",
            {"record": True},
            ValueError,
            "^window, clip, record: .* got 0, none, 1",
        ),
    ],
)
def test_what_they_are_not_for(op: str, change: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        run(op, problem()[op] | change)


@pytest.mark.parametrize("op", problem())
def test_sixteen_bits(op: str) -> None:
    given = problem(torch.float32)[op]

    def narrow(t: Any) -> Any:
        if isinstance(t, list):
            return [narrow(each) for each in t]
        return t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t

    with pytest.raises(TypeError, match=r"^tangents: .* got BFloat16"):
        run(op, {name: narrow(value) for name, value in given.items()})


@pytest.mark.parametrize("op", problem())
def test_no_steps_and_no_rows(op: str) -> None:
    """Nothing is read then, and what there is of results is there."""
    given = problem()[op]
    empty = {"lengths": None, "of_gx": None, "of_h": None, "of_raw": None}
    steps = ("x", "y", "dy", "y_at", "y_t")  # [T, B, ..]
    layers = ("c", "saved", "c_at", "saved_at", "c_t", "saved_t", "dnext")  # [L, T, B, ..]
    for name in given:
        if name in steps:
            empty[name] = given[name][:0]
        elif name in layers:
            empty[name] = given[name][:, :0]
    found = run(op, given | {k: v for k, v in empty.items() if k in given})
    assert found[0].numel() == 0
