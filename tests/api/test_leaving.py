"""The ways out of Python that torch has, as docs/leaving_and_coming_back.md describes them, but for
ONNX."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rnnkernels
from helpers import counted
from rnnkernels import convert, revert

I, H = 3, 4
X = torch.randn(5, 2, I, generator=torch.Generator().manual_seed(3))
STEP = X[0]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")


class Model(nn.Module):
    """A layer and a cell with the states that each takes."""

    def __init__(self, layer: nn.Module, cell: nn.Module) -> None:
        super().__init__()
        self.layer, self.cell = layer, cell
        self.again = layer

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        first, state = self.layer(x[:2])
        second, _ = self.again(x[2:], state)
        h = self.cell(x[0])
        return y + torch.cat([first, second]) + h


class Pairs(Model):
    """The same where states are pairs."""

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.layer(x)
        second, _ = self.again(x, (h, c))
        h, c = self.cell(x[0])
        h, c = self.cell(x[1], (h, c))
        return y + second + h + c


def model(name: str, library: Any = rnnkernels, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = getattr(library, name)(I, H, **options)
    cell = getattr(library, name + "Cell")(I, H)
    return (Pairs if name == "LSTM" else Model)(layer, cell).eval()


def runs_ours(module: Any) -> bool:
    return any(op.startswith("rnnkernels::") for op in counted(lambda: module(X)))


@pytest.mark.parametrize("name", LAYERS)
def test_fx_takes_layers_as_leaves(name: str) -> None:
    """The traced module calls the very layers, and computes the same at another T and B."""
    ours = model(name)
    traced = fx.symbolic_trace(ours)
    assert traced.layer is ours.layer and traced.cell is ours.cell
    called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert set(called) == {"layer", "cell"}
    longer = torch.randn(7, 3, I)
    assert torch.equal(traced(X), ours(X)) and torch.equal(traced(longer), ours(longer))
    assert torch.equal(copy.deepcopy(traced)(X), ours(X)) and runs_ours(traced)
    assert type(revert(traced).layer) is getattr(nn, name)
    torch.testing.assert_close(traced(X), ours(X))


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_fx_takes_a_layer_itself(name: str) -> None:
    """Wherever the traced value stands among the arguments."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = getattr(rnnkernels, name)(I, H)
            self.register_buffer("constant", STEP if "Cell" in name else X)

        def forward(self, state: Any) -> Any:
            return self.part(self.constant, state)

    ours = Calls()
    h = torch.randn(2, H) if "Cell" in name else torch.randn(1, 2, H)
    state = (h, h) if "LSTM" in name else h
    torch.testing.assert_close(fx.symbolic_trace(ours)(state), ours(state), rtol=0, atol=0)


def test_fx_keeps_the_options_of_a_call() -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = rnnkernels.GRU(I, H)
            self.cut = rnnkernels.GRU(I, H, truncate=2, grad_clip=1e-3)

        def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
            first = self.gru(x, lengths=lengths, return_all_states=True, truncate=2)
            return (
                first,
                self.gru(X, reset=reset, grad_clip=("norm", 1e-3)),
                self.gru(X, lengths=lengths),
                self.cut(x, truncate=None, grad_clip=None),
            )

    ours, reset = Options(), torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    args = X, torch.tensor([5, 2]), reset
    traced = fx.symbolic_trace(ours)
    grads = []
    for module in (ours, traced):
        ours.zero_grad()
        (y, h, states), (z, _), (w, _), (v, _) = module(*args)
        (y.sum() + z.square().sum() + w.sum() + v.sum()).backward()
        grads.append([y, h, *states.h, z, w, v, *(p.grad for p in ours.parameters())])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


SAYS = "TorchScript cannot hold the kernels of rnnkernels"


