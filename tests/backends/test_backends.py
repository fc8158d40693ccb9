"""Which backend runs a call: asked for, chosen, refused, explained, missing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels
from helpers import compare, draw, outputs_and_gradients, require_backend, run_python, tensors
from rnnkernels import _backends, _ops, explain, use_backend
from rnnkernels._ops import tangents
from rnnkernels.testing import assert_close

F64 = torch.float64
HAS_CPU = "cpu" in _ops.kernel_devices
HAS_CUDA = "cuda" in _ops.kernel_devices
DEFAULT = "cpu" if HAS_CPU else "reference"
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_environment", None)


def chosen(module: nn.Module | None = None) -> str | None:
    """The backend that runs a layer now."""
    choices = explain(module or rnnkernels.GRU(3, 4), torch.zeros(2, 1, 3)).choices
    return choices[0].backend


# How one is asked for


def test_automatic_choice_on_the_cpu() -> None:
    assert chosen() == DEFAULT


def test_use_backend_nests_and_restores() -> None:
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("torch"):
            assert chosen() == "torch"
            with use_backend(None):
                assert chosen() == DEFAULT
            assert chosen() == "torch"
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == DEFAULT


def test_argument_goes_before_context_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_environment", "reference")
    assert chosen() == "reference"
    with use_backend("torch"):
        assert chosen() == "torch"
        assert chosen(rnnkernels.GRU(3, 4, backend="reference")) == "reference"
    with use_backend("auto"):
        assert chosen() == DEFAULT
    assert chosen(rnnkernels.GRU(3, 4, backend="auto")) == DEFAULT


def test_environment_in_a_process_of_its_own() -> None:
    child = run_python(
        "-c",
        "import torch, rnnkernels; x = torch.zeros(2, 1, 3)\n"
        "print(rnnkernels.explain(rnnkernels.GRU(3, 4), x).choices[0])\n"
        "with rnnkernels.use_backend('torch'):\n"
        "    print(rnnkernels.explain(rnnkernels.GRU(3, 4), x).choices[0])",
        RNNKERNELS_BACKEND="reference",
    )
    assert child.returncode == 0, child.stderr
    first, second = child.stdout.splitlines()
    assert "asked_for='reference', backend='reference'" in first
    assert "asked_for='torch', backend='torch'" in second


def test_unknown_name_in_the_environment() -> None:
    child = run_python("-c", "import rnnkernels", RNNKERNELS_BACKEND="fast")
    assert child.returncode == 1
    assert "ValueError: RNNKERNELS_BACKEND: expected one of 'auto'," in child.stderr


@pytest.mark.parametrize("name", ["fast", "CPU", ""])
@pytest.mark.parametrize("where", ["use_backend", "layer", "cell", "function"])
def test_unknown_names(where: str, name: str) -> None:
    x = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=f"expected one of 'auto', .* got '{name}'"):
        if where == "use_backend":
            with use_backend(name):
                pass
        elif where == "layer":
            rnnkernels.LSTM(3, 4, backend=name)
        elif where == "cell":
            rnnkernels.LSTMCell(3, 4, backend=name)
        else:
            weights = rnnkernels.GRU(3, 4).all_weights
            rnnkernels.functional.gru(x, None, weights, backend=name)


# Refusals: a backend asked for by name is never replaced


REFUSALS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "sigmoid": ("RNN", {"nonlinearity": "sigmoid"}, {}, "torch.nn has no cell 'rnn_sigmoid'"),
    "lengths": ("GRU", {}, {"lengths": [0, 0]}, "torch.nn takes no lengths but of packed rows"),
    "reset": ("GRU", {}, {"reset": torch.zeros(2, 2).bool()}, "torch.nn takes no reset"),
    "all_states": ("LSTM", {}, {"return_all_states": True}, "torch.nn does not return every c"),
    "single": ("LSTM", {"bias_mode": "single"}, {}, "torch.nn has two biases or none"),
}


@pytest.mark.parametrize("option", REFUSALS)
def test_torch_refuses_what_it_has_not(option: str) -> None:
    name, options, call, reason = REFUSALS[option]
    module = getattr(rnnkernels, name)(3, 4, **options)
    x = torch.zeros(2, 2, 3)
    message = f"backend: 'torch' was asked for and cannot run this layer: {reason}"
    with use_backend("torch"), pytest.raises(RuntimeError, match=message):
        module(x, **call)
    module.backend = "torch"
    with pytest.raises(RuntimeError, match=message):
        module(x, **call)
    choice = explain(module, x, **call).choices[0]
    assert (choice.backend, choice.refusals["torch"]) == (None, reason)


def test_torch_refuses_an_empty_sequence() -> None:
    with use_backend("torch"), pytest.raises(RuntimeError, match="takes no empty sequence"):
        rnnkernels.GRU(3, 4)(torch.zeros(0, 2, 3))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_torch_takes_packed_rows(kind: str) -> None:
    module, x = getattr(rnnkernels, kind)(3, 4, bidirectional=True), torch.randn(5, 3, 3)
    want = module(x, lengths=[2, 5, 3])[0]
    with use_backend("torch"):
        torch.testing.assert_close(module(x, lengths=[2, 5, 3])[0], want)
        packed = module(pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False))[0]
    torch.testing.assert_close(pad_packed_sequence(packed)[0], want)


def test_cuda_refuses_the_cpu() -> None:
    reason = "it runs cuda tensors, and the input is on cpu" if HAS_CUDA else "no kernels for cuda"
    reason = reason if HAS_CPU or HAS_CUDA else "the compiled kernels are missing"
    with use_backend("cuda"), pytest.raises(RuntimeError, match=reason):
        rnnkernels.LSTMCell(3, 4)(torch.zeros(2, 3))


def test_cpu_refuses_other_devices() -> None:
    require_backend("cpu")
    module = rnnkernels.GRU(3, 4, device="meta", backend="cpu")
    with pytest.raises(RuntimeError, match="runs cpu tensors, and the input is on meta"):
        module(torch.zeros(2, 1, 3, device="meta"))


# torch's own path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"bidirectional": True, "num_layers": 2}),
        ("RNN", {"nonlinearity": "relu", "batch_first": True}),
        ("LSTM", {"bidirectional": True, "num_layers": 2}),
        ("LSTM", {"proj_size": 3, "bias": False}),
        ("GRU", {"bidirectional": True, "bias": False}),
        ("GRU", {"num_layers": 2, "merge_mode": "mul", "bidirectional": True}),
    ],
    ids=["rnn", "rnn-relu", "lstm", "lstm-proj", "gru", "gru-mul"],
)
def test_torch_backend_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    module = getattr(rnnkernels, name)(4, 7, **options, dtype=F64)
    x = draw(5, 3, 4, seed=1, dtype=F64).requires_grad_()
    found = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            found.append(outputs_and_gradients(module, [x], F64))
    compare(*found)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_torch_backend_runs_cells(name: str) -> None:
    cell = getattr(rnnkernels, name)(4, 7, dtype=F64)
    x = draw(3, 4, seed=1, dtype=F64).requires_grad_()
    found = []
    for backend in ("torch", "reference"):
        cell.backend = backend
        found.append(outputs_and_gradients(cell, [x], F64))
    compare(*found)


# explain


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = rnnkernels.GRU(3, 4, 2, bidirectional=True, dropout=0.5)
        self.top = nn.ModuleList([rnnkernels.LSTM(8, 4, proj_size=2, backend="torch")])
        self.step = rnnkernels.LSTMCell(2, 3)

    def forward(self, x: torch.Tensor, lengths: Any = None) -> Any:
        y, _ = self.encoder(x, lengths=lengths)
        y, _ = self.top[0](y)
        return self.step(y[0])


def test_explain_fields() -> None:
    choices = explain(Model(), torch.zeros(5, 2, 3), lengths=[0, 0]).choices
    assert [(c.module, c.layer) for c in choices] == [
        ("encoder", 0),
        ("encoder", 1),
        ("top.0", 0),
        ("step", -1),
    ]
    assert [c.asked_for for c in choices] == ["auto", "auto", "torch", "auto"]
    assert [c.backend for c in choices] == [DEFAULT, DEFAULT, "torch", DEFAULT]
    assert choices[0].refusals["torch"] == "torch.nn takes no lengths but of packed rows"
    assert "torch" not in choices[2].refusals and "reference" not in choices[2].refusals
    assert choices[0].call == "gru [T=5, B=2, I=3, D=2, H=4] float32 on cpu with lengths"
    assert choices[2].call == "lstm [T=5, B=2, I=8, D=1, H=4, R=2] float32 on cpu"
    assert choices[3].call == "lstm [T=1, B=2, I=2, D=1, H=3] float32 on cpu"


def test_explain_text() -> None:
    lines = str(explain(Model(), torch.zeros(5, 2, 3), lengths=[0, 0])).splitlines()
    head = "gru [T=5, B=2, I=3, D=2, H=4] float32 on cpu with lengths"
    assert lines[0] == f"encoder, layer 0: {head} -> {DEFAULT}"
    assert "    not torch: torch.nn takes no lengths but of packed rows" in lines
    assert any(line.startswith("step: lstm [T=1") for line in lines)
    refused = explain(rnnkernels.GRU(3, 4, backend="cuda"), torch.zeros(5, 2, 3))
    assert "-> none: 'cuda' was asked for and refuses" in str(refused)
    assert str(explain(nn.Linear(3, 3), torch.zeros(3))) == "no layer of rnnkernels was run"


@pytest.mark.skipif(not HAS_CPU, reason="no compiled kernels")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "x", "who", "why"),
    [
        ({"heads": 2, "zoneout": 0.5}, torch.zeros(3, 2, 4), "", ""),
        ({"truncate": 3}, torch.zeros(3, 2, 4), "", ""),
        ({"truncate": 2}, torch.zeros(3, 2, 4), "double backward and forward", "truncate"),
        ({"grad_clip": 1.0}, torch.zeros(3, 2, 4), "double backward", "grad_clip"),
        ({"layer_norm": True}, torch.zeros(3, 2, 4), "double backward and forward", "layer_norm"),
        ({"dtype": torch.bfloat16}, torch.zeros(3, 2, 4).bfloat16(), "double backward and", "16"),
    ],
)
def test_explain_tells_who_has_derivatives(
    options: dict[str, Any], x: torch.Tensor, who: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, asked = rnnkernels.GRU(4, 4, **options), []

    def find(*args: Any) -> Any:
        asked.append(args)
        return kernels(*args)

    kernels = tangents.find
    monkeypatch.setattr(tangents, "find", find)
    said = explain(module, x).choices[0].derivatives
    assert said.startswith(who) and why in said and bool(said) == bool(who)
    with torch.no_grad():
        torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    assert bool(asked) == ("and forward mode" not in said)
    asked.clear()
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
    dx.sum().backward()
    assert bool(asked) == ("double backward" not in said)
    with rnnkernels.batch_invariant():
        assert "refused: batch_invariant" in explain(module, x).choices[0].derivatives


def test_explain_leaves_no_trace() -> None:
    model = Model().train()
    x = torch.randn(5, 2, 3)
    before = torch.get_rng_state()
    explain(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(TypeError):
        explain(model, x, no_such_argument=1)
    with pytest.raises(ValueError, match="2D or 3D"):
        explain(model, x[None])  # an error inside a layer
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert _backends._observer is None
    loss = sum(t.sum() for t in tensors(model(x)))
    loss.backward()  # type: ignore[union-attr]


# The compiled part


def test_build_info() -> None:
    info = rnnkernels.build_info()
    if not HAS_CPU:
        assert info == {}
        return
    assert info.keys() == {
        "cpu_capability", "cpu_capabilities", "compiler", "torch", "cuda_archs", "headers",
        "cuda_headers",
    }  # fmt: skip
    assert info["cpu_capability"] in info["cpu_capabilities"].split(", ")
    assert {*info["cpu_capabilities"].split(", ")} <= {
        "default", "avx2", "avx512", "avx512_bf16", "amx",
    }  # fmt: skip
    assert torch.__version__.startswith(info["torch"])
    assert re.search(r"(GCC|[Cc]lang) \d", info["compiler"])
    assert (info["cuda_archs"] is not None) == HAS_CUDA
    info["compiler"] = "changed"
    assert rnnkernels.build_info()["compiler"] != "changed"


WITHOUT_COMPILED = """
import importlib.abc, sys, warnings

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "rnnkernels._C":
            raise ImportError("hidden by a test")

