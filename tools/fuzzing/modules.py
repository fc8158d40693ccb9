"""Random calls of layers, single steps, functions of weights, and runners of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels as rk
from fuzzing.judge import Attempt, flat
from fuzzing.spoil import FLOATS, Drawn

LAYERS = ("RNN", "LSTM", "GRU")
#: Compiled when they first run: not for a quick run.
WRITTEN = ("MGU", "SLSTM")
#: What errors call the arguments of layers and steps, beside their own names.
NAMES = (
    "input", "hx", "cx", "hidden", "lengths", "reset", "weight", "weights", "bias", "batch_sizes",
    "sorted_indices", "unsorted_indices",
    "nonlinearity", "mat1", "parameter", "options", "chunk", "chunks", "stream_id", "max_streams",
    "layer", "model", "limit", "positional argument", "keyword argument", "backend", "w_hr",
    "input_size", "hidden_size", "num_layers", "batch_first", "bidirectional", "dropout",
    "proj_size", "dtype", "device", "bias_mode", "merge_mode", "truncate", "grad_clip", "recompute",
    "heads", "weight_drop", "recurrent_dropout", "input_dropout", "zoneout", "layer_norm",
    "return_all_states", "training", "cell", "batch size",
)  # fmt: skip
STATES = {"LSTM": 2, "CIFG": 2, "SLSTM": 4}


def _options(d: Drawn, kind: str, written: bool) -> dict[str, Any]:
    """Of a constructor, as they may be given."""
    rng, H = d.rng, d.pick(1, 2, 3, 4, 5, 8, 9, 16, 33)
    options: dict[str, Any] = {"input_size": rng.randrange(1, 7), "hidden_size": H}
    for name, values, p in (
        ("num_layers", (1, 2, 3), 0.5), ("bias", (True, False), 0.3),
        ("batch_first", (True, False), 0.3), ("dropout", (0.0, 0.3, 1.0), 0.2),
        ("bidirectional", (True, False), 0.5), ("dtype", FLOATS, 0.4),
        ("bias_mode", ("double", "single"), 0.2), ("merge_mode", ("sum", "mean", "mul"), 0.2),
        ("truncate", (1, 2, 7, (1, 2), (2, 5)), 0.15), ("recompute", (1, 2, 9), 0.1),
        ("grad_clip", (0.1, ("norm", 0.5), ("tanh", 1.0)), 0.15),
        ("weight_drop", (0.0, 0.4), 0.1), ("recurrent_dropout", (0.0, 0.4), 0.1),
        ("input_dropout", (0.0, 0.4), 0.1), ("zoneout", (None, 0.2), 0.1),
        ("layer_norm", (True, False), 0.1), ("backend", ("cpu", "torch", "reference"), 0.1),
    ):  # fmt: skip
        if d.chance(p):
            options[name] = d.pick(*values)
    if d.chance(0.1):
        options["heads"] = d.pick(*(n for n in (1, 2, 3, 4) if H % n == 0))
    if kind == "LSTM" and H > 1 and d.chance(0.2):
        options["proj_size"] = rng.randrange(1, H)
    if kind == "RNN" and d.chance(0.5):
        options["nonlinearity"] = d.pick("tanh", "relu", "sigmoid")
    if not written:
        options.pop("zoneout", None)  # which makes a written cell of any
    if kind in WRITTEN and options.get("dtype") not in (None, torch.float64):
        del options["dtype"]  # a compiler's run for each
    return options


def _harmless(name: str, value: Any) -> bool:
    """Not so many layers, each of them fine, that making them takes for ever."""
    is_large = isinstance(value, int) and 100 < value < 2**60
    return not (name in ("num_layers", "heads") and is_large)


def _spoil(d: Drawn, arguments: dict[str, Any], p: float, other: str = "hiden_size") -> None:
    """None, one or some of the arguments become others."""
    while arguments and d.chance(p):
        name = d.pick(*arguments)
        if d.chance(0.02):
            arguments[other] = arguments.pop(name)
            d.done.append(f"{name} as {other}")
            return
        value = d.spoiled(name, arguments[name])
        if _harmless(name, value):
            arguments[name] = value
        p /= 2


def _sizes(module: Any) -> tuple[int, int, int]:
    D = 2 if module.bidirectional else 1
    return module.num_layers * D, module.hidden_size, module.proj_size or module.hidden_size


def _inputs(d: Drawn, module: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Of a call of a layer."""
    T, B = d.pick(0, 1, 1, 2, 3, 5, 7), d.pick(0, 1, 2, 3, 4)
    L, H, R = _sizes(module)
    batched = d.chance(0.9)
    lead = ([B, T] if module.batch_first else [T, B]) if batched else [T]
    rows = [L, B] if batched else [L]
    arguments: dict[str, Any] = {"input": d.tensor(*lead, module.input_size, dtype=dtype)}
    if d.chance(0.5):
        states = STATES.get(type(module).__name__, 1)
        widths = [R, *[H] * (states - 1)]
        hx = [d.tensor(*rows, width, dtype=dtype) for width in widths]
        if states == 4:  # SLSTM divides by n, a sum of what is above zero
            hx[2] = hx[2].abs() + 0.5
        arguments["hx"] = tuple(hx) if states > 1 else hx[0]
    lengths = [d.rng.randrange(T + 1) for _ in range(B if batched else 1)]
    if d.chance(0.35):
        arguments["lengths"] = lengths if d.chance(0.4) else torch.tensor(lengths, dtype=torch.long)
    if d.chance(0.3):
        arguments["reset"] = torch.rand(lead, generator=d.torch) < 0.3
    if d.chance(0.2):
        arguments["return_all_states"] = True
    if d.chance(0.1):
        arguments["truncate"] = d.pick(None, 1, 3)
    if d.chance(0.1):
        arguments["grad_clip"] = d.pick(None, 0.2, ("norm", 1.0))
    if batched and "lengths" in arguments and T and B and min(lengths) > 0 and d.chance(0.4):
        del arguments["lengths"]
        arguments["input"] = pack_padded_sequence(
            arguments["input"], torch.tensor(lengths), module.batch_first, enforce_sorted=False
        )
        arguments.pop("reset", None)
    return arguments


