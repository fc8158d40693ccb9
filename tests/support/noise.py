"""What csrc/common/noise.h says of draws, in NumPy; and written cells that draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rnnkernels
from rnnkernels._core.call import Layer
from rnnkernels._core.noise import new_draws
from rnnkernels.cells import DefinedCell, stated, zoned_out
from rnnkernels.functional._noise import known

Array = NDArray[Any]
LOW = np.uint64(0xFFFFFFFF)


def philox(counter: list[Array], key: tuple[int, int]) -> list[Array]:
    """Salmon et al. 2011, section 3.3 and table 2, of words that broadcast."""
    x = [np.asarray(c, np.uint64) & LOW for c in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        high, low = (lambda p: p >> np.uint64(32)), (lambda p: p & LOW)
        x = [high(b) ^ x[1] ^ k[0], low(b), high(a) ^ x[3] ^ k[1], low(a)]
        k = [(k[0] + np.uint64(0x9E3779B9)) & LOW, (k[1] + np.uint64(0xBB67AE85)) & LOW]
    return x


def masks(seed: int, p: float, leaf: int, T: int, B: int, H: int, stream: int = 0) -> Array:
    """The numbers [T, B, H] that a leaf of a cell draws in a direction of a layer."""
    t, b, unit = np.ix_(np.arange(T), np.arange(B), np.arange(H))
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    words = philox([unit, t, b, np.uint64(stream << 8 | leaf // 4)], key)
    return np.broadcast_to(words[leaf % 4] < np.uint64(int(p * 2**32)), (T, B, H)).astype(float)


def seed_of(manual_seed: int) -> int:
    """The seed that the next call draws after torch.manual_seed."""
    torch.manual_seed(manual_seed)
    return int(new_draws(1, torch.device("cpu"))[0, 0])


@rnnkernels.cell
def noisy(
    a: Any,
    n: Any,
    *,
    h: Any,
    p: Any = rnnkernels.per_unit(0.5),
    keep: Any = rnnkernels.bernoulli(0.8),
    more: Any = rnnkernels.bernoulli(0.4),
) -> Any:
    """A parameter, a gate whose parts are apart, noise beside it and inside of a derivative."""
    a = torch.sigmoid(a + more * p)
    return keep * a * torch.tanh(n.x + a * n.h) + (1 - a) * h


ZONED_LSTM: DefinedCell = known(zoned_out(stated("lstm"), (True, True)))
ZONED_GRU: DefinedCell = known(zoned_out(stated("gru"), (True,)))
#: With a parameter, three numbers drawn: one of them is zoneout's.
ZONED_NOISY: DefinedCell = known(zoned_out(noisy, (True,)))
PROBABILITIES = {
    ZONED_LSTM.name: (0.3, 0.6),
    ZONED_GRU.name: (0.4,),
    ZONED_NOISY.name: (0.8, 0.4, 0.3),
}


def drawing(call: Layer, seed: int = 7) -> Layer:
    """A call of one of these cells, with its noise."""
    torch.manual_seed(seed)
    p = torch.tensor(PROBABILITIES[call.cell_name], dtype=torch.float64, device=call.x.device)
    return call._replace(noise=p, draws=new_draws(call.B, call.x.device))


def kept(h: Tensor, initial: Tensor) -> Tensor:
    """Where a state [T, B, H] is the one before it, to the bit."""
    return h == torch.cat([initial[None], h[:-1]])
