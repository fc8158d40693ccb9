"""Ours against torch.nn: outputs, final states and every gradient, layer by layer and cell by cell.

A case is written as words: cell, sizes (T, B, I, H, L layers, P projection) and options.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
from helpers import (
    Results,
    bfloat16_instructions,
    compare,
    draw,
    outputs_and_gradients,
    require_backend,
    run_python,
)
from rnnkernels.testing import assert_close, relative_error

KINDS = ("tanh", "relu", "lstm", "gru")
RUNS = {
    "cpu-float64": ("cpu", torch.float64),
    "cpu-float32": ("cpu", torch.float32),
    "reference-float64": ("reference", torch.float64),
}

PLAIN = [f"{kind} T13 B5 I6 H17 hx" for kind in KINDS]
SIZES = [
    f"{kind} {sizes}"
    for kind in KINDS
    for sizes in ("T1 B1 I1 H1", "T2 B17 I3 H7 hx", "T13 B1 I16 H16 hx", "T2 B5 I5 H130 hx")
]
STACKS = [
    f"{kind} T13 B5 I4 H{H} {options}"
    for kind, H in (("tanh", 16), ("relu", 7), ("lstm", 17), ("gru", 33))
    for options in ("L2 bi hx", "L3 bi first", "L2 nobias hx", "bi nobias first hx")
]
PROJECTED = [
    "lstm T13 B5 I4 H17 P7 hx",
    "lstm T2 B17 I3 H33 P16 L2 bi hx",
    "lstm T13 B1 I3 H16 P1 L3 first hx",
    "lstm T13 B5 I3 H7 P6 L2 bi nobias packed hx",
]
FORMS = [
    f"{kind} T13 B5 I3 H7 {options}"
    for kind in KINDS
    for options in (
        "unbatched L2 bi hx",
        "unbatched first",
        "packed L2 bi hx",
        "unsorted bi hx",
        "unsorted first L2",
        "strided expanded first bi",
    )
]
GRADIENTS = [
    f"{kind} T2 B5 I3 H16 {options}"
    for kind in KINDS
    for options in ("frozen L2 bi hx", "hxonly bi hx", "eval L2 hx", "inputonly first")
]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_CASES = [
    f"{kind} T5 B5 I6 {sizes}"
    for kind in ("tanh", "lstm", "gru")  # the kink of relu falls on either side of a rounding
    for sizes in ("H17 hx", "H33 L2 bi hx")
] + ["lstm T5 B5 I6 H17 P7 hx"]
NO_ONEDNN = "ignore:LSTM with projections is not supported with oneDNN:UserWarning"
CASES = PLAIN + SIZES + STACKS + PROJECTED + FORMS + GRADIENTS


class Case:
    """One case: what to build, and the arguments it is called with."""

    def __init__(self, words: str, dtype: torch.dtype) -> None:
        self.kind, *rest = words.split()
        self.n = {"L": 1, "P": 0} | {word[0]: int(word[1:]) for word in rest if word[0].isupper()}
        self.flags = {word for word in rest if not word[0].isupper()}
        self.dtype = dtype

    def modules(self, **more: Any) -> tuple[Any, Any]:
        """torch.nn's layer and ours, with the same parameters."""
        options: dict[str, Any] = {
            "num_layers": self.n["L"],
            "bias": "nobias" not in self.flags,
            "batch_first": "first" in self.flags,
            "bidirectional": "bi" in self.flags,
            "dtype": self.dtype,
        }
        name = self.kind.upper()
        if self.kind in ("tanh", "relu"):
            name, options["nonlinearity"] = "RNN", self.kind
        if self.n["P"]:
            options["proj_size"] = self.n["P"]
        theirs, ours = (
            getattr(library, name)(self.n["I"], self.n["H"], **options | more)
            for library in (nn, rnnkernels)
        )
        ours.load_state_dict(theirs.state_dict())
        for module in (theirs, ours):
            module.train("eval" not in self.flags)
            for name, p in module.named_parameters():
                frozen = "frozen" in self.flags and ("hh_l0" in name or "ih_l1" in name)
                p.requires_grad_(not frozen and not self.flags & {"hxonly", "inputonly"})
        return theirs, ours

    def arguments(self, dtype: torch.dtype) -> list[Any]:
        """Fresh leaves in this dtype, whose numbers the dtype of the case can hold."""
        n, flags = self.n, self.flags
        shape = [n["T"], n["I"]] if "unbatched" in flags else [n["T"], n["B"], n["I"]]
        if "first" in flags and "unbatched" not in flags:
            shape = [n["B"], n["T"], n["I"]]
        if "strided" in flags:
            shape = [*shape[::-1], 2]
        input = draw(*shape, seed=1, dtype=self.dtype).to(dtype)
        input.requires_grad_("hxonly" not in flags)
        if not flags & {"hx", "expanded"}:
            return [input, None]
        rows = n["L"] * (2 if "bi" in flags else 1)
        batch = [] if "unbatched" in flags else [1 if "expanded" in flags else n["B"]]
        widths = [n["P"] or n["H"]] + [n["H"]] * (self.kind == "lstm")
        hx = [
            draw(rows, *batch, w, seed=2 + i, dtype=self.dtype).to(dtype)
            for i, w in enumerate(widths)
        ]
        for h in hx:
            h.requires_grad_("inputonly" not in flags)
        return [input, tuple(hx)]

    def run(self, module: Any, dtype: torch.dtype, backend: str = "auto") -> Results:
        """Outputs and gradients of one module, by name."""
        call = Call(module, self)
        with rnnkernels.use_backend(backend):
            return outputs_and_gradients(call, self.arguments(dtype), precision=self.dtype)


