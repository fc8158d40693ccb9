"""``torch.vmap`` and ``torch.func``'s gradients over the kernels: what each lane gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnkernels
from helpers import counted, draw, tensors
from rnnkernels import _ops
from rnnkernels._core import reference
from rnnkernels._ops.schema import OF_ROWS, OF_STEPS
from transforms import (
    CASES,
    F64,
    FEW_CASES,
    LANES,
    MODULES,
    B,
    Case,
    H,
    I,
    Lane,
    T,
    second_gradients,
    stacked,
)

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
cases = pytest.mark.parametrize(("module", "call"), CASES)
modules = pytest.mark.parametrize("module", MODULES)
close = torch.testing.assert_close


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on the reference."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "run", refuse)


def gradients(case: Case, parameters: Any, lane: Lane) -> Any:
    """Those of the loss in the parameters and the input, by torch.func."""

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return case.loss(parameters, lane._replace(x=x))

    return grad(loss, (0, 1))(parameters, lane.x)


def each_alone(case: Case) -> list[Any]:
    return [case.gradients(case.parameters, case.lane(i)) for i in range(LANES)]


@cases
@pytest.mark.usefixtures("kernels_alone")
def test_outputs(module: str, call: str) -> None:
    case = Case(module, call)
    want = stacked(case(case.parameters, case.lane(i)) for i in range(LANES))
    close(vmap(case, (None, 0))(case.parameters, case.lanes), want)
    close(vmap(case, (None, 0), chunk_size=2)(case.parameters, case.lanes), want)


@cases
@pytest.mark.usefixtures("kernels_alone")
def test_gradients_of_each_lane(module: str, call: str) -> None:
    """In parameters that all share, which is what each sample of a batch contributes."""
    case = Case(module, call)
    found = vmap(lambda p, lane: gradients(case, p, lane), (None, 0))(case.parameters, case.lanes)
    close(found, stacked(each_alone(case)))
    close(gradients(case, case.parameters, case.lane(0)), each_alone(case)[0])


@cases
@pytest.mark.usefixtures("kernels_alone")
def test_gradients_of_an_ensemble(module: str, call: str) -> None:
    """In parameters that each lane has for itself."""
    case = Case(module, call)
    own = case.own_parameters()
    want = stacked(
        case.gradients({n: p[i] for n, p in own.items()}, case.lane(i)) for i in range(LANES)
    )
    close(vmap(lambda p, lane: gradients(case, p, lane))(own, case.lanes), want)


@cases
@pytest.mark.usefixtures("kernels_alone")
def test_gradients_through_vmap(module: str, call: str) -> None:
    """By torch.func and by torch.autograd; those in the parameters are sums over the lanes."""
    case = Case(module, call)
    of_parameters, dx = stacked(each_alone(case))
    want = {n: g.sum(0) for n, g in of_parameters.items()}, dx

    def total(parameters: Any, x: Tensor) -> Tensor:
        lanes = case.lanes._replace(x=x)
        return vmap(case.loss, (None, 0))(parameters, lanes).sum()

    close(grad(total, (0, 1))(case.parameters, case.lanes.x), want)
    leaves = {n: p.clone().requires_grad_() for n, p in case.parameters.items()}
    x = case.lanes.x.clone().requires_grad_()
    *found, dx = torch.autograd.grad(total(leaves, x), [*leaves.values(), x])
    close((dict(zip(leaves, found, strict=True)), dx), want)
    # Where only the input asks for a gradient, nothing that vmap shows of it does.
    (dx,) = torch.autograd.grad(total(case.parameters, x), x)
    close(dx, want[1])


@pytest.mark.parametrize(("module", "call"), FEW_CASES)
def test_second_gradients(module: str, call: str) -> None:
    """Of a penalty on the gradients: alone, and on those of each lane."""
    case = Case(module, call)
    each = [second_gradients(case, case.lane(i)) for i in range(LANES)]

    def penalty(parameters: Any, x: Tensor, lane: Lane) -> Tensor:
        found = grad(case.loss)(parameters, lane._replace(x=x))
        return torch.stack([g.square().sum() for g in found.values()]).sum()

    close(grad(penalty, (0, 1))(case.parameters, case.lane(0).x, case.lane(0)), each[0])

    def total(parameters: Any, x: Tensor) -> Tensor:
        return vmap(penalty, (None, 0, 0))(parameters, x, case.lanes).sum()

    of_parameters, dx = stacked(each)
    want = {n: g.sum(0) for n, g in of_parameters.items()}, dx
    close(grad(total, (0, 1))(case.parameters, case.lanes.x), want)
    leaves = {n: p.clone().requires_grad_() for n, p in case.parameters.items()}
    x = case.lanes.x.clone().requires_grad_()
    *found, dx = torch.autograd.grad(total(leaves, x), [*leaves.values(), x])
    close((dict(zip(leaves, found, strict=True)), dx), want)


@modules
@pytest.mark.usefixtures("kernels_alone")
def test_two_dimensions_of_lanes(module: str) -> None:
    """Gradients of each, of the parameters and of one that only the inner lanes have alone."""
    case = Case(module)
    x = torch.stack([case.lanes.x, case.lanes.x.flip(0)])
    one = lambda p, x: grad(case.loss)(p, case.lane(0)._replace(x=x))  # noqa: E731
    want = stacked(stacked(one(case.parameters, lane) for lane in lanes) for lanes in x)
    close(vmap(vmap(one, (None, 0)), (None, 0))(case.parameters, x), want)
    own = case.own_parameters()
    each = [{n: p[i] for n, p in own.items()} for i in range(LANES)]
    want = stacked(stacked(one(p, lane) for p in each) for lane in x[0])
    close(vmap(vmap(one, (0, None)), (None, 0))(own, x[0]), want)


@modules
@pytest.mark.usefixtures("kernels_alone")
def test_jacobians(module: str) -> None:
    case = Case(module)

    def f(x: Tensor) -> Tensor:
        return case(case.parameters, case.lane(0)._replace(x=x))[0]

    x = case.lanes.x[0]
    want = torch.autograd.functional.jacobian(f, x)
    close(torch.autograd.functional.jacobian(f, x, vectorize=True), want)
    close(jacrev(f)(x), want)
    close(jacrev(f, chunk_size=7)(x), want)
    close(vmap(jacrev(f))(case.lanes.x)[0], want)
    name, weight = next(iter(case.parameters.items()))

    def of_weight(weight: Tensor) -> Tensor:
        return case(case.parameters | {name: weight}, case.lane(0))[0]

    close(jacrev(of_weight)(weight), torch.autograd.functional.jacobian(of_weight, weight))


@modules
@pytest.mark.usefixtures("kernels_alone")
def test_batches_of_gradients(module: str) -> None:
    """``is_grads_batched``, once and inside of another vmap of that kind."""
    case = Case(module)
    leaves = {n: p.clone().requires_grad_() for n, p in case.parameters.items()}
    y = case(leaves, case.lane(0))[0]
    seeds = draw(2, LANES, *y.shape, seed=2, dtype=F64)

    def all_of(seed: Tensor, **options: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.autograd.grad(
            y, list(leaves.values()), seed, retain_graph=True, **options
        )
        return found

    want = [stacked(all_of(seed) for seed in some) for some in seeds]
    close(all_of(seeds[0], is_grads_batched=True), want[0])
    close(all_of(seeds[0][:1], is_grads_batched=True), tuple(g[:1] for g in want[0]))
    twice = torch._vmap_internals._vmap(lambda some: all_of(some, is_grads_batched=True))
    close(twice(seeds), stacked(want))


@pytest.mark.parametrize("shape", [(T, 1, I), (T, I)], ids=["one row", "no batch"])
@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_batches_of_gradients_of_one_row(kind: str, shape: tuple[int, ...]) -> None:
    """Whose lanes share what forward returned, by strides of 0."""
    layer = getattr(rnnkernels, kind)(I, H, num_layers=2, bidirectional=True, dtype=F64)
    y = layer(draw(*shape, seed=1, dtype=F64))[0]
    seeds, leaves = draw(3, *y.shape, seed=2, dtype=F64), list(layer.parameters())
    found = torch.autograd.grad(y, leaves, seeds, is_grads_batched=True, retain_graph=True)
    close(found, stacked(torch.autograd.grad(y, leaves, g, retain_graph=True) for g in seeds))


@modules
def test_further_derivatives_in_batches(module: str) -> None:
    """Both kinds of vmap over the backward of a gradient."""
    case = Case(module)
    x = case.lanes.x[0].clone().requires_grad_()
    loss = lambda x: case.loss(case.parameters, case.lane(0)._replace(x=x))  # noqa: E731
    (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
    seeds = draw(LANES, *dx.shape, seed=2, dtype=F64)
    want = stacked(torch.autograd.grad(dx, x, seed, retain_graph=True) for seed in seeds)
    close(torch.autograd.grad(dx, x, seeds, is_grads_batched=True, retain_graph=True), want)
    _, pull = torch.func.vjp(grad(loss), x.detach())
    close(vmap(pull)(seeds), want)


def test_shared_weights_take_one_loop() -> None:
    """Whatever the number of lanes; those with weights and inputs of their own take one each."""
    case = Case("GRU")

    def loops(parameters: Any, dims: int | None) -> int:
        run = vmap(lambda p, lane: gradients(case, p, lane), (dims, 0))
        return counted(lambda: run(parameters, case.lanes))["rnnkernels::sequence_backward"]

    assert loops(case.parameters, None) == 1
    assert loops(case.own_parameters(), 0) == LANES


@pytest.mark.parametrize("unbatched", [False, True])
def test_packed_sequences(unbatched: bool) -> None:
    """Of the same lengths in every lane; or each lane an unbatched sequence."""
    gru = rnnkernels.GRU(I, H, dtype=F64, bidirectional=True)
    parameters = {n: p.detach() for n, p in gru.named_parameters()}
    if unbatched:
        x = draw(LANES, T, I, seed=1, dtype=F64)
        form = lambda x: x  # noqa: E731
    else:
        packed = pack_sequence([torch.zeros(n, I) for n in (2, T, 1)], enforce_sorted=False)
        x = draw(LANES, *packed.data.shape, seed=1, dtype=F64)
        form = lambda x: PackedSequence(x, *packed[1:])  # noqa: E731

    def loss(parameters: Any, x: Tensor) -> Tensor:
        y, h_n = functional_call(gru, parameters, (form(x),))
        return tensors(y)[0].square().sum() + h_n.sum()

    want = stacked(grad(loss, (0, 1))(parameters, lane) for lane in x)
    close(vmap(grad(loss, (0, 1)), (None, 0))(parameters, x), want)


def test_windows_of_packed_lanes() -> None:
    """What a further derivative makes of the ends of rows, where a state enters in reverse."""
    gru = rnnkernels.GRU(I, H, dtype=F64, bidirectional=True, truncate=3)
    x, hx = draw(LANES, T, B, I, seed=1, dtype=F64), draw(LANES, 2, B, H, seed=2, dtype=F64)

    def penalty(x: Tensor, hx: Tensor) -> Tensor:
        loss = lambda hx: gru(x, hx, lengths=[3, T])[0].square().sum()  # noqa: E731
        return grad(loss)(hx).square().sum()

    want = stacked(grad(penalty, (0, 1))(x[i], hx[i]) for i in range(LANES))
    close(grad(lambda x, hx: vmap(penalty)(x, hx).sum(), (0, 1))(x, hx), want)


@pytest.mark.parametrize("option", ["dropout", "recurrent_dropout", "input_dropout", "weight_drop"])
def test_dropout(option: str) -> None:
    """Lanes fall out differently, or alike, or vmap asks which, as with torch.nn's layers."""
    gru = rnnkernels.GRU(I, H, 2, **{option: 0.5})
    parameters = {n: p.detach() for n, p in gru.named_parameters()}
    x = draw(1, T, B, I, seed=1, dtype=torch.float32).expand(LANES, T, B, I)

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(gru, parameters, (x,))[0].square().sum()

    def lanes(randomness: str) -> Tensor:
        torch.manual_seed(0)
        found = vmap(grad(loss), (None, 0), randomness=randomness)(parameters, x)
        return found["weight_hh_l1"]

    same, different = lanes("same"), lanes("different")
    close(same, same[:1].expand_as(same))
    assert all((different[0] - other).abs().max() > 1e-3 for other in different[1:])
    with pytest.raises(RuntimeError, match="randomness"):
        lanes("error")


