"""Philox4x32-10, the counter-based generator of Salmon et al. 2011, in torch operations; the
kernels have it in ``csrc/common/philox.h``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_LOW = 0xFFFFFFFF


def _product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words."""
    whole = a * m  # modulo 2^64, of which the sign is the highest bit
    return (whole >> 32) & _LOW, whole & _LOW


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """The four words of a counter of four words and a key of two; words are int64, from 0 to
    2^32 - 1, of shapes that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]
