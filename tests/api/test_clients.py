"""Calls that other packages make on recurrent layers, without those packages: what they do with
torch.nn's layers they do with converted ones. In the end the packages themselves, where they are
installed: docs/clients.md has them."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels
from benchmarks import clients
from benchmarks.client_models import ROOT, alone
from helpers import counted
from rnnkernels import convert, revert

I, H, B, T = 3, 4, 3, 6
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")


class PadBackend(nn.Module):
    """torchrl's LSTMModule and GRUModule with the backend 'pad': torch.nn's layers get packed
    trajectories, and all others a mask that only torchrl's own take."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        if isinstance(self.layer, (nn.LSTM, nn.GRU)):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, hidden = self.layer(packed)
            return pad_packed_sequence(y, batch_first=True, total_length=x.size(1))[0], hidden
        mask = torch.arange(x.size(1)) < lengths[:, None]
        return self.layer(x, None, mask=mask)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_pad_backend_of_torchrl(name: str) -> None:
    model = PadBackend(getattr(nn, name)(I, H, batch_first=True))
    args = torch.randn(B, T, I), torch.tensor([6, 2, 4])
    want = model(*args)
    convert(model, keep_type=True)
    torch.testing.assert_close(model(*args), want)
    assert any(op.startswith("rnnkernels::") for op in counted(lambda: model(*args)))
    with pytest.raises(TypeError, match="mask"):
        convert(PadBackend(getattr(nn, name)(I, H)))(*args)


class Policy(nn.Module):
    """rsl-rl's recurrent policy: steps of T = 1 with a state, exports that ask for the type."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x.unsqueeze(0))[0].squeeze(0))
        return out

    def as_jit(self) -> nn.Module:
        if isinstance(self.rnn, nn.LSTM):
            return ScriptedLSTM(self)
        if isinstance(self.rnn, nn.GRU):
            return ScriptedGRU(self)
        raise NotImplementedError(f"Unsupported RNN type: {type(self.rnn)}")


class ScriptedGRU(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.rnn, self.head = copy.deepcopy(policy.rnn), copy.deepcopy(policy.head)
        self.register_buffer("h", torch.zeros(1, 1, H))

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.rnn(x.unsqueeze(0), self.h)
        self.h[:] = h
        out: Tensor = self.head(y.squeeze(0))
        return out


class ScriptedLSTM(ScriptedGRU):
    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.register_buffer("c", torch.zeros(1, 1, H))

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.rnn(x.unsqueeze(0), (self.h, self.c))
        self.h[:] = h
        self.c[:] = c
        out: Tensor = self.head(y.squeeze(0))
        return out


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_exports_of_rsl_rl(name: str) -> None:
    policy, x = Policy(getattr(nn, name)(I, H)).eval(), torch.randn(1, I)
    want = policy(x)
    convert(policy, keep_type=True)
    torch.testing.assert_close(policy(x), want)
    exported = policy.as_jit()
    with pytest.warns(UserWarning, match="TorchScript cannot hold"):
        scripted = torch.jit.script(exported)
    torch.testing.assert_close(scripted(x), want)
    assert type(policy.rnn) is getattr(rnnkernels.torch_types, name)  # the copy alone is torch.nn's
    assert type(revert(policy).as_jit().rnn) is getattr(nn, name)
    with pytest.raises(NotImplementedError, match="Unsupported RNN type"):
        convert(policy).as_jit()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_initialisation_by_type(name: str) -> None:
    """As kraken's, and transformers' models do it: apply a function that looks at types."""
    kind = getattr(nn, name)

    def initialise(module: nn.Module) -> None:
        if isinstance(module, kind):
            for parameter in module.parameters():
                nn.init.constant_(parameter, 0.5)

    model = convert(nn.Sequential(kind(I, H)), keep_type=True)
    model.apply(initialise)
    assert all(bool((p == 0.5).all()) for p in model.parameters())


class Decoder(nn.Module):
    """silero-vad's: an LSTMCell in a TorchScript model that ships as one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTMCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h, _c = self.rnn(x)
        out: Tensor = h
        return out


