"""Who looks on: modes of torch that see every call and answer none, and a subclass of tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Subclass(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Count(TorchDispatchMode):
    """How often each op runs, by names like ``aten.mm``."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class Wanted(TorchDispatchMode):
    """Keeps what each call of ``sequence_gradients`` is asked for."""

    def __init__(self, found: list[list[int]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rnnkernels.sequence_gradients.default:
            self.found.append(list(args[[a.name for a in func._schema.arguments].index("wanted")]))
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
