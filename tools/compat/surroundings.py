"""Python around a layer: threads, modes, its own options."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset

from compat.processes import WHERE
from compat.processes import run as run_python
from compat.registry import CELLS, LAYERS, B, I, Library, Section, T, gradients, same, total

surroundings = Section("Python")
row = surroundings.row
X = torch.randn(T, B, I)


@row("8 threads of inference on one module: the same bits")
def _(library: Library) -> None:
    for kind in LAYERS:
        module = library.make(kind)
        with torch.no_grad():
            want = module(X)[0]

        def run(_: int, module: Any = module) -> Tensor:
            with torch.no_grad():
                result: Tensor = module(X)[0]
            return result

        with ThreadPoolExecutor(8) as pool:
            assert all(torch.equal(found, want) for found in pool.map(run, range(64)))


@row("4 threads that train copies of one module: the same gradients")
def _(library: Library) -> None:
    want = gradients(library.make("LSTM"), X)
    modules = [library.make("LSTM") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda module: gradients(module, X), modules):
            same(found, want)


@row("TorchFunctionMode and TorchDispatchMode see the calls")
def _(library: Library) -> None:
    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append("function")
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append("dispatch")
            return func(*args, **(kwargs or {}))

    for kind in (*LAYERS, *CELLS):
        module, x = library.make(kind), X[0] if kind in CELLS else X
        want = module(x)
        for mode in (Functions, Dispatch):
            seen.clear()
            with mode():
                same(module(x), want)
            assert seen, f"{kind}: {mode.__name__} saw nothing"


@row("sizes as np.int64, input from numpy and by DLPack")
def _(library: Library) -> None:
    sizes: Any = np.array([I, 3])
    module = library.make("LSTM", *sizes)
    same(module(torch.from_numpy(X.numpy()))[0], module(torch.utils.dlpack.from_dlpack(X))[0])
    assert module(X)[0].detach().numpy().shape == (T, B, 3)


@row("no graph and no module is left after 300 steps of training")
def _(library: Library) -> None:
    module = library.make("LSTM")
    outputs = []
    for _ in range(300):
        y = module(X)[0]
        outputs.append(weakref.ref(y))
        total(y).backward()
    gone = weakref.ref(module)
    del y, module
    gc.collect()
    assert gone() is None and not any(output() is not None for output in outputs)


@row("python -O, -OO, -W error, -X dev, -I", costly=True)
def _(library: Library) -> None:
    code = (
        f"import sys; sys.path.insert(0, {WHERE!r}); import torch; from {{module}} import LSTM;"
        "LSTM(4, 6, num_layers=2)(torch.ones(3, 2, 4))[0].sum().backward()"
    ).format(module=library.module.__name__)
    for flags in (["-O"], ["-OO"], ["-W", "error"], ["-X", "dev"], ["-I"]):
        run_python(code, flags=flags)


@row("import after torch, warnings being errors", ours_only=True, costly=True)
def _(library: Library) -> None:
    run_python("import torch, rnnkernels", flags=["-W", "error"])


@row("torch.utils.benchmark.Timer; workers of a DataLoader run a layer", costly=True)
def _(library: Library) -> None:
    module = library.make("GRU").eval()
    timer = Timer(
        "with torch.no_grad(): module(x)", globals={"module": module, "x": X, "torch": torch}
    )
    assert timer.timeit(2).median > 0
    found = list(DataLoader(Encoded(module), batch_size=None, num_workers=1))
    with torch.no_grad():
        same(found, [module(X + i)[0] for i in range(3)])


class Encoded(Dataset[Tensor]):
    """What a layer makes of each input, in whatever process asks."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Tensor:
        if i >= len(self):
            raise IndexError(i)
        with torch.no_grad():
            result: Tensor = self.module(X + i)[0]
        return result
