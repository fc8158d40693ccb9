"""The compiled part; importing it registers ``torch.ops.rnnkernels.*``."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, dtype

def bring_reference(
    forward_tangents: Callable[..., list[Tensor | None]],
    gradient_tangents: Callable[..., list[Tensor | None]],
    second_order: Callable[..., list[Tensor]],
) -> None:
    """What the autograd formula asks the reference for; see :mod:`rnnkernels._ops.by_reference`."""

def build_info() -> dict[str, Any]:
    """How this module was built, and the instruction set that its CPU kernels use here."""

def register_cell(
    name: str,
    gates: str,
    params: str,
    G: int,
    S: int,
    K: int,
    A: int,
    P: int,
    E: int,
    recurrent: bool,
    reads_h: bool,
) -> None:
    """Makes a cell that a user wrote known to the ops; its name says what it computes."""

def load_cell(name: str, path: str, backend: str) -> str:
    """Loads the kernels of such a cell for a backend, ``'cpu'`` or ``'cuda'``; returns the reason
    where it cannot, or ``''``."""

def set_cell_compiler(compiler: Callable[[str, str], str], backend: str) -> None:
    """``compiler(name, type)`` has the kernels of a cell for a backend and a storage type loaded;
    it returns the reason where it cannot."""

def set_cell_finder(finder: Callable[[str], None]) -> None:
    """``finder(name)`` may register a cell that a call names and nobody has registered yet."""

def set_batch_invariant(on: bool) -> None:
    """Whether a row's result may not depend on the batch that it is in, for the whole process."""

def batch_invariant() -> bool:
    """What :func:`set_batch_invariant` has set."""

def set_cuda_family(name: str) -> None:
    """Which kernels run layers on a GPU: auto, stepwise, cluster or grid; for tests, benchmarks."""

def set_cuda_stacks(name: str) -> None:
    """How the layers of a stack run on a GPU: auto, in turn or together; for tests, benchmarks."""

def force_cuda_layout(units: int, tiles: int, batch: int) -> None:
    """Units of a block, tiles of a group, eights of rows in a tile, or 0 for any; for tests."""

def cuda_plan(
    *,
    cell: str,
    backward: bool,
    precision: str,
    projected: bool,
    norm: bool,
    recorded: bool,
    H: int,
    T: int,
    B: int,
    window: int,
    D: int,
    layers: int,
    heads: bool = False,
    dropped: bool = False,
    device: tuple[int, int, int, int],
    index: int = -1,
    here: bool = False,
    refused: Callable[[str, int], str] | None = None,
) -> dict[str, Any]:
    """How the layers of a call would run on a GPU, or why no persistent kernel would run them.

    Args:
        heads, dropped: the layer has several heads, or recurrent dropout.
        device: compute capability, multiprocessors, bytes of shared memory of a block, blocks of a
            cluster.
        index: of the device, where no kernels are to be chosen that were found wrong there; what
            nothing is known of is inspected first.
        here: ask the current device whether it can launch what is chosen.
        refused: in its place: why it cannot launch a family with so many blocks that share the
            weights, or an empty string.

    Raises:
        ValueError: precision is unknown, or both ``here`` and ``refused`` are given.
        RuntimeError: ``here`` in a build without CUDA kernels.
    """

def force_cuda_kernels(name: str) -> None:
    """Runs the calls of this thread on these kernels, unvetted; ``''``: as any other."""

def settle_cuda_kernels(device: int, name: str, precision: str, right: bool) -> None:
    """These kernels were found right or wrong in this precision on a device."""

def forget_cuda_kernels() -> None:
    """Forgets what was found of all kernels, and closes the short ways."""

def set_cuda_inspector(inspector: Callable[[int, str, str], bool]) -> None:
    """Is asked when kernels are to run that nothing is known of: device, name, precision."""

def open_short_ways(device: int, open: bool) -> None:
    """Whether layers and cells on this CUDA device may go past the choice of a backend."""

def short_ways_open(device: int) -> bool:
    """What :func:`open_short_ways` has set."""

def take_cuda_fault(device_index: int) -> str:
    """What a kernel on this CUDA device has recorded when it waited in vain and gave up: the op,
    the block, the tile, the round, and what to do. Empty where there is no such record; this call
    takes it away. It does not wait for the device."""

def tf32_allowed(dtype: dtype) -> bool:
    """Whether kernels may multiply numbers of this dtype as TF32, by torch's settings now."""

def cuda_probe() -> str:
    """Why kernels of this build cannot run on the current CUDA device, or ``''``."""

def cuda_device() -> tuple[int, int, int, int]:
    """The limits of the current CUDA device that a plan depends on."""

def set_runs_again(on: bool) -> bool:
    """Whether calls of this thread run the same weights again and again; returns what it was."""

def packed_bytes() -> int:
    """Memory of the packed weights that the CPU kernels keep."""

def packed_of(weights: list[Tensor]) -> list[tuple[int, dtype | None, bool]]:
    """The same, and what was chosen for them, a type and whether versions are compared in place of
    values, of each layer all of whose weights are among these."""

def choose_packed(weights: list[Tensor], dtype: dtype | None, by_version: bool) -> int:
    """What each of these layers that a call has seen is packed in from now on, and whether versions
    of weights are compared in place of their values; returns how many there are."""

def packed_limit() -> int:
    """How much memory packed weights may take."""

def set_packed_limit(bytes: int) -> None:
    """Sets how much memory packed weights may take."""

def drop_packed() -> None:
    """Frees the packed weights that are kept."""

def threads_at_work() -> int:
    """Threads that calls of the CPU kernels in this process hold now."""

def cell_table() -> list[dict[str, Any]]:
    """The cells as C++ knows them: name, gates and the sizes of the cell contract."""

def cell_step(
    cell: str,
    parameters: Mapping[str, Tensor | None] | tuple[Tensor | None, ...],
    input_size: int,
    hidden_size: int,
    input: Any,
    hx: Any,
) -> Any:
    """The next state of a cell with these parameters, or None where anything is unusual."""

def layers_call(
    cell: str,
    weights: list[Tensor],
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    directions: int,
    merge_mode: str,
    batch_first: bool,
    input: Any,
    hx: Any,
    lengths: Any,
    reset: Any,
) -> Any:
    """What layers with this flat list of weights return, or None where anything is unusual."""

def same_weights(parameters: Any, names: Any, flat_weights: Any, references: Any) -> bool:
    """Whether a module's flat list of weights holds its parameters of these names, and weak
    references are to them: none was replaced since the list was made."""

def chunk_lengths(chunks: list[Any], input_size: int, weight: Tensor) -> list[int] | None:
    """T of each of these chunks [T, input_size], or None where a layer with this weight takes one
    of them not, or not as it is."""

def join_chunks(chunks: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Data [N, I] and batch sizes [T] of chunks, longest first, step after step; None where
    anything is unusual."""

def part_steps(steps: Tensor, lengths: list[int]) -> list[Tensor] | None:
    """The way back: a tensor [T, R] for each chunk, or None where anything is unusual."""

def cast(tensor: Tensor, dtype: dtype) -> Tensor | None:
    """A tensor as autocast casts it, parameters once per region; None where it is unusual."""

def threads_granted(wanted: int, at_work: int, cores: int) -> int:
    """How many threads a call of the CPU kernels gets, for tests."""

def contention_after(
    state: tuple[int, int, int], took: int, waited: int, threads: int, now: int
) -> tuple[int, int, int]:
    """What a process knows after a call of the CPU kernels, for tests: gain, pause, its end."""
