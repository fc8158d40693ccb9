"""Random arguments, most of them good, and what is done to one to make it odd or wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
#: A dimension whose product with others, or with the size of a number, passes 64 bits, or memory.
HUGE = (2**44, 2**59, 2**62)
INTEGERS: tuple[Any, ...] = (
    0, 1, 2, 3, -1, -(2**31), 2**31, 2**32 + 1, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 2**63,
    2**70, True, 1.0, 1.5, math.nan, math.inf, "3", None, [1], (),
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 0.0, 1e-30, 5e-324, 0.5, 1.0, -0.1, 2.0, 1e30, 1e308, math.nan, math.inf, -math.inf, True,
    None, "0.5", [], (0.5,), (0.1, 0.2), ("norm", 1.0), ("tanh", 0.0), ("value", math.nan), 1j,
)  # fmt: skip
WORDS: tuple[Any, ...] = (
    "", "x", "lstm", "LSTM", "gru", "lstm\0", "é" * 9, "concat", "sum", "mul", "mean", "none",
    "value", "norm", "tanh", "relu", "cpu", "cuda", "reference", "torch", "triton", "a" * 3000,
    "mgu-00000000", None, 1, [],
)  # fmt: skip
FLAGS: tuple[Any, ...] = (True, False, 0, 1, 2, -1, None, "yes", 1.0, [])


@dataclass
class Drawn:
    """The random numbers of one input, and what was done to its arguments in words."""

    seed: int
    number: int
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.number}")
        self.torch = torch.Generator().manual_seed(self.rng.getrandbits(60))

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.torch, dtype=torch.float64)
        return (values * scale).to(dtype)

    def spoiled(self, name: str, value: Any) -> Any:
        """Another value in place of this one, which may be as good."""
        if isinstance(value, Tensor):
            word, new = _tensor(self, value)
        elif isinstance(value, PackedSequence):
            word, new = _packed(self, value)
        elif isinstance(value, (list, tuple)) and value and self.chance(0.8):
            word, new = _list(self, name, value)
        else:
            word, new = _plain(self, value)
        self.done.append(f"{name}: {word}")
        return new


def _plain(drawn: Drawn, value: Any) -> tuple[str, Any]:
    if isinstance(value, bool):
        kinds = FLAGS
    elif isinstance(value, int):
        kinds = INTEGERS
    elif isinstance(value, float):
        kinds = NUMBERS
    elif isinstance(value, str):
        kinds = WORDS
    else:
        kinds = (*INTEGERS, *NUMBERS, *WORDS, *FLAGS, torch.zeros(3), object())
    new = drawn.pick(*kinds)
    if isinstance(new, Tensor):
        return f"a tensor {list(new.shape)}", new
    return (repr(new) if len(repr(new)) < 30 else f"{repr(new)[:20]}..."), new


def _list(drawn: Drawn, name: str, value: Any) -> tuple[str, Any]:
    kind, items = type(value), list(value)
    place = drawn.rng.randrange(len(items))
    match drawn.pick("item", "item", "item", "shorter", "longer", "none", "alone", "empty"):
        case "item":
            inner = Drawn(drawn.seed, drawn.number)
            inner.rng, inner.torch = drawn.rng, drawn.torch
            items[place] = inner.spoiled(f"{name}[{place}]", items[place])
            return inner.done[0].removeprefix(name), kind(items)
        case "shorter":
            del items[place]
            return f"without [{place}]", kind(items)
        case "longer":
            items.insert(place, items[place])
            return f"[{place}] twice", kind(items)
        case "none":
            items[place] = None
            return f"[{place}] None", kind(items)
        case "alone":
            return f"[{place}] alone", items[place]
        case _:
            return "empty", kind([])


def _packed(drawn: Drawn, value: PackedSequence) -> tuple[str, Any]:
    """Another part of it, which anybody can exchange."""
    place = drawn.pick(0, 0, 1, 1, 2, 3)
    part = value[place]
    if not isinstance(part, Tensor):  # exchanged already
        return "as it is", value
    word, new = _tensor(drawn, part)
    parts = list(value)
    parts[place] = new
    return f"{PackedSequence._fields[place]} {word}", tuple.__new__(PackedSequence, parts)


Change = tuple[str, Callable[[Drawn, Tensor], Any]]


def _resized(drawn: Drawn, t: Tensor) -> Tensor:
    shape = list(t.shape) or [1]
    place = drawn.rng.randrange(len(shape))
    shape[place] = max(0, shape[place] + drawn.pick(-2, -1, 1, 2, 9, -shape[place]))
    return t.new_zeros(shape)


def _permuted(drawn: Drawn, t: Tensor) -> Tensor:
    order = list(range(t.dim()))
    drawn.rng.shuffle(order)
    back = [order.index(i) for i in range(t.dim())]
    return t.permute(order).contiguous().permute(back)


def _strided(drawn: Drawn, t: Tensor) -> Tensor:
    """The same numbers, each dimension with gaps, somewhere in a storage."""
    if t.dim() == 0:
        return t.clone()
    steps = [drawn.pick(1, 2, 3) for _ in t.shape]
    big = t.new_full([n * s + 1 for n, s in zip(t.shape, steps, strict=True)], 1)
    view = big[tuple(slice(1, 1 + n * s, s) for n, s in zip(t.shape, steps, strict=True))]
    if tuple(view.shape) != tuple(t.shape):
        return t.clone()
    view.copy_(t.detach())
    return view


def _filled(drawn: Drawn, t: Tensor) -> Tensor:
    if not t.is_floating_point() or t.numel() == 0:
        value = drawn.pick(-1, 0, 1, 2**31, 2**62, -(2**63)) if t.dtype == torch.int64 else 1
        return torch.full_like(t, value) if not t.is_complex() else t.clone()
    new = t.detach().clone()
    value = drawn.pick(math.nan, math.inf, -math.inf, 1e-40, 3e4, -0.0)
    new.view(-1)[drawn.rng.randrange(new.numel())] = value
    return new


def _huge(drawn: Drawn, t: Tensor) -> Tensor:
    """So large as a tensor of stride 0 that nothing of its size fits in memory."""
    shape = list(t.shape) or [1]
    shape[drawn.rng.randrange(len(shape))] = drawn.pick(*HUGE)
    return torch.zeros((), dtype=t.dtype).as_strided(shape, [0] * len(shape))


#: Good ones first: what a call may be given as well.
CHANGES: tuple[Change, ...] = (
    ("permuted in memory", _permuted),
    ("permuted in memory", _permuted),
    ("with gaps in memory", _strided),
    ("with gaps in memory", _strided),
    ("one number of stride 0", lambda d, t: t.new_zeros(()).expand(t.shape)),
    ("NaN, infinite, tiny or far out", _filled),
    ("NaN, infinite, tiny or far out", _filled),
    ("asking for a gradient",
     lambda d, t: t.detach().clone().requires_grad_(t.is_floating_point())),
    ("as a Parameter", lambda d, t: torch.nn.Parameter(t.detach(), t.is_floating_point())),
    ("made in inference mode", lambda d, t: _inference(t)),
    ("negated lazily", lambda d, t: torch._neg_view(t) if t.is_floating_point() else t),
    ("of another dtype", lambda d, t: t.detach().to(d.pick(*FLOATS, *OTHERS))),
    ("of another dtype", lambda d, t: t.detach().to(d.pick(*FLOATS, *OTHERS))),
    ("on the device meta", lambda d, t: t.detach().to("meta")),
    ("of another size", _resized),
    ("of another size", _resized),
    ("huge", _huge),
    ("a scalar", lambda d, t: t.new_zeros(())),
    ("flat", lambda d, t: t.detach().reshape(-1)),
    ("with one dimension more", lambda d, t: t.detach().unsqueeze(d.rng.randrange(t.dim() + 1))),
    ("empty", lambda d, t: t.new_zeros([0] * t.dim())),
    ("sparse", lambda d, t: t.detach().to_sparse()),
    ("as a list", lambda d, t: t.tolist() if t.numel() < 1000 else []),
    ("as an array", lambda d, t: _array(t)),
    ("None", lambda d, t: None),
    ("a text", lambda d, t: "tensor"),
)  # fmt: skip


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.detach().clone()


def _array(t: Tensor) -> Any:
    return t.detach().float().numpy() if t.dtype == torch.bfloat16 else t.detach().numpy()


def _tensor(drawn: Drawn, t: Tensor) -> tuple[str, Any]:
    word, change = drawn.pick(*CHANGES)
    if t.numel() > 10**6:  # already huge: copies would take for ever
        return "as it is", t
    try:
        return word, change(drawn, t)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        MemoryError,
    ):  # torch has none, such as sparse float8
        return "as it is", t
