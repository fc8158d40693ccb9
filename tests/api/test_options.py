"""What our modules do beyond torch.nn's, each against the same thing done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import rnnkernels
from helpers import compare, draw, outputs_and_gradients, require_backend, tensors
from rnnkernels import functional

F64 = torch.float64
T, B, I, H = 5, 3, 4, 7
LENGTHS = [3, 5, 1]
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = {
    "rnn_tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "rnn_sigmoid": ("RNNCell", {"nonlinearity": "sigmoid"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    require_backend(request.param)
    with rnnkernels.use_backend(request.param):
        yield request.param


class Through(nn.Module):
    """A function of a module as a module, so that two functions of one module can be compared."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.module, *args)


def agree(
    module: Any, args: list[Any], ours: Callable[..., Any], by_hand: Callable[..., Any]
) -> None:
    found = []
    for function in (ours, by_hand):
        found.append(outputs_and_gradients(Through(module, function), args, F64))
    compare(*found)


def call(module: Any, *args: Any) -> Any:
    return module(*args)


def arguments(module: Any, shape: tuple[int, ...] = (T, B)) -> list[Any]:
    """A time-major input and states, as leaves."""
    rows = module.num_layers * (1 + module.bidirectional)
    widths = [module.proj_size or H] + [H] * (module.mode == "LSTM")
    x = draw(*shape, module.input_size, seed=1, dtype=F64).requires_grad_()
    hx = [
        draw(rows, *shape[1:], w, seed=2 + i, dtype=F64).requires_grad_()
        for i, w in enumerate(widths)
    ]
    return [x, tuple(hx) if len(hx) > 1 else hx[0]]


def layer(name: str, *args: Any, **options: Any) -> Any:
    return getattr(rnnkernels, name)(*args, dtype=F64, **options)


# bias_mode


def test_single_bias_counts_parameters_as_published() -> None:
    model = nn.Sequential(
        nn.Embedding(1000, 64), rnnkernels.LSTM(64, 128, bias_mode="single"), nn.Linear(128, 10)
    )
    counts = [sum(p.numel() for p in part.parameters()) for part in model]
    assert counts == [64_000, 98_816, 1_290]
    assert sum(p.numel() for p in model.parameters()) == 164_106


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["one", "bi"])
@pytest.mark.parametrize("name", LAYERS)
def test_single_bias_is_double_with_a_zero(
    name: str, options: dict[str, bool], backend: str
) -> None:
    single = layer(name, I, H, 2, bias_mode="single", **options)
    double = layer(name, I, H, 2, **options)
    missing, unexpected = double.load_state_dict(single.state_dict(), strict=False)
    assert not unexpected and {n[:7] for n in missing} == {"bias_hh"}
    assert len(missing) == 2 * (1 + double.bidirectional)
    for n, p in double.named_parameters():
        if n.startswith("bias_hh"):
            nn.init.zeros_(p)
    args = arguments(single)
    expected = outputs_and_gradients(double, args, F64)
    found = outputs_and_gradients(single, args, F64)
    compare(found, {key: expected[key] for key in found})
    assert "bias_mode='single'" in repr(single)


@pytest.mark.parametrize("cell", CELLS)
def test_single_bias_of_cells(cell: str, backend: str) -> None:
    name, options = CELLS[cell]
    single = layer(name, I, H, bias_mode="single", **options)
    assert [n for n, _ in single.named_parameters()] == ["weight_ih", "weight_hh", "bias_ih"]
    double = layer(name, I, H, **options)
    double.load_state_dict(single.state_dict(), strict=False)
    nn.init.zeros_(double.bias_hh)
    x = draw(B, I, seed=1, dtype=F64)
    expected = outputs_and_gradients(double, [x], F64)
    found = outputs_and_gradients(single, [x], F64)
    compare(found, {key: expected[key] for key in found})


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_single_of_no_bias_is_none(name: str) -> None:
    module = layer(name, I, H, bias=False, bias_mode="single")
    assert not [n for n, _ in module.named_parameters() if "bias" in n]
    module(draw(B, I, seed=1, dtype=F64))


# merge_mode

MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "mul": lambda a, b: a * b,
    "concat": lambda a, b: torch.cat([a, b], -1),
}


def stacked_by_hand(module: Any, x: Tensor, hx: Any) -> Any:
    """torch.nn's layers of one direction each, on the parameters of ours."""
    states, finals = tensors(hx), []
    for k in range(module.num_layers):
        parts = []
        for d, suffix in enumerate(("", "_reverse")):
            single = getattr(nn, module.mode)(x.size(-1), H, dtype=F64)
            weights = {n: getattr(module, n.replace("l0", f"l{k}") + suffix) for n in NAMES}
            row = slice(2 * k + d, 2 * k + d + 1)
            initial = tuple(s[row] for s in states)
            y, final = torch.func.functional_call(
                single, weights, (x.flip(0) if d else x, initial if len(states) > 1 else initial[0])
            )
            parts.append(y.flip(0) if d else y)
            finals.append(tensors(final))
        x = MERGES[module.merge_mode](*parts)
    h_n, *c_n = (torch.cat(slot) for slot in zip(*finals, strict=True))
    return x, (h_n, c_n[0]) if c_n else h_n


NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@pytest.mark.parametrize("mode", MERGES)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_merge_mode(name: str, mode: str, backend: str) -> None:
    module = layer(name, I, H, 2, bidirectional=True, merge_mode=mode)
    assert module.weight_ih_l1.size(1) == (2 * H if mode == "concat" else H)
    agree(module, arguments(module), call, stacked_by_hand)