def _with_gradients(module: nn.Module, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
    """What comes out, and the gradients of a sum of its squares."""
    out = call()
    wanted: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    wanted += [
        t for t in flat(list(arguments.values())) if t.requires_grad and t.is_leaf
    ]  # of an input too
    losses = [t.float().square().sum() for t in flat(out) if t.requires_grad]
    if not losses or not wanted or losses[0].device.type == "meta":
        return out
    grads = torch.autograd.grad(torch.stack(losses).sum(), wanted, allow_unused=True)
    return [out, [g for g in grads if g is not None]]


def _comparable(d: Drawn, module: Any, gradients: bool) -> bool:
    """Whether both ways have to agree: not on which side of an edge rounding leads."""
    words = " ".join(d.done)
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    if ("NaN" in words and (gradients or narrow)) or "huge" in words:  # a loop over rows for ever
        return False
    edged = getattr(module, "nonlinearity", "") == "relu" or module.layer_norm
    # An n below zero, as no SLSTM has it, may be met by as much above: c / n of what is left.
    edged = edged or (type(module).__name__ == "SLSTM" and "negated" in words)
    exact = all(p.dtype == torch.float64 for p in module.parameters())
    clipped = module.grad_clip if hasattr(module, "grad_clip") else None
    return exact or not (gradients and (edged or (narrow and clipped)))


def _called(d: Drawn, module: Any, arguments: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """A call of a module, and the same by the reference, in any of the ways to make one."""
    gradients = d.chance(0.4)
    inference, twice = d.chance(0.3), d.chance(0.3)
    backend = module.backend

    def run() -> Any:
        torch.manual_seed(seed)
        if gradients:
            return _with_gradients(module, arguments, lambda: module(**arguments))
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            if twice and not module.training:  # the second one keeps packed weights
                module(**arguments)
            return module(**arguments)

    def expected() -> Any:
        module.backend = "reference"
        try:
            return run()
        finally:
            module.backend = backend

    return run, expected if _comparable(d, module, gradients) else None


def layer(d: Drawn, written: bool) -> Attempt:
    kind = d.pick(*LAYERS, *(WRITTEN if written and d.chance(0.1) else LAYERS))
    options = _options(d, kind, written)
    _spoil(d, options, 0.12)
    what, seed = f"{kind}({_said(options)})", d.rng.getrandbits(30)
    torch.manual_seed(seed)

    def make() -> Any:
        return getattr(rk, kind)(**options)

    try:
        module = make()
    except Exception:  # judged by what makes it once more
        return Attempt(what, NAMES, make)
    return _with_call(d, module, what, seed)


def _with_call(d: Drawn, module: Any, what: str, seed: int) -> Attempt:
    dtype = next(module.parameters()).dtype
    try:
        _sizes(module)
        arguments = _inputs(d, module, dtype)
    except RuntimeError:  # sizes for which no input can be made
        return Attempt(what, NAMES, lambda: None)
    if d.chance(0.5):
        module.eval()
    names = dict(module.named_parameters())
    if d.chance(0.15):
        name = d.pick(*names)
        with torch.no_grad():
            new = d.spoiled(name, names[name].detach())
        if isinstance(new, Tensor):
            try:
                setattr(module, name, nn.Parameter(new, new.is_floating_point()))
            except (RuntimeError, TypeError):  # torch's own word: no parameter is of that kind
                d.done.pop()
    if d.chance(0.3) and isinstance(arguments["input"], Tensor):
        arguments["input"].requires_grad_(arguments["input"].is_floating_point())
    _spoil(d, arguments, 0.45, "length")
    run, expected = _called(d, module, arguments, seed)
    return Attempt(f"{what}({_said(arguments)})", NAMES, run, expected)


def step(d: Drawn, written: bool) -> Attempt:
    """One step of a cell."""
    kind = d.pick("RNNCell", "LSTMCell", "GRUCell")
    options: dict[str, Any] = {"input_size": d.rng.randrange(5), "hidden_size": d.rng.randrange(9)}
    for name, values, p in (
        ("bias", (True, False), 0.3), ("dtype", FLOATS, 0.4), ("zoneout", (None, 0.2), 0.15),
        ("bias_mode", ("double", "single"), 0.2), ("layer_norm", (True, False), 0.1),
        ("backend", ("cpu", "torch", "reference"), 0.1),
    ):  # fmt: skip
        if name == "zoneout" and not written:
            continue
        if d.chance(p) and not (name == "layer_norm" and kind == "RNNCell"):
            options[name] = d.pick(*values)
    _spoil(d, options, 0.12)
    what, seed = f"{kind}({_said(options)})", d.rng.getrandbits(30)
    torch.manual_seed(seed)

    def make() -> Any:
        return getattr(rk, kind)(**options)

    try:
        cell = make()
        I, H, dtype = cell.input_size, cell.hidden_size, cell.weight_ih.dtype
        rows = [d.pick(0, 1, 2, 3, 5)] if d.chance(0.8) else []
        arguments: dict[str, Any] = {"input": d.tensor(*rows, I, dtype=dtype)}
        if d.chance(0.6):
            states = tuple(d.tensor(*rows, H, dtype=dtype) for _ in range(2))
            arguments["hx"] = states if kind == "LSTMCell" else states[0]
    except Exception:
        return Attempt(what, NAMES, make)
    _spoil(d, arguments, 0.45)
    if d.chance(0.5):
        cell.eval()
    run, expected = _called(d, cell, arguments, seed)
    return Attempt(f"{what}({_said(arguments)})", NAMES, run, expected)


def function(d: Drawn, written: bool) -> Attempt:
    """Layers as a function of lists of weights."""
    kind = d.pick(*LAYERS)
    plain = {"input_size": d.rng.randrange(1, 5), "hidden_size": d.rng.randrange(1, 7)}
    plain |= {"num_layers": d.rng.randrange(1, 3), "bidirectional": d.chance(0.4)}
    dtype = d.pick(*FLOATS)
    module = getattr(nn, kind)(**plain, dtype=dtype)
    inputs = _inputs(d, module, dtype)
    weights = [[w.detach() for w in group] for group in module.all_weights]
    arguments = {"hx": None, **inputs, "weights": weights, "bidirectional": plain["bidirectional"]}
    for name in ("dropout", "weight_drop", "training", "heads", "zoneout", "merge_mode"):
        if d.chance(0.1) and (written or name != "zoneout"):
            values = {"training": True, "heads": 1, "merge_mode": "sum"}
            arguments[name] = values.get(name, 0.3)
    _spoil(d, arguments, 0.7)
    seed, call = d.rng.getrandbits(30), getattr(rk.functional, kind.lower())

    def run(**more: Any) -> Any:
        torch.manual_seed(seed)
        return call(**arguments, **more)

    words = " ".join(d.done)
    skip = (dtype in (torch.bfloat16, torch.float16) and "NaN" in words) or "huge" in words
    expected = None if "backend" in arguments or skip else lambda: run(backend="reference")
    return Attempt(f"{kind.lower()}({_said(arguments)})", NAMES, run, expected)


def stream(d: Drawn, written: bool) -> Attempt:
    """Chunks of streams that a runner keeps, and a closed form of theirs: one call of the layer."""
    options: dict[str, Any] = {"input_size": d.rng.randrange(1, 5), "hidden_size": d.pick(1, 4, 9)}
    options["num_layers"] = d.pick(1, 2)
    module = getattr(rk, d.pick(*LAYERS))(**options).eval()
    limit: dict[str, Any] = {"max_streams": d.pick(None, 2, 3)}
    _spoil(d, limit, 0.1, "max_stream")
    I = options["input_size"]
    pieces = [(d.pick("a", "b", 3), d.tensor(d.pick(0, 1, 2, 5), I)) for _ in range(3)]
    arguments: dict[str, Any] = {"stream_id": pieces[-1][0], "chunk": pieces[-1][1]}
    batch = d.chance(0.3)
    if batch:
        arguments = {"chunks": dict(pieces)}
    _spoil(d, arguments, 0.5, "chnk")
    plain = not d.done
    if d.chance(0.1):
        module.train()
        d.done.append("layer: in training")

    def run() -> Any:
        runner = rk.streaming.StreamRunner(module, **limit)
        for name, chunk in pieces[:-1]:
            runner(name, chunk)
        return runner.batch(**arguments) if batch else runner(**arguments)

    def expected() -> Any:
        mine = [chunk for name, chunk in pieces if name == pieces[-1][0]]
        with torch.no_grad():
            return module(torch.cat(mine))[0][-pieces[-1][1].size(0) or len(torch.cat(mine)) :]

    compare = plain and not batch
    return Attempt(f"StreamRunner({_said(arguments)})", NAMES, run, expected if compare else None)


def serving(d: Drawn, written: bool) -> Attempt:
    """Weights packed ahead, of several types, and given up."""
    kind = d.pick(*LAYERS)
    module = getattr(rk, kind)(d.pick(1, 3, 8), d.pick(1, 5, 16), bidirectional=d.chance(0.3))
    arguments: dict[str, Any] = {"model": module}
    if d.chance(0.7):
        arguments["weight_dtype"] = d.pick(torch.bfloat16, torch.float16, torch.int8)
    if d.chance(0.5):
        arguments["compare"] = d.pick("values", "versions")
    if d.chance(0.3):
        arguments[d.pick(*arguments)] = d.pick(None, 3, "x", torch.float64, nn.Linear(2, 2), {})
        d.done.append("another argument")
    x = d.tensor(d.pick(1, 4), d.pick(1, 3), module.input_size)

    def run() -> Any:
        rk.serving.prepack(**arguments)
        with torch.no_grad():
            y = module(x)[0]
        rk.serving.drop()
        return y

    return Attempt(f"prepack({_said(arguments)})", (*NAMES, "weight_dtype", "compare"), run)


def _said(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, nn.Module):
        return type(value).__name__
    text = repr(value)
    return text if len(text) < 60 else text[:50] + "..."