class Call(nn.Module):
    """Gives a module its arguments in the form of the case: strided, expanded, packed."""

    def __init__(self, module: nn.Module, case: Case) -> None:
        super().__init__()
        self.module, self.case = module, case

    def forward(self, input: Any, hx: Any) -> Any:
        n, flags = self.case.n, self.case.flags
        if "strided" in flags:
            input = input[..., 0].permute(*reversed(range(input.dim() - 1)))
            assert input.stride(-1) != 1
        if "expanded" in flags:
            hx = tuple(h.expand(h.size(0), n["B"], h.size(2)) for h in hx)
        if flags & {"packed", "unsorted"}:
            lengths = [n["T"] - 3 * b for b in range(n["B"])]
            if "unsorted" in flags:
                lengths = lengths[1::2] + lengths[::2]
            input = pack_padded_sequence(
                input,
                torch.tensor(lengths),
                batch_first="first" in flags,
                enforce_sorted="packed" in flags,
            )
        return self.module(input, hx[0] if hx is not None and len(hx) == 1 else hx)


@pytest.mark.parametrize(("backend", "dtype"), RUNS.values(), ids=RUNS)
@pytest.mark.filterwarnings(NO_ONEDNN)
@pytest.mark.parametrize("words", CASES, ids=lambda words: words.replace(" ", "-"))
def test_layer(words: str, backend: str, dtype: torch.dtype) -> None:
    require_backend(backend)
    case = Case(words, dtype)
    theirs, ours = case.modules()
    expected = case.run(copy.deepcopy(theirs).double(), torch.float64)
    compare(case.run(ours, dtype, backend), expected)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.filterwarnings(NO_ONEDNN)
@pytest.mark.parametrize("words", HALF_CASES, ids=lambda words: words.replace(" ", "-"))
def test_layer_in_half_precision(words: str, dtype: torch.dtype) -> None:
    """Against float64, ours errs no more than a small factor of what torch.nn does."""
    require_backend("cpu")
    case = Case(words, dtype)
    theirs, ours = case.modules()
    expected = case.run(copy.deepcopy(theirs).double(), torch.float64)
    judge_half(case.run(ours, dtype, "cpu"), case.run(theirs, dtype), expected, dtype)


