"""Nodes RNN, GRU and LSTM of ONNX: numbers as the operators' formulas give them and as onnxruntime
computes them, exact ways there and back, and what is refused."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import formulas
import rnnkernels
from formulas import Array
from helpers import tensors
from rnnkernels import interop
from rnnkernels.interop import from_onnx, to_onnx_weights

T, B, I, H = 5, 3, 4, 6
LENGTHS = [5, 2, 3]  # onnxruntime's kernels take none of length 0 for an LSTM
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
OPERATORS = {
    "RNN": {},
    "RNN relu": {"activations": ["Relu"]},
    "GRU": {"linear_before_reset": 1},
    "GRU reset before": {},
    "LSTM": {},
}
DIRECTIONS = ("forward", "reverse", "bidirectional")
each_operator = pytest.mark.parametrize("case", OPERATORS)
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)


class Attribute(NamedTuple):
    """As onnx.AttributeProto has its fields."""

    name: str
    i: int = 0
    f: float = 0.0
    s: bytes = b""
    strings: tuple[bytes, ...] = ()


class Node(NamedTuple):
    """As onnx.NodeProto has its fields, so that onnx itself is needed for comparisons alone."""

    op_type: str
    input: list[str]
    attribute: list[Attribute]


def node(op_type: str, inputs: list[str], **attributes: Any) -> Node:
    found = []
    for name, value in attributes.items():
        if isinstance(value, str):
            found.append(Attribute(name, s=value.encode()))
        elif isinstance(value, list):
            found.append(Attribute(name, strings=tuple(v.encode() for v in value)))
        elif isinstance(value, float):
            found.append(Attribute(name, f=value))
        else:
            found.append(Attribute(name, i=value))
    return Node(op_type, inputs, found)


def given(case: str, direction: str = "forward", **more: Any) -> dict[str, Any]:
    """The attributes of a node."""
    attributes: dict[str, Any] = {"hidden_size": H, "direction": direction, **OPERATORS[case]}
    if "activations" in attributes and direction == "bidirectional":
        attributes["activations"] = attributes["activations"] * 2
    return attributes | more


def drawn(case: str, D: int, dtype: str = "float64") -> dict[str, Array]:
    """Every input of an operator but X, by name."""
    kind, rng = case.split()[0], np.random.default_rng(7)
    G = GATES[kind]
    shapes = {
        "W": (D, G * H, I),
        "R": (D, G * H, H),
        "B": (D, 2 * G * H),
        "initial_h": (D, B, H),
        **({"initial_c": (D, B, H)} if kind == "LSTM" else {}),
    }
    arrays = {name: (rng.normal(size=s) / 2).astype(dtype) for name, s in shapes.items()}
    return {**arrays, "lengths": np.array(LENGTHS, "int32")}


#: The inputs of a node by the names of `drawn`.
ALL = ["X", "W", "R", "B", "lengths", "initial_h", "initial_c"]
WEIGHTS = ALL[:4]


def names(case: str) -> list[str]:
    return ALL if case == "LSTM" else ALL[:-1]


def x_of(dtype: str = "float64") -> Array:
    return np.random.default_rng(8).normal(size=(T, B, I)).astype(dtype)


def step(case: str, W: Array, R: Array, bias: Array) -> formulas.Step:
    """A step as https://onnx.ai/onnx/operators/ states it, for one direction."""
    Wb, Rb = np.split(bias, 2)

    def rnn(x: Array, states: list[Array]) -> list[Array]:
        f = formulas.FUNCTIONS["relu" if case == "RNN relu" else "tanh"]
        return [f(x @ W.T + states[0] @ R.T + Wb + Rb)]

    def lstm(x: Array, states: list[Array]) -> list[Array]:
        i, o, f, c = np.split(x @ W.T + states[0] @ R.T + Wb + Rb, 4, axis=1)
        return formulas.lstm(i, f, c, o, states[1])

    def gru(x: Array, states: list[Array]) -> list[Array]:
        (h,) = states
        (Wz, Wr, Wh), (Rz, Rr, Rh) = np.split(W, 3), np.split(R, 3)
        (Wbz, Wbr, Wbh), (Rbz, Rbr, Rbh) = np.split(Wb, 3), np.split(Rb, 3)
        r = formulas.sigmoid(x @ Wr.T + h @ Rr.T + Rbr + Wbr)
        if case == "GRU":
            n = x @ Wh.T + r * (h @ Rh.T + Rbh) + Wbh
        else:
            n = x @ Wh.T + (r * h) @ Rh.T + Rbh + Wbh
        return formulas.gru(x @ Wz.T + h @ Rz.T + Rbz + Wbz, n, h)

    return {"RNN": rnn, "LSTM": lstm, "GRU": gru}[case.split()[0]]


