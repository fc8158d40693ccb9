"""What test_threads.py runs in processes of their own, because what goes wrong there is a hang.

``python thread_programs.py NAME`` runs the function of that name.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import rnnkernels
from cases import make_call, random_like
from op_calls import backward_arguments, forward
from rnnkernels import _C
from rnnkernels.streaming import StreamRunner

backward_op = torch.ops.rnnkernels.sequence_backward

LAYERS = ("LSTM", "GRU", "RNN")
#: T, B, I, H: split by units with a barrier per step; by rows; both.
SHAPES = ((40, 1, 16, 128), (12, 24, 16, 64), (8, 9, 16, 320))


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    # Not torch.equal: large ones run in torch's own threads, which a child of a fork has lost.
    return all(g.tolist() == w.tolist() for g, w in zip(got, wanted, strict=True))


def at_once(*works: Callable[[], object]) -> None:
    """Runs all in threads of their own that start together; raises what one of them raises."""
    start = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def infer(module: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [module(x)[0]]


def train(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def one_module_in_many_threads() -> None:
    """Four threads call the same module, two of them for gradients: the bits of a lone call."""
    torch.set_num_threads(2)
    for layer in LAYERS:
        for T, B, I, H in SHAPES:
            check_at_once(getattr(rnnkernels, layer)(I, H), torch.randn(T, B, I))
    assert _C.threads_at_work() == 0


def check_at_once(module: nn.Module, x: Tensor) -> None:
    alone = {run: run(module, x) for run in (infer, train)}

    def repeat(run: Callable[[nn.Module, Tensor], list[Tensor]]) -> None:
        torch.set_num_threads(2)
        for _ in range(10):
            assert same(run(module, x), alone[run]), f"{module} {list(x.shape)}"

    at_once(*(partial(repeat, run) for run in (infer, train) * 2))


def loop_call(T: int = 20, B: int = 3, H: int = 128, **options: Any) -> Any:
    return make_call("lstm", T=T, B=B, inputs=8, H=H, dtype=torch.float32, grad=False, **options)


def backward_of(call: Any) -> Callable[[], list[Tensor]]:
    outs = forward(call)
    arguments = backward_arguments(call, outs, random_like(outs[:4]))
    return lambda: list(backward_op(*arguments))


def both(call: Any) -> list[Tensor]:
    return [*forward(call), *backward_of(call)()]


def changing_numbers_of_threads() -> None:
    """Threads that change their number of threads all the time: no bit of a loop changes."""
    torch.set_num_threads(1)
    calls = [loop_call(), loop_call(B=17, H=40), loop_call(D=2)]
    alone = [both(call) for call in calls]

    def work(offset: int) -> None:
        for i in range(30):
            torch.set_num_threads(1 + (i + offset) % 5)
            which = i % len(calls)
            assert same(both(calls[which]), alone[which])

    at_once(*(partial(work, i) for i in range(4)))
    assert _C.threads_at_work() == 0


def tasks() -> int:
    """Threads of this process, Python's or not."""
    return len(os.listdir("/proc/self/task"))


def new_tasks(run: Callable[[], object], threads: int, expected: int = 0) -> int:
    """How many threads more this process has after ``run`` in a thread set to so many.

    Beside a busy neighbour calls run in one thread for a while: runs until there are as many more
    as expected.
    """
    torch.set_num_threads(threads)  # this alone may start some, for other pools of torch's
    before = tasks()
    run()
    while expected and tasks() - before < expected:  # threads of others may have ended meanwhile
        run()
    return tasks() - before


def number_of_threads_is_obeyed() -> None:
    """A lone call runs in as many threads as torch is set to, one or more than there are cores."""
    torch.set_num_threads(1)
    run = backward_of(loop_call(H=512))
    alone = run()
    # OpenMP keeps its threads: each of these asks for a few more than the one before.
    for threads, more in ((1, 0), (2, 1), (3, 1), (6, 3)):
        assert new_tasks(run, threads, more) == more, threads
    assert same(run(), alone)


