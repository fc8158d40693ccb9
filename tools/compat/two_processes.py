"""What two processes do together under gloo: the cases, and one of the processes.

    python -m compat.two_processes RANK FOLDER LIBRARY CASE...

runs the cases of these numbers as one of two, and writes a list of what went wrong, with empty
texts where nothing did, to FOLDER/RANK. :func:`started` starts both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.microbatch import TensorChunkSpec
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel

from compat.processes import WHERE
from compat.registry import CELLS, LAYERS, LIBRARIES, H, I, Library, T, same, tensors

WORLD = 2
STEPS = 20
torch.manual_seed(3)
X = torch.randn(T, 2 * WORLD, I)


@dataclass(frozen=True)
class Case:
    title: str
    run: Callable[[Library], None]
    costly: bool


CASES: list[Case] = []


def case(title: str, *, costly: bool = False) -> Callable[[Callable[[Library], None]], None]:
    """Adds a case that this function runs in each process."""
    return lambda run: CASES.append(Case(title, run, costly))


def rank() -> int:
    return dist.get_rank()


def share() -> Tensor:
    """The rows of this process."""
    return X.chunk(WORLD, 1)[rank()]


def loss_of(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


def trained(
    model: Any, x: Tensor, optimizer: torch.optim.Optimizer, steps: int = STEPS
) -> list[float]:
    """The losses of some steps."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def alone(library: Library, kind: str, steps: int = STEPS, **options: Any) -> list[float]:
    """The losses of one process that has all rows."""
    model = library.model(kind, **options)
    return trained(model, X, adam(model), steps)


def of_all(losses: Sequence[float]) -> Tensor:
    """The mean over processes."""
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return mean / WORLD


def agree(losses: Sequence[float], want: Sequence[float], tolerance: float = 1e-6) -> None:
    same(of_all(losses), torch.tensor(want, dtype=torch.float64), tolerance)


STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def ddp(library: Library, kind: str, **options: Any) -> None:
    model = DistributedDataParallel(library.model(kind, **STACK), **options)
    agree(trained(model, share(), adam(model)), alone(library, kind, **STACK))


@case("DistributedDataParallel: losses of 20 steps as one process has them, to 1e-6")
def _(library: Library) -> None:
    for kind in LAYERS:
        ddp(library, kind)


