"""What programs share that tell classes apart: which they are, and what is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _gallery import Batch, Task, accuracy, shuffled


def in_parts(model: nn.Module, inputs: Batch, rows: int = 256) -> Tensor:
    """Map ``inputs``, which share their first dimension, to logits ``[N, C]``, some rows at a
    time."""
    parts = zip(*(torch.split(tensor, rows) for tensor in inputs), strict=True)
    return torch.cat([model(*part) for part in parts])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compare what ``model`` says of all but the last tensor of a batch with the last."""
    return cross_entropy(model(*batch[:-1]), batch[-1])


def classification(
    model: nn.Module, learnt: Batch, unseen: Batch, batch_size: int, **more: Any
) -> Task:
    """Complete a task: rows of tensors, the last of which has the classes, to learn from and not
    to learn from; the metric is the share of the latter that are told rightly."""
    return Task(
        model=model,
        batches=lambda: shuffled(batch_size, *learnt),
        loss=loss,
        evaluate=lambda model: accuracy(in_parts(model, unseen[:-1]), unseen[-1]),
        metric="accuracy",
        show=".1%",
        rises=True,
        **more,
    )


def draw_confusion(
    axes: Axes, said: Tensor, truth: Tensor, names: Sequence[str], what: str, turned: bool = False
) -> None:
    """Draw how often each class of ``what`` was taken for each, names ``turned`` where long."""
    confused = torch.zeros(len(names), len(names))
    confused.index_put_((truth, said), torch.ones(len(said)), accumulate=True)
    axes.imshow(confused.log1p(), cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=90 if turned else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answer", ylabel=what)
