"""A long sequence: a bacterium's genome, base by base, in fewer bits than by counting.

    python examples/gallery/dna.py

The chromosome of Corynebacterium diphtheriae (NCTC 11397, 2.46 million bases) comes with
pyrodigal, a finder of genes. Both strands are read, since genes lie on either, as streams side by
side whose states go on from chunk to chunk; a stretch at the end is held out. The baseline is a
Markov model of order k: counts of what follows each k bases, on both strands too, with the k that
suits it best on the very bases held out.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _gallery import Batch, Options, Program, Task, bits, package, recurrent
from rnnkernels import streaming

BASES = "ACGT"
STEPS = 200


class Bases(nn.Module):
    """Embedding -> recurrent layer -> Linear: predicts each next base."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden``."""
        super().__init__()
        self.embedding = nn.Embedding(len(BASES), 16)
        self.rnn = recurrent(options, 16, hidden)
        self.output = nn.Linear(hidden, len(BASES))

    def forward(self, bases: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Map bases ``[T, B]`` and a state to logits ``[T, B, 4]`` and the next state."""
        y, hx = self.rnn(self.embedding(bases), hx)
        return self.output(y), hx


def read_genome() -> Tensor:
    """Read the chromosome: numbers of bases ``[N]``."""
    folder = Path(package("pyrodigal").__file__).parent / "tests/data"
    with gzip.open(folder / "GCF_001457455.1_NCTC11397_genomic.fna.gz", "rt") as stream:
        lines = [line.strip().upper() for line in stream if not line.startswith(">")]
    return torch.tensor([BASES.index(base) for base in "".join(lines) if base in BASES])


def both_strands(bases: Tensor) -> Tensor:
    """Append the other strand, read in its own direction: ``[2 N]``."""
    return torch.cat([bases, 3 - bases.flip(0)])


def markov_bits(learnt: Tensor, held_out: Tensor, order: int) -> float:
    """Measure a Markov model, every count of which starts at one, in bits per base."""

    def runs(bases: Tensor) -> Tensor:
        number = torch.zeros(len(bases) - order, dtype=torch.long)
        for offset in range(order + 1):
            number = 4 * number + bases[offset : len(bases) - order + offset]
        return number

    counts = 1 + torch.bincount(runs(learnt), minlength=4 ** (order + 1)).view(-1, 4).double()
    chances = counts / counts.sum(1, keepdim=True)
    return -chances.flatten()[runs(held_out)].log2().mean().item()


def build(options: Options) -> Task:
    """Read the genome, count the baseline, and build the model."""
    genome = read_genome()
    held_out, rest = genome[-100_000:], genome[:-100_000]
    if options.quick:
        held_out, rest = held_out[:10_000], rest[:100_000]
    learnt = both_strands(rest)
    orders = {k: markov_bits(learnt, held_out, k) for k in range(3, 10)}
    best = min(orders, key=lambda k: orders[k])
    streams = streaming.batchify(learnt, 64)
    unseen = streaming.batchify(held_out, 20)
    model = Bases(options, 32 if options.quick else 128)
    state: Any = None

    def batches() -> Iterator[Batch]:
        nonlocal state
        state = None
        parts = (streaming.chunks(part, STEPS) for part in (streams[:-1], streams[1:]))
        yield from zip(*parts, strict=True)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal state
        logits, state = model(batch[0], state)
        state = streaming.detach(state)
        return cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def evaluate(model: nn.Module) -> float:
        logits = model(unseen[:-1])[0]
        return bits(cross_entropy(logits.flatten(0, 1), unseen[1:].flatten()))

    def draw(axes: Axes) -> None:
        axes.plot(list(orders), list(orders.values()), "o--", color="gray", label="Markov model")
        axes.axhline(evaluate(model), label=f"{options.cell} model")
        axes.set(xlabel="order of the Markov model", ylabel="held-out bits per base")
        axes.legend()

    return Task(
        data=f"pyrodigal's genome of C. diphtheriae, {len(rest):,} bases to learn from, "
        f"{len(held_out):,} held out",
        model=model,
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metric="bits per base",
        show=".4f",
        rises=False,
        baseline=f"Markov model of order {best}",
        baseline_value=orders[best],
        lr=4e-3,
        settles=True,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (3, 2), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
