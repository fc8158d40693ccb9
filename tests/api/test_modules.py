"""The surface of our modules: all that code written for torch.nn's may touch."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import rnnkernels
from helpers import compare, draw, outputs_and_gradients, tensors
from rnnkernels.testing import assert_close

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
F64 = torch.float64

# (class, arguments) as written by users, by position as far as torch takes them.
BUILDS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "rnn": ("RNN", (5, 7), {}),
    "rnn-positions": ("RNN", (5, 7, 2, "relu", False, True, 0.5, True), {}),
    "rnn-relu": ("RNN", (5, 7), {"nonlinearity": "relu", "bidirectional": True}),
    "lstm": ("LSTM", (5, 7), {}),
    "lstm-positions": ("LSTM", (5, 7, 3, False, True, 0.5, True, 3), {}),
    "lstm-proj": ("LSTM", (5, 7, 2), {"proj_size": 3}),
    "lstm-no-bias": ("LSTM", (5, 7, 2), {"bias": False, "bidirectional": True}),
    "gru": ("GRU", (5, 7), {}),
    "gru-positions": ("GRU", (5, 7, 2, False, True, 0.5, True), {}),
    "gru-bi": ("GRU", (5, 7, 2), {"bidirectional": True, "dtype": F64}),
    "rnncell": ("RNNCell", (5, 7), {}),
    "rnncell-positions": ("RNNCell", (5, 7, False, "relu"), {}),
    "lstmcell": ("LSTMCell", (5, 7), {"dtype": F64}),
    "lstmcell-positions": ("LSTMCell", (5, 7, False), {}),
    "grucell": ("GRUCell", (5, 7), {}),
    "grucell-no-bias": ("GRUCell", (5, 7), {"bias": False}),
}


def both(build: str) -> tuple[Any, Any]:
    """torch.nn's module and ours, each built from the same seed."""
    name, args, kwargs = BUILDS[build]
    made = []
    for library in (nn, rnnkernels):
        torch.manual_seed(11)
        made.append(getattr(library, name)(*args, **kwargs))
    return made[0], made[1]


def arguments(module: Any) -> list[Any]:
    """An input and states for any module, the same for the same sizes."""
    p = next(module.parameters())
    B, I, H = 2, module.input_size, module.hidden_size
    lstm = "lstm" in type(module).__name__.lower()
    if isinstance(module, nn.RNNCellBase):
        shape, states = [B, I], [[B, H]] * (1 + lstm)
    else:
        rows = module.num_layers * (1 + module.bidirectional)
        shape = [B, 4, I] if module.batch_first else [4, B, I]
        states = [[rows, B, module.proj_size or H]] + [[rows, B, H]] * lstm
    hx = [
        draw(*s, seed=i, dtype=torch.float32).to(p.dtype).requires_grad_()
        for i, s in enumerate(states)
    ]
    x = draw(*shape, seed=9, dtype=torch.float32).to(p.dtype).requires_grad_()
    return [x, tuple(hx) if lstm else hx[0]]


def same(ours: nn.Module, other: nn.Module, rtol: float | None = 0.0) -> None:
    """Outputs and gradients of both are equal."""
    for m in (ours, other):
        m.eval()  # no dropout
    precision = torch.float32
    actual = outputs_and_gradients(ours, arguments(ours), precision)
    compare(actual, outputs_and_gradients(other, arguments(other), precision), rtol=rtol)


pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
)
each_build = pytest.mark.parametrize("build", BUILDS)


@each_build
def test_same_seed_gives_the_same_parameters_and_random_state(build: str) -> None:
    name, args, kwargs = BUILDS[build]
    states = []
    for library in (nn, rnnkernels):
        torch.manual_seed(11)
        module = getattr(library, name)(*args, **kwargs)
        states.append((module.state_dict(), torch.get_rng_state()))
    (theirs, their_rng), (ours, our_rng) = states
    assert list(theirs) == list(ours)
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype
        assert torch.equal(value, ours[key]), key
    assert torch.equal(their_rng, our_rng)


@each_build
def test_state_dict_goes_both_ways(build: str) -> None:
    theirs, ours = both(build)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    same(ours, theirs, rtol=None)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@each_build
