"""Are a layer's weights those that it found last? The short way asks before each call."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from torch import nn

import rnnkernels
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)


def swapped(items: list[Any], i: int, item: Any) -> list[Any]:
    return [*items[:i], item, *items[i + 1 :]]


def test_same_weights() -> None:
    module: Any = rnnkernels.GRU(5, 6)
    names, flat, refs = module._flat_weights_names, module._flat_weights, module._flat_weight_refs
    own = module._parameters
    assert _ops.same_weights(own, names, flat, refs) is True
    assert _ops.same_weights({}, [], [], []) is True
    other = [nn.Parameter(w.detach().clone()) for w in flat]
    dead = [weakref.ref(w.detach()) for w in flat]
    for given in (
        ({}, names, flat, refs),
        (None, names, flat, refs),
        (own, names, tuple(flat), refs),
        (own, names, flat, None),
        (own, names[::-1], flat, refs),
        (own, names, flat, refs[::-1]),
        (own, names, flat, [None] * 4),
        (own, names, other, refs),
        (dict(zip(names, other, strict=True)), names, other, refs),
        (dict.fromkeys(names), names, [None] * 4, refs),
        (own, names, flat, refs[:1]),
        (own, names[:1], flat, refs),
        (own, names, flat, [*refs, refs[0]]),
        (own, [*names, "weight_hr_l0"], flat, refs),
        (own, (), [], []),
        (own, [], (), []),
        (own, [], [], ()),
        (own, names, flat, dead),
        (dict.fromkeys(names), names, [None] * 4, dead),
        *((own, names, swapped(flat, i, other[i]), refs) for i in range(4)),
        *((own, names, flat, swapped(refs, i, refs[i - 1])) for i in range(4)),
        *((own | {names[i]: other[i]}, names, flat, refs) for i in range(4)),
    ):
        assert _ops.same_weights(*given) is False
    with pytest.raises(TypeError, match="unhashable"):
        _ops.same_weights(own, [[]] * 4, flat, refs)
    with pytest.raises(TypeError, match="expected 4 arguments"):
        _ops.same_weights(own, names, flat)
