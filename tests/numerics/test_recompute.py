"""recompute=: the gradients stay what they are, and less is kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels as rk
from cases import NAMES, convert, gradients, make_call
from helpers import counted, tensors
from layers import Sizes
from rnnkernels import _backends
from rnnkernels._core import reference
from rnnkernels._core.call import Call, Clip, Layer, LayerResult
from rnnkernels._core.windows import how_many, windows
from rnnkernels.testing import assert_close

RTOL = 1e-12
T, B, I, H = 11, 3, 4, 6
layer, sequence = Sizes(T, B, I, H).layer, Sizes(T, B, I, H).sequence
RESET = torch.arange(T * B).view(T, B) % 5 == 1  # of the longest row, at its first step too


def run_layer(layer: Layer, every: int) -> LayerResult:
    """A layer by the kernels, with states kept every so many steps."""
    found = _backends.run(layer.call()._replace(recompute=every), "cpu")
    return LayerResult(found.y, found.h_n, found.c_n, None if found.c is None else found.c[0])


@pytest.mark.parametrize("padded", list(itertools.product([1, 2], [False, True], [False, True])))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name: str, padded: tuple[int, bool, bool]) -> None:
    """Directions, lengths of padded rows and resets, each with some of: windows of truncated
    BPTT, of which 11 and k are no multiples; bounds; every state; a projection."""
    D, lengths, reset = padded
    extras = (
        {"every": 1},
        {"every": 3, "window": 4},
        {"every": 4, "window": 2, "clip": Clip("norm", 0.3)},
        {"every": 5, "all_states": True, "clip": Clip("value", 0.05)},
        {"every": 20, "window": 3},
        {"every": 2, "proj": 3 if name == "lstm" else 0, "window": 50},
    )
    for extra in extras:
        changes: dict[str, Any] = dict(extra)
        every, proj = changes.pop("every"), changes.pop("proj", 0)
        call = make_call(name, T, 4, D=D, proj=proj, lengths=lengths, reset=reset)._replace(
            **changes
        )
        if lengths:
            call = call._replace(lengths=torch.tensor([4, 11, 0, 7]))
        got = gradients(lambda layer, every=every: run_layer(layer, every), call)
        assert_close(got, gradients(reference.run_layer, call), rtol=RTOL)


#: What a layer is made with, and what it is called with.
USES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stack": ({"num_layers": 3}, {}),
    "stack, rows": ({"num_layers": 2}, {"lengths": [5, 11, 0], "reset": RESET}),
    "stack, padded rows": ({"num_layers": 2, "truncate": (3, 5)}, {"lengths": [5, 11, 8]}),
    "both ways": ({"num_layers": 2, "bidirectional": True}, {"reset": RESET}),
    "both ways, rows": ({"bidirectional": True}, {"lengths": [5, 11, 0], "reset": RESET}),
    "merged": ({"num_layers": 2, "bidirectional": True, "merge_mode": "mul"}, {}),
    "dropout": ({"num_layers": 3, "dropout": 0.5}, {}),
    "dropout both ways": ({"num_layers": 2, "dropout": 0.5, "bidirectional": True}, {}),
    "recurrent dropout": (
        {"num_layers": 2, "recurrent_dropout": 0.5, "input_dropout": 0.3},
        {"lengths": [5, 11, 0], "reset": RESET},
    ),
    "input dropout": ({"num_layers": 2, "input_dropout": 0.3}, {}),
    "recurrent dropout both ways": ({"bidirectional": True, "recurrent_dropout": 0.5}, {}),
    "every state": ({"num_layers": 2}, {"return_all_states": True, "lengths": [5, 11, 8]}),
    "every state, both ways": (
        {"num_layers": 2, "bidirectional": True, "truncate": 4},
        {"return_all_states": True},
    ),
    "one bias, batch first": (
        {"bias_mode": "single", "batch_first": True, "truncate": 4, "grad_clip": ("norm", 0.1)},
        {"reset": RESET.t()},
    ),
    "no bias": ({"bias": False, "num_layers": 2}, {}),
}


def found(module: Any, x: Any, inputs: list[Tensor], **call: Any) -> tuple[Any, ...]:
    """Outputs, and gradients of a loss on all of them that weighs every element differently."""
    torch.manual_seed(5)
    outputs = tensors(module(x, **call))
    loss = torch.stack([((i + 1) * y.sin()).sum() for i, y in enumerate(outputs)]).sum()
    return outputs, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layers(kind: str, use: str) -> None:
    options, call = USES[use]
    module = layer(kind, **options)
    x = sequence(B, T, I) if module.batch_first else sequence()
    inputs = [x, *module.parameters()]
    expected = found(module, x, inputs, **call)
    for every in (1, 3, 50):
        assert_close(found(module, x, inputs, recompute=every, **call), expected, rtol=RTOL)


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "truncate": 4}, {"proj_size": 2}],
    ids=str,
)
def test_packed(options: dict[str, Any], reset: bool) -> None:
    """Rows that end before others leave the windows behind, and so does their memory."""
    module, x = layer(**options), sequence()
    hx = sequence(module.num_layers * (1 + module.bidirectional), B, module.proj_size or H)
    c0 = sequence(*hx.shape[:2], H)
    inputs = [x, hx, c0, *module.parameters()]
    call = {"hx": (hx, c0), "reset": RESET if reset else None, "return_all_states": True}

    def run(every: int | None) -> tuple[Any, ...]:
        packed = pack_padded_sequence(x, torch.tensor([5, 11, 8]), enforce_sorted=False)
        return found(module, packed, inputs, recompute=every, **call)

    expected = run(None)
    for every in (1, 2, 5):
        assert_close(run(every), expected, rtol=RTOL)


@pytest.mark.parametrize("wanted", ["x", "hx", "weight_hh_l0", "bias_ih_l1"])
def test_some_gradients(wanted: str) -> None:
    """Where others are frozen; and of a loss on the last state alone."""
    module, x, h, c = layer(num_layers=2), sequence(), sequence(2, B, H), sequence(2, B, H)
    inputs = {"x": [x], "hx": [h, c]}.get(wanted) or [dict(module.named_parameters())[wanted]]
    for t in (x, h, c, *module.parameters()):
        t.requires_grad_(any(t is i for i in inputs))

    def last(every: int | None) -> tuple[Tensor, ...]:
        _, (h_n, _) = module(x, (h, c), recompute=every)
        return torch.autograd.grad(h_n.sin().sum(), inputs)

    assert_close(last(3), last(None), rtol=RTOL)


@pytest.mark.parametrize("shape", [(0, 3, I), (5, 0, I), (1, 1, I)], ids=str)
def test_empty_and_smallest(shape: tuple[int, ...]) -> None:
    module, x = layer(num_layers=2), sequence(*shape)
    h, c = sequence(2, shape[1], H), sequence(2, shape[1], H)
    inputs = [x, h, c, *module.parameters()]
    got, want = (found(module, x, inputs, hx=(h, c), recompute=k) for k in (2, None))
    assert_close(got, want, rtol=RTOL)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_other_backends(backend: str) -> None:
    module, x = layer(num_layers=2, bidirectional=True), sequence()
    inputs = [x, *module.parameters()]
    with rk.use_backend(backend):
        got = found(module, x, inputs, recompute=3)
    assert_close(got, found(module, x, inputs), rtol=RTOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("gru", "lstm"):
        call = make_call(name, T=7, B=5, H=19, D=2, dtype=dtype, lengths=True)
        _, grads = gradients(lambda layer: run_layer(layer, 3), call)
        _, expected = gradients(reference.run_layer, convert(call, Tensor.double))
        assert_close(grads, expected)


def test_gradients_of_weights_add_up_in_float32() -> None:
    """bfloat16 has 8 bits: a sum of as many equal terms that is rounded each time stays there."""
    module = rk.RNN(I, H, nonlinearity="sigmoid", dtype=torch.bfloat16)
    x = torch.ones(400, 1, I, dtype=torch.bfloat16)
    got, want = (
        torch.autograd.grad(module(x, recompute=k)[0].sum(), module.bias_hh_l0)[0].double()
        for k in (1, None)
    )
    assert (got / want - 1).abs().max() < 2**-6


# What is kept


def kept_bytes(run: Any) -> int:
    """Of all that autograd keeps while ``run`` goes forward."""
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("every", [1, 8, 200])
def test_what_is_kept(layers: int, every: int) -> None:
    """Inputs and weights, which are there anyway, and the states that enter every window."""
    module, x = layer(num_layers=layers), sequence(200, B, I)
    given = x.nbytes + sum(p.nbytes for p in module.parameters()) + 2 * layers * B * H * 8
    states = -(-200 // every) * layers * B * 2 * H * 8
    assert kept_bytes(lambda: module(x, recompute=every)) == given + states
    assert kept_bytes(lambda: module(x)) > given + 200 * layers * B * 5 * H * 8


def test_what_is_kept_of_packed_rows() -> None:
    """States of rows that reach a window, of no others."""
    module = layer()
    lengths = torch.tensor([40, 1, 1, 1, 1])
    x = sequence(40, 5, I)
    packed = pack_padded_sequence(x, lengths)
    given = packed.data.nbytes + sum(p.nbytes for p in module.parameters()) + 2 * 5 * H * 8
    steps = 5 * 8 + 41 * 8  # lengths, starts
    states = (5 + 9) * 2 * H * 8
    assert kept_bytes(lambda: module(packed, recompute=4)) == given + steps + states


def test_backward_holds_one_window_at_a_time(one_thread: None) -> None:
    """The peak of forward and backward, to the byte the same in every run."""
    pytest.importorskip("tqdm")
    from benchmarks.device import Cpu

    gru = rk.LSTM(16, 16, num_layers=2)
    x = torch.randn(512, 16, 16, requires_grad=True)

    def step(every: int | None) -> object:
        y = gru(x, recompute=every)[0]
        return y, torch.autograd.grad(y.sum(), [x, *gru.parameters()])

    every_one, some, few = (Cpu().peak_allocated(lambda k=k: step(k)) for k in (None, 16, 128))
    assert some < 0.3 * every_one and some < few < 0.6 * every_one


def test_gradients_of_weights_are_there_once(one_thread: None) -> None:
    """Those of a window are added where they belong, and no longer stand beside the sums."""
    pytest.importorskip("tqdm")
    from benchmarks.device import Cpu

    module, x = rk.LSTM(256, 256), torch.randn(6, 1, 256)
    weights = sum(w.nbytes for w in module.parameters())

    def step() -> object:
        return torch.autograd.grad(module(x, recompute=2)[0].sum(), [*module.parameters()])

    step()  # the packs of forward are kept from here on
    # Beside the gradients, the packs of W_hh for backward, and sums of blocks of a product.
    assert Cpu().peak_allocated(step) < 1.9 * weights


def test_without_gradients_nothing_changes() -> None:
    module, x = layer(recompute=2), sequence()
    with torch.no_grad():
        used = counted(lambda: module(x))
    assert [name for name in used if "recomputed" in name] == []
    forward, backward = "rnnkernels::recomputed_forward", "rnnkernels::recomputed_backward"
    used = counted(lambda: module(x)[0].sum().backward())
    assert used[forward] == used[backward] == 1


@pytest.mark.parametrize("window", [0, 1, 3, 6, 50])
@pytest.mark.parametrize("every", [1, 2, 3, 7, 40])
def test_windows(every: int, window: int) -> None:
    """They cover all steps once, none is longer than asked, none crosses a boundary."""
    for steps in (0, 1, 6, 12, 17):
        call: Call = make_call(T=steps, grad=False)._replace(window=window).call()
        listed = windows(call, every)
        assert len(listed) == how_many(steps, every, window)
        assert [t for w in listed for t in range(w.first, w.last)] == list(range(steps))
        for w in listed:
            assert 0 < w.last - w.first <= every
            assert not window or w.first // window == (w.last - 1) // window
