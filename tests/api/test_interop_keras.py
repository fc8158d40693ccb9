"""Weights of Keras: numbers as its formulas give them and as Keras itself computes them, exact ways
there and back, and what is refused."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

import formulas
import rnnkernels
from formulas import Array
from rnnkernels import interop
from rnnkernels.interop import from_keras, to_keras

B, T, I, H = 3, 5, 4, 6
GATES = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3}
#: Kinds with the options that go with their weights.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SimpleRNN": ("SimpleRNN", {}),
    "SimpleRNN relu": ("SimpleRNN", {"activation": "relu"}),
    "SimpleRNN sigmoid": ("SimpleRNN", {"activation": "sigmoid"}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU reset before": ("GRU", {"reset_after": False}),
}
each_case = pytest.mark.parametrize("case", CASES)


def drawn(
    kind: str, options: dict[str, Any], bias: bool = True, directions: int = 1
) -> list[Array]:
    """Weights as get_weights() returns them."""
    rng, G = np.random.default_rng(7), GATES[kind]
    shapes: list[tuple[int, ...]] = [(I, G * H), (H, G * H)]
    if bias:
        twice = kind == "GRU" and options.get("reset_after", True)
        shapes.append((2, G * H) if twice else (G * H,))
    return [rng.normal(size=shape) / 2 for _ in range(directions) for shape in shapes]


def step(kind: str, arrays: list[Array], options: dict[str, Any]) -> formulas.Step:
    """A step of Keras's cells, as keras.io states them."""
    kernel, recurrent = arrays[:2]
    bias = arrays[2] if len(arrays) == 3 else np.zeros(recurrent.shape[1])

    def rnn(x: Array, states: list[Array]) -> list[Array]:
        f = formulas.FUNCTIONS[options.get("activation", "tanh")]
        return [f(x @ kernel + states[0] @ recurrent + bias)]

    def lstm(x: Array, states: list[Array]) -> list[Array]:
        i, f, c, o = np.split(x @ kernel + states[0] @ recurrent + bias, 4, axis=1)
        return formulas.lstm(i, f, c, o, states[1])

    def gru(x: Array, states: list[Array]) -> list[Array]:
        (h,) = states
        of_input, of_state = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
        xz, xr, xh = np.split(x @ kernel + of_input, 3, axis=1)
        if options.get("reset_after", True):
            hz, hr, hh = np.split(h @ recurrent + of_state, 3, axis=1)
            n = xh + formulas.sigmoid(xr + hr) * hh
        else:
            uz, ur, uh = np.split(recurrent, 3, axis=1)
            hz, hr = h @ uz, h @ ur
            n = xh + (formulas.sigmoid(xr + hr) * h) @ uh
        return formulas.gru(xz + hz, n, h)

    return {"SimpleRNN": rnn, "LSTM": lstm, "GRU": gru}[kind]


def expected(kind: str, arrays: list[Array], options: dict[str, Any], x: Array) -> Array:
    """All outputs [B, T, D*H]."""
    D = options.get("bidirectional", False) + 1
    each = len(arrays) // D
    outputs = []
    for d in range(D):
        one = step(kind, arrays[d * each : (d + 1) * each], options)
        states = formulas.zeros(2 if kind == "LSTM" else 1, B, H)
        outputs.append(formulas.run(one, x.swapaxes(0, 1), states, reverse=d == 1)[0])
    merge = options.get("merge_mode", "concat")
    if D == 1 or merge == "concat":
        y = np.concatenate(outputs, axis=-1)
    elif merge == "mul":
        y = outputs[0] * outputs[1]
    else:
        y = (outputs[0] + outputs[1]) / (2 if merge == "ave" else 1)
    return np.asarray(y.swapaxes(0, 1))


def inputs() -> Array:
    return np.random.default_rng(8).normal(size=(B, T, I))


