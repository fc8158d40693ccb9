"""Everything that must be refused, with the type of error and the name of what is wrong.

Where torch.nn gives a clear error for the same mistake, ours is of the same type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels
from rnnkernels import functional

LAYERS, CELL_KINDS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
BACKENDS = ("cpu", "reference")


def refuses(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert type(caught.value) is error


#: arguments, error, what the text names, whether torch.nn raises the same type
CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], str, bool]] = [
    ({"hidden_size": 0}, ValueError, "hidden_size", True),
    ({"hidden_size": -1}, ValueError, "hidden_size", True),
    ({"input_size": 0}, ValueError, "input_size", True),
    ({"input_size": -1}, ValueError, "input_size", True),
    *(
        ({name: bad}, TypeError, name, bad is not True)
        for name in ("hidden_size", "input_size")
        for bad in (3.0, "3", None, True)
    ),
    ({"num_layers": 0}, ValueError, "num_layers", True),
    ({"num_layers": -1}, ValueError, "num_layers", True),
    *(({"num_layers": bad}, TypeError, "num_layers", True) for bad in (1.5, "2", None)),
    *(
        ({"num_layers": 2, "dropout": bad}, ValueError, "dropout", True)
        for bad in (-0.1, 1.1, float("nan"), float("inf"), True, "0.1")
    ),
    ({"num_layers": 2, "dropout": None}, TypeError, "dropout", False),
    ({"bias": 1}, TypeError, "bias", True),
    ({"bias": None}, TypeError, "bias", True),
    ({"batch_first": 1}, TypeError, "batch_first", True),
    *(({"bidirectional": bad}, TypeError, "bidirectional", False) for bad in (1, 2, "yes", None)),
    ({"dtype": torch.int32}, TypeError, "dtype", False),
    ({"dtype": torch.bool}, TypeError, "dtype", False),
    ({"dtype": "float32"}, TypeError, "dtype", True),
    ({"dtype": torch.complex64}, NotImplementedError, "dtype", False),
    ({"bias_mode": "triple"}, ValueError, "bias_mode.*'single'", False),
    ({"merge_mode": "max"}, ValueError, "merge_mode.*'mul'", False),
    ({"backend": "gpu"}, ValueError, "backend.*'reference'", False),
    ({"hidden_size": 2**62}, ValueError, "hidden_size", False),
]


@pytest.mark.parametrize(
    ("arguments", "error", "named", "like_torch"),
    CONSTRUCTOR,
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_constructor(
    kind: str, arguments: dict[str, Any], error: type[Exception], named: str, like_torch: bool
) -> None:
    arguments = {"input_size": 3, "hidden_size": 4, **arguments}
    refuses(error, named, lambda: getattr(rnnkernels, kind)(**arguments))
    if like_torch:
        with pytest.raises(error):
            getattr(nn, kind)(**arguments)


@pytest.mark.parametrize(
    ("proj_size", "error"),
    [(-1, ValueError), (4, ValueError), (5, ValueError), (2.0, TypeError), (None, TypeError)],
    ids=str,
)
def test_proj_size(proj_size: Any, error: type[Exception]) -> None:
    refuses(error, "proj_size", lambda: rnnkernels.LSTM(3, 4, proj_size=proj_size))
    with pytest.raises(error):
        nn.LSTM(3, 4, proj_size=proj_size)
    for kind in ("RNN", "GRU"):
        for module in (rnnkernels, nn):
            refuses(
                ValueError,
                "proj_size argument is only supported for LSTM",
                lambda m=module, k=kind: getattr(m, k)(3, 4, proj_size=0),
            )


def test_nonlinearity() -> None:
    for build in (rnnkernels.RNN, rnnkernels.RNNCell):
        refuses(
            ValueError, "nonlinearity 'gelu'.*'tanh'", lambda b=build: b(3, 4, nonlinearity="gelu")
        )
    with pytest.raises(ValueError, match="nonlinearity"):
        nn.RNN(3, 4, nonlinearity="gelu")
    refuses(ValueError, "nonlinearity", lambda: rnnkernels.RNN(4, 4, 1, False))
    weights = nn.RNN(3, 4).all_weights
    x = torch.zeros(2, 2, 3)
    refuses(
        ValueError, "nonlinearity", lambda: functional.rnn(x, None, weights, nonlinearity="gelu")
    )


OF_CELLS = {"hidden_size", "input_size", "bias", "dtype", "bias_mode", "backend"}


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    # A cell may have no inputs and no units, as torch.nn's may.
    [row[:3] for row in CONSTRUCTOR if OF_CELLS.issuperset(row[0]) and 0 not in row[0].values()],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cell_constructor(
    kind: str, arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    arguments = {"input_size": 3, "hidden_size": 4, **arguments}
    refuses(error, named, lambda: getattr(rnnkernels, kind)(**arguments))


@pytest.mark.parametrize("kind", LAYERS)
def test_accepted_constructors(kind: str) -> None:
    """Neighbours of the refused: integer-like sizes, dropout of 1, a warning as torch's."""
    layer = getattr(rnnkernels, kind)(np.int64(3), np.int32(4), num_layers=np.int64(2), dropout=1)
    y, _ = layer(torch.randn(2, 2, 3))
    assert y.isfinite().all()
    for module in (rnnkernels, nn):
        with pytest.warns(
            UserWarning, match="dropout option adds dropout after all but last"
        ) as told:
            getattr(module, kind)(3, 4, dropout=0.5)
        assert module is nn or told[0].filename == __file__


