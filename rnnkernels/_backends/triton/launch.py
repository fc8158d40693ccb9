"""What the compiled part calls: runs the loop over time of a layer as Triton kernels.

All tensors are checked, contiguous and on the current device; results are written in place. Shapes
are those of ``csrc/common/layout.h``, with w_hh [D, G*H, H], biases [D, G*H] and parameters of the
cell [D, P, H]. Of a cell without recurrent weights w_hh has that shape and no memory of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from rnnkernels._backends import float32, vetting
from rnnkernels._backends.triton import INTERPRETED, forced, sequence
from rnnkernels._backends.triton.cells import pair
from rnnkernels._backends.triton.plan import Layout, choose
from rnnkernels._core.call import Call
from rnnkernels.cells import Cell, find

REGISTERS = 65536  # of an NVIDIA multiprocessor
#: How often a program looks whether the others have come as far as it has. A look takes about a
#: microsecond and a step hundreds at most: this is seconds, after which nobody will come.
PATIENCE = 1 << 22


def _layouts(call: Call) -> tuple[Layout, Layout]:
    """Of forward, and of the backward that would follow."""
    T, B = call.T, call.B
    windows = -(-T // call.window) if 0 < call.window < T else 1
    D, H, cell = call.directions * call.heads, call.h0.size(2), call.cell
    w_hh = call.x.new_empty(1).expand(D, cell.G * H, H)  # whose numbers nobody reads
    masked = call.h_mask is not None
    return (
        layout_of(w_hh, B, False, cell, masked),
        layout_of(w_hh, B * windows, call.clip == "norm", cell, masked),
    )


def describe(call: Call) -> str:
    """The layouts of forward, and of the backward that would follow."""
    forward, backward = _layouts(call)
    return f"{_numbers_in_words(call)}forward {forward}; backward {backward}"


def kinds(call: Call) -> set[str]:
    """Of the layouts of both passes."""
    return {layout.kind for layout in _layouts(call)}


def _numbers_in_words(call: Call) -> str:
    """How float32 is multiplied, and what says so."""
    found = precision(call.x.dtype, device_of(call.x)[0])
    setting = "cudnn.rnn" if found == "tf32" else "cuda.matmul"
    return float32.in_words(found, setting) if call.x.dtype == torch.float32 else ""


def layout_of(w_hh: Tensor, rows: int, norm: bool, cell: Cell, masked: bool = False) -> Layout:
    """Of a pass over `rows` rows with weights of the shape [D, G*H, H], if the cell has some.

    On a GPU, of kinds that were not found wrong there; one that nothing is known of is checked.

    Raises:
        RuntimeError: all of them were.
    """
    D, _, H = w_hh.shape
    gpu, processors = device_of(w_hh)
    half = w_hh.dtype != torch.float32

    def without(kinds: Collection[str]) -> Layout:
        return choose(
            gpu=gpu, numbers="half" if half else precision(w_hh.dtype, gpu), H=H, rows=rows, D=D,
            norm=norm, processors=processors, without=kinds, recurrent=cell.recurrent,
            crowded=masked or cell.S > 2 or cell.P + cell.E > 0,
        )  # fmt: skip

    if forced.kind is not None or not w_hh.is_cuda:
        return without({"resident", "grid"} - {forced.kind} if forced.kind is not None else ())
    while True:
        layout = without(vetting.refused("triton", w_hh.device))
        settled = vetting.settle("triton", w_hh.device, layout.kind, numbers(w_hh.dtype, w_hh))
        if not settled or layout.kind not in vetting.refused("triton", w_hh.device):
            return layout
        if layout.kind == "step":  # which takes what no other does
            raise RuntimeError(f"triton: {vetting.refusal('triton', w_hh.device)}")


def numbers(dtype: torch.dtype, like: Tensor) -> str:
    """What numbers of this dtype are in a product on the device of a tensor, as a check has it."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    found = precision(dtype, device_of(like)[0])
    return "float32" if found == "ieee" else found


def device_of(like: Tensor) -> tuple[str, int]:
    """The kind of GPU, as in ``plan.TABLES``, and its multiprocessors."""
    if not like.is_cuda:
        return "cuda", 4  # interpreted
    properties = torch.cuda.get_device_properties(like.device)
    gpu = "cuda"
    if torch.version.hip is not None:
        gpu = "cdna" if properties.gcnArchName.startswith("gfx9") else "rdna"
    return gpu, properties.multi_processor_count