sys.meta_path.insert(0, Hide())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    count = len(caught)
    import rnnkernels
    lstm = rnnkernels.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    theirs = torch.nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    lstm.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for module in (lstm, theirs):
        module(x)[0].pow(2).sum().backward()
    for p, q in zip(lstm.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
    messages = [str(w.message) for w in caught[count:]]
assert len(messages) == 1, messages
assert caught[count].filename == "<string>"  # the line that imports, not one of ours
assert "without its compiled kernels" in messages[0] and "hidden by a test" in messages[0]
assert rnnkernels.build_info() == {}
choice = rnnkernels.explain(lstm, x).choices[0]
assert choice.backend == "torch", choice
assert "compiled kernels are missing (hidden by a test" in choice.refusals["cpu"]
reset = torch.zeros(5, 2, dtype=torch.bool)
assert rnnkernels.explain(lstm, x, reset=reset).choices[0].backend == "reference"
torch.func.jvp(lambda x: lstm(x)[0], (x,), (x,))  # torch.nn's have no rule for it
with torch.autograd.forward_ad.dual_level():
    lstm(torch.autograd.forward_ad.make_dual(x, x))
rnnkernels.GRUCell(3, 4)(torch.zeros(2, 3)).sum().backward()
try:
    rnnkernels.GRU(3, 4, backend="cpu")(torch.zeros(2, 2, 3))
except RuntimeError as error:
    assert "compiled kernels are missing" in str(error)
else:
    raise AssertionError("a backend that is not there was replaced by another")
"""


def test_without_the_compiled_module() -> None:
    child = run_python("-c", WITHOUT_COMPILED)
    assert child.returncode == 0, child.stderr


def test_unknown_instruction_set_is_refused() -> None:
    require_backend("cpu")
    code = "import torch, rnnkernels; rnnkernels.GRU(3, 4)(torch.zeros(2, 2, 3))"
    child = run_python("-c", code, RNNKERNELS_CPU_CAPABILITY="mmx")
    assert child.returncode == 1
    built = rnnkernels.build_info()["cpu_capabilities"]
    said = f"RNNKERNELS_CPU_CAPABILITY: expected one of {built}, which this build has, as far as"
    assert said in child.stderr and "got 'mmx'" in child.stderr


def test_results_of_all_backends_are_alike() -> None:
    module, x = rnnkernels.LSTM(4, 7, dtype=F64), draw(5, 3, 4, seed=1, dtype=F64)
    results = []
    for backend in ("reference", DEFAULT, "torch"):
        with use_backend(backend):
            results.append(tensors(module(x)))
    for result in results[1:]:
        assert_close(result, results[0])
