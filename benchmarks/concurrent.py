"""Several Python threads that run inference at once, as in a server: calls per second."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from benchmarks import correctness, providers
from benchmarks.cases import LAYERS, Case, shapes
from benchmarks.contest import Contest, Setup, Way
from benchmarks.problem import Inputs, Problem, Runner, flat, ready

CALLERS = 4
SECONDS = 0.1  # that a sample takes, at least

#: Callers, and what each sets by torch.set_num_threads; 0: nothing, so that the run's number holds.
SETTINGS = ((CALLERS, 0), (CALLERS, 1), (CALLERS, 2), (1, 1), (1, 2))

CASES = tuple(
    Case(cell, shape)
    for cell in LAYERS
    for shape in shapes("64,1,128,128", "256,8,128,256", "128,32,256,256")
)


def setting(callers: int, threads: int) -> str:
    """``4 callers x 1``: what one of :data:`SETTINGS` is called."""
    noun = "callers" if callers > 1 else "caller"
    return f"{callers} {noun} x {threads or 'default'}"


def run_at_once(
    runner: Runner, inputs: Inputs, callers: int, threads: int, seconds: float
) -> tuple[float, list[object]]:
    """Seconds per call, all callers together, and each one's last outputs."""
    counts, last = [0] * callers, [object()] * callers
    line = threading.Barrier(callers + 1)

    def work(i: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        with torch.no_grad():
            try:
                runner.forward(inputs)
            except BaseException:
                line.abort()  # or the others would wait for ever
                raise
            line.wait()
            end = time.perf_counter() + seconds
            while counts[i] == 0 or time.perf_counter() < end:
                last[i] = runner.forward(inputs)
                counts[i] += 1

    before = torch.get_num_threads()
    with ThreadPoolExecutor(callers) as pool:
        workers = [pool.submit(work, i) for i in range(callers)]
        with suppress(threading.BrokenBarrierError):  # a worker's own error says more
            line.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.result()
    taken = time.perf_counter() - start
    torch.set_num_threads(before)  # a thread's number is that of threads started later, too
    return taken / sum(counts), last


def check(problem: Problem, runner: Runner, callers: int, threads: int) -> float:
    """The largest error of what any caller got."""
    worst = 0.0
    for outputs in run_at_once(runner, problem.checked, callers, threads, seconds=0.0)[1]:
        found = {f"output {i}": out for i, out in enumerate(flat(outputs))}
        error = correctness.largest_error(
            found, problem.outputs, correctness.arithmetic(problem.case)
        )
        worst = max(worst, error)
    return worst


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """torch.nn and ours in all :data:`SETTINGS`; times are those per call, all callers together."""
    problem = ready(case)

    def sample(runner: Runner, callers: int, threads: int) -> float:
        return 1e3 * run_at_once(runner, problem.next(), callers, threads, SECONDS)[0]

    ways = {}
    for provider in (providers.BASELINE, providers.ours_on(setup.backends[0])):
        runner = providers.build(provider, problem)
        for callers, threads in SETTINGS:
            ways[f"{provider}, {setting(callers, threads)}"] = Way(
                partial(runner.forward, problem.checked),
                partial(check, problem, runner, callers, threads),
                partial(sample, runner, callers, threads),
            )
    return Contest(ways, problem.redraw, grad=False)
