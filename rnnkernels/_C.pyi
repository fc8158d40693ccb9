"""The compiled part; importing it registers ``torch.ops.rnnkernels.*``."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, dtype

def build_info() -> dict[str, Any]:
    """How this module was built, and the instruction set that its CPU kernels use here."""

def set_batch_invariant(on: bool) -> None:
    """Whether a row's result may not depend on the batch that it is in, for the whole process."""

def batch_invariant() -> bool:
    """What :func:`set_batch_invariant` has set."""

def set_cuda_family(name: str) -> None:
    """Which kernels run layers on a GPU: auto, stepwise, cluster or grid; for tests, benchmarks."""

def set_cuda_stacks(name: str) -> None:
    """How the layers of a stack run on a GPU: auto, in turn or together; for tests, benchmarks."""

def cuda_plan(
    cell: str,
    backward: bool,
    precision: str,
    projected: bool,
    norm: bool,
    H: int,
    rows: int,
    D: int,
    device: tuple[int, int, int, int],
    layers: int,
    steps: int,
) -> dict[str, Any]:
    """How a persistent kernel would be laid out over a device, or why it would not."""

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
    batch_first: bool,
    input: Any,
    hx: Any,
) -> Any:
    """What layers with this flat list of weights return, or None where anything is unusual."""

def cast(tensor: Tensor, dtype: dtype) -> Tensor | None:
    """A tensor as autocast casts it, parameters once per region; None where it is unusual."""

def set_flow_sink(sink: Callable[[Tensor], None] | None) -> None:
    """Has ``sink`` called with |dL/dh_t| [T, B, D] by every backward of this thread's next
    ``sequence_forward`` that makes a graph. None takes it back."""

def threads_granted(wanted: int, at_work: int, cores: int) -> int:
    """How many threads a call of the CPU kernels gets, for tests."""

def contention_after(
    state: tuple[int, int, int], took: int, waited: int, threads: int, now: int
) -> tuple[int, int, int]:
    """What a process knows after a call of the CPU kernels, for tests: gain, pause, its end."""
