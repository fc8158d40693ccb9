"""Conversion of models from torch.nn to ours and back."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnnkernels
from helpers import compare, counted, draw, outputs_and_gradients, same_bits
from rnnkernels import convert, from_torch, revert, to_torch

F64 = torch.float64
I, H = 5, 7

BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {"num_layers": 2, "bidirectional": True}),
    "rnn-relu": ("RNN", {"nonlinearity": "relu", "batch_first": True}),
    "lstm": ("LSTM", {"num_layers": 2, "bias": False}),
    "lstm-proj": ("LSTM", {"proj_size": 3, "bidirectional": True}),
    "gru": ("GRU", {"num_layers": 2, "dropout": 0.5}),
    "rnncell": ("RNNCell", {}),
    "rnncell-relu": ("RNNCell", {"nonlinearity": "relu", "bias": False}),
    "lstmcell": ("LSTMCell", {}),
    "grucell": ("GRUCell", {}),
}
each_build = pytest.mark.parametrize("build", BUILDS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
)


def theirs(build: str, **more: Any) -> Any:
    name, options = BUILDS[build]
    return getattr(nn, name)(I, H, dtype=F64, **options | more).eval()


def ours(build: str) -> type[nn.Module]:
    cls: type[nn.Module] = getattr(rnnkernels, BUILDS[build][0])
    return cls


def results(module: nn.Module) -> dict[str, Tensor | None]:
    x = draw(4, I, seed=1, dtype=F64).requires_grad_()  # unbatched for a layer, a batch for a cell
    return outputs_and_gradients(module, [x], F64)


class Model(nn.Module):
    """Every kind of place that a module can stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(I, H, dtype=F64)
        self.again = self.encoder
        self.parts = nn.ModuleList([nn.Sequential(nn.GRU(H, H, dtype=F64)), nn.Identity()])
        self.cells = nn.ModuleDict({"step": nn.LSTMCell(H, H, dtype=F64)})
        self.norm = nn.LayerNorm(H, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.encoder(x)
        y, _ = self.parts[0](y)
        h, c = self.cells["step"](self.norm(y))
        out: Tensor = h + c
        return out


@each_build
def test_from_torch_shares_parameters_and_computes_the_same(build: str) -> None:
    old = theirs(build)
    new = from_torch(old)
    assert type(new) is getattr(rnnkernels, BUILDS[build][0])
    old_parameters = dict(old.named_parameters())
    assert list(dict(new.named_parameters())) == list(old_parameters)
    assert all(p is old_parameters[n] for n, p in new.named_parameters())
    compare(results(new), results(old))
    assert repr(new) == repr(old) and not new.training
    assert from_torch(theirs(build).train()).training


@each_build
def test_converted_is_like_built(build: str) -> None:
    """Nothing is left or missing beside what our constructor sets."""
    name, options = BUILDS[build]
    built = getattr(rnnkernels, name)(I, H, dtype=F64, **options)
    new = from_torch(theirs(build))
    assert vars(new).keys() == vars(built).keys()
    for key, value in vars(built).items():
        if isinstance(value, (str, int, float, bool)) and key != "training":
            assert vars(new)[key] == value, key
    compare(results(copy.deepcopy(new)), results(new), rtol=0.0)


@each_build
def test_to_torch_goes_back(build: str) -> None:
    old = theirs(build)
    back = to_torch(from_torch(old))
    assert type(back) is type(old)
    assert vars(back).keys() == vars(old).keys()
    assert all(map(lambda a, b: a is b, back.parameters(), old.parameters()))
    compare(results(back), results(old), rtol=0.0)
    compare(results(copy.deepcopy(back).float().double()), results(old), rtol=1e-5)


@each_build
def test_to_torch_of_one_built_by_us(build: str) -> None:
    name, options = BUILDS[build]
    built = getattr(rnnkernels, name)(I, H, dtype=F64, **options, backend="reference").eval()
    back = to_torch(built)
    assert vars(back).keys() == vars(theirs(build)).keys()
    compare(results(back), results(built))


def test_convert_replaces_every_place_and_revert_undoes_it() -> None:
    model: Any = Model()
    before, original = model.state_dict(), copy.deepcopy(model)
    parameters = list(model.parameters())
    converted: Any = convert(model)
    assert converted is model
    assert type(model.encoder) is rnnkernels.LSTM and model.again is model.encoder
    assert type(model.parts[0][0]) is rnnkernels.GRU
    assert type(model.cells["step"]) is rnnkernels.LSTMCell
    assert type(model.norm) is nn.LayerNorm
    assert list(model.state_dict()) == list(before)
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    compare(results(model), results(original))
    encoder = model.encoder
    assert convert(model).encoder is encoder  # a second time does nothing
    reverted: Any = revert(model)
    assert reverted is model
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    compare(results(model), results(original), rtol=0.0)


@each_build
def test_convert_of_a_layer_itself_returns_ours(build: str) -> None:
    old = theirs(build)
    new = convert(old)
    assert type(new) is getattr(rnnkernels, BUILDS[build][0])
    assert type(revert(new)) is type(old)
    assert convert(new) is new and revert(old) is old


def test_hooks_are_kept_and_can_still_be_removed() -> None:
    layer, calls = nn.GRU(I, H, dtype=F64), []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: calls.append(("before", type(m)))),
        layer.register_forward_hook(lambda m, args, out: calls.append(("after", type(m)))),
        layer.register_full_backward_hook(lambda m, gi, go: calls.append(("back", type(m)))),
    ]
    model = convert(nn.Sequential(layer))
    results(model)
    assert calls == [(name, rnnkernels.GRU) for name in ("before", "after", "back")]
    for handle in handles:
        handle.remove()
    results(model)
    assert len(calls) == 3


