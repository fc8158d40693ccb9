"""Many to many, one answer per step: tell of each character of Python source what token it is in.

    python examples/gallery/tagging.py

The text is that of Python's standard library, which every machine has, read character by character;
the answers are those of its own ``tokenize``. Whether a quote opens or closes a string shows from
both sides only, so three models learn from the same batches: two bidirectional ones, whose
directions are concatenated or summed, and one that reads forward alone. The baseline gives each
character the class that it is in most often.
"""

from __future__ import annotations

import io
import keyword
import sys
import token
import tokenize

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import _path  # noqa: F401
from _gallery import Batch, Options, Program, Task, accuracy, recurrent, shuffled
from _text import Vocabulary, read_corpus

CLASSES = ("between", "name", "keyword", "number", "string", "comment", "operator")
STEPS = 128


class Tagger(nn.Module):
    """Embedding -> recurrent layer -> Linear at every step."""

    def __init__(self, options: Options, characters: int, hidden: int, merge: str | None) -> None:
        """Merge both directions by ``merge``, or read forward alone."""
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        both = {"bidirectional": True, "merge_mode": merge} if merge else {}
        self.rnn = recurrent(options, 32, hidden, **both)
        self.output = nn.Linear(2 * hidden if merge == "concat" else hidden, len(CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map characters ``[T, B]`` to logits ``[T, B, classes]``."""
        logits: Tensor = self.output(self.rnn(self.embedding(tokens))[0])
        return logits


def kind(found: tokenize.TokenInfo) -> str:
    """Name the class of a token."""
    if found.type == token.NAME:
        return "keyword" if keyword.iskeyword(found.string) else "name"
    name = token.tok_name[found.type]
    if "STRING" in name:  # from Python 3.12 on, an f-string is of several kinds of tokens
        return "string"
    return {"NUMBER": "number", "COMMENT": "comment", "OP": "operator"}.get(name, "between")


def label(text: str) -> tuple[str, Tensor]:
    """Return ``text``, up to where its last whole token ends, and its characters' classes."""
    ends = (index + 1 for index, character in enumerate(text) if character == "\n")
    starts = [0, *ends, len(text), len(text)]  # of the lines, those after the last one too
    labels = torch.zeros(len(text), dtype=torch.long)
    last = 0
    try:
        for found in tokenize.generate_tokens(io.StringIO(text).readline):
            start, last = (starts[row - 1] + column for row, column in (found.start, found.end))
            labels[start:last] = CLASSES.index(kind(found))
    except (tokenize.TokenError, SyntaxError):
        pass  # the text was cut inside of a string or of brackets
    return text[:last], labels[:last]


def build(options: Options) -> Task:
    """Read and label the text, and build the three models."""
    corpus = read_corpus()
    text, labels = label(corpus.train[: 30_000 if options.quick else 500_000])
    unseen, truth = label(corpus.held_out[: 10_000 if options.quick else 100_000])
    vocabulary = Vocabulary.of(text)

    def rows(values: Tensor) -> Tensor:
        return values[: len(values) // STEPS * STEPS].view(-1, STEPS)

    x, y, held_out = rows(vocabulary.encode(text)), rows(labels), rows(vocabulary.encode(unseen))
    truth = rows(truth).T
    counts = torch.zeros(len(vocabulary), len(CLASSES))
    counts.index_add_(0, x.flatten(), one_hot(y.flatten(), len(CLASSES)).float())
    hidden = 16 if options.quick else 64
    models = nn.ModuleDict(
        {
            name: Tagger(options, len(vocabulary), hidden, merge)
            for name, merge in (("concat", "concat"), ("sum", "sum"), ("forward alone", None))
        }
    )

    def loss(models: nn.Module, batch: Batch) -> Tensor:
        tokens, labels = (part.T for part in batch)
        logits = [model(tokens).flatten(0, 1) for model in models.children()]
        return torch.stack([cross_entropy(part, labels.flatten()) for part in logits]).mean()

    def draw(axes: Axes) -> None:
        for name, model in models.items():
            right = model(held_out.T).argmax(-1) == truth
            share = [right[truth == index].double().mean().item() for index in range(len(CLASSES))]
            axes.plot(share, CLASSES, "o", label=f"{name}: {right.double().mean():.1%} of all")
        axes.set(xlabel="share of characters that are right")
        axes.legend()

    return Task(
        data=f"{len(text):,} characters of Python's standard library to learn from, "
        f"{len(unseen):,} held out",
        model=models,
        batches=lambda: shuffled(16 if options.quick else 32, x, y),
        loss=loss,
        evaluate=lambda models: accuracy(models.get_submodule("concat")(held_out.T), truth),
        metric="accuracy",
        show=".2%",
        rises=True,
        baseline="each character's most common class",
        baseline_value=accuracy(counts[held_out.T], truth),
        draw=draw,
        finish=lambda: [
            print(f"  {name + ':':15}{accuracy(model(held_out.T), truth):.2%}")
            for name, model in models.items()
        ],
    )


PROGRAM = Program(__file__, __doc__, build, (6, 6), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
