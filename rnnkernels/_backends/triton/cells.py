"""The cells of :mod:`rnnkernels.cells` in Triton: what one hidden unit does in one step.

Each is a pair of functions on tuples of blocks of units, in float32, with the same symbols:
``forward(gx, gh, prev) -> next, saved`` and
``backward(saved, prev, next, dnext) -> dgx, dgh, dprev``. Sequence kernels take them as constants.
"""

from functools import cache
from typing import Any

import triton
import triton.language as tl

from rnnkernels.cells import DefinedCell, find
from rnnkernels.cells.definition import compiled


@triton.jit
def tanh(x):
    """tanh to about 1e-7 of its value: near zero by its series, where 1 - exp(-2x) would cancel."""
    z = x * x
    series = 1382 / 155925 - z * (21844 / 6081075)
    series = 62 / 2835 - z * series
    series = 17 / 315 - z * series
    series = 2 / 15 - z * series
    series = 1 / 3 - z * series
    e = tl.exp(-2 * tl.abs(x))
    magnitude = (1 - e) / (1 + e)
    return tl.where(z < 0.16, x - x * z * series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and x above 20, as torch has it; what 1 + exp(x) rounds away is added."""
    e = tl.exp(tl.minimum(x, 21.0, propagate_nan=tl.PropagateNan.ALL))
    u = 1 + e
    return tl.where(x > 20, x, tl.log(u) + (e - (u - 1)) / u)


@triton.jit
def rnn_tanh_forward(gx, gh, prev):
    return (tanh(gx[0] + gh[0]),), ()


@triton.jit
def rnn_tanh_backward(saved, prev, next, dnext):
    d = dnext[0] * (1 - next[0] * next[0])
    return (d,), (d,), (tl.zeros_like(d),)


@triton.jit
def rnn_relu_forward(gx, gh, prev):
    sum = gx[0] + gh[0]
    return (tl.where(sum < 0, 0.0, sum),), ()  # a NaN stays one


@triton.jit
def rnn_relu_backward(saved, prev, next, dnext):
    d = tl.where(next[0] <= 0, 0.0, dnext[0])  # not hidden behind a zero where it is NaN
    return (d,), (d,), (tl.zeros_like(d),)


@triton.jit
def rnn_sigmoid_forward(gx, gh, prev):
    return (sigmoid(gx[0] + gh[0]),), ()


@triton.jit
def rnn_sigmoid_backward(saved, prev, next, dnext):
    d = dnext[0] * next[0] * (1 - next[0])
    return (d,), (d,), (tl.zeros_like(d),)


@triton.jit
def lstm_forward(gx, gh, prev):
    i = sigmoid(gx[0] + gh[0])
    f = sigmoid(gx[1] + gh[1])
    g = tanh(gx[2] + gh[2])
    o = sigmoid(gx[3] + gh[3])
    c = f * prev[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def lstm_backward(saved, prev, next, dnext):
    i, f, g, o = saved
    tanh_c = tanh(next[1])
    dc = dnext[1] + dnext[0] * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * prev[1] * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dnext[0] * tanh_c * o * (1 - o)
    return (di, df, dg, do), (di, df, dg, do), (tl.zeros_like(dc), dc * f)


@triton.jit
def gru_forward(gx, gh, prev):
    r = sigmoid(gx[0] + gh[0])
    z = sigmoid(gx[1] + gh[1])
    n = tanh(gx[2] + r * gh[2])
    return (n + z * (prev[0] - n),), (r, z, n, gh[2])


@triton.jit
def gru_backward(saved, prev, next, dnext):
    r, z, n, gh_n = saved
    dn = dnext[0] * (1 - z) * (1 - n * n)
    dr = dn * gh_n * r * (1 - r)
    dz = dnext[0] * (prev[0] - n) * z * (1 - z)
    return (dr, dz, dn), (dr, dz, dn * r), (dnext[0] * z,)


@triton.jit
def emitting_lstm_forward(gx, gh, prev):
    """Up to the output gate, in the place of h, and c: see csrc/common/normed.h."""
    next, saved = lstm_forward(gx, gh, prev)
    return (saved[3], next[1]), saved


@triton.jit
def emitting_lstm_backward(saved, prev, next, dnext):
    i, f, g, o = saved
    dc = dnext[1]
    di = dc * g * i * (1 - i)
    df = dc * prev[1] * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dnext[0] * o * (1 - o)
    return (di, df, dg, do), (di, df, dg, do), (tl.zeros_like(dc), dc * f)


@triton.jit
def lstm_emit(o, n):
    """h of the output gate and of the normalised c."""
    return o * tanh(n)


@triton.jit
def lstm_emit_backward(saved, n, dh):
    tanh_n = tanh(n)
    return dh * tanh_n, dh * saved[3] * (1 - tanh_n * tanh_n)


#: The two directions of every cell; of one whose products are normalised, between the norms.
PAIRS = {
    "rnn_tanh": (rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": (rnn_relu_forward, rnn_relu_backward),
    "rnn_sigmoid": (rnn_sigmoid_forward, rnn_sigmoid_backward),
    "lstm": (lstm_forward, lstm_backward),
    "gru": (gru_forward, gru_backward),
    "layer_norm_lstm": (emitting_lstm_forward, emitting_lstm_backward),
    "layer_norm_gru": (gru_forward, gru_backward),
}
#: How those that emit make h of slot 0 and of the normalised slot 1; and the gradients of both,
#: from what is saved, the latter and dh.
EMITS = {"layer_norm_lstm": (lstm_emit, lstm_emit_backward)}


@cache
def pair(name: str) -> tuple[Any, Any]:
    """Those of a cell, which a user may have written."""
    if name in PAIRS:
        return PAIRS[name]
    cell = find(name)
    assert isinstance(cell, DefinedCell)
    names = compiled(cell.triton, name, "triton")
    return names["forward"], names["backward"]