def test_surface_equals_torchs(build: str) -> None:
    theirs, ours = both(build)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)
    for name, value in vars(theirs).items():
        if isinstance(value, (int, float, bool, str)):
            assert getattr(ours, name) == value, name
    if isinstance(theirs, nn.RNNCellBase):
        assert isinstance(ours, nn.RNNCellBase)
        return
    assert isinstance(ours, nn.RNNBase)
    assert not isinstance(ours, (nn.RNN, nn.LSTM, nn.GRU))
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert all(
        map(lambda w, n: w is getattr(ours, n), ours._flat_weights, ours._flat_weights_names)
    )
    assert [[w.shape for w in group] for group in ours.all_weights] == [
        [w.shape for w in group] for group in theirs.all_weights
    ]
    ours.flatten_parameters()  # nothing to do, and no error


@pytest.mark.parametrize("name", LAYERS)
def test_constructor_of_layer_is_torchs_and_more(name: str) -> None:
    documented = inspect.signature(typing.get_overloads(getattr(nn, name).__init__)[0])
    ours = inspect.signature(getattr(rnnkernels, name).__init__)
    check_signatures(documented, ours)


@pytest.mark.parametrize("name", CELLS)
def test_constructor_of_cell_is_torchs_and_more(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(m, name).__init__) for m in (nn, rnnkernels))
    check_signatures(theirs, ours)


def check_signatures(theirs: inspect.Signature, ours: inspect.Signature) -> None:
    positional = [p for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_forward_takes_torchs_arguments(name: str) -> None:
    for module in (nn, rnnkernels):
        parameters = list(inspect.signature(getattr(module, name).forward).parameters.values())
        assert [p.name for p in parameters[:3]] == ["self", "input", "hx"]
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:])


@pytest.mark.parametrize("build", [b for b in BUILDS if "cell" not in b])
def test_checks_answer_as_torchs_do(build: str) -> None:
    theirs, ours = both(build)
    (x, hx), lstm = arguments(theirs), build.startswith("lstm")
    h = hx[0] if lstm else hx
    sizes = torch.tensor([2, 2, 2, 2])
    packed = pack_sequence([x.detach()[0], x.detach()[0]]).data
    wrong = torch.zeros(1, 2, 3, 4)
    index = torch.tensor([1, 0])
    calls: list[Callable[[Any], Any]] = [
        lambda m: m.get_expected_hidden_size(x, None),
        lambda m: m.get_expected_hidden_size(packed, sizes),
        lambda m: m.check_input(x, None),
        lambda m: m.check_input(wrong, None),
        lambda m: m.check_input(x[..., :2], None),
        lambda m: m.check_hidden_size(h, m.get_expected_hidden_size(x, None)),
        lambda m: m.check_hidden_size(h, (9, 9, 9), "Expected {} and not {}"),
        lambda m: m.check_forward_args(x, hx, None),
        lambda m: m.check_forward_args(x, (h[:, :1], h) if lstm else h[:, :1], None),
        lambda m: m.permute_hidden(hx, None) is hx,
        lambda m: m.permute_hidden(hx, index),
    ]
    if lstm:
        calls.append(lambda m: m.get_expected_cell_size(x, None))
    for call in calls:
        answers = []
        for module in (theirs, ours):
            try:
                answers.append(call(module))
            except Exception as error:
                answers.append((type(error), str(error)))
        assert str(answers[0]) == str(answers[1])


@each_build
def test_reset_parameters_draws_as_torch_does(build: str) -> None:
    theirs, ours = both(build)
    for module in (theirs, ours):
        torch.manual_seed(5)
        module.reset_parameters()
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@each_build
def test_copies_are_equal_and_independent(build: str, copied: Callable[[Any], Any]) -> None:
    _, ours = both(build)
    other = copied(ours)
    assert type(other) is type(ours) and repr(other) == repr(ours)
    same(other, ours)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    # The copy computes with its own numbers.
    assert not torch.equal(tensors(other(*arguments(other)))[0], tensors(ours(*arguments(ours)))[0])


@each_build
def test_dtype_changes(build: str) -> None:
    theirs, ours = both(build)
    same(ours.double(), theirs.double(), rtol=None)
    ours.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    same(ours, theirs.float(), rtol=None)


