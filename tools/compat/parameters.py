"""Parameters, and what is done to them."""

from __future__ import annotations

import copy
import io
import os
import pickle
import pkgutil
import tempfile
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import parametrizations, parametrize, prune

from compat.registry import LAYERS, B, I, Library, Section, T, gradients, same, total

parameters = Section("Parameters")
row = parameters.row
X = torch.randn(T, B, I)


def trains(module: nn.Module) -> None:
    """Every parameter has a gradient, and a step changes the output."""
    before = module(X)[0].detach()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    total(module(X)).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    optimizer.step()
    assert (module(X)[0] != before).any()


@row("state_dict: keys and shapes of torch.nn, into it and back")
def _(library: Library) -> None:
    for kind in LAYERS:
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
        ours = library.make(kind, **options)
        theirs = Library("torch.nn", nn).make(kind, **options)
        with torch.no_grad():
            for p in ours.parameters():
                p.mul_(2)
        theirs.load_state_dict(ours.state_dict())
        same(ours(X), theirs(X))


@row("parametrizations.weight_norm")
def _(library: Library) -> None:
    trains(parametrizations.weight_norm(library.make("LSTM"), "weight_hh_l0"))


@row("nn.utils.weight_norm, by hooks")
def _(library: Library) -> None:
    trains(nn.utils.weight_norm(library.make("LSTM"), "weight_hh_l0"))


@row("parametrizations.spectral_norm, orthogonal")
def _(library: Library) -> None:
    for norm in (parametrizations.spectral_norm, parametrizations.orthogonal):
        trains(norm(library.make("GRU"), "weight_hh_l0"))


@row("parametrize.cached, deepcopy, state_dict, remove_parametrizations")
def _(library: Library) -> None:
    module = parametrizations.weight_norm(library.make("GRU"), "weight_hh_l0")
    want = module(X)
    with parametrize.cached():
        same(module(X), want)
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    same(twin(X), want)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    same(module(X), want)


@row("prune.l1_unstructured: trains, is removed, is copied")
def _(library: Library) -> None:
    module = library.make("LSTM")
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    total(module(X)).backward()
    prune.remove(module, "weight_hh_l0")
    same(copy.deepcopy(module)(X), module(X))
    assert (module.weight_hh_l0 == 0).float().mean() >= 0.5


@row("a raw tensor as a weight (weight drop)")
def _(library: Library) -> None:
    module = library.make("LSTM")
    raw = nn.Parameter(module.weight_hh_l0.detach().clone())
    del module._parameters["weight_hh_l0"]
    module.raw = raw
    outputs = []
    for scale in (1, 2):
        module.weight_hh_l0 = raw * scale
        outputs.append(module(X)[0])
    outputs[1].sum().backward()
    assert (outputs[0] != outputs[1]).any() and raw.grad is not None and raw.grad.any()


@row("p.data = ..., p.data.copy_, nn.init, vector_to_parameters")
def _(library: Library) -> None:
    other = library.make("LSTM", I, 6)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)

    def assigned(p: Tensor, q: Tensor) -> None:
        p.data = q.detach().clone()

    def copied(p: Tensor, q: Tensor) -> None:
        p.data.copy_(q)

    for change in (assigned, copied):
        module = library.make("LSTM", I, 6)
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            change(p, q)
        same(module(X), other(X))
    module = library.make("LSTM", I, 6)
    vector = nn.utils.parameters_to_vector(other.parameters())
    nn.utils.vector_to_parameters(vector, module.parameters())
    same(module(X), other(X))
    for p in module.parameters():
        nn.init.zeros_(p)
    assert not module(X)[0].any()


@row("functional_call with other weights, and its gradient")
def _(library: Library) -> None:
    for kind in LAYERS:
        module = library.make(kind)
        twice = {n: (2 * p).detach().requires_grad_() for n, p in module.named_parameters()}
        loss = total(torch.func.functional_call(module, twice, (X,)))
        found = torch.autograd.grad(loss, list(twice.values()))
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(2)
        same(found, gradients(module, X))


