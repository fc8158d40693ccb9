"""Layers and steps of cells that users write: every option, transforms, compilers, pickling."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
import written_cells
from helpers import ROOT, draw, run_python, tensors
from rnnkernels._core.call import LayerWeights
from rnnkernels.cells import DefinedCell

F64 = torch.float64
T, B, I, H = 6, 4, 3, 5
X = draw(T, B, I, seed=1, dtype=F64)
LENGTHS = torch.tensor([6, 2, 0, 5])
RESET = draw(T, B, seed=2, dtype=F64) > 0.7
SAME: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-14}

BUILT_IN: dict[str, tuple[DefinedCell, Callable[..., torch.nn.Module]]] = {
    "gru": (written_cells.gru, rnnkernels.GRU),
    "lstm": (written_cells.lstm, rnnkernels.LSTM),
    "rnn": (written_cells.elman, rnnkernels.RNN),
}
#: Of a layer, and of its call.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "stack": ({"num_layers": 3, "bidirectional": True}, {}),
    "lengths-reset": ({"bidirectional": True}, {"lengths": LENGTHS, "reset": RESET}),
    "batch-first": ({"batch_first": True}, {}),
    "merged": ({"bidirectional": True, "merge_mode": "sum", "num_layers": 2}, {}),
    "single-bias": ({"bias_mode": "single"}, {}),
    "no-bias": ({"bias": False}, {}),
    "truncate": ({"truncate": 2}, {"lengths": LENGTHS}),
    "overlapping": ({"truncate": (2, 3)}, {}),
    "clip-norm": ({"grad_clip": ("norm", 0.1), "num_layers": 2}, {}),
    "clip-value": ({"grad_clip": 0.05}, {"reset": RESET}),
    "recompute": ({"recompute": 2, "num_layers": 2}, {}),
    "all-states": ({"num_layers": 2, "bidirectional": True}, {"return_all_states": True}),
    "projection": ({"proj_size": 2, "num_layers": 2}, {"reset": RESET}),
}


def results(module: torch.nn.Module, x: Any, **options: Any) -> list[Tensor]:
    """All outputs and gradients."""
    module.zero_grad()
    x = x.detach().requires_grad_() if isinstance(x, Tensor) else x
    outputs = tensors(module(x, **options))
    loss = torch.stack([(o * o).sum() + o.sum() for o in outputs]).sum()
    loss.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [*outputs, *grads, *([x.grad] if isinstance(x, Tensor) and x.grad is not None else [])]


def pair(name: str, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A written layer and the built-in one, with the same weights."""
    cell, built_in = BUILT_IN[name]
    written = rnnkernels.layer(cell)(I, H, dtype=F64, **options)
    other = built_in(I, H, dtype=F64, **options)
    other.load_state_dict(written.state_dict())
    return written, other


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_equals_the_built_in_layer(name: str, option: str) -> None:
    if name != "lstm" and option == "projection":
        pytest.skip("no projection")
    of_layer, of_call = OPTIONS[option]
    written, other = pair(name, **of_layer)
    for got, want in zip(results(written, X, **of_call), results(other, X, **of_call), strict=True):
        torch.testing.assert_close(got, want, **SAME)


def test_packed() -> None:
    x = pack_padded_sequence(X, torch.tensor([6, 5, 3, 1]))
    for name in BUILT_IN:
        written, other = pair(name, num_layers=2)
        for got, want in zip(results(written, x), results(other, x), strict=True):
            torch.testing.assert_close(got, want, **SAME)