def cores_are_shared() -> None:
    """A call that finds all cores taken by others runs in its caller's thread alone."""
    cores = max(2, len(os.sched_getaffinity(0)))
    torch.set_num_threads(cores)
    long, short = backward_of(loop_call(T=20000)), backward_of(loop_call(H=512))
    seen: list[int] = []
    while not seen:
        ready, done = threading.Event(), threading.Event()

        def work(ready: threading.Event = ready, done: threading.Event = done) -> None:
            torch.set_num_threads(cores)
            # OpenMP starts the threads of this one now, and not while they are counted.
            before = tasks()
            for _ in range(1000):
                short()
                if tasks() > before:
                    break
            ready.set()
            long()
            done.set()

        def probe(ready: threading.Event = ready, done: threading.Event = done) -> None:
            ready.wait()
            while _C.threads_at_work() < cores and not done.is_set():
                os.sched_yield()
            if done.is_set():
                return
            started = new_tasks(short, cores)
            if not done.is_set():  # else the cores may have been free already
                seen.append(started)

        at_once(work, probe)
    assert seen == [0]


def an_error_gives_its_threads_back() -> None:
    os.environ["RNNKERNELS_CPU_CAPABILITY"] = "abacus"
    try:
        forward(loop_call())
    except RuntimeError as error:
        assert "abacus" in str(error), error
    else:
        raise AssertionError("no error")
    assert _C.threads_at_work() == 0


def child_of_a_fork() -> None:
    """The child of a fork has lost OpenMP's threads: our loops run without, in the same bits."""
    torch.set_num_threads(2)
    runs: list[Callable[[], list[Tensor]]] = []
    for call in (loop_call(), loop_call(B=16)):  # that split units and rows
        runs.append(partial(forward, call))
        runs.append(backward_of(call))
    parents = [run() for run in runs]
    started: list[int] = []
    pid = os.fork()
    if pid == 0:
        assert torch.get_num_threads() == 2
        for run, parent in zip(runs, parents, strict=True):
            assert same(run(), parent)
        # A new thread gets OpenMP's threads anew.
        at_once(lambda: started.append(new_tasks(runs[0], 2, 1)))
        assert started == [1]
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


class Encoded(Dataset[Tensor]):
    """Sequences that a recurrent layer makes when they are asked for."""

    def __init__(self) -> None:
        self.module = rnnkernels.LSTM(16, 64)
        self.x = torch.randn(8, 20, 4, 16)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return infer(self.module, self.x[index])[0]


def workers_of_a_data_loader() -> None:
    torch.set_num_threads(2)
    data = Encoded()
    expected = [data[i] for i in range(len(data))]
    for start in ("fork", "spawn"):
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start)
        assert same(list(loader), expected), start


def ticks(run: Callable[[], object]) -> int:
    """How often another Python thread gets the interpreter and lets go of it while ``run`` runs."""
    counting, over, count = threading.Event(), threading.Event(), 0

    def other() -> None:
        nonlocal count
        counting.set()
        while not over.is_set():
            os.fstat(0)  # a system call lets go of the interpreter
            count += 1

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    counting.wait()
    sys.setswitchinterval(1e-6)  # who wants the interpreter back need not fight for it
    try:
        before = count
        run()
        return count - before
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()


def the_interpreter_is_free_meanwhile() -> None:
    """Long calls let other Python threads run all along, not just at their start and end."""
    torch.set_num_threads(1)
    T = 40_000
    call = loop_call(T=T, B=1)
    outs = forward(call)
    arguments = backward_arguments(call, outs, [torch.ones_like(outs[0]), None, None, None])
    module = rnnkernels.LSTM(16, 64)
    x = torch.randn(T, 1, 16, requires_grad=True)
    y = module(x)[0]
    dy = torch.ones_like(y)
    streams = StreamRunner(rnnkernels.LSTM(16, 64).eval())
    chunk = x[:, 0].detach()
    runs: dict[str, Callable[[], object]] = {
        "forward op": partial(forward, call),
        "backward op": lambda: backward_op(*arguments),
        "module without gradient": lambda: infer(module, x),
        "module": lambda: module(x),
        "autograd": lambda: torch.autograd.grad(y, [x], dy, retain_graph=True),
        "stream": lambda: streams("a", chunk),
        "streams": lambda: streams.batch({"a": chunk, "b": chunk[1:]}),  # packed
    }
    for name, run in runs.items():
        # Each takes as long as 40 000 ticks or more. Where the interpreter changes hands, some
        # thousand may pass before it does, but not every time.
        fewest = min(ticks(run) for _ in range(4))
        assert fewest > 5000, f"{name}: {fewest} ticks"


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
    print("done")