X = torch.zeros(5, 2, 3)


def hx(kind: str, *shape: int, **options: Any) -> Any:
    state = torch.zeros(shape, **options)
    return (state, state) if kind.startswith("LSTM") else state


def other_device(kind: str) -> tuple[Tensor, Any]:
    return X, hx(kind, 1, 2, 4, device="meta")


def wrong_form(kind: str) -> tuple[Tensor, Any]:
    return X, torch.zeros(1, 2, 4) if kind == "LSTM" else (X, X)


def arrays(kind: str) -> tuple[Tensor, Any]:
    return X, (np.zeros(3), np.zeros(3)) if kind == "LSTM" else np.zeros(3)


def other_dtype(kind: str) -> tuple[Tensor, Any]:
    return X, hx(kind, 1, 2, 4, dtype=torch.float64)


META = X.to("meta")
#: name, input and hx by kind of layer, error, text, whether torch.nn raises the same type
FORWARD: list[tuple[str, Callable[[str], tuple[Any, Any]], type[Exception], str, bool]] = [
    ("0d", lambda k: (X[0, 0, 0], None), ValueError, "Expected input to be 2D or 3D, got 0D", True),
    ("1d", lambda k: (X[0, 0], None), ValueError, "Expected input to be 2D or 3D, got 1D", True),
    ("4d", lambda k: (X[None], None), ValueError, "Expected input to be 2D or 3D, got 4D", True),
    ("features", lambda k: (X[..., :2], None), RuntimeError, "input.size.*Expected 3, got 2", True),
    ("hx-layers", lambda k: (X, hx(k, 2, 2, 4)), RuntimeError, r"hidden.*\(1, 2, 4\)", True),
    ("hx-batch", lambda k: (X, hx(k, 1, 3, 4)), RuntimeError, r"hidden.*\(1, 2, 4\)", True),
    ("hx-batch-1", lambda k: (X, hx(k, 1, 1, 4)), RuntimeError, r"hidden.*\(1, 2, 4\)", True),
    ("hx-width", lambda k: (X, hx(k, 1, 2, 5)), RuntimeError, r"hidden.*\(1, 2, 4\)", True),
    ("hx-2d", lambda k: (X, hx(k, 1, 4)), RuntimeError, "batched 3-D input, hx.*2-D", True),
    ("hx-3d", lambda k: (X[:, 0], hx(k, 1, 1, 4)), RuntimeError, "unbatched 2-D.*hx.*3-D", True),
    ("int-input", lambda k: (X.int(), None), ValueError, "input dtype.*weight dtype", True),
    ("input-dtype", lambda k: (X.double(), None), ValueError, "input dtype.*weight dtype", True),
    ("hx-dtype", other_dtype, ValueError, "hx.*dtype", False),
    ("input-device", lambda k: (META, None), RuntimeError, "Input and parameter.*device", True),
    ("hx-device", other_device, RuntimeError, "Input and hidden.*device", True),
    ("numpy", lambda k: (X.numpy(), None), TypeError, "input.*ndarray", False),
    ("list", lambda k: (X.tolist(), None), TypeError, "input.*list", False),
    ("none", lambda k: (None, None), TypeError, "input.*NoneType", False),
    ("hx-form", wrong_form, TypeError, "hx", False),
    ("hx-numpy", arrays, TypeError, "hx.*ndarray", False),
]