def test_a_new_module_in_place_of_a_layer_holds_nothing_of_it() -> None:
    layer: nn.Module = nn.GRU(I, H)
    layer.register_forward_hook(lambda *_: None)
    new, gone = convert(layer), weakref.ref(layer)
    del layer
    assert type(new) is rnnkernels.GRU and gone() is None


@each_build
def test_layers_inside_a_model_change_in_place(build: str) -> None:
    """The same object before and after, with all that either class sets and nothing of the other's;
    who holds it keeps holding what runs."""
    layer, other = theirs(build), theirs(build)
    held: list[nn.Module] = [layer]
    expected = results(layer)
    with torch.no_grad():
        for parameter, same in zip(other.parameters(), layer.parameters(), strict=True):
            parameter.copy_(same)
    model = nn.ModuleList([layer])
    assert convert(model) is model and model[0] is layer and type(held[0]) is ours(build)
    assert vars(layer).keys() == vars(from_torch(other)).keys()
    compare(results(held[0]), expected)
    model.train()
    assert held[0].training
    model.eval()
    assert revert(model) is model and model[0] is layer and type(layer) is type(other)
    assert vars(layer).keys() == vars(other).keys()
    compare(results(layer), expected, rtol=0.0)


def test_flat_weights_survive_conversion() -> None:
    """What was put in place of a weight before is still there after."""
    layer = nn.GRU(I, H, dtype=F64)
    layer._flat_weights[1] = torch.zeros_like(layer.weight_hh_l0)
    expected = layer(torch.ones(2, I, dtype=F64))[0]
    model = convert(nn.Sequential(layer))
    torch.testing.assert_close(model(torch.ones(2, I, dtype=F64))[0], expected)
    revert(model)
    torch.testing.assert_close(model(torch.ones(2, I, dtype=F64))[0], expected)


@each_build
def test_kept_types_run_our_kernels(build: str) -> None:
    """Instances of torch.nn's classes, like built, copied and reverted."""
    name, options = BUILDS[build]
    kept: Any = getattr(rnnkernels.torch_types, name)
    old = theirs(build)
    model = convert(nn.Sequential(copy.deepcopy(old)), keep_type=True)
    layer, new, built = model[0], from_torch(old, keep_type=True), kept(I, H, dtype=F64, **options)
    for module in (layer, new, built):
        assert type(module) is kept
        assert isinstance(module, getattr(nn, name)) and isinstance(module, ours(build))
        assert vars(module).keys() == vars(built).keys()
        assert repr(module) == repr(old)
    seen = counted(lambda: layer(draw(2, I, seed=3, dtype=F64)))
    assert any(op.startswith("rnnkernels::") for op in seen)
    for module in (layer, new, pickle.loads(pickle.dumps(new)), copy.deepcopy(new)):
        compare(results(module), results(old))
    assert type(convert(new, keep_type=True)) is kept and convert(new) is new
    assert type(to_torch(new)) is type(old) and type(revert(model)[0]) is type(old)
    compare(results(model[0]), results(old), rtol=0.0)


def test_keep_type_is_kept_for_ours_as_well() -> None:
    model = convert(nn.Sequential(rnnkernels.LSTM(I, H, bias_mode="single")), keep_type=True)
    assert type(model[0]) is rnnkernels.torch_types.LSTM and model[0].bias_mode == "single"


def test_same_seed_gives_kept_types_the_same_parameters() -> None:
    for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"):
        states = []
        for library in (nn, rnnkernels.torch_types):
            torch.manual_seed(4)
            states.append(getattr(library, name)(I, H).state_dict())
        assert same_bits(list(states[0].values()), list(states[1].values()))


