"""Serving: constant weights and no gradients, beside what people export recurrent layers to.

``sequence``: a whole sequence from a state of zeros. ``step``: one step (T = 1) whose state is
handed in and comes back, as in decoders, streams and policies. All are called from Python with a
torch tensor and give torch tensors; onnxruntime and OpenVINO share memory with these.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import rnnkernels as rk
from benchmarks import contest, device, providers, timing
from benchmarks.cases import LAYERS, Case, shapes
from benchmarks.contest import Contest, Setup
from benchmarks.problem import STEP, Results, Runner, ready
from rnnkernels.testing import rounded

SEQUENCES = shapes(
    "16,1,64,64",
    "64,1,128,128",
    "64,1,128,256",
    "100,1,256,512",
    "64,4,80,256",
    "256,8,128,256",
    "50,64,256,512",
)
STEPS = shapes("1,1,16,16", "1,1,64,64", "1,1,256,256", "1,4,128,128", "1,32,256,256")
THREADS = (1, 2)

CASES = tuple(
    Case(cell, shape, threads=threads, variant=variant)
    for variant, listed in (("sequence", SEQUENCES), (STEP, STEPS))
    for cell in LAYERS
    for shape in listed
    for threads in THREADS
)

#: What is behind the name of ours where ``prepack(compare="versions")`` was called.
BY_VERSION = "by version"

#: For :func:`compete_narrow`: few rows, whose time is that of reading weights.
NARROW = shapes("100,1,256,512", "64,1,128,256", "50,4,128,256", "1,1,512,512", "100,1,512,1024")
NARROW_CASES = tuple(
    Case(cell, shape, threads=threads) for cell in LAYERS for shape in NARROW for threads in THREADS
)

#: Seconds before each sample: threads of others that wait for work by spinning go to sleep.
REST = 0.05
#: Seconds of calls after that, untimed: so long it may take until the system has moved threads that
#: it woke to cores of their own.
WAKE = 0.03

#: torch.nn's gates in ONNX's order: i o f c, and z r h.
GATES = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}

#: Takes x and the states, one after the other; gives y and the states.
Call = Callable[..., Sequence[Tensor]]


def as_onnx(layer: nn.Module, case: Case) -> bytes:
    """A model of one node with the weights of torch.nn's layer of one direction, its sizes fixed.

    Inputs ``x [T, B, I]``, ``h0 [1, B, H]`` and, of an LSTM, ``c0``; outputs ``y [T, 1, B, H]``,
    ``h_n`` and ``c_n``.
    """
    onnx = importlib.import_module("onnx")
    T, B, I, H = case.shape.T, case.shape.B, case.shape.I, case.shape.H
    names = ["h0", "c0"] if case.cell == "LSTM" else ["h0"]
    outputs = ["y", *(name[0] + "_n" for name in names)]

    def reordered(name: str) -> Tensor:
        parts = layer.get_parameter(name).detach().chunk(len(GATES[case.cell]))
        return torch.cat([parts[gate] for gate in GATES[case.cell]])

    bias = torch.cat([reordered("bias_ih_l0"), reordered("bias_hh_l0")])
    weights = {"W": reordered("weight_ih_l0"), "R": reordered("weight_hh_l0"), "bias": bias}
    attributes: dict[str, Any] = {"hidden_size": H}
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1
    node = onnx.helper.make_node(
        case.cell, ["x", "W", "R", "bias", "", *names], outputs, **attributes
    )

    def described(name: str, *shape: int) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        [node],
        case.cell,
        [described("x", T, B, I), *(described(name, 1, B, H) for name in names)],
        [described("y", T, 1, B, H), *(described(name, 1, B, H) for name in outputs[1:])],
        [onnx.numpy_helper.from_array(t[None].numpy(), name) for name, t in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    found: bytes = model.SerializeToString()
    return found


def onnxruntime(model: bytes, threads: int) -> Call:
    """A session on the CPU with this number of threads."""
    library = importlib.import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    session = library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(*tensors: Tensor) -> list[Tensor]:
        given = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, given)]

    return call


def openvino(model: bytes, threads: int) -> Call:
    """A compiled model with this number of threads, in float32 as the others."""
    core = importlib.import_module("openvino").Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    request, count = compiled.create_infer_request(), len(compiled.outputs)

    def call(*tensors: Tensor) -> list[Tensor]:
        given = [t.numpy() for t in tensors]
        found = request.infer(given, share_inputs=True, share_outputs=False)
        return [torch.from_numpy(found[i]) for i in range(count)]

    return call


PEERS: dict[str, Callable[[bytes, int], Call]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def of_peer(call: Call, zeros: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Called as torch.nn's layers are; y loses its dimension of directions."""

    def run(x: Tensor, hx: Tensor | tuple[Tensor, ...] | None = None) -> Any:
        states = zeros if hx is None else (hx if isinstance(hx, tuple) else (hx,))
        y, *last = call(x, *states)
        return (y.squeeze(1), *last)

    return run


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """torch.nn, ours, ours that takes weights for constant as the peers do, and the peers that are
    installed."""
    problem = ready(case)
    for inputs in (problem.checked, *problem.timed):
        for t in inputs.leaves:
            t.requires_grad_(False)
    layer = problem.template.eval()
    ours = providers.ours_on(setup.backends[0])
    calls: dict[str, Callable[..., Any]] = {providers.BASELINE: layer}
    calls[ours] = providers.our_module(problem, setup.backends[0]).eval()
    constant = providers.our_module(problem, setup.backends[0]).eval()
    rk.serving.prepack(constant, compare="versions")
    calls[f"{ours}, {BY_VERSION}"] = constant
    zeros = torch.zeros(1, case.shape.B, case.shape.H)
    states = (zeros, zeros) if case.cell == "LSTM" else (zeros,)
    refused = {}
    for name, make in PEERS.items():
        try:
            model = as_onnx(layer, case)
            calls[name] = of_peer(make(model, case.threads or setup.threads), states)
        except ImportError as error:
            refused[name] = f"not installed ({error})"
    runners = {name: Runner(call, ()) for name, call in calls.items()}
    return all_rested(contest.of_runners(problem, mode, runners, refused))