@each_build
def test_meta_device_then_to_empty(build: str) -> None:
    name, args, kwargs = BUILDS[build]
    _, source = both(build)
    ours = getattr(rnnkernels, name)(*args, **kwargs, device="meta")
    assert all(p.is_meta for p in ours.parameters())
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(source.state_dict())
    same(ours, source)


@each_build
def test_meta_device_runs(build: str) -> None:
    """Shapes without numbers, forward and backward."""
    found = []
    for module in both(build):
        args = [t.detach().to("meta").requires_grad_() for t in tensors(arguments(module))]
        hx: Any = tuple(args[1:]) if len(args) > 2 else args[1]
        outputs = tensors(module.to("meta")(args[0], hx))
        torch.autograd.backward([t.sum() for t in outputs])
        leaves = (*args, *module.parameters())
        assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
        found.append([(t.shape, t.dtype, t.device) for t in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("build", ["lstm-proj", "gru-bi", "rnn", "lstmcell", "grucell"])
def test_functional_call_uses_the_weights_it_is_given(build: str) -> None:
    _, ours = both(build)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.5).add_(0.1)
    weights = {k: v.detach().clone().requires_grad_() for k, v in other.named_parameters()}
    args = arguments(ours)
    result = torch.func.functional_call(ours, weights, tuple(args))
    expected = other(*args)
    assert_close(tensors(result), tensors(expected), rtol=0.0)
    torch.autograd.backward([t.sum() for t in (*tensors(result), *tensors(expected))])
    for key, p in other.named_parameters():
        assert_close(weights[key].grad, p.grad, name=key, rtol=0.0)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("build", ["lstm-proj", "gru-bi", "rnn", "lstmcell", "grucell", "rnncell"])
def test_parametrizations(build: str) -> None:
    theirs, ours = both(build)
    name = "weight_hh" if isinstance(ours, nn.RNNCellBase) else "weight_hh_l0"
    for module in (theirs, ours):
        parametrizations.weight_norm(module, name)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.25)
    same(ours, theirs, rtol=None)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("build", ["lstm-proj", "gru-bi", "rnn", "lstmcell", "grucell", "rnncell"])
def test_weight_norm_of_old(build: str) -> None:
    theirs, ours = both(build)
    name = "weight_hh" if isinstance(ours, nn.RNNCellBase) else "weight_hh_l0"
    for module in (theirs, ours):
        nn.utils.weight_norm(module, name)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.25)
    assert f"{name}_g" in dict(ours.named_parameters())
    same(ours, theirs, rtol=None)
    nn.utils.remove_weight_norm(ours, name)
    nn.utils.remove_weight_norm(theirs, name)
    same(ours, theirs, rtol=None)


@each_build
def test_replicas_of_data_parallel(build: str) -> None:
    """What nn.parallel.replicate does, on one device: parameters become plain tensors."""
    _, ours = both(build)
    replica = ours._replicate_for_data_parallel()
    copies = {name: p * 2 for name, p in ours.named_parameters()}
    for name in ours._parameters:
        if name in copies:
            setattr(replica, name, copies[name])
        else:
            replica._parameters[name] = None
    doubled = copy.deepcopy(ours)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    for module in (replica, doubled):
        module.eval()
    args = arguments(ours)
    assert_close(tensors(replica(*args)), tensors(doubled(*args)), rtol=0.0)
    sum(t.sum() for t in tensors(replica(*args))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


@each_build
def test_replaced_parameter_is_used(build: str) -> None:
    """A new Parameter under an old name, as pruning and weight dropping do."""
    theirs, ours = both(build)
    for module in (theirs, ours):
        name, p = next(iter(module.named_parameters()))
        setattr(module, name, nn.Parameter(p.detach() * 3))
    same(ours, theirs, rtol=None)


@pytest.mark.parametrize("name", LAYERS)
def test_batch_first_output_and_state_share_nothing(name: str) -> None:
    for batch_first in (False, True):
        module = getattr(rnnkernels, name)(3, 4, batch_first=batch_first)
        for T in (1, 3):
            outputs = tensors(module(torch.randn(2, T, 3) if batch_first else torch.randn(T, 2, 3)))
            storages = {t.untyped_storage().data_ptr() for t in outputs}
            assert len(storages) == len(outputs)
