"""``torch.vmap`` over models that read the same input: one loop for all, and what each gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnkernels
from helpers import counted, draw, tensors
from rnnkernels import _ops
from transforms import F64, B, H, I, T, stacked

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
N = 3
Tensors = dict[str, Tensor]
LENGTHS = torch.tensor([3, T])
RESET = draw(T, B, seed=9, dtype=F64) > 0.4
BOTH = {"bidirectional": True}

#: Classes, what they take beside the sizes, and options of a call.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "RNN": ("RNN", {"bias": False, "batch_first": True}, {}),
    "LSTM": ("LSTM", {}, {}),
    "both": ("LSTM", BOTH, {"reset": RESET}),
    "lengths": ("GRU", BOTH, {"lengths": LENGTHS}),
    "all-states": ("LSTM", BOTH, {"return_all_states": True}),
    "merged": ("GRU", BOTH | {"merge_mode": "mul"}, {"return_all_states": True}),
    "heads": ("LSTM", BOTH | {"heads": 2}, {"truncate": 2}),
    "merged-heads": ("GRU", BOTH | {"heads": 2, "merge_mode": "sum"}, {}),
    "bounded": ("LSTM", {}, {"grad_clip": ("norm", 0.02)}),
    "parameters": ("PeepholeLSTM", BOTH, {}),
    "states": ("SLSTM", {"bias_mode": "single"}, {}),
    "IndRNN": ("IndRNN", BOTH, {}),
    "packed": ("GRU", BOTH, {}),
    "LSTMCell": ("LSTMCell", {}, {}),
    "RNNCell": ("RNNCell", {"nonlinearity": "relu"}, {}),
    "stack": ("GRU", {"num_layers": 2}, {}),
    "projected": ("LSTM", {"proj_size": 2}, {}),
    "normed": ("GRU", {"layer_norm": True}, {}),
}
#: Those whose lanes run one after the other.
APART = ("stack", "projected", "normed")


class Ensemble:
    """A module, its parameters and states of every lane, and an input that all read."""

    def __init__(self, name: str) -> None:
        kind, options, self.call = CASES[name]
        torch.manual_seed(0)
        self.module = getattr(rnnkernels, kind)(I, H, dtype=F64, **options)
        self.parameters = {
            n: torch.stack([p.detach() * (1 + 0.1 * i) for i in range(N)])
            for n, p in self.module.named_parameters()
        }
        one = kind.endswith("Cell")
        self.x = draw(B, I, seed=1, dtype=F64) if one else draw(T, B, I, seed=1, dtype=F64)
        self.lengths = None
        if options.get("batch_first"):
            self.x = self.x.transpose(0, 1)
        if name == "packed":
            packed = pack_sequence([torch.zeros(n, I) for n in (2, T, 1)], enforce_sorted=False)
            self.x, self.lengths = draw(*packed.data.shape, seed=1, dtype=F64), packed[1:]
        rows = 3 if name == "packed" else B
        D = 2 if options.get("bidirectional") else 1
        shape = (rows, H) if one else (D * options.get("num_layers", 1), rows, H)
        states = {"LSTM": 2, "LSTMCell": 2, "PeepholeLSTM": 2, "SLSTM": 4}.get(kind, 1)
        hx = [draw(N, *shape, seed=2 + i, dtype=F64) for i in range(states)]
        hx[0] = hx[0][..., : options.get("proj_size", H)]
        self.hx = tuple(hx) if states > 1 else hx[0]

    def __call__(self, parameters: Tensors, hx: Any, x: Tensor) -> list[Tensor]:
        given = x if self.lengths is None else PackedSequence(x, *self.lengths)
        found = functional_call(self.module, parameters, (given, hx), self.call)
        return [t for t in tensors(found) if t.is_floating_point()]

    def loss(self, parameters: Tensors, hx: Any, x: Tensor) -> Tensor:
        terms = []
        for i, out in enumerate(self(parameters, hx, x)):
            factor = torch.linspace(-1, 1 + 0.1 * i, out.numel(), dtype=F64).view(out.shape)
            terms.append((out * factor).sum())
        return torch.stack(terms).sum()

    def lane(self, i: int) -> tuple[Tensors, Any]:
        of = lambda t: t[i]  # noqa: E731
        return torch.utils._pytree.tree_map(of, (self.parameters, self.hx))

    def gradients(self, i: int) -> tuple[Tensors, Any, Tensor]:
        """Those of a lane by itself, in parameters, states and the input."""
        found: tuple[Tensors, Any, Tensor] = torch.utils._pytree.tree_map(
            lambda t: t.clone().requires_grad_(), (*self.lane(i), self.x)
        )
        flat, spec = torch.utils._pytree.tree_flatten(found)
        grads = torch.autograd.grad(self.loss(*found), flat)
        return torch.utils._pytree.tree_unflatten(grads, spec)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_equals_each_alone(name: str) -> None:
    """Outputs and gradients, taken in each lane and through all."""
    of = Ensemble(name)
    run = vmap(of, (0, 0, None))
    close(run(of.parameters, of.hx, of.x), stacked(of(*of.lane(i), of.x) for i in range(N)))
    want = stacked(of.gradients(i) for i in range(N))
    loops = []

    def each(*of_what: int) -> Any:
        return vmap(grad(of.loss, of_what), (0, 0, None))(of.parameters, of.hx, of.x)

    def total(parameters: Tensors, hx: Any, x: Tensor) -> Tensor:
        return vmap(of.loss, (0, 0, None))(parameters, hx, x).sum()

    through = lambda: grad(total, (0, 1, 2))(of.parameters, of.hx, of.x)  # noqa: E731
    for run in (lambda: close(each(0, 1), want[:2]), lambda: close(through()[:2], want[:2])):
        loops.append(counted(run)["rnnkernels::sequence_backward"])
    assert loops == ([N, N] if name in APART else [1, 1])
    close(through()[2], want[2].sum(0))
    close(each(2), (want[2],))  # which is no sum over lanes


@pytest.mark.parametrize("option", ["lengths", "reset"])
def test_what_each_lane_has_for_itself(option: str) -> None:
    """Beside its weights: such lanes run one after the other."""
    gru = rnnkernels.GRU(I, H, dtype=F64, bidirectional=True)
    own = {
        n: torch.stack([p.detach() * (1 + i) for i in range(2)]) for n, p in gru.named_parameters()
    }
    x = draw(T, B, I, seed=1, dtype=F64)
    each = {"lengths": torch.tensor([[1, 4], [2, 3]]), "reset": torch.stack([RESET, ~RESET])}[
        option
    ]

    def loss(parameters: Tensors, given: Tensor) -> Tensor:
        return functional_call(gru, parameters, (x,), {option: given})[0].square().sum()

    one = lambda i: grad(loss)({n: p[i] for n, p in own.items()}, each[i])  # noqa: E731
    close(vmap(grad(loss))(own, each), stacked(one(i) for i in range(2)))


@pytest.mark.parametrize("name", ["both", "normed"])
def test_what_only_some_lanes_have(name: str) -> None:
    """One weight of each lane, the others and the states shared."""
    of = Ensemble(name)
    shared, hx = of.lane(0)
    own = shared | {"weight_hh_l0": of.parameters["weight_hh_l0"]}
    dims = {n: 0 if n == "weight_hh_l0" else None for n in own}
    some = lambda i: shared | {"weight_hh_l0": own["weight_hh_l0"][i]}  # noqa: E731
    want = stacked(grad(of.loss, (0, 1))(some(i), hx, of.x) for i in range(N))
    close(vmap(grad(of.loss, (0, 1)), (dims, None, None))(own, hx, of.x), want)


def test_what_no_lane_has_for_itself() -> None:
    """Then there are none to the layer, but those of an outer vmap."""
    gru, x = rnnkernels.GRU(I, H, dtype=F64), draw(2, T, B, I, seed=1, dtype=F64)
    parameters = {n: p.detach() for n, p in gru.named_parameters()}
    factors = torch.ones(N, dtype=F64)

    def run(factor: Tensor, x: Tensor) -> Tensor:
        y: Tensor = functional_call(gru, parameters, (x,))[0]
        assert torch._C._functorch.maybe_get_level(y) == 1
        return y * factor

    found = vmap(lambda x: vmap(run, (0, None))(factors, x))(x)
    close(found, stacked(gru(some)[0].expand(N, T, B, H) for some in x))


def test_two_dimensions_of_lanes() -> None:
    """Models of both; inputs of the outer one, and of the inner one, whose models then differ."""
    of = Ensemble("both")
    one = grad(of.loss)
    models = [of.lane(i) for i in range(N)]
    grid = torch.utils._pytree.tree_map(
        lambda t: torch.stack([t, t.flip(0)]), (of.parameters, of.hx)
    )
    every = vmap(vmap(one, (0, 0, None)), (0, 0, None))
    found = every(*grid, of.x)
    want = stacked(one(*model, of.x) for model in models)
    close({n: g[0] for n, g in found.items()}, want)
    close({n: g[1].flip(0) for n, g in found.items()}, want)
    x = torch.stack([of.x, of.x.flip(0)])
    want = stacked(stacked(one(*model, some) for model in models) for some in x)
    close(vmap(vmap(one, (0, 0, None)), (None, None, 0))(of.parameters, of.hx, x), want)
    want = stacked(stacked(one(*model, some) for some in x) for model in models)
    close(vmap(vmap(one, (None, None, 0)), (0, 0, None))(of.parameters, of.hx, x), want)


@pytest.mark.parametrize("name", ["both", "merged-heads"])
def test_further_derivatives(name: str) -> None:
    """A penalty on gradients in each lane and through all; batches of gradients."""
    of = Ensemble(name)

    def penalty(parameters: Tensors, hx: Any, x: Tensor) -> Tensor:
        found = grad(lambda p: self_product(of(p, hx, x)))(parameters)
        return self_product(list(found.values()))

    want = stacked(grad(penalty)(*of.lane(i), of.x) for i in range(N))
    close(vmap(grad(penalty), (0, 0, None))(of.parameters, of.hx, of.x), want)

    def total(parameters: Tensors) -> Tensor:
        return vmap(penalty, (0, 0, None))(parameters, of.hx, of.x).sum()

    close(grad(total)(of.parameters), want)
    leaves = {n: p.clone().requires_grad_() for n, p in of.parameters.items()}
    y = vmap(of, (0, 0, None))(leaves, of.hx, of.x)[0]
    seeds, each = draw(2, *y.shape, seed=8, dtype=F64), list(leaves.values())
    found = torch.autograd.grad(y, each, seeds, is_grads_batched=True, retain_graph=True)
    close(found, stacked(torch.autograd.grad(y, each, seed, retain_graph=True) for seed in seeds))


def self_product(outputs: list[Tensor]) -> Tensor:
    return torch.stack([out.square().sum() for out in outputs]).sum()


@pytest.mark.parametrize("option", ["recurrent_dropout", "zoneout"])
def test_what_falls_out_in_each(option: str) -> None:
    """The same in all lanes, or something else in each, as vmap is asked for."""
    torch.manual_seed(0)
    gru = rnnkernels.GRU(I, H, dtype=F64, **{option: 0.5})
    own = {n: torch.stack([p.detach()] * N) for n, p in gru.named_parameters()}
    x = draw(T, B, I, seed=1, dtype=F64)
    loss = lambda p: functional_call(gru, p, (x,))[0].square().sum()  # noqa: E731

    def lanes(randomness: str) -> Tensor:
        torch.manual_seed(0)
        return vmap(grad(loss), randomness=randomness)(own)["weight_hh_l0"]

    same, different = lanes("same"), lanes("different")
    torch.manual_seed(0)
    alone = grad(loss)({n: p[0] for n, p in own.items()})["weight_hh_l0"]
    close(same, alone.expand_as(same))
    assert all((different[0] - other).abs().max() > 1e-3 for other in different[1:])


def test_compiled() -> None:
    of = Ensemble("both")

    def run(parameters: Tensors, hx: Any, x: Tensor) -> Any:
        return vmap(grad(of.loss, (0, 1)), (0, 0, None))(parameters, hx, x)

    torch._dynamo.reset()
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(of.parameters, of.hx, of.x)
    close(found, run(of.parameters, of.hx, of.x))


def test_exported() -> None:
    """The graph has the vmap itself, and whoever runs it one loop."""
    of = Ensemble("LSTM")

    class Model(nn.Module):
        def forward(self, parameters: Tensors, hx: Any, x: Tensor) -> Tensor:
            return vmap(of, (0, 0, None))(parameters, hx, x)[0]  # type: ignore[no-any-return]

    given = (of.parameters, of.hx, of.x)
    program = torch.export.export(Model(), given).module()
    calls = counted(lambda: close(program(*given), Model()(*given)))
    assert calls["rnnkernels::sequence_forward"] == 4  # of either the one in vmap, and one below it
