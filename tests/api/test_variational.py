"""Dropout that a call draws once for all of its steps, against the same done by hand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import formulas
import op_parity
import rnnkernels
from formulas import Array
from helpers import require_backend, same_bits, tensors
from rnnkernels import functional
from rnnkernels._backends import gpu, onnx, triton

T, B, I, H = 5, 3, 4, 6
LAYERS = {"RNN": functional.rnn, "LSTM": functional.lstm, "GRU": functional.gru}
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    require_backend(request.param)
    with rnnkernels.use_backend(request.param):
        yield request.param


def layer(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnkernels, name)(I, H, num_layers=2, bidirectional=True, **F64, **options)


def pulled(outputs: Any, module: torch.nn.Module) -> list[Tensor]:
    """Outputs, and the gradients of all parameters for a fixed random loss."""
    torch.manual_seed(2)
    found = tensors(outputs)
    loss = torch.stack([(t * torch.randn_like(t)).sum() for t in found]).sum()
    return [*found, *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize("name", LAYERS)
def test_weight_drop_is_a_call_with_dropped_weights(name: str, backend: str) -> None:
    module, x = layer(name, weight_drop=0.4), torch.randn(T, B, I, **F64)
    torch.manual_seed(1)
    found = pulled(module(x), module)
    torch.manual_seed(1)
    dropped = [[w[0], F.dropout(w[1], 0.4), *w[2:]] for w in module.all_weights]
    assert all((w[1] == 0).any() for w in dropped)
    by_hand = LAYERS[name](x, None, dropped, bidirectional=True)
    for a, b in zip(found, pulled(by_hand, module), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def stepped(kind: str, module: Any, d: int, x_mask: Array, h_mask: Array) -> formulas.Step:
    """A step of direction d of an only layer, as Gal and Ghahramani 2016 write it (section 4.1, one
    mask for all gates): masks [1, size] of what is multiplied by a weight. A GRU's ``z * h`` is
    none of that."""
    w_ih, w_hh, b_ih, b_hh = (w.detach().numpy() for w in module.all_weights[d])

    def step(x: Array, states: list[Array]) -> list[Array]:
        gx = (x * x_mask) @ w_ih.T + b_ih
        gh = (states[0] * h_mask) @ w_hh.T + b_hh
        if kind == "RNN":
            return [np.tanh(gx + gh)]
        if kind == "LSTM":
            return formulas.lstm(*np.split(gx + gh, 4, -1), states[1])
        (r, z, n), (r_h, z_h, n_h) = np.split(gx, 3, -1), np.split(gh, 3, -1)
        return formulas.gru(z + z_h, n + formulas.sigmoid(r + r_h) * n_h, states[0])

    return step


@pytest.mark.parametrize("kind", LAYERS)
def test_is_what_the_paper_says(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    drops: Any = {"recurrent_dropout": 0.4, "input_dropout": 0.4}
    module = getattr(rnnkernels, kind)(I, H, bidirectional=True, **drops, **F64)
    x, lengths = torch.randn(T, B, I, **F64), [T, 0, 3]
    states = [torch.randn(2, B, H, **F64) for _ in range(2 if kind == "LSTM" else 1)]
    torch.manual_seed(1)
    y, last = module(x, tuple(states) if kind == "LSTM" else states[0], lengths=lengths)
    torch.manual_seed(1)
    x_mask, h_mask = drawn(2, I), drawn(2, 2, H)  # of rows with steps, the longest first
    assert (h_mask == 0).any() and (x_mask == 0).any() and (h_mask > 1).any()
    for d in range(2):
        for place, b in enumerate((0, 2)):
            own = slice(place, place + 1)
            step = stepped(kind, module, d, x_mask[own], h_mask[d, own])
            first = [s[d, b : b + 1].numpy() for s in states]
            row = x[:, b : b + 1].numpy()
            want, end = formulas.run(step, row, first, lengths[b : b + 1], reverse=d == 1)
            got = y[:, b : b + 1, d * H : (d + 1) * H]
            np.testing.assert_allclose(got.detach(), want, rtol=0, atol=1e-14)
            for s, e in zip(tensors(last), end, strict=True):
                np.testing.assert_allclose(s[d, b : b + 1].detach(), e, rtol=0, atol=1e-14)


def drawn(*shape: int) -> Array:
    return F.dropout(torch.ones(*shape, **F64), 0.4).numpy()


@pytest.mark.parametrize("lengths", [None, [3, T, 2]], ids=["whole", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_drop_their_inputs(dropout: float, lengths: Any, backend: str) -> None:
    """Every layer, as if it stood alone, beside torch's dropout; and nothing of every step is kept
    but y, c and the gates."""
    options: Any = {"bidirectional": True, "dropout": dropout, "input_dropout": 0.4}
    torch.manual_seed(0)
    module = rnnkernels.LSTM(I, H, num_layers=3, **options, **F64)
    x = torch.randn(T, B, I, **F64)
    torch.manual_seed(1)
    found = pulled(module(x, lengths=lengths), module)
    torch.manual_seed(1)
    steps = (T, B) if lengths is None else (sum(lengths),)
    order = list(range(B)) if lengths is None else [1, 0, 2]  # of rows, packed
    between = [F.dropout(torch.ones(*steps, 2 * H, **F64), dropout) for _ in "ab" if dropout]
    masks = [F.dropout(torch.ones(1, B, size, **F64), 0.4) for size in (I, 2 * H, 2 * H)]
    places = torch.ones(T, B, dtype=torch.bool)
    if lengths is not None:
        places = torch.arange(T)[:, None] < torch.tensor(lengths)[order]
    y, last = x[:, order], []
    for n, mask in enumerate(masks):
        if n and dropout:
            whole = torch.zeros(T, B, 2 * H, **F64)
            whole[places] = between[n - 1].flatten(0, -2)
            y = y * whole
        y, states = functional.lstm(
            y * mask, None, module.all_weights[2 * n : 2 * n + 2], bidirectional=True,
            lengths=None if lengths is None else [lengths[b] for b in order],
        )  # fmt: skip
        last.append(states)
    back = [order.index(b) for b in range(B)]
    h_n, c_n = (torch.cat([s[k] for s in last])[:, back] for k in (0, 1))
    for a, b in zip(found, pulled((y[:, back], (h_n, c_n)), module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_what_backward_keeps() -> None:
    """No mask of all steps between layers, nor the input that one has made."""
    require_backend("cpu")
    long, sizes = 50, []

    def kept(t: Tensor) -> Tensor:
        sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return t

    module = rnnkernels.LSTM(I, H, num_layers=2, recurrent_dropout=0.4, input_dropout=0.4)
    x = torch.randn(long, B, I)
    found = []
    for training in (True, False):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
            module.train(training)(x)
        found.append(sum(n for n in sizes if n >= long * B))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits_for_any_number_of_threads(name: str) -> None:
    """And of outputs where backward computes again."""
    require_backend("cpu")
    torch.manual_seed(0)
    module = getattr(rnnkernels, name)(I, 70, bidirectional=True, recurrent_dropout=0.5)
    x, threads = torch.randn(T, 9, I), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            torch.manual_seed(1)
            found.append(pulled(module(x), module))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    torch.manual_seed(1)
    outputs = tensors(module(x, recompute=2))
    assert same_bits(outputs, found[0][: len(outputs)])


@pytest.mark.parametrize(
    ("name", "options"),
    [("GRU", {"heads": 2}), ("LSTM", {"proj_size": 2}), ("MGU", {"truncate": 2})],
)
def test_kernels_and_reference_agree(name: str, options: dict[str, Any]) -> None:
    """In layers of heads, whose states lie head by head, of projections and of written cells."""
    require_backend("cpu")
    module, x = layer(name, **options, **dict.fromkeys(OPTIONS, 0.4)), torch.randn(T, B, I, **F64)
    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        torch.manual_seed(1)
        found.append(pulled(module(x, lengths=[3, T, 2]), module))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("option", ["weight_drop", "recurrent_dropout"])
def test_cells_without_recurrent_weights(option: str) -> None:
    message = rf"{option}: expected 0 for the cell ind_rnn.*, which has no recurrent weights"
    with pytest.raises(ValueError, match=message):
        rnnkernels.IndRNN(I, H, **{option: 0.4})
    with pytest.raises(ValueError, match=message):
        functional.layers(
            rnnkernels.IndRNN.definition, torch.zeros(1, 1, 2), None, [[torch.zeros(3, 2)] * 2],
            **{option: 0.4},
        )  # fmt: skip


def test_what_has_no_recurrent_dropout_says_so() -> None:
    module, x = rnnkernels.LSTM(I, H, recurrent_dropout=0.4, backend="torch"), torch.zeros(T, B, I)
    with pytest.raises(RuntimeError, match=r"torch\.nn has no recurrent dropout"):
        module(x)
    module.eval()(x)
    module.train().backend = "reference"
    text = str(rnnkernels.explain(module, x))
    assert "with recurrent_dropout" in text
    call = op_parity.make(op_parity.Case("lstm", drop=True), torch.float32).call()
    assert "recurrent" in str(onnx.refusal(call))
    assert "recurrent" not in str(onnx.refusal(call._replace(h_mask=None)))
    for refusal in (gpu.cuda_refusal, triton.refusal):
        assert "recurrent" not in str(refusal(call))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t[..., :-1], RuntimeError, "h_mask: expected shape"),
        (Tensor.float, ValueError, "h_mask: expected dtype"),
        (Tensor.requires_grad_, RuntimeError, "h_mask: expected tensors that require no gradient"),
    ],
)
def test_masks_of_another_form(change: Any, error: Any, message: str) -> None:
    require_backend("cpu")
    call = op_parity.make(op_parity.Case("gru", drop=True), torch.float64)
    with pytest.raises(error, match=message):
        op_parity.forward(torch.ops.rnnkernels, call._replace(h_mask=change(call.h_mask)))


def test_one_graph() -> None:
    """A compiled layer draws as it does without a compiler."""
    require_backend("cpu")
    torch._dynamo.reset()
    options = dict.fromkeys(OPTIONS, 0.4)
    module, x = layer("GRU", **options), torch.randn(T, B, I, **F64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, module):
        torch.manual_seed(1)
        found.append(pulled(run(x), module))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


OPTIONS = ("weight_drop", "recurrent_dropout", "input_dropout")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("asks", [nullcontext, lambda: rnnkernels.use_backend("cpu")])
def test_only_training_draws(option: str, asks: Any) -> None:
    """Calls without gradients, which may keep packed weights and take the short way past Python,
    or the long one where a backend is asked for."""
    require_backend("cpu")
    module, x = layer("LSTM", **{option: 0.4}), torch.randn(T, B, I, **F64)
    plain = tensors(layer("LSTM")(x))
    with torch.no_grad(), asks():
        for _ in range(3):
            state = torch.get_rng_state()
            assert same_bits(tensors(module.eval()(x)), plain)
            assert torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(4)
            drawn = tensors(module.train()(x))
            assert not same_bits(drawn, tensors(module(x)))
            torch.manual_seed(4)
            assert same_bits(drawn, tensors(module(x)))


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_no_probability(option: str) -> None:
    for value in (1, -0.1, 2, float("nan")):
        with pytest.raises(ValueError, match=rf"{option} should be a number in range \[0, 1\)"):
            rnnkernels.LSTM(2, 3, **{option: value})
    for value in (None, "0.5", True):
        with pytest.raises(TypeError, match=rf"{option} should be a number in range \[0, 1\)"):
            functional.gru(
                torch.zeros(1, 1, 2), None, [[torch.zeros(9, 2), torch.zeros(9, 3)]],
                **{option: value},
            )  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_has_no_such_option(option: str) -> None:
    module = rnnkernels.GRU(2, 3, **{option: 0.25})
    assert f"{option}=0.25" in repr(module)
    with pytest.raises(ValueError, match=f"torch.nn has no {option}=0.25"):
        rnnkernels.revert(module)
