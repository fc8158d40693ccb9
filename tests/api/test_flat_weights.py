"""Where a layer takes its weights from: its attributes, or what stands in _flat_weights, as
torch.nn's layers do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import rnnkernels
from helpers import draw
from rnnkernels.nn.base import RNNBase

I, H = 3, 4
LAYERS = ("RNN", "LSTM", "GRU")
X = draw(5, 2, I, seed=7, dtype=torch.float64)


def dropconnect(base: Any) -> Any:
    """A public pattern: recurrent weights dropped by another list in their place."""

    class Dropped(base):  # type: ignore[misc]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            kept = self._flat_weights
            self._flat_weights = [
                w * 0.5 if name.startswith("weight_hh") else w
                for w, name in zip(kept, self._flat_weights_names, strict=True)
            ]
            out = super().forward(input, hx)
            self._flat_weights = kept
            return out

    return Dropped


def both(name: str, wrap: Callable[[Any], Any] = lambda base: base, **options: Any) -> list[Any]:
    """torch.nn's layer and ours with the same numbers."""
    pair = [wrap(getattr(m, name))(I, H, dtype=torch.float64, **options) for m in (nn, rnnkernels)]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def same(pair: list[Any], plain: Any = None) -> None:
    """Outputs and gradients agree; where ``plain`` is given, they are not those of that layer."""
    found = []
    for module in pair:
        module.zero_grad()
        y = module(X)[0]
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(found[1], found[0])
    if plain is not None:
        assert (plain(X)[0] - found[1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["1", "4"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_subclass_may_swap_the_list(name: str, options: dict[str, Any]) -> None:
    pair, plain = both(name, dropconnect, **options), both(name, **options)[0]
    plain.load_state_dict(pair[0].state_dict())
    same(pair, plain)
    same(pair, plain)  # a second time as the first


@pytest.mark.parametrize("name", LAYERS)
def test_an_entry_of_the_list_may_be_replaced(name: str) -> None:
    pair = both(name)
    plain = copy.deepcopy(pair[0])
    for module in pair:
        module._flat_weights[1] = module.weight_hh_l0.detach() * -1
    same(pair, plain)
    for module in pair:  # a replaced parameter brings all attributes back
        module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach().clone())
    same(pair)
    torch.testing.assert_close(pair[1](X)[0], plain(X)[0])
    for module in pair:  # and an entry put in place after that call counts again
        module._flat_weights[1] = module.weight_hh_l0.detach() * -1
    same(pair, plain)


def set_parameter(module: Any) -> None:
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)


def set_in_the_dictionary(module: Any) -> None:  # as sharding does
    module._parameters["weight_hh_l0"] = nn.Parameter(module.weight_hh_l0.detach() * 2)


def set_a_tensor(module: Any) -> None:  # as weight drop does
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.register_parameter("raw", raw)
    module.register_forward_pre_hook(
        lambda m, _: setattr(m, "weight_hh_l0", m.raw * 2), with_kwargs=False
    )


def assign_state(module: Any) -> None:
    state = {name: p.detach() * 2 for name, p in module.named_parameters()}
    module.load_state_dict(state, assign=True)


def to_empty_and_load(module: Any) -> None:
    state = {name: p.detach() * 2 for name, p in module.named_parameters()}
    module.to("meta").to_empty(device="cpu").load_state_dict(state)


def swap_tensors(module: Any) -> None:
    theirs = not isinstance(module, RNNBase)
    if theirs:
        module._flat_weight_refs = []  # weak references, which swap_tensors refuses
    torch.utils.swap_tensors(module.weight_hh_l0, nn.Parameter(module.weight_hh_l0.detach() * 2))
    if theirs:
        module._init_flat_weights()


CHANGES = [
    set_parameter,
    set_in_the_dictionary,
    set_a_tensor,
    assign_state,
    to_empty_and_load,
    swap_tensors,
    lambda m: m.share_memory(),
    lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=5),
    lambda m: m.weight_hh_l0.data.mul_(2),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: getattr(c, "__name__", "change"))