def outputs(module: torch.nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(module(torch.from_numpy(x))[0].numpy())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@each_case
def test_numbers_are_those_of_the_formula(case: str, bias: bool) -> None:
    kind, options = CASES[case]
    arrays, x = drawn(kind, options, bias), inputs()
    ours = from_keras(kind, arrays, **options)
    np.testing.assert_allclose(
        outputs(ours, x), expected(kind, arrays, options, x), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("merge", ["concat", "sum", "ave", "mul"])
@each_case
def test_both_directions(case: str, merge: str) -> None:
    kind, options = CASES[case]
    options = {**options, "bidirectional": True, "merge_mode": merge}
    arrays, x = drawn(kind, options, directions=2), inputs()
    ours = from_keras(kind, arrays, **options)
    np.testing.assert_allclose(
        outputs(ours, x), expected(kind, arrays, options, x), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each_case
def test_there_and_back_are_the_same_bits(
    case: str, dtype: str, bias: bool, directions: int
) -> None:
    kind, options = CASES[case]
    arrays = [a.astype(dtype) for a in drawn(kind, options, bias, directions)]
    back = to_keras(from_keras(kind, arrays, bidirectional=directions == 2, **options))
    assert [a.dtype.name for a in back] == [dtype] * len(arrays)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, back, strict=True))


def test_what_became_of_the_layer() -> None:
    lstm = from_keras("LSTM", drawn("LSTM", {}), batch_first=False)
    assert type(lstm) is rnnkernels.LSTM and not lstm.batch_first and lstm.bias_mode == "single"
    gru = from_keras("GRU", drawn("GRU", {}))
    assert type(gru) is rnnkernels.GRU and gru.batch_first and gru.bias_mode == "double"
    before = from_keras("GRU", drawn("GRU", {"reset_after": False}), reset_after=False)
    assert type(before) is interop.GRUResetBefore


def test_layers_of_a_stack_and_cells() -> None:
    """A stack has a Keras layer for each of its layers; a cell has one."""
    stack = rnnkernels.LSTM(I, H, num_layers=2)
    kernel, recurrent, bias = to_keras(stack, layer=1)
    assert np.array_equal(kernel[:, H : 2 * H].T, stack.weight_ih_l1[H : 2 * H].detach().numpy())
    assert recurrent.shape == (H, 4 * H)
    assert np.array_equal(bias, (stack.bias_ih_l1 + stack.bias_hh_l1).detach().numpy())
    cell = rnnkernels.GRUCell(I, H)
    kernel, _, bias = to_keras(cell)
    assert np.array_equal(kernel[:, :H].T, cell.weight_ih[H : 2 * H].detach().numpy())  # z of r z n
    assert np.array_equal(bias[1, 2 * H :], cell.bias_hh[2 * H :].detach().numpy())


class Layer:
    """A Keras layer as from_keras sees one."""

    def __init__(self, weights: list[Array], **config: Any) -> None:
        self._weights, self._config = weights, config

    def get_config(self) -> dict[str, Any]:
        return self._config

    def get_weights(self) -> list[Array]:
        return self._weights


def layer(kind: str, weights: list[Array], **config: Any) -> Layer:
    made: Layer = type(kind, (Layer,), {})(weights, **config)
    return made


def test_a_layer_is_asked_for_its_options() -> None:
    arrays = drawn("GRU", {"reset_after": False})
    found = from_keras(layer("GRU", arrays, reset_after=False, activation="tanh"))
    assert type(found) is interop.GRUResetBefore
    relu = from_keras(layer("SimpleRNN", drawn("SimpleRNN", {}), activation="relu"))
    assert relu.nonlinearity == "relu"
    inner = {"class_name": "GRU", "config": {"reset_after": True, "go_backwards": False}}
    backward = {"class_name": "GRU", "config": {"reset_after": True, "go_backwards": True}}
    arrays = drawn("GRU", {}, directions=2)
    both = from_keras(
        layer("Bidirectional", arrays, layer=inner, backward_layer=backward, merge_mode="ave")
    )
    assert type(both) is rnnkernels.GRU and both.merge_mode == "mean"
    assert all(np.array_equal(*p) for p in zip(to_keras(both), arrays, strict=True))
    backward["config"]["activation"] = "relu"
    with pytest.raises(ValueError, match="layer: expected a Bidirectional of two layers of the sa"):
        from_keras(layer("Bidirectional", arrays, layer=inner, backward_layer=backward))


def test_dropout_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"recurrent_dropout=0\.5 of the Keras layer is left out"):
        from_keras(layer("LSTM", drawn("LSTM", {}), recurrent_dropout=0.5))


