"""Recurrent policies of sb3-contrib and torchrl with ``reset=``: one line each to switch.

Both libraries train on stretches of experience in which episodes end and others begin. sb3-contrib
then runs its LSTM step by step, and torchrl makes every episode a row of its own. A layer of
rnnkernels takes the stretch in one call, with ``reset=`` where an episode begins.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import rnnkernels as rk

States = tuple[Tensor, Tensor]


def reset_inside(policy: Any) -> Any:
    """Convert a policy of sb3-contrib's ``RecurrentPPO``, and have it use ``reset=``::

        reset_inside(model.policy)  # model = RecurrentPPO("MlpLstmPolicy", env); returns it

    Weights, states and numbers stay the same.
    """

    def process(features: Tensor, states: States, starts: Tensor, lstm: nn.Module) -> Any:
        """Stand in for ``_process_sequence``: features ``[B T, I]``, states ``[L, B, H]``, starts
        ``[B T]``; return outputs ``[B T, H]`` and states."""
        rows = states[0].shape[1]
        x = features.reshape(rows, -1, features.shape[-1]).transpose(0, 1)
        begins = starts.reshape(rows, -1).T
        y, states = lstm(x, states, reset=begins > 0)
        return y.transpose(0, 1).flatten(0, 1), states

    rk.convert(policy)
    policy._process_sequence = process
    return policy


class ResetInside(nn.Module):
    """A torchrl ``LSTMModule``, for training on stretches ``[B, T]``::

        train_policy = ResetInside(lstm_module)  # of the same weights

    Reads and writes the same keys of a tensordict, but for the states, of which it reads those
    that a row begins with, and writes none.
    """

    def __init__(self, module: Any) -> None:
        """Share the weights of ``module``."""
        super().__init__()
        self.lstm = rk.convert(module.lstm)
        self.keys = (*module.in_keys[:3], module.out_keys[0])

    def forward(self, tensordict: Any) -> Any:
        """Run the stretches of a tensordict ``[B, T]`` whose ``is_init`` tells where episodes
        begin."""
        x, h, c, out = self.keys
        hx = None
        if h in tensordict:
            hx = tuple(tensordict[key][:, 0].transpose(0, 1).contiguous() for key in (h, c))
        y, _ = self.lstm(tensordict[x], hx, reset=tensordict["is_init"].squeeze(-1))
        return tensordict.set(out, y)