def test_mgu_is_its_formula() -> None:
    """By hand: Zhou et al. 2016, with the gate after the recurrent product."""
    module = rnnkernels.layer(written_cells.mgu)(I, H, dtype=F64)
    h = X.new_zeros(B, H)
    for t in range(T):
        xf, xn = torch.nn.functional.linear(X[t], module.weight_ih_l0, module.bias_ih_l0).chunk(
            2, 1
        )
        hf, hn = torch.nn.functional.linear(h, module.weight_hh_l0, module.bias_hh_l0).chunk(2, 1)
        f = torch.sigmoid(xf + hf)
        n = torch.tanh(xn + f * hn)
        h = (1 - f) * h + f * n
    _, h_n = module(X)
    torch.testing.assert_close(h_n[0], h, **SAME)
    want = torch.autograd.grad(h.square().sum(), list(module.parameters()))
    got = torch.autograd.grad(h_n.square().sum(), list(module.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize(
    "cell", [written_cells.mgu, written_cells.peephole, written_cells.odd], ids=lambda c: c.title
)
def test_gradcheck(cell: DefinedCell) -> None:
    module = rnnkernels.layer(cell)(2, 2, dtype=F64, bidirectional=True)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = draw(3, 2, 2, seed=4, dtype=F64).requires_grad_()
    given = {"lengths": torch.tensor([3, 1]), "reset": RESET[:3, :2]}

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        parameters = dict(zip(names, weights, strict=True))
        return tensors(torch.func.functional_call(module, parameters, (x,), given))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_vmap_and_grad() -> None:
    module = rnnkernels.layer(written_cells.mgu)(I, H, dtype=F64)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x[:, None],))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, X)
    for b in range(B):
        alone = torch.func.grad(loss)(parameters, X[:, b])
        for name in parameters:
            torch.testing.assert_close(each[name][b], alone[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode() -> None:
    module = rnnkernels.layer(written_cells.peephole)(I, H, dtype=F64)
    dx = draw(T, B, I, seed=7, dtype=F64)
    _, got = torch.func.jvp(lambda x: module(x)[0], (X,), (dx,))
    reference = rnnkernels.layer(written_cells.peephole)(I, H, dtype=F64, backend="reference")
    reference.load_state_dict(module.state_dict())
    _, want = torch.func.jvp(lambda x: reference(x)[0], (X,), (dx,))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compile(backend: str) -> None:
    module = rnnkernels.layer(written_cells.mgu)(I, H, num_layers=2, dtype=F64, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, X), results(module, X), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, **SAME)


def test_export(tmp_path: Path) -> None:
    module = rnnkernels.layer(written_cells.gru)(I, H, dtype=F64)
    program = torch.export.export(module, (X,))
    torch.testing.assert_close(program.module()(X)[0], module(X)[0])
    path = tmp_path / "program.pt2"
    torch.export.save(program, path)
    load = f"import torch, rnnkernels; p = torch.export.load({str(path)!r}).module()"
    run = f"p(torch.ones({T}, {B}, {I}, dtype=torch.float64)); print('ran')"
    done = run_python("-c", f"{load}; {run}")
    assert "is not known in this process" in done.stderr and "import the module" in done.stderr
    support = f"import sys; sys.path.append({str(ROOT / 'tests' / 'support')!r})"
    known = f"{support}; import written_cells"
    assert run_python("-c", f"{known}; {load}; {run}").stdout == "ran\n"
    none = {"XDG_CACHE_HOME": str(tmp_path), "CXX": "none"}
    done = run_python("-c", f"{known}; {load}; {run}", **none)
    assert (
        f"no CPU kernels of {written_cells.gru.name!r} for float64: no C++ compiler" in done.stderr
    )


@pytest.mark.parametrize("make", [rnnkernels.layer, rnnkernels.cell_class], ids=["layer", "step"])
def test_pickle_and_copy(make: Any) -> None:
    module = make(written_cells.mgu)(I, H, dtype=F64)
    x = X if make is rnnkernels.layer else X[0]
    want = tensors(module(x))[0]
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(module) and other.definition is written_cells.mgu
        assert torch.equal(tensors(other(x))[0], want)


def test_a_cell_that_nobody_finds_again() -> None:
    @rnnkernels.cell
    def local(a: Any, *, h: Any) -> Any:
        return torch.tanh(a) + h

    module = rnnkernels.layer(local)(I, H)
    copy.deepcopy(module)
    with pytest.raises(
        TypeError, match=r"cell 'local': expected .*local to be this cell.*Define it"
    ):
        pickle.dumps(module)


def test_a_function_that_has_changed() -> None:
    module = rnnkernels.layer(written_cells.mgu)(I, H)
    state = {**module.__dict__, "mode": "mgu-00000000"}
    with pytest.raises(ValueError, match="the function has changed"):
        module.__setstate__(state)


def test_functions() -> None:
    module = rnnkernels.layer(written_cells.lstm)(I, H, num_layers=2, dtype=F64)
    y, (h, c) = rnnkernels.functional.layers(written_cells.lstm, X, None, module.all_weights)
    for got, want in zip((y, h, c), tensors(module(X)), strict=True):
        assert torch.equal(got, want)
    step = rnnkernels.cell_class(written_cells.gru)(I, H, dtype=F64)
    other = rnnkernels.GRUCell(I, H, dtype=F64)
    other.load_state_dict(step.state_dict())
    torch.testing.assert_close(step(X[0]), other(X[0]), **SAME)
    weights = LayerWeights(*step.parameters())
    alone = rnnkernels.functional.cell("MyCell", written_cells.gru, X[0], None, weights)
    assert torch.equal(alone, step(X[0]))


def test_names() -> None:
    Layer = rnnkernels.layer(written_cells.mgu)
    assert Layer is rnnkernels.layer(written_cells.mgu)
    assert repr(Layer(3, 5, num_layers=2)) == "MguLayer(3, 5, num_layers=2)"
    assert repr(rnnkernels.cell_class(written_cells.mgu)(3, 5)) == "MguCell(3, 5)"
    name = written_cells.mgu.name
    assert repr(written_cells.mgu) == f"<cell mgu(f, n, *, h), which is {name}>"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="proj_size: expected 0 for the cell mgu, which has no"):
        rnnkernels.layer(written_cells.mgu)(I, H, proj_size=2)
    with pytest.raises(ValueError, match="the cell odd, which computes with h itself"):
        rnnkernels.layer(written_cells.odd)(I, H, proj_size=2)
    for make in (rnnkernels.layer, rnnkernels.cell_class):
        with pytest.raises(TypeError, match=r"expected what rnnkernels.cell returned, got str"):
            make("gru")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected what rnnkernels.cell returned, got str"):
        rnnkernels.functional.layers("gru", X, None, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mgu: Expected input to be 2D or 3D, got 1D"):
        rnnkernels.layer(written_cells.mgu)(I, H)(X[0, 0])
