"""How layers would be laid out over a GPU: the CUDA backend's arithmetic, asked from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass

import torch

from rnnkernels import _ops
from rnnkernels._backends import float32
from rnnkernels._core.call import Call


@dataclass(frozen=True)
class Device:
    """The limits of a GPU that matter here.

    Attributes:
        major: of the compute capability.
        multiprocessors: how many there are.
        shared_bytes: of shared memory that a block may have.
        most_blocks: of a cluster.
    """

    major: int
    multiprocessors: int
    shared_bytes: int
    most_blocks: int

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Those of a CUDA device, by which kernels are launched on it."""
        with torch.cuda.device(device):
            return cls(*_ops.cuda_device())


DEVICES = {
    "H100": Device(9, 132, 232448, 16),
    "A100": Device(8, 108, 166912, 8),
}


@dataclass(frozen=True)
class Plan:
    """A layout; all but reason, passed_over and family are 0 where there is none.

    Attributes:
        reason: why the layer runs step by step; empty where it does not.
        passed_over: why a layout that would be faster cannot be launched on the device; empty where
            there is none.
        family: ``'cluster'``, ``'grid'`` or ``'stepwise'``.
        kernels: the family, and whether as a wavefront: what is vetted as one.
        blocks: that hold the recurrent weights of a direction together, a group.
        units: hidden units of a block.
        tiles: of rows of the batch that a group takes.
        rows: of the batch in a tile.
        pitch: bytes between the rows that a block multiplies.
        groups: per direction.
        launches: one after the other.
        stages: layers of a stack that run at the same time.
        shared_bytes: of shared memory of a block.
        cycles: of a step, estimated from published costs of instructions.
        all_cycles: of all steps and all layers of the stack, and before the first step.
    """

    reason: str
    passed_over: str
    family: str
    kernels: str
    blocks: int
    units: int
    tiles: int
    rows: int
    pitch: int
    groups: int
    launches: int
    stages: int
    shared_bytes: int
    cycles: float
    all_cycles: float

    def __str__(self) -> str:
        if self.reason:
            return f"step by step: {self.reason}"
        times = f" in {self.launches} launches" if self.launches > 1 else ""
        why = f" (the device refuses {self.passed_over})" if self.passed_over else ""
        group = (
            f"a {self.family} of {self.blocks} blocks" if self.blocks > 1 else "a block by itself"
        )
        per, at_once = "direction", ""
        if self.stages > 1:
            per, at_once = "layer", f", {self.stages} layers at a time"
        return (
            f"{group} with {self.units} units, {self.groups} per "
            f"{per}{times}, {self.tiles} x {self.rows} rows each{at_once}{why}"
        )


def plan(
    cell: str,
    backward: bool,
    precision: str,
    H: int,
    rows: int,
    D: int,
    device: Device,
    projected: bool = False,
    norm: bool = False,
    layers: int = 1,
    steps: int = 512,
    dropped: bool = False,
    refused: Callable[[str, int], str] | None = None,
) -> Plan:
    """How one layer is laid out, or as many layers of a stack as run at the same time.

    Args:
        cell: a name from :data:`rnnkernels.cells.CELLS`.
        backward: the backward loop, whose product is another.
        precision: a floating dtype, or ``'tf32'`` for float32 on tensor cores.
        H: hidden units.
        rows: of the batch; in backward, of all windows.
        D: directions.
        projected: the layer has a ``proj_size``.
        norm: gradients are bounded by their norm.
        layers: of a stack of one direction.
        steps: of the loop over time.
        dropped: the layer has recurrent dropout.
        refused: in place of a device: why it cannot launch a family with so many blocks that share
            the weights, or an empty string.
    """
    found = _ops.cuda_plan(
        cell=cell,
        backward=backward,
        precision=precision,
        projected=projected,
        norm=norm,
        recorded=False,
        H=H,
        T=steps,
        B=rows,
        window=0,
        D=D,
        layers=layers,
        dropped=dropped,
        device=astuple(device),
        refused=refused,
    )
    return Plan(**found)


def of_pass(call: Call, backward: bool, index: int = -1) -> Plan:
    """Of forward of a call on a CUDA device, or of the backward that would follow.

    With the number of a device, of kernels that were not found wrong there; what nothing is known
    of is inspected first, as it is when the call runs.
    """
    device = call.x.device
    here = device.type == "cuda" and torch.cuda.is_available()  # a device that can be asked
    with torch.cuda.device(device) if here else nullcontext():
        found = _ops.cuda_plan(
            cell=call.cell_name,
            backward=backward,
            precision=float32.numbers(call.x.dtype),
            projected=call.projected,
            norm=backward and call.clip == "norm",
            recorded=backward and call.flow is not None,
            H=call.H,
            T=call.T,
            B=call.B,
            window=call.window,
            D=call.directions,
            layers=call.layers,
            heads=call.heads > 1,
            dropped=call.h_mask is not None,
            device=astuple(Device.of(device)),
            index=index,
            here=here,
        )
    return Plan(**found)


def of_call(call: Call, index: int = -1) -> str:
    """For a call on a CUDA device, in words: both passes."""
    passes = f"forward in {of_pass(call, False, index)}; backward in {of_pass(call, True, index)}"
    if call.x.dtype != torch.float32:
        return passes
    return float32.in_words("tf32" if float32.tf32_allowed(torch.float32) else "ieee") + passes
