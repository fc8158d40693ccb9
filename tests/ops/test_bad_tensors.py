"""Weights and arguments of the ops that do not fit: refused before any memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rnnkernels
from cases import make_call, random_like
from op_calls import backward, backward_arguments, forward, forward_arguments
from rnnkernels import functional
from rnnkernels._core.call import Layer

BACKENDS = ("cpu", "reference", "torch")
X = torch.zeros(5, 2, 3)


def refuses(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert type(caught.value) is error


def smaller(t: Tensor) -> Tensor:
    return t.new_zeros([n - 1 for n in t.shape])


def bigger(t: Tensor) -> Tensor:
    return t.new_zeros([n + 1 for n in t.shape])


#: What stands in place of a weight, and the error.
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "smaller": (smaller, RuntimeError),
    "bigger": (bigger, RuntimeError),
    "scalar": (lambda t: t.new_zeros(()), RuntimeError),
    "flat": (lambda t: t.new_zeros(t.numel() + (t.dim() == 1)), RuntimeError),
    "deeper": (lambda t: t.new_zeros((*t.shape, 1)), RuntimeError),
    "empty": (lambda t: t.new_zeros((0, *t.shape[1:])), RuntimeError),
    "dtype": (lambda t: t.detach().double(), ValueError),
    "device": (lambda t: t.detach().to("meta"), RuntimeError),
}
#: Every kind of weight, on the first and the second layer, in both directions.
WEIGHTS = [
    base + suffix
    for base in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    for suffix in ("_l0", "_l1_reverse")
]
OF_LAYERS = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in ("RNN", "LSTM", "GRU")
    for name in WEIGHTS
    if kind == "LSTM" or not name.startswith("weight_hr")
]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "name"), OF_LAYERS)
def test_weight_of_a_layer(kind: str, backend: str, wrong: str, name: str) -> None:
    """By functional_call and as a replaced Parameter: the error names the weight."""
    options = {"proj_size": 2} if kind == "LSTM" else {}
    layer = getattr(rnnkernels, kind)(
        3, 4, num_layers=2, bidirectional=True, backend=backend, **options
    )
    make, error = WRONG[wrong]
    bad = make(getattr(layer, name))
    named = name
    if name == "weight_ih_l0" and wrong in ("dtype", "device"):
        named = "does not match weight dtype|not at the same device"  # as torch.nn says it
    refuses(error, named, lambda: functional_call(layer, {name: bad}, (X,)))
    setattr(layer, name, nn.Parameter(bad))
    refuses(error, named, lambda: layer(X))
    with torch.no_grad():
        refuses(error, named, lambda: layer(X))


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_weight_of_a_cell(kind: str, backend: str, wrong: str, name: str) -> None:
    cell = getattr(rnnkernels, kind)(3, 4, backend=backend)
    make, error = WRONG[wrong]
    bad = make(getattr(cell, name))
    named = name
    if name == "weight_ih" and wrong == "device":
        named = "not at the same device"
    if name.startswith("weight") and wrong == "dtype":  # as torch.nn's cells refuse it
        error = RuntimeError
    refuses(error, named, lambda: functional_call(cell, {name: bad}, (X[0],)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_a_function(backend: str) -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    good = [list(w) for w in lstm.all_weights]

    def call(weights: Any, **options: Any) -> Any:
        options = {"bidirectional": True, "backend": backend, **options}
        return functional.lstm(X, None, weights, **options)

    def changed(group: int, place: int, value: Any) -> list[list[Any]]:
        weights = [list(w) for w in good]
        weights[group][place] = value
        return weights

    call(good)
    refuses(ValueError, "weights.*2 per layer.*got 3", lambda: call(good[:3]))
    refuses(ValueError, "weights.*got 0", lambda: call([]))
    refuses(ValueError, "weights.*w_ih.*shape", lambda: call(changed(0, 0, good[0][2])))
    refuses(TypeError, "weights.*NoneType", lambda: call(changed(3, 1, None)))
    refuses(ValueError, "weights.*got 1 tensors", lambda: call([g[:1] for g in good]))
    refuses(ValueError, "weights.*got 6 tensors", lambda: call([[*g, *g[:2]] for g in good]))
    refuses(RuntimeError, "weight_hh_l1_reverse", lambda: call(changed(3, 1, torch.zeros(16, 5))))
    refuses(ValueError, "bias_hh_l1", lambda: call(changed(2, 3, torch.zeros(16).double())))
    one_bias = [good[0], good[1][:3], *good[2:]]
    message = r"weights: expected as many tensors for each.* got \[4, 3, 4, 4\]"
    refuses(ValueError, message, lambda: call(one_bias))
    gru = nn.GRU(3, 4).all_weights[0]
    refuses(
        ValueError,
        "w_hr.*projection needs",
        lambda: functional.gru(X, None, [[*gru, torch.zeros(2, 4)]], backend="reference"),
    )


def test_a_layer_of_meta_tensors_works() -> None:
    """On the meta device everything stays there, as in torch.nn."""
    layer = rnnkernels.LSTM(3, 4, device="meta")
    y, (h_n, c_n) = layer(X.to("meta"))
    assert {t.device.type for t in (y, h_n, c_n)} == {"meta"} and y.shape == (5, 2, 4)


def with_(**changes: Any) -> Callable[[Layer], Layer]:
    return lambda call: call._replace(**changes)


def each(name: str, change: Callable[[Any], Any]) -> Callable[[Layer], Layer]:
    return lambda call: call._replace(**{name: change(getattr(call, name))})


#: What is done to a good call of T=5, B=3, D=2, H=5, R=2; the error; what it names.
FORWARD: list[tuple[str, Callable[[Layer], Layer], type[Exception], str]] = [
    ("cell", with_(cell_name="lstn"), ValueError, "cell: expected one of rnn_tanh.*lstn"),
    ("x-2d", each("x", lambda x: x[0]), RuntimeError, "input: expected 3 dim"),
    ("x-int", each("x", lambda x: x.int()), TypeError, "input: expected float32"),
    ("x-batch", each("x", lambda x: x[:, :2]), RuntimeError, "hx: expected shape"),
    ("x-features", each("x", lambda x: x[..., :2]), RuntimeError, "weight_ih_l0: expected shape"),
    *(
        (
            f"{n}-{how}",
            each(n, lambda w, f=f: [w[0], f(w[1])]),
            error,
            n.replace("w_", "weight_").replace("b_", "bias_") + "_l0_reverse",
        )
        for n in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
        for how, (f, error) in WRONG.items()
        if how != "dtype"
    ),
    ("w_hh-dtype", each("w_hh", lambda w: [w[0], w[1].half()]), ValueError, "weight_hh_l0_rev"),
    ("h0-2d", each("h0", lambda h: h[0]), RuntimeError, "h0: expected 3 dim"),
    ("h0-directions", each("h0", lambda h: h[:1]), RuntimeError, "hx: expected shape"),
    ("h0-batch", each("h0", lambda h: h[:, :2]), RuntimeError, "hx: expected shape"),
    ("h0-empty", each("h0", lambda h: h[..., :0]), RuntimeError, "h0: expected a hidden size"),
    ("h0-dtype", each("h0", lambda h: h.float()), ValueError, "hx: expected dtype"),
    ("h0-device", each("h0", lambda h: h.to("meta")), RuntimeError, "hx: expected device"),
    ("no-c0", with_(c0=None), ValueError, "c0: a cell 'lstm' takes an initial c"),
    ("c0-2d", each("c0", lambda c: c[0]), RuntimeError, "c0: expected 3 dim"),
    ("c0-batch", each("c0", lambda c: c[:, :2]), RuntimeError, "cx: expected shape"),
    ("c0-dtype", each("c0", lambda c: c.float()), ValueError, "cx: expected dtype"),
    ("no-projection", with_(w_hr=[]), RuntimeError, "h0: expected the hidden size of c0"),
    ("gru", with_(cell_name="gru"), ValueError, "c0: a cell 'gru' takes no c"),
    ("gru-w_hr", with_(cell_name="gru", c0=None), ValueError, "w_hr: a projection needs"),
    ("lengths-shape", with_(lengths=torch.ones(4).long()), ValueError, "lengths: expected shape"),
    ("lengths-int32", with_(lengths=torch.ones(3).int()), TypeError, "lengths: expected dtype"),
    ("lengths-big", with_(lengths=torch.tensor([5, 6, 0])), ValueError, "lengths.*to 5.*got 6"),
    ("lengths-low", with_(lengths=torch.tensor([5, 0, -9])), ValueError, "lengths.*to 5.*got -9"),
    ("reset-shape", with_(reset=torch.zeros(3, 5).bool()), ValueError, "reset: expected shape"),
    ("reset-float", with_(reset=torch.zeros(5, 3)), TypeError, "reset: expected dtype bool"),
    ("reset-meta", with_(reset=torch.zeros(5, 3).bool().to("meta")), RuntimeError, "reset: .*dev"),
]


def good_call() -> Layer:
    return make_call(T=5, B=3, H=5, D=2, proj=2, grad=False)._replace(number=0)


@pytest.mark.parametrize(
    ("change", "error", "named"), [pytest.param(*row[1:], id=row[0]) for row in FORWARD]
)
def test_sequence_forward(
    change: Callable[[Layer], Layer], error: type[Exception], named: str
) -> None:
    call = change(good_call())
    refuses(error, named, lambda: forward(call))


def places(op: Any) -> dict[str, int]:
    """Of the arguments of an op, by their names."""
    return {a.name: i for i, a in enumerate(op.default._schema.arguments)}


def changed(i: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda list_: [*list_[:i], change(list_[i]), *list_[i + 1 :]]


#: What is done to an argument of sequence_backward, the error, what it names.
BACKWARD: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("cell", lambda _: "", ValueError, "cell: expected one of"),
    *((n, smaller, RuntimeError, f"{n}: .*shape") for n in ("dy", "dh_n", "dc_n", "dc")),
    # The first three give the sizes, so that another tensor may be the one that does not fit.
    *((n, smaller, RuntimeError, "^(h0|c0|y|weight_hh_l0): .*shape") for n in ("h0", "c0", "y")),
    *((n, bigger, RuntimeError, "^(h0|c0|y|weight_hh_l0): .*shape") for n in ("h0", "c0", "y")),
    *((n, smaller, RuntimeError, f"{n}: .*shape") for n in ("c", "saved")),
    *((n, lambda t: t[0], RuntimeError, n) for n in ("dy", "dc", "h0", "c0", "y", "c", "saved")),
    *((n, lambda t: t[:0], RuntimeError, n) for n in ("c", "saved")),
    *((n, Tensor.float, ValueError, f"{n}: .*dtype") for n in ("dy", "dh_n", "dc", "c", "saved")),
    ("y", Tensor.long, TypeError, "y: expected float32"),
    *(
        (n, lambda t: t.to("meta"), RuntimeError, "device")
        for n in ("dy", "dc_n", "h0", "y", "c", "saved")
    ),
    ("weights", lambda w: [], ValueError, "weights: expected .* 2 layers and directions, got 0"),
    ("weights", lambda w: w[:-1], ValueError, "weights: expected .*got 9"),
    ("weights", lambda w: w[:2] * 2, ValueError, "weights: expected .*got 4"),
    ("weights", lambda w: w + w[:2], ValueError, "weights: expected .*got 12"),
    ("weights", changed(6, smaller), RuntimeError, "weight_hh_l0_reverse: .*shape"),
    ("weights", changed(9, bigger), RuntimeError, "weight_hr_l0_reverse: .*shape"),
    ("projected", lambda _: False, ValueError, "weights: expected .*got 10"),
    ("c0", lambda _: None, ValueError, "c0: a cell 'lstm' takes"),
    ("lengths", lambda _: torch.ones(4).long(), ValueError, "lengths: expected shape"),
    ("lengths", lambda _: torch.tensor([5, 6, 0]), ValueError, "lengths.*to 5.*got 6"),
    ("reset", lambda _: torch.zeros(3, 5).bool(), ValueError, "reset: expected shape"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "named"),
    [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(BACKWARD)],
)
def test_sequence_backward(
    name: str, change: Callable[[Any], Any], error: type[Exception], named: str
) -> None:
    call = good_call()
    outs = forward(call)
    op = torch.ops.rnnkernels.sequence_backward
    arguments = backward_arguments(call, outs, random_like(outs[:4]))
    at = places(op)[name]
    arguments[at] = change(arguments[at])
    refuses(error, named, lambda: op(*arguments))


@pytest.mark.parametrize("change", [lambda w: [], lambda w: w[:-1], lambda w: w + w[:1]])
def test_weights_that_are_not_as_many(change: Callable[[Any], Any]) -> None:
    op = torch.ops.rnnkernels.sequence_forward
    arguments = forward_arguments(good_call())
    at = places(op)["weights"]
    arguments[at] = change(arguments[at])
    refuses(ValueError, "weights: expected .* 2 layers and directions", lambda: op(*arguments))


def test_no_c_where_the_cell_has_none() -> None:
    call = make_call("gru", D=2, grad=False)
    outs = forward(call)
    for place in (2, 3):
        douts: list[Tensor | None] = [None] * 4
        douts[place] = torch.zeros(5, 3, 2, 5, dtype=torch.float64)
        refuses(ValueError, "has no c", lambda d=douts: backward(call, outs, d))