class Looped(nn.Module):
    """A cell that takes step after step, and a head."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        hx: Any = None
        for step in x:
            hx = self.cell(step, hx)
        result: Tensor = self.head(tensors(hx)[0])
        return result


@case("DistributedDataParallel: cells in a loop, the same")
def _(library: Library) -> None:
    for kind in CELLS:
        plain, model = Looped(library.make(kind)), Looped(library.make(kind))
        model.load_state_dict(plain.state_dict())
        want = trained(plain, X, adam(plain))
        wrapped = DistributedDataParallel(model)
        agree(trained(wrapped, share(), adam(wrapped)), want)


@case("DistributedDataParallel, static_graph=True")
def _(library: Library) -> None:
    ddp(library, "LSTM", static_graph=True)


@case("DistributedDataParallel, gradient_as_bucket_view=True")
def _(library: Library) -> None:
    ddp(library, "GRU", gradient_as_bucket_view=True)


@case("DistributedDataParallel, find_unused_parameters=True")
def _(library: Library) -> None:
    ddp(library, "RNN", find_unused_parameters=True)


@case("DistributedDataParallel, no_sync: gradients add up over calls")
def _(library: Library) -> None:
    plain = library.model("GRU")
    model = DistributedDataParallel(library.model("GRU"))
    with model.no_sync():
        loss_of(model(share())).backward()
    loss_of(model(share())).backward()
    loss_of(plain(X)).backward()
    want = [2 * p.grad for p in plain.parameters() if p.grad is not None]
    same([p.grad for p in model.parameters()], want, 1e-6)


@case("torch.compile of DistributedDataParallel", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model = DistributedDataParallel(library.model(kind))
        compiled = torch.compile(model, backend="aot_eager")
        agree(trained(compiled, share(), adam(model), 3), alone(library, kind, 3))
        torch.compiler.reset()


@case("ZeroRedundancyOptimizer", costly=True)
def _(library: Library) -> None:
    model = DistributedDataParallel(library.model("GRU"))
    kind: Any = torch.optim.Adam
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, lr=0.01)
    agree(trained(model, share(), optimizer), alone(library, "GRU"))


def sharded(model: Any, **options: Any) -> Any:
    """FSDP2 over the layer, and over what is left."""
    fully_shard(model.layer, **options)
    fully_shard(model, **options)
    return model


@case("FSDP2, fully_shard: losses of 20 steps as one process has them, to 1e-6; weights")
def _(library: Library) -> None:
    for kind in LAYERS:
        plain, model = library.model(kind, **STACK), sharded(library.model(kind, **STACK))
        want = trained(plain, X, adam(plain))
        agree(trained(model, share(), adam(model)), want)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            same(p.full_tensor(), q, 1e-5)


@case("FSDP2, parameters in bfloat16 (MixedPrecisionPolicy)")
def _(library: Library) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(library.model("LSTM"), mp_policy=policy)
    agree(trained(model, share(), adam(model), 5), alone(library, "LSTM", 5), 0.02)


@case("torch.compile of FSDP2", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model = sharded(library.model(kind))
        compiled = torch.compile(model, backend="aot_eager")
        agree(trained(compiled, share(), adam(model), 3), alone(library, kind, 3))
        torch.compiler.reset()


@case("FSDP1, use_orig_params=True", costly=True)
def _(library: Library) -> None:
    model = FullyShardedDataParallel(
        library.model("LSTM"), use_orig_params=True, device_id=torch.device("cpu")
    )
    agree(trained(model, share(), adam(model)), alone(library, "LSTM"))


@case("torch.distributed.checkpoint of FSDP2: saved by two, loaded by two and by one, resumed")
def _(library: Library) -> None:
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        model = sharded(library.model("LSTM"))
        optimizer = adam(model)
        trained(model, share(), optimizer, 5)
        save(state_of(model, optimizer), checkpoint_id=folder[0])
        want = [p.full_tensor() for p in model.parameters()]
        losses = of_all(trained(model, share(), optimizer, 5))

        pair = sharded(library.model("LSTM"))
        loaded = restored(pair, folder[0])
        assert all(map(torch.equal, (p.full_tensor() for p in pair.parameters()), want))
        same(of_all(trained(pair, share(), loaded, 5)), losses, 0)

        single = library.model("LSTM")
        loaded = restored(single, folder[0], no_dist=True)
        assert all(map(torch.equal, single.parameters(), want))
        agree(trained(single, X, loaded, 5), losses.tolist())
        dist.barrier()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def restored(model: nn.Module, folder: str, **options: Any) -> torch.optim.Optimizer:
    """An optimizer, after both have been loaded."""
    optimizer = adam(model)
    state = state_of(model, optimizer)
    load(state, checkpoint_id=folder, **options)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return optimizer


class Stage(nn.Module):
    """A layer, and what follows its output."""

    def __init__(self, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.layer(x)[0])
        return result


@case("pipelining: a layer in each PipelineStage, ScheduleGPipe")
def _(library: Library) -> None:
    torch.manual_seed(0)
    stages = (
        Stage(library.make("LSTM"), nn.Identity()),
        Stage(library.make("GRU", H, 4), nn.Linear(4, 2)),
    )
    want = gradients_of_loss(nn.Sequential(*stages), X)
    value = loss_of(nn.Sequential(*stages)(X))
    here = stages[rank()]
    rows: Any = TensorChunkSpec(1)  # the dimension of the batch
    schedule = ScheduleGPipe(
        PipelineStage(here, rank(), WORLD, torch.device("cpu")),
        n_microbatches=2,
        loss_fn=lambda y, _: loss_of(y),
        args_chunk_spec=(rows,),
        output_merge_spec=rows,
    )
    if rank() == 0:
        schedule.step(X)
    else:
        losses: list[Tensor] = []
        schedule.step(target=torch.zeros(2), losses=losses)
        same(torch.stack(losses).mean(), value, 1e-6)
    before = 0 if rank() == 0 else len(list(stages[0].parameters()))
    found = [p.grad for p in here.parameters()]
    same(found, want[before:][: len(found)], 1e-6)


def gradients_of_loss(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model(x)), list(model.parameters())))


def on_mesh(library: Library, placement: Placement) -> None:
    """Outputs and gradients of replicated weights, for an input with this placement."""
    mesh: DeviceMesh = init_device_mesh("cpu", (WORLD,))
    for kind in (*LAYERS, *CELLS):
        cell = kind in CELLS
        plain, module = (library.make(kind, **({} if cell else STACK)) for _ in range(2))
        x = (X[0] if cell else X).clone().requires_grad_()
        where = Shard(0) if cell and placement == Shard(1) else placement
        spread = distribute_tensor(x.detach(), mesh, [where]).requires_grad_()
        module = distribute_module(module, mesh)
        for _ in range(2):  # the second call finds what the first one left
            out: list[Any] = tensors(module(spread))
            want = tensors(plain(x))
        assert all(isinstance(t, DTensor) for t in out)
        same([t.full_tensor() for t in out], want, 1e-6)
        torch.stack([t.square().sum().full_tensor() for t in out]).sum().backward()
        torch.stack([t.square().sum() for t in want]).sum().backward()
        leaves: list[Any] = [
            (spread, x),
            *zip(module.parameters(), plain.parameters(), strict=True),
        ]
        same([p.grad.full_tensor() for p, _ in leaves], [p.grad for _, p in leaves])


@case("DTensor: replicated weights, replicated input")
def _(library: Library) -> None:
    on_mesh(library, Replicate())


@case("DTensor: replicated weights, an input sharded over the batch")
def _(library: Library) -> None:
    on_mesh(library, Shard(1))
    if library.ours:
        options_on_mesh(library)


def options_on_mesh(library: Library) -> None:
    """What torch.nn's layers have not, for rows that processes have in unequal numbers."""
    mesh: DeviceMesh = init_device_mesh("cpu", (WORLD,))
    x, h = torch.randn(3, T, I), torch.randn(2, 3, H)
    options = {"lengths": [T, 0, 2], "reset": torch.rand(3, T) < 0.3, "return_all_states": True}
    make = partial(library.make, "GRU", bidirectional=True, batch_first=True)
    module = distribute_module(make(), mesh)
    spread = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(h, mesh, [Shard(1)])
    out: list[Any] = tensors(module(*spread, **options))
    plain = make()
    want = tensors(plain(x, h, **options))
    assert [t.placements[0].dim for t in out] == [0, 1, 0] and out[0].stride() == want[0].stride()
    same([t.full_tensor() for t in out], want, 1e-6)
    torch.stack([t.square().sum().full_tensor() for t in out]).sum().backward()
    torch.stack([t.square().sum() for t in want]).sum().backward()
    found: list[Any] = [p.grad for p in module.parameters()]
    same([g.full_tensor() for g in found], [p.grad for p in plain.parameters()])


