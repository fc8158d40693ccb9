"""Empty sequences and batches, and the functions behind the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
from helpers import compare, draw, outputs_and_gradients, require_backend, tensors
from rnnkernels import functional
from rnnkernels._core.call import LayerWeights
from rnnkernels.testing import assert_close

F64 = torch.float64
T, B, I, H = 5, 3, 4, 7
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = {"rnn_relu": "RNNCell", "lstm": "LSTMCell", "gru": "GRUCell"}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    require_backend(request.param)
    with rnnkernels.use_backend(request.param):
        yield request.param


def arguments(module: Any, *shape: int, seed: int = 1) -> list[Any]:
    """Leaves: an input of this shape without its features, and states for it."""
    rows = module.num_layers * (1 + module.bidirectional)
    batch = shape[:1] if module.batch_first and len(shape) == 2 else shape[1:]
    widths = [module.proj_size or H] + [H] * (module.mode == "LSTM")
    x = draw(*shape, module.input_size, seed=seed, dtype=F64).requires_grad_()
    hx = [
        draw(rows, *batch, w, seed=seed + 1 + i, dtype=F64).requires_grad_()
        for i, w in enumerate(widths)
    ]
    return [x, tuple(hx) if len(hx) > 1 else hx[0]]


# T = 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, B), {"bidirectional": True, "num_layers": 2}),
        ((B, 0), {"batch_first": True}),
        ((0,), {"bidirectional": True}),
        ((0, 0), {"bias": False}),
    ],
    ids=["stack", "batch_first", "unbatched", "nothing"],
)
@pytest.mark.parametrize("name", [*LAYERS, "LSTM-proj"])
def test_no_steps(name: str, shape: tuple[int, ...], options: dict[str, Any], backend: str) -> None:
    name, *projected = name.split("-")
    more = {"proj_size": 3} if projected else {}
    module = getattr(rnnkernels, name)(I, H, dtype=F64, **options, **more)
    args = arguments(module, *shape)
    y, final = module(*args)
    R = module.proj_size or H
    assert y.shape == (*shape, R * (1 + module.bidirectional))
    assert_close(tensors(final), tensors(args[1]), rtol=0.0)
    found = outputs_and_gradients(module, args, F64)
    for i in range(len(tensors(final))):  # a state passes through, and so does its gradient
        grad = found[f"gradient of argument {1 + i}"]
        assert grad is not None and (grad.abs().sum() > 0 or grad.numel() == 0)
    for key, _ in module.named_parameters():
        grad = found[f"gradient of {key}"]
        assert grad is not None and not grad.any(), key
    assert found["gradient of argument 0"] is not None


@pytest.mark.parametrize("name", LAYERS)
def test_no_steps_without_states(name: str, backend: str) -> None:
    module = getattr(rnnkernels, name)(I, H, dtype=F64)
    y, final, states = module(torch.empty(0, B, I, dtype=F64), return_all_states=True)
    assert not any(t.any() for t in tensors(final))
    assert all(t.shape == (0, B, 1, H) for t in tensors(states))
    y.sum().backward()  # an empty loss is a loss
    assert not any(p.grad.any() for p in module.parameters())


# B = 0


@pytest.mark.parametrize("name", LAYERS)
def test_no_rows(name: str, backend: str) -> None:
    found = []
    for library in (rnnkernels, nn):
        module = getattr(library, name)(I, H, 2, bidirectional=True, dtype=F64)
        found.append(outputs_and_gradients(module, arguments(module, T, 0), F64))
    compare(*found)


@pytest.mark.parametrize("name", CELLS.values())
def test_no_rows_of_a_cell(name: str, backend: str) -> None:
    found = []
    for library in (rnnkernels, nn):
        cell = getattr(library, name)(I, H, dtype=F64)
        x = torch.empty(0, I, dtype=F64).requires_grad_()
        found.append(outputs_and_gradients(cell, [x], F64))
    compare(*found)


# functional

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "no-bias": {"num_layers": 2, "bias": False},
    "single": {"num_layers": 2, "bidirectional": True, "bias_mode": "single"},
    "merged": {"num_layers": 2, "bidirectional": True, "merge_mode": "sum"},
    "reference": {"backend": "reference"},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "relu": {"nonlinearity": "relu"},
    "sigmoid": {"nonlinearity": "sigmoid"},
    "proj": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
    "proj-no-bias": {"proj_size": 3, "bias": False},
}
ONLY = {"relu": "RNN", "sigmoid": "RNN", "proj": "LSTM", "proj-no-bias": "LSTM"}


@pytest.mark.parametrize(
    ("name", "options"),
    [(n, o) for o in OPTIONS for n in LAYERS if ONLY.get(o, n) == n],
)
def test_function_equals_module(name: str, options: str) -> None:
    module = getattr(rnnkernels, name)(I, H, **OPTIONS[options], dtype=F64)

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *args: Any) -> Any:
            taken = {k: v for k, v in OPTIONS[options].items() if k not in FROM_WEIGHTS}
            function = getattr(functional, name.lower())
            return function(*args, module.all_weights, training=True, **taken)

    class Module(Function):
        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    found = []
    for call in (Function(), Module()):
        torch.manual_seed(3)
        found.append(outputs_and_gradients(call, arguments(module, T, B), F64))
    compare(*found, rtol=0.0)


FROM_WEIGHTS = ("num_layers", "bias", "bias_mode", "proj_size")


@pytest.mark.parametrize("name", LAYERS)
def test_function_takes_packed_input_lengths_reset_and_torchs_weights(name: str) -> None:
    module = getattr(rnnkernels, name)(I, H, dtype=F64)
    theirs = getattr(nn, name)(I, H, dtype=F64)
    module.load_state_dict(theirs.state_dict())
    function, weights = getattr(functional, name.lower()), theirs.all_weights
    x, hx = arguments(module, T, B)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    options = {"lengths": [2, 5, 0], "reset": torch.rand(T, B) < 0.3, "return_all_states": True}
    for input, more in ((packed, {}), (x, options)):
        result, expected = function(input, hx, weights, **more), module(input, hx, **more)
        assert_close(tensors(result), tensors(expected), rtol=0.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([], "one list of tensors per layer"), ([["a"]] * 3, "2 per layer, got 3")],
    ids=["none", "odd"],
)
def test_function_refuses_a_wrong_number_of_weights(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.gru(torch.zeros(T, B, I), None, weights, bidirectional=True)


@pytest.mark.parametrize("form", ["1d", "2d", "2d-zeros", "2d-no-bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_function_of_a_cell_equals_the_cell(cell: str, form: str, backend: str) -> None:
    options = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    bias = "no-bias" not in form
    module = getattr(rnnkernels, CELLS[cell])(I, H, bias=bias, dtype=F64, **options)
    biases = [module.bias_ih, module.bias_hh] if bias else [None, None]
    weights = LayerWeights(module.weight_ih, module.weight_hh, *biases)
    batch = () if form == "1d" else (B,)
    x = draw(*batch, I, seed=1, dtype=F64)
    states = tuple(draw(*batch, H, seed=s, dtype=F64) for s in (2, 3))
    hx: Any = None if "zeros" in form else states if cell == "lstm" else states[0]
    result = functional.cell("Cell", cell, x, hx, weights)
    assert_close(tensors(result), tensors(module(x, hx)), rtol=0.0)
    assert all(t.shape == (*batch, H) for t in tensors(result))