def test_weights_that_only_some_lanes_have() -> None:
    """One weight of each lane, all others shared; and states of each, with an input that is one."""
    case = Case("LSTM")
    own = case.parameters | {"weight_hh_l1": case.own_parameters()["weight_hh_l1"]}
    dims = {n: 0 if n == "weight_hh_l1" else None for n in own}
    x = case.lanes.x[0]
    hx = draw(LANES, 2, B, H, seed=5, dtype=F64), draw(LANES, 2, B, H, seed=6, dtype=F64)

    def loss(parameters: Any, hx: Any) -> Tensor:
        y, (h_n, c_n) = functional_call(case.module, parameters, (x, hx))
        return y.square().sum() + (h_n * c_n).sum()

    each = [
        ({n: p if dims[n] is None else p[i] for n, p in own.items()}, tuple(s[i] for s in hx))
        for i in range(LANES)
    ]
    want = stacked(grad(loss, (0, 1))(*pair) for pair in each)
    close(vmap(grad(loss, (0, 1)), (dims, 0))(own, hx), want)
    want = stacked(grad(loss, 1)(case.parameters, state) for _, state in each)
    close(vmap(grad(loss, 1), (None, 0))(case.parameters, hx), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    """The products of each lane add up as those of a layer do."""
    gru = rnnkernels.GRU(I, H, dtype=dtype)
    parameters = {n: p.detach() for n, p in gru.named_parameters()}
    x = draw(LANES, 60, B, I, seed=1, dtype=dtype)

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(gru, parameters, (x,))[0].float().square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(LANES):
        leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        want = torch.autograd.grad(loss(leaves, x[i]), list(leaves.values()))
        # Of numbers that the same loop rounds: what remains is the order of a product's sums.
        unit = torch.finfo(dtype).eps
        for g, w in zip(got.values(), want, strict=True):
            close(g[i], w, rtol=2 * unit, atol=2 * unit * float(w.abs().max()))


@pytest.mark.parametrize("module", ["LSTM", "GRUCell"])
def test_compiled(module: str) -> None:
    """To one graph, whose ops have the shapes that their fake kernels say."""
    case = Case(module)

    def run(parameters: Any, x: Tensor) -> Any:
        loss = lambda p, x: case.loss(p, case.lane(0)._replace(x=x))  # noqa: E731
        return vmap(grad(loss, (0, 1)), (None, 0))(parameters, x)

    torch._dynamo.reset()
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(case.parameters, case.lanes.x)
    close(found, run(case.parameters, case.lanes.x))


def test_lengths_are_checked() -> None:
    gru, x = rnnkernels.GRU(I, H), draw(LANES, T, B, I, seed=1, dtype=torch.float32)
    run = lambda x, lengths: gru(x, lengths=lengths)[0].sum()  # noqa: E731
    lengths = torch.tensor([[1, 2], [3, T + 1]])
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to 4.* got 5"):
        vmap(run)(x, lengths)
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to 4.* got 5"):
        grad(run)(x[1], lengths[1])


def test_recorded_gradients_are_refused() -> None:
    gru, x = rnnkernels.GRU(I, H), draw(LANES, T, B, I, seed=1, dtype=torch.float32)
    refused = pytest.raises(NotImplementedError, match=r"gradient_flow: torch.vmap.* outside")
    with rnnkernels.diagnostics.gradient_flow(gru):
        y = gru(x[0])[0]
        with refused:
            vmap(gru)(x)
    with refused:
        torch.autograd.grad(y, gru.weight_hh_l0, torch.stack([y, y]), is_grads_batched=True)


@pytest.mark.parametrize("op", ["sequence_forward", "sequence_gradients"])
def test_the_rows_of_every_tensor_are_known(op: str) -> None:
    """A new argument that has rows, and is not listed, would come to every lane whole."""
    schema = getattr(torch.ops.rnnkernels, op).default._schema
    tensors = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
    assert tensors - OF_STEPS.keys() - OF_ROWS.keys() == {"weights", "starts", "noise"} | (
        {"flow"} if op == "sequence_forward" else set()
    )


def test_ops_without_a_rule() -> None:
    """Those that a batch never comes to; the text names what to call."""
    dgates, w_ih = torch.randn(LANES, T, B, 1, 4 * H), torch.randn(3 * H, I)
    with pytest.raises(NotImplementedError, match=r"input_gradient: .*sequence_gradients"):
        vmap(lambda d: torch.ops.rnnkernels.input_gradient(d, [w_ih]))(dgates)