def started(library: Library, cases: Sequence[int]) -> dict[str, str]:
    """What went wrong in each case in either of two processes; empty texts where nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join((str(Path(__file__).parents[1]), WHERE))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        processes = []
        for i in range(WORLD):
            numbers = map(str, cases)
            command = [sys.executable, "-m", __name__, str(i), folder, library.name, *numbers]
            processes.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            )
        errors = [process.communicate()[1] for process in processes]
        found = [Path(folder, str(i)) for i in range(WORLD)]
        if not all(each.exists() for each in found):
            raise RuntimeError("a process ended before it was done: " + "\n".join(errors)[-2000:])
        lists = [json.loads(each.read_text()) for each in found]
    return {
        CASES[number].title: "; the other process: ".join(filter(None, reasons))
        for number, *reasons in zip(cases, *lists, strict=True)
    }


def main(number: int, folder: str, name: str, cases: Sequence[int]) -> None:
    library = next(each for each in LIBRARIES if each.name == name)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    reasons = []
    for each in cases:
        torch.manual_seed(0)
        try:
            CASES[each].run(library)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            reasons.append("")
    written = Path(folder, f"{number}.new")
    written.write_text(json.dumps(reasons))
    written.rename(Path(folder, str(number)))
    dist.destroy_process_group()


if __name__ == "__main__":
    from compat import two_processes  # whose functions are those that pickles name

    rank_, folder_, library_, *cases_ = sys.argv[1:]
    two_processes.main(int(rank_), folder_, library_, [int(each) for each in cases_])