def expected(case: str, direction: str, arrays: dict[str, Array]) -> list[Array]:
    """Y as our output [T, B, D*H], Y_h and Y_c [D, B, H]."""
    found = []
    for d in range(len(arrays["W"])):
        one = step(case, arrays["W"][d], arrays["R"][d], arrays["B"][d])
        states = [arrays[name][d] for name in ("initial_h", "initial_c") if name in arrays]
        backwards = direction == "reverse" or d == 1
        found.append(formulas.run(one, x_of(), states, LENGTHS, backwards))
    y = np.concatenate([y for y, _ in found], axis=-1)
    return [y, *(np.stack(s) for s in zip(*(states for _, states in found), strict=True))]


def ran(found: interop.OnnxLayer, x: Array) -> list[Array]:
    with torch.no_grad():
        result = found.module(torch.from_numpy(x), found.hx, lengths=found.lengths)
    return [t.numpy() for t in tensors(result)]


@each_direction
@each_operator
def test_numbers_are_those_of_the_formula(case: str, direction: str) -> None:
    """With biases, lengths and initial states."""
    arrays = drawn(case, 1 + (direction == "bidirectional"))
    found = from_onnx(node(case.split()[0], names(case), **given(case, direction)), arrays)
    assert found.dynamic == {}
    for got, want in zip(ran(found, x_of()), expected(case, direction, arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


@each_operator
def test_rows_first(case: str) -> None:
    """layout=1: X [B, T, I], initial states [B, D, H]."""
    arrays = drawn(case, 2)
    want = expected(case, "bidirectional", arrays)
    for name in ("initial_h", "initial_c"):
        if name in arrays:
            arrays[name] = arrays[name].swapaxes(0, 1)
    attributes = given(case, "bidirectional", layout=1)
    found = from_onnx(node(case.split()[0], names(case), **attributes), arrays)
    y, *states = ran(found, x_of().swapaxes(0, 1))
    for got, value in zip([y.swapaxes(0, 1), *states], want, strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-13)


@each_direction
@each_operator
def test_there_and_back_are_the_same_bits(case: str, direction: str) -> None:
    arrays = drawn(case, 1 + (direction == "bidirectional"), "float32")
    found = from_onnx(node(case.split()[0], WEIGHTS, **given(case, direction)), arrays)
    assert found.hx is None and found.lengths is None
    back = to_onnx_weights(found.module)
    for name in "WRB":
        value = getattr(back, name)
        assert value.dtype == np.float32 and np.array_equal(value, arrays[name])
    again = from_onnx(node(back.op_type, WEIGHTS, **back.attributes), back._asdict()).module
    assert type(again) is type(found.module)
    assert all(map(torch.equal, again.state_dict().values(), found.module.state_dict().values()))
    without = from_onnx(node(back.op_type, ["", *WEIGHTS[1:3]], **back.attributes), arrays)
    assert to_onnx_weights(without.module).B is None


def test_what_became_of_the_node() -> None:
    kinds = {}
    for case in OPERATORS:
        attributes = given(case)
        kinds[case] = from_onnx(node(case.split()[0], WEIGHTS, **attributes), drawn(case, 1)).module
    assert [type(m) for m in kinds.values()] == [
        *(rnnkernels.RNN, rnnkernels.RNN, rnnkernels.GRU, interop.GRUResetBefore, rnnkernels.LSTM)
    ]
    assert kinds["RNN relu"].nonlinearity == "relu"
    backwards = from_onnx(node("LSTM", WEIGHTS, **given("LSTM", "reverse")), drawn("LSTM", 1))
    assert type(backwards.module) is interop.Reversed
    assert type(backwards.module.layer) is rnnkernels.LSTM


def test_values_of_the_graph_are_named() -> None:
    """What whoever calls the module has to pass on; one of two states is not."""
    arrays = drawn("LSTM", 1)
    weights = {name: arrays[name] for name in "WRB"}
    found = from_onnx(node("LSTM", ALL, **given("LSTM")), weights)
    wanted = {"sequence_lens": "lengths", "initial_h": "initial_h", "initial_c": "initial_c"}
    assert found.dynamic == wanted
    assert found.hx is None and found.lengths is None
    del arrays["initial_c"]
    with pytest.raises(ValueError, match="initial_c: expected a constant, since initial_h is one"):
        from_onnx(node("LSTM", ALL, **given("LSTM")), arrays)
    hx = from_onnx(node("LSTM", ALL[:-1], **given("LSTM")), arrays).hx
    assert isinstance(hx, tuple) and not hx[1].any() and hx[1].shape == (1, B, H)


def test_peepholes_of_zero_are_none() -> None:
    arrays = drawn("LSTM", 1) | {"P": np.zeros((1, 3 * H))}
    from_onnx(node("LSTM", [*ALL, "P"], **given("LSTM")), arrays)
    arrays["P"][0, 1] = 1
    with pytest.raises(ValueError, match="P: expected peepholes that are all zero, got others"):
        from_onnx(node("LSTM", [*ALL, "P"], **given("LSTM")), arrays)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "clip": (
        *(node("LSTM", WEIGHTS, **given("LSTM", clip=3.0)), {}, ValueError),
        "clip: expected a node without, got 3: it bounds the sums of every gate",
    ),
    "CIFG": (
        *(node("LSTM", WEIGHTS, **given("LSTM", input_forget=1)), {}, ValueError),
        r"input_forget: expected 0, got 1, coupled input and forget gates \(CIFG\)",
    ),
    "activations": (
        *(node("LSTM", WEIGHTS, **given("LSTM", activations=["HardSigmoid", "Tanh", "Tanh"])), {}),
        *(ValueError, r"activations: expected \['Sigmoid', 'Tanh', 'Tanh'\] for LSTM, got \['Hard"),
    ),
    "two activations": (
        *(node("RNN", WEIGHTS, hidden_size=H, direction="bidirectional"),),
        *({"activations": ["Tanh", "Relu"]}, ValueError, r"got \['Tanh', 'Relu'\], which the ker"),
    ),
    "direction": (
        *(node("LSTM", WEIGHTS, **given("LSTM", "backward")), {}, ValueError),
        "direction: expected one of 'forward', 'reverse', 'bidirectional', got 'backward'",
    ),
    "attribute": (
        *(node("LSTM", WEIGHTS, **given("LSTM", window=3)), {}, ValueError),
        "source: expected a node with attributes among .*, got window",
    ),
    "operator": (node("Gemm", WEIGHTS), {}, ValueError, "operators RNN, GRU, LSTM, got Gemm"),
    "no node": ([], {}, TypeError, "source: expected an onnx.NodeProto or onnx.ModelProto, got li"),
    "name beside a node": (
        *(node("LSTM", WEIGHTS, **given("LSTM")), {"name": "it"}, TypeError),
        "name: expected None beside a node, got 'it'",
    ),
    "no initializers": (
        *(node("LSTM", WEIGHTS, **given("LSTM")), {"initializers": None}, TypeError),
        "initializers: expected the arrays by name beside a node, got None",
    ),
    "no inputs": (node("LSTM", ["X", "W"]), {}, ValueError, "inputs X, W and R, got"),
    "no constant": (
        *(node("LSTM", ["X", "computed", "R"], **given("LSTM")), {}, ValueError),
        "W: expected an initializer, got the value 'computed', which is none of them",
    ),
    "W": (
        *(node("LSTM", ["X", "R", "R"], **given("LSTM")), {"drop": 1}, ValueError),
        r"R: expected shape \[1, 24, 6\], got \[1, 24, 5\]",
    ),
    "B": (
        *(node("LSTM", ["X", "W", "R", "lengths"], **given("LSTM")), {}, TypeError),
        "B: expected an array of float16, float32, float64, got int32",
    ),
    "direction of weights": (
        *(node("LSTM", WEIGHTS, **given("LSTM", "bidirectional")), {}, ValueError),
        r"R: expected shape \[2, any, any\], got \[1, 24, 6\]",
    ),
    "lengths": (
        *(node("GRU", ["X", "W", "R", "", "W"], **given("GRU")), {"case": "GRU"}, ValueError),
        r"sequence_lens: expected integers \[B\], got float64 \[1, 18, 4\]",
    ),
}


@pytest.mark.parametrize("named", REFUSED)
def test_refuses(named: str) -> None:
    source, options, error, says = REFUSED[named]
    options = dict(options)
    arrays: Any = drawn(options.pop("case", "LSTM"), 1)
    if "drop" in options:
        arrays["R"] = arrays["R"][:, :, options.pop("drop") :]
    if "activations" in options:
        added = node("RNN", [], activations=options.pop("activations")).attribute
        source = source._replace(attribute=source.attribute + added)
    options = {"initializers": arrays} | options
    with pytest.raises(error, match=says):
        from_onnx(source, **options)


def model_of(case: str, direction: str, arrays: dict[str, Array], inputs: list[str]) -> Any:
    """A model of one node called `it`, whose arrays are initializers."""
    onnx = pytest.importorskip("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    kind, D = case.split()[0], len(arrays["W"])
    outputs = ["Y", "Y_h"] + ["Y_c"] * (kind == "LSTM")
    made = helper.make_node(kind, inputs, outputs, name="it", **given(case, direction))
    graph = helper.make_graph(
        [made],
        "graph",
        [helper.make_tensor_value_info("X", real, [T, B, I])],
        [
            helper.make_tensor_value_info(name, real, [T, D, B, H] if name == "Y" else [D, B, H])
            for name in outputs
        ],
        [onnx.numpy_helper.from_array(arrays[name], name) for name in inputs[1:] if name],
    )
    opset = helper.make_opsetid("", 14)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def in_onnxruntime(model: Any, x: Array) -> list[Array]:
    """Y as our output, and the states."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString())
    y, *states = session.run(None, {"X": x})
    return [y.transpose(0, 2, 1, 3).reshape(T, B, -1), *states]


@pytest.mark.parametrize("inputs", ["all", "weights"])
@each_direction
@each_operator
def test_agrees_with_onnxruntime(case: str, direction: str, inputs: str) -> None:
    arrays = drawn(case, 1 + (direction == "bidirectional"), "float32")
    model = model_of(case, direction, arrays, names(case) if inputs == "all" else WEIGHTS)
    x = x_of("float32")
    found = from_onnx(model, name="it")
    for got, want in zip(ran(found, x), in_onnxruntime(model, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    back = to_onnx_weights(found.module)._asdict()
    assert all(np.array_equal(back[name], arrays[name]) for name in "WRB")


def test_a_node_is_found_by_its_name() -> None:
    model = model_of("GRU", "forward", drawn("GRU", 1, "float32"), WEIGHTS)
    by_output, alone = from_onnx(model, name="Y_h").module, from_onnx(model).module
    assert all(map(torch.equal, by_output.parameters(), alone.parameters()))
    with pytest.raises(ValueError, match=r"name: expected .*\(GRU 'it'\), got 'other', which is "):
        from_onnx(model, name="other")
    with pytest.raises(TypeError, match="initializers: expected None beside a model"):
        from_onnx(model, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter's own
def test_what_torch_exports_comes_back() -> None:
    """Weights that torch.onnx.export wrote, its optimizer having folded their order of gates."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = rnnkernels.LSTM(I, H, bidirectional=True)
            self.gru = rnnkernels.GRU(2 * H, H)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.gru(self.lstm(x)[0])
            return y

    model, file = Model(), io.BytesIO()
    torch.onnx.export(model, (torch.randn(T, B, I),), file, dynamo=True, verbose=False)
    proto = onnx.load_from_string(file.getvalue())
    nodes = {n.op_type: n.output[0] for n in proto.graph.node}
    for kind, layer in (("LSTM", model.lstm), ("GRU", model.gru)):
        found = from_onnx(proto, name=nodes[kind]).module
        want = layer.state_dict()
        assert found.state_dict().keys() == want.keys()
        assert all(torch.equal(value, want[name]) for name, value in found.state_dict().items())
