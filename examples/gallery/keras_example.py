"""Many to one, in the sizes of a common first example of Keras: which language is a message in?

    python examples/gallery/keras_example.py

Embedding of 1,000 tokens by 64, LSTM of 128, Dense of 10: 164,106 parameters, with one bias vector
as Keras has it (``bias_mode="single"``). Tokens are characters; the ten classes are languages that
the messages of gramps are translated into, and no message held out is learnt from in any of them.
The baseline is naive Bayes on the same characters: how often a language has them, in whatever
order.
"""

from __future__ import annotations

import sys

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import one_hot

from _classify import classification, draw_confusion
from _gallery import Options, Program, Task, accuracy, recurrent
from _translation import read_messages

LANGUAGES = ("da", "de", "es", "fi", "fr", "hu", "it", "nl", "pl", "sv")
CHARACTERS = 1000
LONGEST = 30


class Classifier(nn.Module):
    """Embedding -> recurrent layer -> Dense on its last output."""

    def __init__(self, options: Options) -> None:
        """Build it in the sizes of the example."""
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 64)
        self.rnn = recurrent(options, 64, 128, bias_mode="single")
        self.dense = nn.Linear(128, len(LANGUAGES))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, T]``, 0 in front of a message that is shorter, to logits ``[B, 10]``."""
        logits: Tensor = self.dense(self.rnn(self.embedding(tokens.T))[0][-1])
        return logits


def encode(text: str) -> list[int]:
    """Number the last characters of a message; those beyond the embedding share its last row."""
    numbers = [min(ord(character), CHARACTERS - 1) for character in text[-LONGEST:]]
    return [0] * (LONGEST - len(numbers)) + numbers


def build(options: Options) -> Task:
    """Read the messages in every language, hold every tenth out, and build the model."""
    parts: dict[bool, list[tuple[list[int], int]]] = {False: [], True: []}
    for label, language in enumerate(LANGUAGES):
        for index, (message, text) in enumerate(read_messages(language).items()):
            if len(text) >= 10 and text != message and (not options.quick or index % 40 < 2):
                parts[sum(message.encode()) % 10 == 0].append((encode(text), label))
    (x, y), (unseen, truth) = (
        (torch.tensor([row for row, _ in part]), torch.tensor([label for _, label in part]))
        for part in (parts[False], parts[True])
    )
    model = Classifier(options)

    def counted(tokens: Tensor) -> Tensor:
        counts = one_hot(tokens, CHARACTERS).sum(1).float()
        counts[:, 0] = 0
        return counts

    seen = torch.ones(len(LANGUAGES), CHARACTERS)
    for rows in torch.split(torch.arange(len(x)), 1000):
        seen.index_add_(0, y[rows], counted(x[rows]))
    bayes = counted(unseen) @ (seen / seen.sum(1, keepdim=True)).log().T

    def draw(axes: Axes) -> None:
        draw_confusion(axes, model(unseen).argmax(1), truth, LANGUAGES, "language")

    return classification(
        model,
        (x, y),
        (unseen, truth),
        batch_size=128,
        data=f"messages of gramps in ten languages, {len(x):,} to learn from, {len(unseen):,} held "
        "out",
        baseline="naive Bayes on the same characters",
        baseline_value=accuracy(bayes, truth),
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (4, 4), "lstm")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
