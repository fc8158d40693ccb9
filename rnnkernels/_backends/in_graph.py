"""What torch.compile is shown of a step of a cell in training on a CPU: its formula in torch
operations, which the compiler fuses, in place of an op that it cannot look into.

Of more than a few rows the op is torch's products with a cell between them, and the compiler has
the same. Around it, an op costs its call, an allocation for each of its outputs, and a copy of h
where the states of a loop are stacked; the compiler writes h where it goes to. A few rows, and
calls without gradients, whose weights stay packed, have products of our own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels._core.call import Call, LayerWeights, Result, needs_gradient
from rnnkernels.cells import CELLS, Values

#: Rows that the op has a product of its own for: kDotRows in csrc/cpu/single.cpp.
OWN_ROWS = 8


def takes(call: Call) -> bool:
    """Whether a compiler is to see the formula of this call. Where a guard would be needed to tell
    how many rows there are, it is not: one graph is to hold for all sizes of the batch."""
    if not call.step or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if call.cell_name not in CELLS or call.heads > 1 or call.draws is not None:
        return False
    if call.x.device.type != "cpu" or call.x.dtype not in (torch.float32, torch.float64):
        return False
    return needs_gradient(call.tensors) and _has_rows(call) and _fits(call)


def _has_rows(call: Call) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # costs a second

    return statically_known_true(call.x.size(1) > OWN_ROWS)


def _fits(call: Call) -> bool:
    """Whether weights are as they ought to be; else the op tells what is wrong, by name."""
    w = LayerWeights.from_list(call.weights)
    rows, I, H = call.cell.G * call.H, call.x.size(2), call.H
    sizes = {"w_ih": (rows, I), "w_hh": (rows, H), "b_ih": (rows,), "b_hh": (rows,)}
    own = [(t, sizes[name]) for name, t in w._asdict().items() if name in sizes and t is not None]
    like = call.x.dtype, call.x.device
    return all(t.shape == size and (t.dtype, t.device) == like for t, size in own)


def run(call: Call) -> Result:
    """The next states; y is h itself, which a cell does not return a second time."""
    w = LayerWeights.from_list(call.weights)
    assert w.w_hh is not None
    prev = [t[0] for t in (call.h0, call.c0) if t is not None]
    gx = F.linear(call.x[0], w.w_ih, w.b_ih)
    gh = F.linear(prev[0], w.w_hh, w.b_hh)
    if call.cell.A == 0:  # backward then puts the gradients of the gates together once
        gx, gh = gx + gh, gx.new_zeros(call.cell.G)
    next, _ = call.cell.forward(_gates(gx, call.cell.G), _gates(gh, call.cell.G), prev)
    h, c = (next[i].unsqueeze(0) if i < len(next) else None for i in (0, 1))
    assert h is not None
    return Result(h, h, c, None, None)


def _gates(together: Tensor, G: int) -> Values:
    """Those that lie side by side; a chunk of one would be copied in backward."""
    return [together] if G == 1 else together.chunk(G, -1)