def test_merge_mode_of_one_direction_is_nothing() -> None:
    for mode in MERGES:
        module = layer("GRU", I, H, 2, merge_mode=mode)
        assert module(draw(T, B, I, seed=1, dtype=F64))[0].shape == (T, B, H)


# nonlinearity


def sigmoid_by_hand(module: Any, x: Tensor, h: Tensor) -> Any:
    outputs, state = [], h[0]
    for x_t in x:
        gates = x_t @ module.weight_ih_l0.T + module.bias_ih_l0
        gates = gates + state @ module.weight_hh_l0.T + module.bias_hh_l0
        state = 1 / (1 + torch.exp(-gates))
        outputs.append(state)
    return torch.stack(outputs), state[None]


def test_sigmoid_layer(backend: str) -> None:
    module = layer("RNN", I, H, nonlinearity="sigmoid")
    agree(module, arguments(module), call, sigmoid_by_hand)


def test_sigmoid_cell(backend: str) -> None:
    cell = layer("RNNCell", I, H, nonlinearity="sigmoid")
    x, h = (draw(B, n, seed=n, dtype=F64).requires_grad_() for n in (I, H))
    agree(
        cell,
        [x, h],
        call,
        lambda m, x, h: torch.sigmoid(
            x @ m.weight_ih.T + m.bias_ih + h @ m.weight_hh.T + m.bias_hh
        ),
    )


# return_all_states

STATEFUL = {
    "rnn": ("RNN", {"num_layers": 2}),
    "lstm": ("LSTM", {"num_layers": 2}),
    "lstm-bi": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm-proj": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "gru-bi": ("GRU", {"bidirectional": True, "num_layers": 2}),
}
each_stateful = pytest.mark.parametrize("build", STATEFUL)


def with_states(module: Any, *args: Any) -> Any:
    y, final, states = module(*args, return_all_states=True)
    assert isinstance(states, rnnkernels.AllStates)
    assert len(states.h) == module.num_layers
    assert (states.c is None) == (module.mode != "LSTM")
    return y, final, states


def stepped(module: Any, x: Tensor, hx: Any) -> Any:
    """The same by calls of one step, one layer and one direction each."""
    run = getattr(functional, module.mode.split("_")[0].lower())
    D, groups = 1 + module.bidirectional, module.all_weights
    initial, finals, everything = tensors(hx), [], []
    for k, group in enumerate(groups):
        d = k % D
        state: Any = [s[k : k + 1] for s in initial]
        seen: list[Any] = [None] * T
        for t in reversed(range(T)) if d else range(T):
            _, after = run(x[t : t + 1], state if len(state) > 1 else state[0], [group])
            seen[t] = state = tensors(after)
        finals.append(state)
        everything.append([torch.cat(slot) for slot in zip(*seen, strict=True)])  # [T, B, size]
        if d == D - 1:
            x = torch.cat([states[0] for states in everything[k - d :]], dim=-1)
    by_layer = [
        tuple(
            torch.stack([everything[k + d][slot] for d in range(D)], dim=2)
            for k in range(0, len(groups), D)
        )
        for slot in range(len(initial))
    ]
    final = tuple(torch.cat(slot) for slot in zip(*finals, strict=True))
    return x, final if len(final) > 1 else final[0], by_layer


@each_stateful
def test_all_states_equal_single_steps(build: str, backend: str) -> None:
    name, options = STATEFUL[build]
    module = layer(name, I, H, **options)
    agree(module, arguments(module), with_states, stepped)


@each_stateful
def test_all_states_batch_first(build: str, backend: str) -> None:
    name, options = STATEFUL[build]
    module = layer(name, I, H, **options)

    def batch_first(module: Any, x: Tensor, hx: Any) -> Any:
        module.batch_first = True
        y, final, states = with_states(module, x.transpose(0, 1), hx)
        module.batch_first = False
        return y.transpose(0, 1), final, [s.transpose(0, 1) for s in tensors(states)]

    agree(module, arguments(module), with_states, batch_first)


@each_stateful
def test_all_states_unbatched(build: str, backend: str) -> None:
    name, options = STATEFUL[build]
    module = layer(name, I, H, **options)

    def batched(module: Any, x: Tensor, hx: Any) -> Any:
        states = tuple(s.unsqueeze(1) for s in tensors(hx))
        results = with_states(module, x.unsqueeze(1), states if len(states) > 1 else states[0])
        return [t.squeeze(1) for t in tensors(results)]

    agree(module, arguments(module, (T,)), with_states, batched)


@each_stateful
def test_all_states_packed(build: str, backend: str) -> None:
    """Every row of a packed batch as a run of its own, gradients through c included."""
    name, options = STATEFUL[build]
    module = layer(name, I, H, **options)

    def packed(module: Any, x: Tensor, hx: Any) -> Any:
        input = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
        y, final, states = with_states(module, input, hx)
        sequences = [y, *states.h, *(states.c or ())]
        return [pad_packed_sequence(s)[0] for s in sequences], final

    def rows(module: Any, x: Tensor, hx: Any) -> Any:
        runs: list[tuple[list[Tensor], list[Tensor]]] = []
        for b, n in enumerate(LENGTHS):
            own = tuple(s[:, b] for s in tensors(hx))
            y, final, states = with_states(module, x[:n, b], own if len(own) > 1 else own[0])
            runs.append(([y, *states.h, *(states.c or ())], tensors(final)))
        sequences = [pad_sequence(list(s)) for s in zip(*(run[0] for run in runs), strict=True)]
        finals = [torch.stack(s, dim=1) for s in zip(*(run[1] for run in runs), strict=True)]
        return sequences, finals

    agree(module, arguments(module), packed, rows)
