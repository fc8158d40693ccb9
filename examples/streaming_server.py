"""Serve many streams from several threads, and print chunks per second and latencies.

    python examples/streaming_server.py                     # each thread runs its own chunks
    python examples/streaming_server.py --batch             # one thread runs all that wait together
    python examples/streaming_server.py --cell gru --streams 64 --threads 8 --longest 1

Clients send chunks of random lengths. The layer's state of every stream stays in the server.
"""

from __future__ import annotations

import argparse
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rnnkernels as rk
from _cli import Parser, exit_code, whole
from rnnkernels.streaming import StreamRunner

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": rk.LSTM, "gru": rk.GRU, "rnn": rk.RNN}
PERCENTILES = (50, 90, 99)


class Options(argparse.Namespace):
    """The command line, typed."""

    cell: str
    layers: int
    inputs: int
    hidden: int
    streams: int
    threads: int
    chunks: int
    longest: int
    batch: bool
    kernel_threads: int
    seed: int


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line; raise ``UsageError`` where it makes no sense."""
    assert __doc__
    parser = Parser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    size = whole(1)
    parser.add_argument("--cell", choices=tuple(LAYERS), default="lstm", help="layer type")
    parser.add_argument("--layers", type=size, default=2, metavar="N", help="recurrent layers")
    parser.add_argument("--inputs", type=size, default=64, metavar="N", help="features of a step")
    parser.add_argument("--hidden", type=size, default=128, metavar="N", help="size of the state")
    parser.add_argument("--streams", type=size, default=16, metavar="N", help="streams in all")
    parser.add_argument(
        "--threads", type=size, default=4, metavar="N", help="threads that share the streams"
    )
    parser.add_argument(
        "--chunks", type=size, default=100, metavar="N", help="chunks that each stream sends"
    )
    parser.add_argument(
        "--longest", type=size, default=16, metavar="T", help="chunks have 1 to T steps"
    )
    parser.add_argument(
        "--batch",
        action="store_true",
        help="gather the chunks that wait and run them in one call of the layer",
    )
    parser.add_argument(
        "--kernel-threads", type=size, default=1, metavar="N", help="threads that one call may take"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of all numbers")
    return parser.parse_args(argv, namespace=Options())


Submit = Callable[[int, Tensor], "Future[Tensor]"]


class Request(NamedTuple):
    """A chunk that waits for its turn."""

    stream: int
    chunk: Tensor
    answer: Future[Tensor]


class Batcher:
    """A thread that takes all chunks that wait, one of each stream, and runs them together."""

    def __init__(self, runner: StreamRunner) -> None:
        self._runner = runner
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, stream: int, chunk: Tensor) -> Future[Tensor]:
        """Leave a chunk; the answer comes later."""
        request = Request(stream, chunk, Future())
        self._requests.put(request)
        return request.answer

    def stop(self) -> None:
        """Answer what waits, then end the thread."""
        self._requests.put(None)
        self._thread.join()

    def _work(self) -> None:
        left: list[Request] = []
        going = True
        while going or left:
            requests, left = left, []
            while going and (not requests or not self._requests.empty()):
                request = self._requests.get()
                if request is None:
                    going = False
                else:
                    requests.append(request)
            batch: dict[int, Request] = {}
            for request in requests:
                if request.stream in batch:
                    left.append(request)  # its turn comes after the first one's
                else:
                    batch[request.stream] = request
            self._answer(batch)

    def _answer(self, batch: dict[int, Request]) -> None:
        try:
            ys = self._runner.batch({stream: r.chunk for stream, r in batch.items()})
        except Exception as error:
            if len(batch) > 1:  # no stream has moved, and not all need be to blame
                for stream, request in batch.items():
                    self._answer({stream: request})
            else:
                for request in batch.values():
                    request.answer.set_exception(error)
        else:
            for stream, y in ys.items():
                batch[stream].answer.set_result(y)


def at_once(runner: StreamRunner) -> Submit:
    """Answer in the thread that asks."""

    def submit(stream: int, chunk: Tensor) -> Future[Tensor]:
        answer: Future[Tensor] = Future()
        answer.set_result(runner(stream, chunk))
        return answer

    return submit


def client(submit: Submit, streams: dict[int, list[Tensor]]) -> list[float]:
    """Send the next chunk of every stream, wait for all, and so on; return seconds per chunk."""
    latencies: list[float] = []

    def timed(stream: int, chunk: Tensor) -> Future[Tensor]:
        begin = time.perf_counter()
        answer = submit(stream, chunk)
        answer.add_done_callback(lambda _: latencies.append(time.perf_counter() - begin))
        return answer

    for chunks in zip(*streams.values(), strict=True):
        answers = [timed(i, chunk) for i, chunk in zip(streams, chunks, strict=True)]
        for answer in answers:
            answer.result()
    return latencies


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that so many percent of all do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def make_chunks(options: Options) -> dict[int, list[Tensor]]:
    """What each stream sends: chunks [T, inputs] of 1 to ``longest`` steps."""
    return {
        stream: [
            torch.randn(int(T), options.inputs)
            for T in torch.randint(1, options.longest + 1, (options.chunks,))
        ]
        for stream in range(options.streams)
    }


def run(options: Options) -> int:
    """Serve, and print what it took; return the exit code."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.kernel_threads)
    layer = LAYERS[options.cell](options.inputs, options.hidden, options.layers).eval()
    runner = StreamRunner(layer, max_streams=options.streams)
    everything = make_chunks(options)
    threads = min(options.threads, options.streams)
    batcher = Batcher(runner) if options.batch else None
    submit = at_once(runner) if batcher is None else batcher.submit
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        shares = [
            {i: chunks for i, chunks in everything.items() if i % threads == n}
            for n in range(threads)
        ]
        clients = [pool.submit(client, submit, share) for share in shares]
        latencies = [seconds for c in clients for seconds in c.result()]
    seconds = time.perf_counter() - begin
    if batcher is not None:
        batcher.stop()
    count = options.streams * options.chunks
    steps = sum(len(chunk) for chunks in everything.values() for chunk in chunks)
    print(
        f"{options.cell.upper()}, {options.layers} x {options.hidden}: {count} chunks of 1 to "
        f"{options.longest} steps, {options.streams} streams, {threads} threads, "
        f"{'batched' if options.batch else 'one by one'}"
    )
    print(f"{count / seconds:.0f} chunks per second, {steps / seconds:.0f} steps per second")
    shown = [f"p{p} {1e3 * percentile(latencies, p):.3f} ms" for p in PERCENTILES]
    print(f"latency: {', '.join(shown)}, longest {1e3 * max(latencies):.3f} ms")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("streaming_server.py", lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
