"""Handwritten digits, and telling one by its nearest mean image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from _gallery import package

HELD_OUT = 450


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 64]`` from 0 to 1 and labels ``[N]``, to learn from and held out."""

    images: Tensor
    labels: Tensor
    unseen: Tensor
    truth: Tensor

    def nearest_mean(self) -> Tensor:
        """Return of each image held out the digit whose mean image is closest, ``[HELD_OUT]``."""
        means = [self.images[self.labels == digit].mean(0) for digit in range(10)]
        return torch.cdist(self.unseen, torch.stack(means)).argmin(1)

    def baseline(self) -> float:
        """Return the share of the images held out that :meth:`nearest_mean` tells rightly."""
        return (self.nearest_mean() == self.truth).double().mean().item()

    def described(self) -> str:
        """Say where they come from, and how many there are."""
        return (
            f"scikit-learn's digits, {len(self.images):,} to learn from, {len(self.unseen)} held "
            "out"
        )


def read_digits(quick: bool) -> Digits:
    """Read scikit-learn's digits; a part of those to learn from with ``quick``."""
    digits = package("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    unseen, learnt = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + 300 if quick else None]
    return Digits(images[learnt], labels[learnt], images[unseen], labels[unseen])