def precision(dtype: torch.dtype, gpu: str) -> str:
    """How numbers are multiplied; float32 by torch's switches.

    TF32 where torch's own recurrent layers use it; else in three parts of TF32, where torch's
    matrix products may use it; else as they are. GPUs that have no such products take float32 as
    it is.
    """
    if dtype != torch.float32 or gpu == "rdna":
        return "ieee"
    if float32.tf32_allowed(dtype):
        return "tf32"
    return "tf32x3" if gpu == "cuda" and float32.tf32_in_matmul() else "ieee"


def _launches(layout: Layout, rows: int, rounds: int) -> Iterator[tuple[int, int, int, int]]:
    """First and last round, first block of rows and number of blocks, of every launch."""
    blocks = -(-rows // layout.block_b)
    for block in range(0, blocks, layout.row_blocks):
        many = min(layout.row_blocks, blocks - block)
        if layout.kind != "step":
            yield 0, rounds, block, many
        else:
            for n in range(rounds):
                yield n, n + 1, block, many


def _more(cell: str, w_hh: Tensor, heads: int, layout: Layout) -> dict[str, Any]:
    """The constants of both kernels, and how they are to be compiled and started."""
    contract, (D, _, H), (gpu, _) = find(cell), w_hh.shape, device_of(w_hh)
    found: dict[str, Any] = {
        "G": contract.G, "S": contract.S, "K": contract.K, "P": contract.P, "E": contract.E,
        "RECURRENT": contract.recurrent, "D": D, "HEADS": heads, "H": H,
        "BLOCK_B": layout.block_b, "BLOCK_H": layout.block_h, "BLOCK_K": layout.block_k,
        "RESIDENT": layout.kind == "resident", "HELD": layout.held,
        "PRECISION": precision(w_hh.dtype, gpu), "PATIENCE": PATIENCE,
    }  # fmt: skip
    found |= compiled(gpu, layout.warps, layout.stages)
    if layout.kind == "grid" and not INTERPRETED:
        found["launch_cooperative_grid"] = True  # all programs at once, or an error
    return found


def compiled(gpu: str, warps: int, stages: int) -> dict[str, Any]:
    """How a kernel is to be compiled."""
    if INTERPRETED:
        return {}
    found = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if gpu == "cuda":
        # All there are: the assembler would rather spill than leave other programs no room.
        found["maxnreg"] = min(255, REGISTERS // (32 * warps))
    return found


def _wide(layout: Layout, h0: Tensor, y: Tensor) -> bool:
    """Whether every row of h begins at a multiple of 16 bytes, in both of the places it comes from,
    and so does every piece of it."""
    sizes = h0.size(2) * h0.element_size(), layout.block_k * h0.element_size()
    return not any(n % 16 for n in (*sizes, h0.data_ptr(), y.data_ptr()))


def _counts(layout: Layout, w_hh: Tensor) -> Tensor | None:
    """What the programs of a block of rows signal to each other with; zeros for every launch."""
    if layout.kind != "grid":
        return None
    return torch.zeros(len(w_hh) * layout.row_blocks, dtype=torch.int32, device=w_hh.device)


#: By device: memory of the host that a program writes to when it has waited in vain, so that nobody
#: has to wait for the device to find nothing there.
_faults: dict[torch.device, Tensor] = {}


def _fault(layout: Layout, like: Tensor) -> Tensor | None:
    """Where programs that wait for each other tell of a fault."""
    if layout.kind != "grid":
        return None
    if like.device not in _faults:
        _faults[like.device] = torch.zeros(1, dtype=torch.int64, pin_memory=like.is_cuda)
    return _faults[like.device]


def take_fault(device: torch.device) -> str:
    """What a launch on this device has told since the last time, having given up; ``''`` where none
    has. It does not wait for the device."""
    found = _faults.get(device)
    word = int(found.item()) if found is not None else 0
    if found is None or not word:
        return ""
    found.zero_()
    name = "sequence_backward" if word & 1 else "sequence_forward"
    return (
        f"rnnkernels_triton::{name}: an earlier call on {device} gave up: at round {word // 2 - 1} "
        f"a program had waited for seconds in vain for the others of its rows. The results of "
        "that call are wrong, and all that followed from them. This is a fault of the kernel or of "
        "the device, not of the call: choose another backend (backend='torch'), and please report "
        "it"
    )


def raise_fault(device: torch.device) -> None:
    """Raises RuntimeError where an earlier call on this device gave up."""
    fault = take_fault(device)
    if fault:
        raise RuntimeError(fault)


def _carry(layout: Layout, S: int, rows: int, w_hh: Tensor) -> Tensor | None:
    """The states between launches."""
    if layout.kind != "step":
        return None
    shape = (S, w_hh.size(0), rows, w_hh.size(2))
    return torch.empty(shape, dtype=torch.float32, device=w_hh.device)


def forward(
    cell: str, gx: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor,
    c0: Tensor | None, y: Tensor, h_n: Tensor, c_n: Tensor | None, c: Tensor | None,
    saved: Tensor | None, lengths: Tensor | None, starts: Tensor | None, reset: Tensor | None,
    T: int, noise: Tensor | None = None, draws: Tensor | None = None, layer: int = 0,
    params: Tensor | None = None, h_mask: Tensor | None = None, heads: int = 1,
) -> None:  # fmt: skip
    """The loop of ``sequence_forward``. Raises RuntimeError where an earlier call gave up."""
    raise_fault(y.device)
    B = h0.size(1)
    layout = layout_of(w_hh, B, False, find(cell), h_mask is not None)
    carry = _carry(layout, find(cell).S, B, w_hh)
    more = _more(cell, w_hh, heads, layout)
    for first, last, block, blocks in _launches(layout, B, T):
        sequence.forward[(blocks, layout.parts, len(w_hh))](
            gx, w_hh, b_ih, b_hh, params, h_mask, h0, c0, y, h_n, c_n, c, saved, lengths, starts,
            reset, noise, draws, carry, _counts(layout, w_hh), _fault(layout, w_hh), T, B, layer,
            -(-w_hh.size(2) // layout.block_k), first, last, block, CELL=pair(cell)[0],
            WIDE=_wide(layout, h0, y), **more,
        )  # fmt: skip


def backward(
    cell: str, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc: Tensor | None,
    w_hh: Tensor, h0: Tensor, c0: Tensor | None, y: Tensor, c: Tensor | None,
    saved: Tensor | None, dgates: Tensor, dh0: Tensor | None, dc0: Tensor | None,
    flow: Tensor | None, lengths: Tensor | None, starts: Tensor | None, reset: Tensor | None,
    T: int, steps: int, rows: int, clip: str, bound: float, noise: Tensor | None = None,
    draws: Tensor | None = None, layer: int = 0, params: Tensor | None = None,
    h_mask: Tensor | None = None, dunit: Tensor | None = None, heads: int = 1,
) -> None:  # fmt: skip
    """The loop of ``sequence_backward``, over `rows` windows of `steps` steps. Raises RuntimeError
    where an earlier call gave up."""
    raise_fault(y.device)
    if saved is not None and saved.data_ptr() == dgates.data_ptr() and torch.version.hip:
        saved = saved.clone()  # there, a barrier does not keep loads before stores of other waves
    (D, B, _), width = h0.shape, dgates.size(-1)
    norm = clip == "norm"
    layout = layout_of(w_hh, rows, norm, find(cell), h_mask is not None)
    carry = _carry(layout, find(cell).S, rows, w_hh)
    pending = squares = parts = None
    if norm:
        pending = torch.empty(2, D, rows, width, dtype=torch.float32, device=y.device)
        squares = torch.empty(2, D, rows, layout.parts, dtype=torch.float64, device=y.device)
    if flow is not None:
        parts = torch.empty(*flow.shape, layout.parts, dtype=torch.float64, device=y.device)
    more, pieces = _more(cell, w_hh, heads, layout), -(-w_hh.size(2) // layout.block_k)
    finish = norm or dh0 is not None
    launches = list(_launches(layout, rows, steps))
    if finish and layout.kind == "step":
        launches += [
            (steps, steps, block, many) for _, end, block, many in launches if end == steps
        ]
    for first, last, block, blocks in launches:
        sequence.backward[(blocks, layout.parts, D)](
            dy, dh_n, dc_n, dc, w_hh, params, h_mask, h0, c0, y, c, saved, dgates, dh0, dc0, dunit,
            lengths, starts, reset, noise, draws, carry, _counts(layout, w_hh),
            _fault(layout, w_hh), pending, squares, parts,
            T, B, layer, find(cell).G * pieces, steps, rows, first, last, block, bound,
            CELL=pair(cell)[1], A=find(cell).A, CLIP=clip,
            FINISH=finish and (layout.kind != "step" or first == last), WIDE=False,
            **more,
        )  # fmt: skip
    if flow is not None and parts is not None:
        flow.copy_(parts.sum(-1).sqrt_())