def test_torchscript_of_silero_is_reported() -> None:
    model = nn.Sequential(torch.jit.script(Decoder()))
    with pytest.warns(UserWarning, match=r"0: .*TorchScript, compiled with LSTMCell inside"):
        convert(model)
    with pytest.raises(TypeError, match="LSTMCell"):
        convert(model, strict=True)
    built = Decoder()
    built.load_state_dict(model[0].state_dict())
    x = torch.randn(2, I)
    torch.testing.assert_close(convert(built)(x), model(x))


def test_a_traced_model_is_reported_by_its_operators() -> None:
    """Where no module is left inside, as in a frozen one."""
    frozen = torch.jit.freeze(torch.jit.script(Decoder().eval()))
    with pytest.warns(UserWarning, match="aten::lstm_cell"):
        convert(frozen)


class Padded(nn.Module):
    """neuralforecast's and others': a subclass with its own forward around torch's."""

    def __init__(self) -> None:
        super().__init__()

        class Locked(nn.LSTM):
            pass

        self.rnn = Locked(I, H)


def test_subclasses_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"Locked left alone: a subclass of torch\.nn\.LSTM"):
        convert(Padded())


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("client", clients.CLIENTS, ids=lambda c: f"{c.name}-{c.how}".split(",")[0])
def test_the_package_itself(client: clients.Client) -> None:
    """Outputs and gradients are those before conversion."""
    if missing := client.missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    assert clients.difference(client, *client.pair()) < 1e-5


def linear() -> clients.Model:
    """A network without recurrent layers."""
    return clients.Model(nn.Linear(I, H), lambda m: m(torch.ones(2, I)))


def layer() -> clients.Model:
    x = torch.randn(T, B, I)
    return clients.Model(nn.GRU(I, H), lambda m: m(x)[0])


def off_in_backward(module: Any) -> Any:
    """Convert, and double the gradient of a parameter."""
    module = convert(module)
    module.weight_hh_l0.register_hook(lambda gradient: 2 * gradient)
    return module


def off(module: Any) -> Any:
    module = convert(module)
    with torch.no_grad():
        module.bias_hh_l0 += 0.01
    return module


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (linear, convert, "no layer was converted"),
        (layer, off, "outputs differ"),
        (layer, off_in_backward, "gradients of weight_hh_l0 differ"),
    ],
)
def test_what_is_wrong_with_a_client_is_said(
    build: Callable[[], clients.Model], change: Callable[[Any], nn.Module], message: str
) -> None:
    client = clients.Client("one", (), "a layer", "made up", build)
    assert client.convert is convert
    if build is layer:
        assert clients.difference(client, *client.pair()) < 1e-6
    with pytest.raises(AssertionError, match=message):
        clients.difference(client, *replace(client, convert=change).pair())


DOCUMENT = Path(ROOT, "docs/clients.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split()[1])
def test_lines_of_the_document(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they are written, beside the examples."""
    pytest.importorskip(snippet.split()[1].partition(".")[0])
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "examples/gallery")])
    names: dict[str, Any] = {}
    exec(snippet, names)
    found = names.get("training", names.get("layer")) or names["model"].policy
    assert clients.recurrent_layers(found) > 0


def test_a_module_is_imported_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package that cannot be imported as a whole."""
    folder = tmp_path / "large/models"
    folder.mkdir(parents=True)
    (tmp_path / "large/__init__.py").write_text("raise ImportError('of much else')")
    (folder / "net.py").write_text("from absent import Base\nclass Net(Base): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    net = alone("large.models.net", "absent").Net
    assert issubclass(net, nn.Module)
    assert not {"large", "large.models", "absent"} & sys.modules.keys()
    with pytest.raises(ImportError):
        alone("large.models.other")
    assert "large" not in sys.modules