class Tied(nn.Module):
    """Two layers that share all parameters."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.one, self.two = library.make("GRU", I, I), library.make("GRU", I, I)
        for name, p in self.one.named_parameters():
            setattr(self.two, name, p)

    def forward(self, x: Tensor) -> Any:
        return self.two(self.one(x)[0])[0]


@row("tied weights in functional_call (tie_weights)")
def _(library: Library) -> None:
    module = Tied(library)
    twice: dict[str, Tensor] = {n: (2 * p).detach() for n, p in module.named_parameters()}
    found = torch.func.functional_call(module, twice, (X,), tie_weights=True)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    same(found, module(X))


@row("torch.__future__.set_swap_module_params_on_conversion: .double(), then a call")
def _(library: Library) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = library.make("GRU").double()
        want = library.make("GRU")(X)
        same(module(X.double())[0].float(), want[0])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@row("torch.utils.swap_tensors of parameters")
def _(library: Library) -> None:
    one, two = library.make("GRU"), library.make("GRU")
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(2)
    want = two(X)[0].detach()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.utils.swap_tensors(p, q)
    same(one(X)[0], want)


@row("deepcopy, pickle, torch.save of a module")
def _(library: Library) -> None:
    for kind in LAYERS:
        module, file = library.make(kind), io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for twin in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(file, weights_only=False),
        ):
            same(twin(X), module(X))


@row("torch.load(weights_only=True) of a state_dict")
def _(library: Library) -> None:
    module, file = library.make("LSTM"), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert isinstance(found, OrderedDict)
    twin = library.make("LSTM")
    twin.load_state_dict(found)
    same(twin(X), module(X))


@row("torch.load(weights_only=True) of a whole module, with safe_globals")
def _(library: Library) -> None:
    module, file = library.make("LSTM"), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    classes = [pkgutil.resolve_name(name) for name in needed]
    file.seek(0)
    with torch.serialization.safe_globals(classes):
        twin = torch.load(file, weights_only=True)
    same(twin(X), module(X))


@row("a state_dict by torch.load(mmap=True), load_state_dict(assign=True)")
def _(library: Library) -> None:
    module = library.make("LSTM")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pt")
        torch.save(module.state_dict(), path)
        twin = library.make("LSTM")
        twin.load_state_dict(torch.load(path, mmap=True), assign=True)
        same(twin(X), module(X))


def hogwild(_: int, module: nn.Module) -> None:
    """What a process does."""
    torch.set_num_threads(1)  # whose OpenMP a forked child must not wait for
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        total(module(X)).backward()
        optimizer.step()


def shared(library: Library, start: str) -> None:
    """Two processes that train one module."""
    module = library.make("LSTM").share_memory()
    before = total(module(X)).detach()
    start_processes(hogwild, (module,), 2, start_method=start)
    assert total(module(X)) < before


@row("share_memory, Hogwild in processes that are spawned", costly=True)
def _(library: Library) -> None:
    shared(library, "spawn")


@row("share_memory, Hogwild in processes that are forked", costly=True)
def _(library: Library) -> None:
    shared(library, "fork")


@row("nn.DataParallel on a CPU")
def _(library: Library) -> None:
    module = library.model()
    same(nn.DataParallel(module)(X), module(X))


@row(
    "isinstance(layer, torch.nn.LSTM)",
    exception="torch.compile refuses instances of torch.nn's layers by their type. "
    "`rnnkernels.torch_types` has classes that are, `convert(model, keep_type=True)` takes them.",
)
def _(library: Library) -> None:
    assert isinstance(library.make("LSTM"), nn.LSTM)


@row("the same by rnnkernels.torch_types", ours_only=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        assert isinstance(getattr(library.module.torch_types, kind)(I, 2), getattr(nn, kind))
