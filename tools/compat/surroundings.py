"""Python around a layer: threads, modes, other libraries."""

from __future__ import annotations

import gc
import importlib
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from compat.registry import CELLS, LAYERS, B, I, Library, Section, T, gradients, same, total

surroundings = Section("Python and other libraries")
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


@row("no graph and no module is left after training")
def _(library: Library) -> None:
    module = library.make("LSTM")
    outputs = []
    for _ in range(10):
        y = module(X)[0]
        outputs.append(weakref.ref(y))
        total(y).backward()
    gone = weakref.ref(module)
    del y, module
    gc.collect()
    assert gone() is None and not any(output() is not None for output in outputs)


@row("torch.ao: quantize_dynamic makes the layer int8")
def _(library: Library) -> None:
    model = library.model()
    kinds = {type(model.layer)}
    done = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    assert "quantized" in type(done.layer).__module__


@row("safetensors: save_model, load_model", needs=["safetensors"])
def _(library: Library) -> None:
    files = importlib.import_module("safetensors.torch")
    model, twin = library.model(), library.model("LSTM")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.safetensors"))
        files.save_model(model, path)
        files.load_model(twin, path)
    same(twin(X), model(X))


@row("torchinfo.summary counts parameters", needs=["torchinfo"])
def _(library: Library) -> None:
    model = library.model()
    found = importlib.import_module("torchinfo").summary(model, input_data=X, verbose=0)
    assert found.total_params == sum(p.numel() for p in model.parameters())
