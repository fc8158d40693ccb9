"""torch.utils.flop_counter.FlopCounterMode counts what the kernels multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rnnkernels
from helpers import tensors
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

T, B, I, H = 4, 2, 5, 7
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {"bias": False}),
    "GRU, two layers, both directions": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "LSTM, two layers": ("LSTM", {"num_layers": 2}),
    "LSTM, projected": ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    "GRU, merged": ("GRU", {"num_layers": 2, "bidirectional": True, "merge_mode": "sum"}),
    "RNNCell": ("RNNCell", {}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


def states(module: Any, dtype: torch.dtype) -> Any:
    """Initial states that want a gradient, so that no step of a backward is left out."""
    if "Cell" in type(module).__name__:
        shapes = [(B, H)] * (2 if isinstance(module, rnnkernels.LSTMCell) else 1)
    else:
        rows = module.num_layers * (2 if module.bidirectional else 1)
        shapes = [(rows, B, module.proj_size or H)]
        shapes += [(rows, B, H)] if isinstance(module, rnnkernels.LSTM) else []
    made = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return made if len(made) > 1 else made[0]


def counts(module: Any, x: Tensor, hx: Any) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        outputs = tensors(module(x, hx))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward([t.sum() for t in outputs])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_counts_what_the_reference_multiplies(name: str, dtype: torch.dtype) -> None:
    """Whose products are torch's, which it counts one by one."""
    kind, options = MODULES[name]
    module = getattr(rnnkernels, kind)(I, H, dtype=dtype, **options)
    x = torch.randn(*((B, I) if "Cell" in kind else (T, B, I)), dtype=dtype, requires_grad=True)
    hx = states(module, dtype)
    found = counts(module, x, hx)
    with rnnkernels.use_backend("reference"):
        assert found == counts(module, x, hx)
    assert found[1] == 2 * found[0] > 0


def test_batch_invariant_gradient_of_the_input() -> None:
    """Whose product is an op of ours."""
    gru, x = rnnkernels.GRU(I, H), torch.randn(T, B, I, requires_grad=True)
    hx = states(gru, torch.float32)
    plain = counts(gru, x, hx)
    with rnnkernels.batch_invariant():
        assert counts(gru, x, hx) == plain


def test_by_hand() -> None:
    """The formula that is stated, with G = 4 gates and a projection to R = 3, for each part of the
    model by its name."""
    model = torch.nn.Sequential(rnnkernels.LSTM(I, H, bidirectional=True, proj_size=3))
    with FlopCounterMode(display=False) as mode:
        model(torch.randn(T, B, I))
    each = 2 * T * B * 2 * (4 * H * I + 4 * H * 3 + 3 * H)
    counted = mode.get_flop_counts()["Sequential.0"]
    assert counted == {torch.ops.rnnkernels.sequence_forward: each}


def test_packed_steps_count_alone() -> None:
    """lengths that can be read on the CPU leave no padding to multiply."""
    gru, x = rnnkernels.GRU(I, H), torch.randn(T, B, I)
    with FlopCounterMode(display=False) as mode:
        gru(x, lengths=[4, 1])
    assert mode.get_total_flops() == 2 * 5 * 3 * H * (I + H)


def test_double_backward_counts() -> None:
    gru, x = rnnkernels.GRU(I, H), torch.randn(T, B, I, requires_grad=True)
    (dx,) = torch.autograd.grad(gru(x)[0].sum(), x, create_graph=True)
    with FlopCounterMode(display=False) as mode:
        dx.square().sum().backward()
    assert mode.get_total_flops() > 0


def test_loops_of_tangents_count_as_those_of_values() -> None:
    lstm, x = rnnkernels.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    (dx,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    with FlopCounterMode(display=False) as mode:
        dx.square().sum().backward()
    counted, each = mode.get_flop_counts()["Global"], 2 * T * B * 4 * H
    kernels = torch.ops.rnnkernels
    assert counted[kernels.forward_tangents] == each * (I + H)
    assert counted[kernels.backward_record] == counted[kernels.backward_tangents] == each * H