@pytest.mark.parametrize(
    ("arguments", "error", "named", "like_torch"),
    [pytest.param(*row[1:], id=row[0]) for row in FORWARD],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_forward(
    kind: str,
    arguments: Callable[[str], tuple[Any, Any]],
    error: type[Exception],
    named: str,
    like_torch: bool,
) -> None:
    """The module, the function and torch.nn; packed input and lengths= take the same checks."""
    ours, theirs = getattr(rnnkernels, kind)(3, 4), getattr(nn, kind)(3, 4)
    function = getattr(functional, kind.lower())
    x, state = arguments(kind)
    for backend in BACKENDS:
        ours.backend = backend
        refuses(error, named, lambda: ours(x, state))
        refuses(error, named, lambda b=backend: function(x, state, ours.all_weights, backend=b))
    if isinstance(x, Tensor) and x.dim() == 3 and x.device.type == "cpu":
        packed = pack_padded_sequence(x, torch.tensor([5, 3]))
        refuses(error, named, lambda: ours(packed, state))
        refuses(error, named, lambda: ours(x, state, lengths=[5, 3]))
    if like_torch:
        with pytest.raises(error):
            theirs(x, state)


def test_three_states_for_lstm() -> None:
    for bad in ((X[:1, :, :1],) * 3, [], "hc"):
        refuses(TypeError, "hx.*h_0, c_0", lambda b=bad: rnnkernels.LSTM(3, 1)(X, b))
    assert rnnkernels.LSTM(3, 1)(X, [X[:1, :, :1]] * 2)[0].shape == (5, 2, 1)


XC = torch.zeros(2, 3)
CELL_FORWARD: list[tuple[str, Callable[[str], tuple[Any, Any]], type[Exception], str, bool]] = [
    ("0d", lambda k: (XC[0, 0], None), ValueError, "input to be 1D or 2D, got 0D", True),
    ("3d", lambda k: (XC[None], None), ValueError, "input to be 1D or 2D, got 3D", True),
    ("features", lambda k: (XC[:, :2], None), RuntimeError, "input_size: got 2 expected 3", True),
    ("hx-batch", lambda k: (XC, hx(k, 3, 4)), RuntimeError, "hidden.* batch size 3", True),
    ("hx-width", lambda k: (XC, hx(k, 2, 5)), RuntimeError, "hidden_size: got 5, expected 4", True),
    ("hx-3d", lambda k: (XC, hx(k, 1, 2, 4)), ValueError, "(hidden|hx).*got 3D", True),
    ("hx-dtype", lambda k: (XC, hx(k, 2, 4, dtype=torch.float64)), RuntimeError, "dtype", True),
    ("hx-device", lambda k: (XC, hx(k, 2, 4, device="meta")), RuntimeError, "device", True),
    ("int-input", lambda k: (XC.int(), None), RuntimeError, "dtype.*Int and Float", True),
    ("numpy", lambda k: (XC.numpy(), None), TypeError, "input.*ndarray", False),
    ("hx-form", lambda k: (XC, XC if k == "LSTMCell" else (XC, XC)), TypeError, "hx", False),
]


@pytest.mark.parametrize(
    ("arguments", "error", "named", "like_torch"),
    [pytest.param(*row[1:], id=row[0]) for row in CELL_FORWARD],
)
@pytest.mark.parametrize("kind", CELL_KINDS)
def test_cell_forward(
    kind: str,
    arguments: Callable[[str], tuple[Any, Any]],
    error: type[Exception],
    named: str,
    like_torch: bool,
) -> None:
    x, state = arguments(kind)
    for backend in BACKENDS:
        cell = getattr(rnnkernels, kind)(3, 4, backend=backend)
        refuses(error, named, lambda c=cell: c(x, state))
    if like_torch:
        with pytest.raises(error):
            getattr(nn, kind)(3, 4)(x, state)


LENGTHS: list[tuple[str, Any, type[Exception], str]] = [
    ("negative", [-1, 5], ValueError, "lengths.*from 0 to 5.*-1"),
    ("beyond-t", [5, 6], ValueError, "lengths.*from 0 to 5.*6"),
    ("huge", torch.tensor([2**62, 1]), ValueError, "lengths.*from 0 to 5"),
    ("count", [5, 5, 5], ValueError, r"lengths.*\[2\]"),
    ("2d", torch.ones(2, 1, dtype=torch.int64), ValueError, r"lengths.*\[2\]"),
    ("0d", torch.tensor(3), ValueError, r"lengths.*\[2\]"),
    ("int", 3, TypeError, "lengths.*int"),
    ("float", torch.tensor([4.7, 3.0]), TypeError, "lengths.*float32"),
    ("float-list", [4.7, 3], TypeError, "lengths.*4.7"),
    ("bool", torch.tensor([True, True]), TypeError, "lengths.*bool"),
    ("bool-list", [True, 3], TypeError, "lengths.*True"),
    ("text", ["5", "3"], TypeError, "lengths"),
    ("none-list", [None, 3], TypeError, "lengths"),
    ("complex", torch.tensor([1j, 1j]), TypeError, "lengths.*complex64"),
]
RESETS: list[tuple[str, Any, type[Exception], str]] = [
    ("shape", torch.zeros(2, 5, dtype=torch.bool), ValueError, r"reset.*\[5, 2\]"),
    ("features", torch.zeros(5, 2, 3, dtype=torch.bool), ValueError, r"reset.*\[5, 2\]"),
    ("float", torch.zeros(5, 2), TypeError, "reset.*float32"),
    ("int", torch.zeros(5, 2, dtype=torch.int64), TypeError, "reset.*int64"),
    ("words", [["no", "no"]] * 5, TypeError, "reset: expected"),
    ("device", torch.zeros(5, 2, dtype=torch.bool, device="meta"), RuntimeError, "reset.*device"),
]


@pytest.mark.parametrize(
    ("option", "bad", "error", "named"),
    [pytest.param("lengths", *row[1:], id=f"lengths-{row[0]}") for row in LENGTHS]
    + [pytest.param("reset", *row[1:], id=f"reset-{row[0]}") for row in RESETS],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_reset(
    kind: str, option: str, bad: Any, error: type[Exception], named: str
) -> None:
    layer, function = getattr(rnnkernels, kind)(3, 4), getattr(functional, kind.lower())
    for backend in BACKENDS:
        layer.backend = backend
        options = {option: bad, "backend": backend}
        refuses(error, named, lambda: layer(X, **{option: bad}))
        refuses(error, named, lambda o=options: function(X, None, layer.all_weights, **o))


DATA = torch.zeros(6, 3)
PACKED: list[tuple[str, list[int] | Tensor, type[Exception], str]] = [
    ("sum-too-small", [2, 2, 1], ValueError, "batch_sizes.*sum of 6.*got 5"),
    ("sum-too-big", [3, 3, 1], ValueError, "batch_sizes.*sum of 6.*got 7"),
    ("zero", [3, 3, 0], ValueError, "batch_sizes.*above zero"),
    ("negative", [4, 3, -1], ValueError, "batch_sizes.*above zero"),
    ("increasing", [2, 1, 3], ValueError, "batch_sizes.*never increase.*3 after 1"),
    ("int32", torch.tensor([3, 3], dtype=torch.int32), TypeError, "batch_sizes.*int32"),
    ("empty", torch.zeros(0, dtype=torch.int64), ValueError, "batch_sizes.*T > 0"),
    ("2d", torch.tensor([[3, 3]]), ValueError, "batch_sizes.*shape"),
]


@pytest.mark.parametrize(
    ("sizes", "error", "named"), [pytest.param(*row[1:], id=row[0]) for row in PACKED]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_handmade_packed_sequence(
    kind: str, sizes: Any, error: type[Exception], named: str
) -> None:
    packed = PackedSequence(DATA, torch.as_tensor(sizes))
    layer, function = getattr(rnnkernels, kind)(3, 4), getattr(functional, kind.lower())
    refuses(error, named, lambda: layer(packed))
    refuses(error, named, lambda: function(packed, None, layer.all_weights))


def test_packed_with_lengths_and_features() -> None:
    packed = pack_padded_sequence(X, torch.tensor([5, 3]))
    refuses(ValueError, "lengths", lambda: rnnkernels.GRU(3, 4)(packed, lengths=[5, 3]))
    deep = PackedSequence(torch.zeros(6, 3, 2), torch.tensor([3, 3]))
    refuses(RuntimeError, "input must have 2 dim", lambda: rnnkernels.GRU(3, 4)(deep))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_valid_edges(kind: str, backend: str) -> None:
    """No step, no row, no length: empty or zero output, states as given, zero gradients."""
    layer = getattr(rnnkernels, kind)(3, 4, num_layers=2, bidirectional=True, backend=backend)
    state = hx(kind, 4, 2, 4)
    first = state[0] if kind == "LSTM" else state
    y, finals = layer(X[:0], state)
    final = finals[0] if kind == "LSTM" else finals
    assert y.shape == (0, 2, 8) and torch.equal(final, first)
    y, _ = layer(X, state, lengths=[0, 0])
    assert torch.equal(y, torch.zeros(5, 2, 8))
    y, _ = layer(X[:, :0])
    assert y.shape == (5, 0, 8)
    y.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())
