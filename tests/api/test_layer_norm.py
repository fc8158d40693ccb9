"""Layers and cells whose products are normalised: the paper's formula, kernels against the
reference over all options, modules, compilation, and what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import formulas
import rnnkernels
from formulas import Array
from graphs import Graphs, Model, assert_same, options_for, result, tokens
from helpers import draw, require_backend, same_bits, tensors
from normed_layers import F64, KINDS, B, H, I, T, X, called, everything, given, make, pulled
from rnnkernels import _backends
from rnnkernels._backends import onnx

LENGTHS = torch.tensor([6, 2, 0, 5, 3])
RESET = draw(T, B, seed=2, dtype=F64) > 0.7
#: Of a layer, and of its call.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "stack": ({"num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "reset": ({"bidirectional": True}, {"lengths": LENGTHS, "reset": RESET}),
    "no-bias": ({"bias": False, "batch_first": True}, {"reset": RESET.t()}),
    "one-bias": ({"bias_mode": "single"}, {}),
    "merged": ({"bidirectional": True, "merge_mode": "mul", "num_layers": 2}, {}),
    "window": ({"truncate": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "windows": ({"truncate": 4}, {"reset": RESET}),
    "overlapping": ({"truncate": (2, 3), "num_layers": 2}, {"lengths": LENGTHS}),
    "value": ({"grad_clip": 0.05, "bidirectional": True}, {}),
    "norm": ({"grad_clip": ("norm", 0.05), "num_layers": 2}, {"lengths": LENGTHS}),
    "tanh": ({"grad_clip": ("tanh", 0.05), "truncate": 3}, {}),
    "recompute": ({"recompute": 2, "num_layers": 2, "bidirectional": True}, {"reset": RESET}),
    "recompute-packed": ({"recompute": 4}, {"lengths": LENGTHS}),
    "all-states": ({"num_layers": 2, "bidirectional": True}, {"return_all_states": True}),
    "dropout": (
        {"recurrent_dropout": 0.4, "input_dropout": 0.3, "weight_drop": 0.3}
        | {"dropout": 0.2, "num_layers": 2, "bidirectional": True},
        {"lengths": LENGTHS},
    ),
    "projected": ({"proj_size": 3, "num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "projected-norm": ({"proj_size": 5, "grad_clip": ("norm", 0.05), "truncate": 2}, {}),
}
CASES = [(kind, name) for kind in KINDS for name in OPTIONS if kind == "LSTM" or "proj" not in name]


def norm(v: Array, weight: Array, bias: Array) -> Array:
    """Ba et al. 2016, equations 3 and 4, with the number that keeps it finite."""
    deviation = np.sqrt(((v - v.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-5)
    return np.asarray(weight / deviation * (v - v.mean(-1, keepdims=True)) + bias)


def stepped(kind: str, module: Any, suffix: str) -> formulas.Step:
    """A step as the supplementary material of the paper has it, with torch.nn's biases."""
    named = {n.removesuffix(suffix): p.detach().numpy() for n, p in module.named_parameters()}

    def normed(place: str, v: Array, own: slice = slice(None)) -> Array:
        affine = (named[f"{what}_norm_{place}"][own] for what in ("weight", "bias"))
        return norm(v[:, own], *affine)

    def step(x: Array, states: list[Array]) -> list[Array]:
        gx, gh = x @ named["weight_ih"].T, states[0] @ named["weight_hh"].T
        b_x, b_h = named["bias_ih"], named["bias_hh"]
        if kind == "LSTM":
            i, f, g, o = np.split(normed("hh", gh) + normed("ih", gx) + b_x + b_h, 4, -1)
            c = formulas.sigmoid(f) * states[1] + formulas.sigmoid(i) * np.tanh(g)
            return [formulas.sigmoid(o) * np.tanh(normed("c", c)), c]
        both, last = slice(0, 2 * H), slice(2 * H, None)
        gates = normed("hh", gh, both) + normed("ih", gx, both) + (b_x + b_h)[both]
        r, z = np.split(gates, 2, -1)
        hidden = normed("hh", gh, last) + b_h[last]
        n = normed("ih", gx, last) + b_x[last] + formulas.sigmoid(r) * hidden
        return formulas.gru(z, n, states[0])

    return step


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_the_paper_says(kind: str, backend: str) -> None:
    require_backend(backend)
    module = make(kind, bidirectional=True, backend=backend)
    states = given(module)
    y, *last = called(module, X, states, lengths=LENGTHS)
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        step, first = stepped(kind, module, suffix), [s[d].detach().numpy() for s in states]
        want, end = formulas.run(step, X.numpy(), first, LENGTHS.tolist(), reverse=d == 1)
        np.testing.assert_allclose(y[..., d * H : (d + 1) * H].detach(), want, rtol=0, atol=1e-13)
        for s, e in zip(last, end, strict=True):
            np.testing.assert_allclose(s[d].detach(), e, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_kernels_equal_the_reference(kind: str, name: str) -> None:
    options, call = OPTIONS[name]
    found = [everything(make(kind, backend=b, **options), **call) for b in ("cpu", "reference")]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_more_units_than_a_panel_has(kind: str) -> None:
    """Several tiles, of which the last has part of a vector; rows in more than one block."""
    found = []
    for backend in ("cpu", "reference"):
        module = make(kind, (3, 37), backend=backend)
        x = draw(3, 140, 3, seed=1, dtype=F64).requires_grad_()
        states = given(module, 140)
        found.append(pulled(called(module, x, states), [x, *states, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unbatched(kind: str) -> None:
    module = make(kind)
    order = [0, 3, 4, 1]
    packed = tensors(module(pack_padded_sequence(X[:, order], LENGTHS[order])))
    padded = tensors(module(X, lengths=LENGTHS))
    for a, b in zip(packed[1:], padded[1:], strict=True):
        torch.testing.assert_close(a, b[:, order], rtol=1e-12, atol=1e-13)
    alone = tensors(module(X[:, 0]))
    torch.testing.assert_close(alone[0], padded[0][:, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_takes_the_steps_of_its_layer(kind: str) -> None:
    layer, cell = make(kind), make(f"{kind}Cell")
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    x = X.detach().requires_grad_()
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(tensors(state)[0])
    asked = [[x, *m.parameters()] for m in (layer, cell)]
    found = [
        pulled([y], a) for y, a in zip((layer(x)[0], torch.stack(outputs)), asked, strict=True)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with rnnkernels.use_backend("reference"):
        torch.testing.assert_close(tensors(cell(X[0]))[0], found[0][0][0], rtol=1e-12, atol=1e-13)


def test_parameters() -> None:
    """Those of torch.nn first, with the same numbers; norms as torch.nn.LayerNorm begins."""
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 3}
    layers = []
    for more in ({}, {"layer_norm": True}):
        torch.manual_seed(0)
        layers.append(rnnkernels.LSTM(I, H, **options, **more))
    plain, normed = (layer.state_dict() for layer in layers)
    assert layers[1].load_state_dict(plain, strict=False).unexpected_keys == []
    added = {name: p for name, p in normed.items() if name not in plain}
    assert len(added) == 4 * 6
    for name, p in added.items():
        kind, _, place = name.split("_")[:3]
        assert p.shape == (H if place == "c" else 4 * H,)
        assert torch.equal(p, torch.full_like(p, float(kind == "weight")))
    assert list(normed)[5:11] == [
        f"{kind}_norm_{place}_l0" for place in ("ih", "hh", "c") for kind in ("weight", "bias")
    ]
    again = pickle.loads(pickle.dumps(layers[1]))
    x = torch.randn(T, B, I)
    assert same_bits(tensors(again(x)), tensors(layers[1](x)))
    assert "layer_norm=True" in repr(again) and "layer_norm=True" in repr(make("GRUCell"))
    weights = [list(map(layers[1].__getattr__, names)) for names in layers[1]._all_weights]
    by_hand = rnnkernels.functional.lstm(x, None, weights, bidirectional=True, layer_norm=True)
    assert same_bits(tensors(by_hand), tensors(layers[1](x)))


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_every_size() -> None:
    model, graphs = Model("GRU", layer_norm=True, bidirectional=True), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    for i, (steps, rows) in enumerate([(5, 3), (7, 2)]):
        args, extra = tokens(steps, rows), options_for(steps, rows, "lengths")
        want = result(model, model, args, **extra)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(result(model, compiled, args, **extra), want)
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert len(graphs.ops(graphs.forward[0])) == 1


def test_what_is_refused() -> None:
    def of(kind: Any, **options: Any) -> Any:
        return kind(I, H, **{"layer_norm": True} | options)

    with pytest.raises(ValueError, match="layer_norm: expected False for RNN: it is defined for"):
        of(rnnkernels.RNN)
    with pytest.raises(ValueError, match="layer_norm: expected False for mgu: it is defined"):
        of(rnnkernels.MGU)
    with pytest.raises(ValueError, match="layer_norm: expected no heads beside it, got heads=7"):
        of(rnnkernels.GRU, heads=7)
    with pytest.raises(ValueError, match="layer_norm: expected no zoneout beside it"):
        of(rnnkernels.LSTMCell, zoneout=0.1)
    with pytest.raises(TypeError, match="layer_norm"):
        of(rnnkernels.GRU, layer_norm=1)
    module = make("LSTM")
    with pytest.raises(ValueError, match="layer_norm=True"):
        rnnkernels.revert(module)
    with pytest.raises(ValueError, match="layer without layer_norm"):
        rnnkernels.interop.to_keras(module)
    normed = rnnkernels.GRU(I, H, layer_norm=True)
    with pytest.raises(ValueError, match="weight_dtype: expected the layer to have no layer_norm"):
        rnnkernels.serving.prepack(normed, weight_dtype=torch.int8)
    with rnnkernels.batch_invariant(), pytest.raises(NotImplementedError, match="batch_invariant"):
        torch.vmap(lambda x: module(x)[0])(X[None])
    module.weight_norm_c_l0 = torch.nn.Parameter(torch.ones(H + 1, dtype=F64))
    with pytest.raises(RuntimeError, match=r"weight_norm_c_l0: expected shape \[7\], got \[8\]"):
        module(X)
    op = torch.ops.rnnkernels.sequence_forward
    w = torch.ones(3 * H, 0, dtype=F64), torch.ones(3 * H, H, dtype=F64)
    weights = [*w, *torch.ones(4, H, dtype=F64)]
    end = (
        "none",
        1.0,
        X,
        weights,
        torch.zeros(1, B, H, dtype=F64),
        *[None] * 9,
        False,
        False,
        False,
    )
    with pytest.raises(RuntimeError, match="takes the input part of its gates, 21 numbers"):
        op("layer_norm_gru", 1, 1, 1, False, "concat", 0, *end)


def test_who_runs_it() -> None:
    module = make("LSTM", num_layers=2)
    told = str(rnnkernels.explain(module, X))
    assert "layer_norm" in told and "cpu" in told
    calls: list[Any] = []

    def look(call: Any, name: Any) -> Any:
        calls.append(call)
        return run(call, name)

    with _backends.observe(look) as run:
        module(X)
    assert [call.layers for call in calls] == [1, 1]
    assert onnx.refusal(calls[0]) == "none of them is the cell layer_norm_lstm"