LSTM, GRU, RNN = drawn("LSTM", {}), drawn("GRU", {}), drawn("SimpleRNN", {})
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "activation": (
        *(("LSTM", LSTM), {"activation": "relu"}, ValueError),
        "activation: expected 'tanh' for LSTM, got 'relu', which the kernels have not",
    ),
    "activation of a SimpleRNN": (
        *(("SimpleRNN", RNN), {"activation": "elu"}, ValueError),
        "activation: expected 'tanh' or 'relu' or 'sigmoid' for SimpleRNN, got 'elu'",
    ),
    "recurrent_activation": (
        *(("GRU", GRU), {"recurrent_activation": "hard_sigmoid"}, ValueError),
        "recurrent_activation: expected 'sigmoid' for GRU, got 'hard_sigmoid'",
    ),
    "of a layer": (
        *((layer("LSTM", LSTM, recurrent_activation="hard_sigmoid"),), {}, ValueError),
        "recurrent_activation: expected 'sigmoid' for LSTM, got 'hard_sigmoid'",
    ),
    "function of a layer": (
        *((layer("SimpleRNN", RNN, activation={"class_name": "function"}),), {}, ValueError),
        "activation: expected .* for SimpleRNN, got a function of its own, which the kernels have",
    ),
    "merge_mode": (
        *(("GRU", GRU * 2), {"bidirectional": True, "merge_mode": "max"}, ValueError),
        "merge_mode: expected one of 'concat', 'sum', 'ave', 'mul', got 'max'",
    ),
    "reset_after": (
        *(("GRU", GRU), {"reset_after": False}, ValueError),
        r"bias: expected shape .*got \[2, 18\] and reset_after=False. Pass reset_after=True",
    ),
    "go_backwards": (
        *((layer("LSTM", LSTM, go_backwards=True),), {}, ValueError),
        r"go_backwards=False, got True.*run the module on input\.flip\(1\)",
    ),
    "kind by name": (("ConvLSTM", LSTM), {}, ValueError, "layer: expected one of 'SimpleRNN', "),
    "kind": ((layer("RNN", LSTM),), {}, TypeError, "'GRU' or a Bidirectional of one, got RNN"),
    "no layer": ((LSTM,), {}, TypeError, "layer: expected a Keras layer, or one of .* got list"),
    "no weights": (("LSTM",), {}, TypeError, "weights: expected the list that get_weights"),
    "not built": ((layer("LSTM", []),), {}, ValueError, "got 0. The layer is not built"),
    "weights beside a layer": (
        *((layer("LSTM", LSTM), LSTM), {}, TypeError),
        "weights: expected nothing beside a Keras layer",
    ),
    "options beside a layer": (
        *((layer("GRU", GRU),), {"reset_after": True}, TypeError),
        "reset_after: expected nothing beside a Keras layer",
    ),
    "number of arrays": (
        *(("LSTM", LSTM), {"bidirectional": True}, ValueError),
        "weights: expected 4 or 6 arrays, .* of each direction, got 3",
    ),
    "kernel": (
        *(("LSTM", [LSTM[0][:, 1:], *LSTM[1:]]), {}, ValueError),
        r"kernel: expected shape \[any, 24\], got \[4, 23\]",
    ),
    "recurrent_kernel": (
        *(("GRU", [LSTM[0], LSTM[1], LSTM[2]]), {}, ValueError),
        r"recurrent_kernel: expected shape \[6, 18\], got \[6, 24\]",
    ),
    "bias": (
        *(("LSTM", [*LSTM[:2], LSTM[2][1:]]), {}, ValueError),
        r"bias: expected shape \[24\], got \[23\]",
    ),
    "integers": (
        *(("LSTM", [a.astype(int) for a in LSTM]), {}, TypeError),
        "recurrent_kernel: expected an array of float16, float32, float64, got int64",
    ),
    "dtypes": (
        *(("LSTM", [LSTM[0].astype("float32"), *LSTM[1:]]), {}, TypeError),
        "weights: expected arrays of one dtype, got float32, float64",
    ),
    "sizes of directions": (
        *(("SimpleRNN", [*RNN, RNN[0][:, :1], RNN[1][:1, :1], RNN[2][:1]]),),
        *({"bidirectional": True}, ValueError),
        "weights: expected those of both directions to be of the same sizes",
    ),
}


@pytest.mark.parametrize("named", REFUSED)
def test_refuses(named: str) -> None:
    args, options, error, says = REFUSED[named]
    with pytest.raises(error, match=says):
        from_keras(*args, **options)


@rnnkernels.cell
def other(n: Any, *, h: Any) -> Any:
    return h + torch.tanh(n)


@pytest.mark.parametrize(
    ("module", "options", "error", "says"),
    [
        (torch.nn.GRU(I, H), {}, TypeError, r"got torch\.nn.*GRU\. Pass rnnkernels\.from_torch"),
        (torch.nn.Linear(I, H), {}, TypeError, "module: expected a layer or cell of rnnkernels"),
        (rnnkernels.GRU(I, H, 2), {}, ValueError, "layer: expected one of 0 to 1, since module is"),
        (rnnkernels.GRU(I, H, 2), {"layer": 2}, ValueError, "layer: expected one of 0 to 1, got 2"),
        (rnnkernels.LSTM(I, H, proj_size=2), {}, ValueError, "without a projection.*proj_size=2"),
        (
            rnnkernels.layer(other)(I, H),
            {},
            ValueError,
            "module: expected one of the cells .*other",
        ),
    ],
    ids=["torch.nn", "no layer of ours", "stack", "layer", "proj_size", "own cell"],
)
def test_refuses_on_the_way_back(
    module: Any, options: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        to_keras(module, **options)


@pytest.mark.filterwarnings("ignore")  # of Keras's own
@pytest.mark.parametrize("both", [False, True], ids=["one direction", "Bidirectional"])
@each_case
def test_as_keras_computes(case: str, both: bool) -> None:
    """From a layer object and back into it; numbers to float32's rounding."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    kind, options = CASES[case]
    made = getattr(keras.layers, kind)(H, return_sequences=True, **options)
    made = keras.layers.Bidirectional(made, merge_mode="ave") if both else made
    x = inputs().astype("float32")
    made(x)
    arrays = [a.astype("float32") for a in drawn(kind, options, directions=1 + both)]
    made.set_weights(arrays)
    ours = from_keras(made)
    theirs = np.asarray(keras.ops.convert_to_numpy(made(x)))
    np.testing.assert_allclose(outputs(ours, x), theirs, rtol=0, atol=2e-6)
    assert all(np.array_equal(a, b) for a, b in zip(to_keras(ours), arrays, strict=True))
    made.set_weights(to_keras(ours))