@pytest.mark.parametrize("name", LAYERS)
def test_script_takes_torchs_layers(name: str) -> None:
    """With a warning, since torch puts them into the model as well; convert takes that back."""
    ours = model(name, num_layers=2)
    want, parameters = ours(X).detach(), list(ours.parameters())
    with pytest.warns(UserWarning, match=SAYS):
        scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(X), want)
    assert not runs_ours(scripted)
    assert {id(p) for p in scripted.parameters()} <= {id(p) for p in parameters} or all(
        a.data_ptr() == b.data_ptr() for a, b in zip(scripted.parameters(), parameters, strict=True)
    )
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(X), want)
    convert(ours)
    assert runs_ours(ours)
    torch.testing.assert_close(ours(X).detach(), want, rtol=0, atol=0)


def test_script_warns_at_one_place() -> None:
    """One text for all layers, which Python's filters then show once."""
    with pytest.warns(UserWarning, match=SAYS) as caught:
        torch.jit.script(model("LSTM"))
    ours = [w for w in caught if w.category is UserWarning]
    assert len({(str(w.message), w.filename, w.lineno) for w in ours}) == 1 < len(ours)


class Special(rnnkernels.GRU):
    pass


@pytest.mark.parametrize(
    ("layer", "error", "named"),
    [
        (rnnkernels.GRU(I, H, bias_mode="single"), ValueError, "bias_mode='single'"),
        (rnnkernels.RNNCell(I, H, nonlinearity="sigmoid"), ValueError, "nonlinearity='sigmoid'"),
        (Special(I, H), TypeError, "Special"),
    ],
    ids=["bias_mode", "sigmoid", "subclass"],
)
def test_script_refuses_what_torch_has_not(layer: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=rf"torch\.jit\.script .*rnnkernels\.revert\(model\).*{named}"):
        torch.jit.script(nn.Sequential(layer))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_quantize_dynamic_takes_reverted_layers_alone(name: str) -> None:
    """As documented: it goes by exact types, and leaves ours as they are."""
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised kernels")
    library = torch.ao.quantization
    kinds = {getattr(nn, name)}
    for keep_type in (False, True):
        ours = convert(nn.Sequential(getattr(nn, name)(I, H)), keep_type=keep_type)
        same = library.quantize_dynamic(ours, kinds, dtype=torch.qint8)
        assert type(same[0]) is type(ours[0])
    want = ours(X)[0]
    done = library.quantize_dynamic(revert(ours), kinds, dtype=torch.qint8)
    assert type(done[0]).__module__.startswith("torch.ao")
    torch.testing.assert_close(done(X)[0], want, rtol=0, atol=0.05)
    with pytest.warns(UserWarning, match="quantised weights"):
        convert(done)


STAYS = (
    r"were chosen, and have no quantised kernels.*rnnkernels\.revert\(model\)"
    r".*rnnkernels\.serving\.prepack\(model, weight_dtype=torch\.int8\)"
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_quantisation_of_ours_warns(name: str) -> None:
    """Where layers are chosen by our class; the others are quantised, and ours run as before."""
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised kernels")
    kind = getattr(rnnkernels, name)
    ours, args = nn.Sequential(kind(I, H)), STEP if "Cell" in name else X
    want = ours(args)
    with pytest.warns(UserWarning, match=STAYS) as caught:
        done = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(*ours, nn.Linear(H, H)), {kind, nn.Linear}, dtype=torch.qint8
        )
    assert len([w for w in caught if "rnnkernels" in str(w.message)]) == 1
    assert type(done[0]) is kind and type(done[1]) is not nn.Linear
    torch.testing.assert_close(done[0](args), want, rtol=0, atol=0)
    assert "qconfig" not in vars(done[0]) and not hasattr(done[0], "qconfig")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantisation_of_others_says_nothing() -> None:
    """Ours are given None then, also where torch.nn's class was chosen: as documented."""
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised kernels")
    model = nn.Sequential(rnnkernels.LSTM(I, H))
    done = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert type(done[0]) is rnnkernels.LSTM


def test_qconfig_is_an_ordinary_attribute() -> None:
    layer = rnnkernels.GRU(I, H)
    layer.qconfig = None
    assert copy.deepcopy(layer).qconfig is None
    del layer.qconfig
    with pytest.raises(AttributeError, match="qconfig"):
        layer.qconfig  # noqa: B018
    with pytest.raises(AttributeError, match="qconfig"):
        del layer.qconfig
