"""Parameters of Flax's cells: numbers as its formulas give them and as Flax itself computes them,
exact ways there and back, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import formulas
import rnnkernels
from formulas import Array
from rnnkernels.interop import GRUResetBefore, from_flax, to_flax

B, T, I, H = 3, 5, 4, 6
#: Shapes of every parameter, for each class: names, gates in one product, which has biases.
NAMED_LSTM = {**{f"i{g}": (I, H, 0) for g in "ifgo"}, **{f"h{g}": (H, H, 1) for g in "ifgo"}}
SHAPES: dict[str, dict[str, tuple[int, int, int]]] = {
    "linen.LSTMCell": NAMED_LSTM,
    "linen.OptimizedLSTMCell": NAMED_LSTM,
    "linen.GRUCell": {
        **{f"i{g}": (I, H, 1) for g in "rzn"},
        **{f"h{g}": (H, H, int(g == "n")) for g in "rzn"},
    },
    "linen.SimpleCell": {"i": (I, H, 1), "h": (H, H, 0)},
    "nnx.LSTMCell": {"if_" if k == "if" else k: v for k, v in NAMED_LSTM.items()},
    "nnx.OptimizedLSTMCell": {"dense_i": (I, 4 * H, 0), "dense_h": (H, 4 * H, 1)},
    "nnx.GRUCell": {"dense_i": (I, 3 * H, 1), "dense_h": (H, 3 * H, 0)},
    "nnx.SimpleCell": {"dense_i": (I, H, 1), "dense_h": (H, H, 0)},
}
each_cell = pytest.mark.parametrize("cell", SHAPES)


def drawn(cell: str, dtype: str = "float64", seed: int = 7) -> dict[str, dict[str, Array]]:
    rng, tree = np.random.default_rng(seed), {}
    for name, (rows, columns, biased) in SHAPES[cell].items():
        tree[name] = {"kernel": (rng.normal(size=(rows, columns)) / 2).astype(dtype)}
        if biased:
            tree[name]["bias"] = rng.normal(size=columns).astype(dtype)
    return tree


def step(cell: str, tree: dict[str, dict[str, Array]]) -> formulas.Step:
    """A step as the documentation of the class states it."""

    def dense(name: str, x: Array) -> Array:
        return np.asarray(x @ tree[name]["kernel"] + tree[name].get("bias", 0))

    def gates(side: str, x: Array, letters: str) -> list[Array]:
        if f"dense_{side}" in tree:
            return np.split(dense(f"dense_{side}", x), len(letters), axis=1)
        found = [side + g if side + g in tree else f"{side}{g}_" for g in letters]
        return [dense(name, x) for name in found]

    def lstm(x: Array, states: list[Array]) -> list[Array]:
        pairs = zip(gates("i", x, "ifgo"), gates("h", states[0], "ifgo"), strict=True)
        i, f, g, o = (a + b for a, b in pairs)
        return formulas.lstm(i, f, g, o, states[1])

    def gru(x: Array, states: list[Array]) -> list[Array]:
        (h,) = states
        (xr, xz, xn), (hr, hz, hn) = gates("i", x, "rzn"), gates("h", h, "rzn")
        return formulas.gru(xz + hz, xn + formulas.sigmoid(xr + hr) * hn, h)

    def simple(x: Array, states: list[Array]) -> list[Array]:
        names = ("i", "h") if "i" in tree else ("dense_i", "dense_h")
        return [np.tanh(dense(names[0], x) + dense(names[1], states[0]))]

    return lstm if "LSTM" in cell else gru if "GRU" in cell else simple


def inputs() -> Array:
    return np.random.default_rng(8).normal(size=(B, T, I))


def outputs(module: torch.nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(module(torch.from_numpy(x))[0].numpy())


def same(a: dict[str, dict[str, Array]], b: dict[str, dict[str, Array]]) -> bool:
    flat = [{(n, k): v for n, part in t.items() for k, v in part.items()} for t in (a, b)]
    return flat[0].keys() == flat[1].keys() and all(
        v.dtype == flat[1][k].dtype and np.array_equal(v, flat[1][k]) for k, v in flat[0].items()
    )


@each_cell
def test_numbers_are_those_of_the_formula(cell: str) -> None:
    params, x = drawn(cell), inputs()
    states = formulas.zeros(2 if "LSTM" in cell else 1, B, H)
    want, _ = formulas.run(step(cell, params), x.swapaxes(0, 1), states)
    got = outputs(from_flax(cell, params), x)
    np.testing.assert_allclose(got, want.swapaxes(0, 1), rtol=0, atol=1e-13)


@each_cell
def test_both_directions(cell: str) -> None:
    trees, x = (drawn(cell), drawn(cell, seed=9)), inputs()
    ours = from_flax(cell, *trees)
    halves = []
    for d, tree in enumerate(trees):
        states = formulas.zeros(2 if "LSTM" in cell else 1, B, H)
        y, _ = formulas.run(step(cell, tree), x.swapaxes(0, 1), states, reverse=d == 1)
        halves.append(y.swapaxes(0, 1))
    want = np.concatenate(halves, axis=-1)
    np.testing.assert_allclose(outputs(ours, x), want, rtol=0, atol=1e-13)
    assert same(to_flax(ours, cell), trees[0])
    assert same(to_flax(ours, cell, reverse=True), trees[1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each_cell
def test_there_and_back_are_the_same_bits(cell: str, dtype: str) -> None:
    params = drawn(cell, dtype)
    assert same(to_flax(from_flax(cell, params), cell), params)


def test_linen_is_what_a_layer_becomes_by_itself() -> None:
    for kind, name in (("LSTM", "linen.LSTMCell"), ("GRU", "linen.GRUCell")):
        stack = getattr(rnnkernels, kind)(I, H, num_layers=2, batch_first=True, dtype=torch.float64)
        tree, x = to_flax(stack, layer=0), inputs()
        assert {n: tuple(p["kernel"].shape) for n, p in tree.items()} == {
            n: shape[:2] for n, shape in SHAPES[name].items()
        }
        below = getattr(rnnkernels, kind)(I, H, batch_first=True, dtype=torch.float64)
        below.load_state_dict({n: v for n, v in stack.state_dict().items() if n.endswith("l0")})
        np.testing.assert_allclose(
            outputs(from_flax(name, tree), x), outputs(below, x), rtol=0, atol=1e-14
        )
    assert set(to_flax(rnnkernels.RNNCell(I, H))) == {"i", "h"}


def test_a_layer_without_biases_has_zeros() -> None:
    tree = to_flax(rnnkernels.GRU(I, H, bias=False))
    assert not any(part["bias"].any() for part in tree.values() if "bias" in part)
    assert "bias" in to_flax(rnnkernels.GRU(I, H, bias=False), "nnx.GRUCell")["dense_i"]


def test_what_stands_around_the_parameters() -> None:
    params = drawn("linen.GRUCell")
    wrapped = from_flax("linen.GRUCell", {"params": {"cell": params}})
    assert same(to_flax(wrapped), params)


GRU = drawn("linen.GRUCell")
REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "cell": (("linen.MGUCell", GRU), ValueError, "cell: expected one of linen.LSTMCell, "),
    "no mapping": (("linen.GRUCell", []), TypeError, "params: expected a mapping of param.* list"),
    "names": (
        ("linen.LSTMCell", GRU),
        *(ValueError, "params: expected ii, if, ig, io, hi, .* for linen.LSTMCell, got ir, iz, in"),
    ),
    "bias missing": (
        ("linen.GRUCell", GRU | {"hn": {"kernel": GRU["hn"]["kernel"]}}),
        *(ValueError, r"params\['hn'\]: expected \['bias', 'kernel'\] for .*, got \['kernel'\]"),
    ),
    "bias too many": (
        ("linen.GRUCell", {"params": GRU | {"hr": GRU["hn"]}}),
        *(ValueError, r"params\['params'\]\['hr'\]: expected \['kernel'\] for linen.GRUCell, got "),
    ),
    "shape": (
        ("linen.GRUCell", GRU | {"iz": {"kernel": np.ones((I + 1, H)), "bias": np.ones(H)}}),
        *(ValueError, r"params\['iz'\]\['kernel'\]: expected shape \[4, 6\], got \[5, 6\]"),
    ),
    "reverse": (
        ("linen.GRUCell", GRU, {}),
        *(ValueError, "reverse: expected ir, .* got nothing"),
    ),
}


@pytest.mark.parametrize("named", REFUSED)
def test_refuses(named: str) -> None:
    args, error, says = REFUSED[named]
    with pytest.raises(error, match=says):
        from_flax(*args)


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (rnnkernels.GRU(I, H), {"cell": "linen.LSTMCell"}, "cell: expected one of linen.GRUCell, "),
        (rnnkernels.GRU(I, H), {"cell": "nnx.GRUCell"}, "cell: expected a class whose n gate has"),
        (rnnkernels.GRU(I, H), {"reverse": True}, "reverse: expected False for a layer of one dir"),
        (
            rnnkernels.RNN(I, H, nonlinearity="relu"),
            {},
            "module: expected .* rnn_tanh, .* rnn_relu",
        ),
        (GRUResetBefore(I, H), {}, "module: expected one of the cells .*got gru_reset_before"),
        (rnnkernels.GRU(I, H, 2), {}, "layer: expected one of 0 to 1"),
    ],
    ids=["another cell", "no bias of n", "one direction", "relu", "reset before", "stack"],
)
def test_refuses_on_the_way_back(module: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        to_flax(module, **options)


@pytest.mark.filterwarnings("ignore")  # of jax's own
@each_cell
def test_as_flax_computes(cell: str) -> None:
    """From the parameters of an object and back into it; numbers to float32's rounding."""
    pytest.importorskip("flax")
    jax = pytest.importorskip("jax")
    kind, name = cell.split(".")
    x = inputs().astype("float32")
    with jax.default_matmul_precision("highest"):
        if kind == "linen":
            linen = pytest.importorskip("flax.linen")
            model = linen.RNN(getattr(linen, name)(H))
            variables = model.init(jax.random.key(0), x)
            params = drawn(cell, "float32")
            found = {n: set(p) for n, p in variables["params"]["cell"].items()}
            assert found == {n: set(p) for n, p in params.items()}
            theirs = model.apply({"params": {"cell": params}}, x)
            params_of = variables
        else:
            nnx = pytest.importorskip("flax.nnx")
            one = getattr(nnx, name)(I, H, rngs=nnx.Rngs(0))
            params_of = nnx.to_pure_dict(nnx.state(one, nnx.Param))
            params = drawn(cell, "float32")
            nnx.update(one, params)
            theirs = nnx.RNN(one)(x)
    ours = from_flax(cell, params)
    np.testing.assert_allclose(outputs(ours, x), np.asarray(theirs), rtol=0, atol=2e-6)
    drawn_there = from_flax(cell, params_of)  # as Flax hands them over: arrays of jax
    assert set(to_flax(drawn_there, cell)) == set(SHAPES[cell])
