"""What a program of the gallery takes with torch.nn's layers, which have not all that ours have."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import _path  # noqa: F401
import rnnkernels as rk
from _compare import InWindows

KINDS: dict[type[nn.Module], type[nn.RNNBase]] = {rk.RNN: nn.RNN, rk.LSTM: nn.LSTM, rk.GRU: nn.GRU}


class AsOurs(nn.Module):
    """A layer of torch.nn that is called as one of ours, and does the same the long way round.

    Rows of unequal lengths are packed, a sequence with resets is cut where there is one, a
    truncated one where its windows begin.
    """

    def __init__(self, ours: Any) -> None:
        """Stand in for ``ours`` by a layer of the same sizes, with the weights that both have."""
        super().__init__()
        self.merge_mode = ours.merge_mode
        self.rnn = KINDS[type(ours)](
            ours.input_size, ours.hidden_size, ours.num_layers,
            bidirectional=ours.bidirectional, dropout=ours.dropout, dtype=ours.weight_hh_l0.dtype,
        )  # fmt: skip
        for name in self.rnn.load_state_dict(ours.state_dict(), strict=False).missing_keys:
            nn.init.zeros_(self.rnn.get_parameter(name))  # the second of two bias vectors
        self.whole = self.rnn if ours.truncate is None else InWindows(self.rnn, ours.truncate)

    def forward(
        self, x: Tensor, hx: Any = None, *, lengths: Any = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Map ``x`` ``[T, B, I]`` and a state to the output and the next state."""
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, hx = self.rnn(packed, hx)
            y = pad_packed_sequence(y, total_length=len(x))[0]
        elif reset is not None:
            y, hx = self.by_resets(x, hx, reset)
        else:
            y, hx = self.whole(x, hx)
        if self.merge_mode == "sum":
            y = sum(y.chunk(2, -1))
        return y, hx

    def by_resets(self, x: Tensor, hx: Any, reset: Tensor) -> tuple[Tensor, Any]:
        """Run up to each step at which a row begins again, and zero the state of that row."""
        y = []
        begins = [0, *(reset[1:].any(1).nonzero().flatten() + 1).tolist(), len(x)]
        for begin, end in pairwise(begins):
            if hx is not None:
                keep = ~reset[begin, :, None]
                hx = tuple(s * keep for s in hx) if isinstance(hx, tuple) else hx * keep
            part, hx = self.rnn(x[begin:end], hx)
            y.append(part)
        return torch.cat(y), hx


def with_torch_nn(model: nn.Module) -> nn.Module | None:
    """Exchange our layers in ``model`` for torch.nn's; None where one of them has what cannot be
    done with these (a cell of its own, a gradient bounded at every step)."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.RNNBase):
            continue
        if type(module) not in KINDS or getattr(module, "grad_clip", None) is not None:
            return None
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, AsOurs(module))
    return model