def judge_half(ours: Results, theirs: Results, expected: Results, dtype: torch.dtype) -> None:
    for name, value in expected.items():
        if value is None:
            assert ours[name] is None
            continue
        reference, mine = theirs[name], ours[name]
        assert reference is not None and mine is not None and mine.dtype == dtype
        # One rounding to the dtype is free: torch may hit a number by chance.
        allowed = 1.5 * relative_error(reference, value) + torch.finfo(dtype).eps / 2
        assert_close(mine, value, name=name, rtol=allowed)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_takes_the_same_random_numbers(kind: str, p: float, batch_first: bool) -> None:
    first = "first" if batch_first else ""
    case = Case(f"{kind} T4 B3 I5 H8 L3 bi hx {first}", torch.float64)
    theirs, ours = case.modules(dropout=p)
    torch.manual_seed(7)
    expected = case.run(theirs, torch.float64)
    torch.manual_seed(7)
    compare(case.run(ours, torch.float64), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_eval(kind: str) -> None:
    case = Case(f"{kind} T4 B3 I5 H8 L2 eval", torch.float64)
    theirs, ours = case.modules(dropout=0.9)
    compare(case.run(ours, torch.float64), case.run(theirs, torch.float64))


CELLS = {
    "tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}


def cell_modules(kind: str, I: int, H: int, **options: Any) -> tuple[Any, Any]:
    name, extra = CELLS[kind]
    theirs, ours = (
        getattr(library, name)(I, H, **extra, **options) for library in (nn, rnnkernels)
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run_cell(module: Any, kind: str, shape: list[int], hx: bool, dtype: torch.dtype) -> Results:
    """The numbers are drawn in the dtype of the module as it was made, ``precision``."""
    precision = module.precision
    *batch, I = shape
    H = module.hidden_size
    input = draw(*batch, I, seed=1, dtype=precision).to(dtype).requires_grad_()
    states = [
        draw(*batch, H, seed=2 + i, dtype=precision).to(dtype).requires_grad_()
        for i in range(2 if kind == "lstm" else 1)
    ]
    state: Any = None if not hx else states[0] if kind != "lstm" else tuple(states)
    return outputs_and_gradients(module, [input, state], precision=precision)


@pytest.mark.parametrize(("backend", "dtype"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("form", ["1d", "1d-nobias-hx", "2d", "2d-hx", "2d-nobias-hx"])
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind: str, form: str, backend: str, dtype: torch.dtype) -> None:
    require_backend(backend)
    theirs, ours = cell_modules(kind, 6, 17, bias="nobias" not in form, dtype=dtype)
    theirs.precision = ours.precision = dtype
    shape = [6] if "1d" in form else [5, 6]
    expected = run_cell(theirs.double(), kind, shape, "hx" in form, torch.float64)
    with rnnkernels.use_backend(backend):
        compare(run_cell(ours, kind, shape, "hx" in form, dtype), expected)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_cell_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    theirs, ours = cell_modules(kind, 6, 17, dtype=dtype)
    theirs.precision = ours.precision = dtype
    expected = run_cell(copy.deepcopy(theirs).double(), kind, [5, 6], True, torch.float64)
    reference = run_cell(theirs, kind, [5, 6], True, dtype)
    judge_half(run_cell(ours, kind, [5, 6], True, dtype), reference, expected, dtype)


def supported_capabilities() -> list[str]:
    """The instruction sets that our kernels know and this processor has."""
    wider = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}
    found = wider.get(torch.backends.cpu.get_cpu_capability(), [])
    return ["default", *found, *bfloat16_instructions()]


def test_capability_is_the_one_asked_for() -> None:
    wanted = os.environ.get("RNNKERNELS_CPU_CAPABILITY")
    if wanted is None:
        pytest.skip("none is asked for")
    assert rnnkernels.build_info()["cpu_capability"] == wanted


#: Files of tests of what each instruction set has of its own.
MORE = (
    "ops/test_single_step",
    "numerics/test_bfloat16",
    "numerics/test_cells",
    "numerics/test_nonfinite",
)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(capability: str) -> None:
    """Some of the cases above once more in a process held to one instruction set."""
    require_backend("cpu")
    if capability not in supported_capabilities():
        pytest.skip(f"this processor has no {capability}")
    if capability not in rnnkernels.build_info()["cpu_capabilities"].split(", "):
        pytest.skip(f"this build has no kernels for {capability}")
    child = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", __file__),
        *(str(Path(__file__).parents[1] / f"{name}.py") for name in MORE),
        "-k",
        "capability_is or test_float32 or added_in_float32 or against_float64 or activations "
        "or (test_ops and float32 and (inf or closed)) "
        "or (test_layer and cpu and (H17 or H130) and not bi)",
        RNNKERNELS_CPU_CAPABILITY=capability,
    )
    assert child.returncode == 0, child.stdout + child.stderr