@pytest.mark.usefixtures("fresh_compiler")
def test_kept_types_compile_only_where_torch_lets_rnns() -> None:
    """What keep_type costs, as documented; cells compile."""
    lstm, x = rnnkernels.torch_types.LSTM(I, H), torch.randn(2, I)
    compiled = torch.compile(lstm, fullgraph=True, backend="eager")
    # The hint is torch's; 2.15 leaves it out, and names what stands for the layer.
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"allow_rnn|DelayGraphBreakVar"):
        compiled(x)
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.testing.assert_close(compiled(x)[0], lstm(x)[0])
    cell = rnnkernels.torch_types.GRUCell(I, H)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="eager")(x), cell(x))


FUNCTIONS = [convert, revert, rnnkernels.convertible, from_torch, to_torch, rnnkernels.explain]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.LSTM, r"got the class torch\.nn\.LSTM\. Pass an instance .* rnnkernels\.LSTM"),
        (nn.Sequential, r"got the class torch\.nn\..*Sequential\. Pass an instance"),
        ([nn.LSTM(I, H)], r"expected a torch\.nn\.Module, got list"),
    ],
    ids=["layer", "model", "list"],
)
def test_what_is_no_module_is_refused(function: Any, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function(value)


def test_optimizer_goes_on() -> None:
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            results(model)
            optimizer.step()
        if step == 1:
            convert(models[1])
        if step == 2:
            revert(models[1])
    first, second = (m.state_dict() for m in models)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-9, atol=1e-9)


def test_subclasses_are_left_alone() -> None:
    class Special(nn.LSTM):
        pass

    class OurSpecial(rnnkernels.GRU):
        pass

    model = nn.Sequential(Special(I, H), nn.LSTM(I, H), OurSpecial(I, H))
    convert(model)
    assert [type(m) for m in model] == [Special, rnnkernels.LSTM, OurSpecial]
    revert(model)
    assert [type(m) for m in model] == [Special, nn.LSTM, OurSpecial]
    with pytest.raises(TypeError, match="Special"):
        from_torch(model[0])
    with pytest.raises(TypeError, match="OurSpecial"):
        to_torch(model[2])


@pytest.mark.parametrize("module", [nn.Linear(2, 2), rnnkernels.GRU(2, 2)], ids=["linear", "ours"])
def test_from_torch_takes_torchs_six_classes_only(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"expected one of torch\.nn\.RNN"):
        from_torch(module)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.GRU(2, 2)], ids=["linear", "theirs"])
def test_to_torch_takes_our_six_classes_only(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"expected one of rnnkernels\.RNN"):
        to_torch(module)


@pytest.mark.parametrize("library", [nn, rnnkernels], ids=["convert", "revert"])
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrized_layers_are_refused_and_nothing_changes(library: Any, name: str) -> None:
    special = getattr(library, name)(I, H)
    parametrizations.weight_norm(special, "weight_hh" if "Cell" in name else "weight_hh_l0")
    model = nn.Sequential(library.GRU(I, H), special)
    before = list(model.modules())
    with pytest.raises(TypeError, match=name):
        (convert if library is nn else revert)(model)
    assert all(map(lambda a, b: a is b, model.modules(), before))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_of_old_is_converted() -> None:
    layer = nn.utils.weight_norm(nn.LSTM(I, H, dtype=F64), "weight_hh_l0")
    expected = results(layer)
    new = convert(layer)
    with torch.no_grad():
        new.weight_hh_l0_g.mul_(2)  # type: ignore[operator]
    changed = results(new)
    compare(changed, results(layer))
    assert not torch.equal(changed["output 0"], expected["output 0"])  # type: ignore[arg-type]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bias_mode": ("LSTM", {"bias_mode": "single"}, "bias_mode='single'"),
    "merge_mode": ("GRU", {"merge_mode": "sum", "bidirectional": True}, "merge_mode='sum'"),
    "sigmoid": ("RNN", {"nonlinearity": "sigmoid"}, "nonlinearity='sigmoid'"),
    "cell-bias_mode": ("GRUCell", {"bias_mode": "single"}, "bias_mode='single'"),
    "cell-sigmoid": ("RNNCell", {"nonlinearity": "sigmoid"}, "nonlinearity='sigmoid'"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_torch_has_not_is_refused_and_nothing_changes(option: str) -> None:
    name, options, message = REFUSED[option]
    module = getattr(rnnkernels, name)(I, H, **options)
    with pytest.raises(ValueError, match=message):
        to_torch(module)
    model = nn.Sequential(rnnkernels.LSTM(I, H), module)
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        revert(model)
    assert all(map(lambda a, b: a is b, model.modules(), before))