def narrow(ours: str, dtype: torch.dtype) -> str:
    """The name of ours with packed weights of this type."""
    return f"{ours}, {str(dtype).removeprefix('torch.')} weights"


def compete_narrow(case: Case, mode: str, setup: Setup) -> Contest:
    """Ours with packed weights as they are and in every narrower type. What is right is the layer
    of weights rounded to that type; a single step has them as they are."""
    problem = ready(case)
    for inputs in (problem.checked, *problem.timed):
        for t in inputs.leaves:
            t.requires_grad_(False)
    ours = providers.ours_on(setup.backends[0])
    dtypes = {ours: None} | {narrow(ours, dtype): dtype for dtype in rk.serving.WEIGHT_DTYPES}
    runners = {}
    for name, dtype in dtypes.items():
        layer = providers.our_module(problem, setup.backends[0]).eval()
        rk.serving.prepack(layer, weight_dtype=dtype)
        runners[name] = Runner(layer, ())

    def right(name: str) -> Results:
        dtype, layer = dtypes[name], copy.deepcopy(problem.exact_template)
        for own, w in zip(layer.parameters(), problem.template.parameters(), strict=True):
            if dtype is not None and w.dim() == 2 and case.shape.T > 1:
                own.data.copy_(rounded(w.detach(), dtype))
        return Runner(layer, ()).results(problem.exact_inputs, grad=False)

    return all_rested(contest.of_runners(problem, mode, runners, right=right))


def all_rested(found: Contest) -> Contest:
    """The same, timed by :func:`rested`."""
    ways = {name: replace(way, sampler=rested(way.run)) for name, way in found.ways.items()}
    return replace(found, ways=ways)


def rested(run: Callable[[], object]) -> timing.Sampler:
    """The usual sampler after a rest; made at the first sample, in whose modes it is to run."""
    made: list[timing.Sampler] = []

    def sample() -> float:
        time.sleep(REST)
        awake = time.perf_counter() + WAKE
        while time.perf_counter() < awake:
            run()
        if not made:
            made.append(timing.sampler(run, device.get("cpu")))
        return made[0]()

    return sample