@pytest.mark.parametrize("name", LAYERS)
def test_changed_attributes_are_used(name: str, change: Callable[[Any], Any]) -> None:
    pair = both(name)
    same(pair)
    for module in pair:
        change(module)
    same(pair)
    if all(w.is_leaf for w in pair[1]._flat_weights):  # torch copies no others
        same([pair[0], copy.deepcopy(pair[1])])
        same([pair[0], pickle.loads(pickle.dumps(pair[1]))])


class Twice(nn.Module):
    count = 0

    def forward(self, w: Tensor) -> Tensor:
        Twice.count += 1
        return w * 2


@pytest.mark.parametrize("name", LAYERS)
def test_a_parametrization_is_computed_once_per_call(name: str) -> None:
    pair = both(name)
    for module in pair:
        parametrize.register_parametrization(module, "weight_hh_l0", Twice())
    same(pair)
    for _ in range(2):
        before = Twice.count
        pair[1](X)
        assert Twice.count == before + 1
    assert all(w.is_leaf for w in pair[1]._flat_weights)  # no graph is kept between calls
    same([pair[0], copy.deepcopy(pair[1])])


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_and_back(name: str) -> None:
    """The weights of a functional call serve that call alone."""
    module = both(name)[1]
    other = {k: p.detach() * 2 for k, p in module.named_parameters()}
    plain = module(X)[0]
    for _ in range(2):
        assert (torch.func.functional_call(module, other, (X,))[0] - plain).abs().max() > 1e-3
        assert torch.equal(module(X)[0], plain)
    assert torch.equal(copy.deepcopy(module)(X)[0], plain)
    stacked, buffers = torch.func.stack_module_state([module, copy.deepcopy(module)])
    second = {k: p[1] for k, p in stacked.items()}
    assert torch.equal(torch.func.functional_call(module, (second, buffers), (X,))[0], plain)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_swapped_list_compiles(name: str) -> None:
    layer = both(name, dropconnect)[1]
    want = layer(X)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X)[0], want)
    assert all(
        w is getattr(layer, n)
        for w, n in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )
    torch.testing.assert_close(layer(X)[0], want)
    torch.testing.assert_close(compiled(X)[0], want)


BAD: dict[str, tuple[Callable[[list[Any]], Any], type[Exception], str]] = {
    "short": (lambda w: w[:3], ValueError, r"_flat_weights: expected a list of 4 .*, got 3"),
    "long": (lambda w: [*w, w[0]], ValueError, r"_flat_weights: .*weight_ih_l0, .*, got 5"),
    "none": (lambda w: None, ValueError, r"_flat_weights: .*got a NoneType"),
    "not-a-tensor": (
        lambda w: [w[0], w[1], 3.0, w[3]],
        TypeError,
        r"_flat_weights\[2\]: expected a Tensor for bias_ih_l0, got float",
    ),
    "shape": (lambda w: [w[0], w[1][:, :2], w[2], w[3]], RuntimeError, "weight_hh_l0"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", LAYERS)
def test_a_bad_list_is_refused(name: str, bad: str) -> None:
    change, error, message = BAD[bad]
    module = getattr(rnnkernels, name)(I, H)
    module._flat_weights = change(module._flat_weights)
    with pytest.raises(error, match=message):
        module(torch.randn(5, 2, I))


def test_a_tuple_is_as_good_as_a_list() -> None:
    pair = both("GRU")
    for module in pair:
        module._flat_weights = tuple(w * 2 for w in module._flat_weights)
    same(pair)


def test_a_weight_that_is_gone_is_named() -> None:
    module: Any = rnnkernels.GRU(I, H)
    del module._parameters["weight_hh_l0"]
    module.weight_ih_l0 = nn.Parameter(torch.zeros(3 * H, I))
    with pytest.raises(TypeError, match=r"_flat_weights\[1\]: expected a Tensor for weight_hh_l0"):
        module(torch.randn(5, 2, I))
