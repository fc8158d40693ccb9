"""Learning by trial: balance a pole whose speed is not shown, with a policy that remembers.

    python examples/gallery/cartpole.py

CartPole comes with gymnasium; of its four numbers the two velocities are hidden, so that a policy
must tell them from what it saw before. Sixteen carts are played side by side for a stretch of
steps, one call of the layer each; where a pole falls, the next episode begins in the same row. To
learn (PPO, Schulman et al. 2017), the stretch goes through the layer in one call, and ``reset=``
begins each episode anew inside of it. The baseline pushes to the side to which the pole leans.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import _path  # noqa: F401
from _compare import in_turns
from _gallery import Batch, Options, Program, Task, package, recurrent

CARTS = 16
DISCOUNT, TRACE = 0.98, 0.95
SEEN = torch.tensor([[1 / 2.4, 0.0], [0, 0], [0, 1 / 0.21], [0, 0]])
"""From position, velocity, angle and its velocity to what the policy is shown, about 1 at most."""


class Policy(nn.Module):
    """A recurrent layer that says how to push and what return it expects."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden``."""
        super().__init__()
        self.rnn = recurrent(options, 2, hidden)
        self.push = nn.Linear(hidden, 2)
        self.value = nn.Linear(hidden, 1)

    def forward(
        self, seen: Tensor, hx: Any = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Map what is seen ``[T, B, 2]`` to log-probabilities of a push to the left and right
        ``[T, B, 2]``, expected returns ``[T, B]`` and the next state; where ``reset`` ``[T, B]``,
        an episode begins."""
        y, hx = self.rnn(seen, hx, reset=reset)
        return self.push(y).log_softmax(2), self.value(y).squeeze(2), hx


def make_carts() -> Any:
    """Make the carts; one whose episode ends begins the next in the same step."""
    mode = package("gymnasium.vector").AutoresetMode.SAME_STEP
    return package("gymnasium").make_vec(
        "CartPole-v1",
        num_envs=CARTS,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
    )


@torch.no_grad()
def play(carts: Any, policy: Policy, steps: int) -> Batch:
    """Play new episodes; return seen ``[T, B, 2]``, reset, pushes, their log-probabilities,
    advantages and returns ``[T, B]`` (generalised advantages of Schulman et al. 2016)."""
    state, _ = carts.reset(seed=int(torch.randint(2**31, [])))
    ended, hx = torch.ones(CARTS, dtype=torch.bool), None
    rows = []
    for _ in range(steps):
        seen = torch.from_numpy(state) @ SEEN
        chances, value, hx = policy(seen[None], hx, ended[None])
        push = torch.multinomial(chances[0].exp(), 1)
        begun = ended
        state, _, fell, late, _ = carts.step(push.squeeze(1).numpy())
        ended = torch.from_numpy(fell | late)
        rows.append(
            (seen, begun, push.squeeze(1), chances[0].gather(1, push).squeeze(1), value[0], ended)
        )
    seen, reset, pushes, likely, values, ends = (
        torch.stack(part) for part in zip(*rows, strict=True)
    )
    following = policy((torch.from_numpy(state) @ SEEN)[None], hx, ended[None])[1]
    gain = torch.zeros(CARTS)
    gains: list[Tensor] = []
    for t in reversed(range(steps)):
        goes_on = 1 - ends[t].float()
        expected = values[t + 1] if t + 1 < steps else following[0]
        gain = 1 + DISCOUNT * goes_on * expected - values[t] + DISCOUNT * TRACE * goes_on * gain
        gains.insert(0, gain)
    advantages = torch.stack(gains)
    return seen, reset, pushes, likely, advantages, advantages + values


def loss(policy: nn.Module, batch: Batch) -> Tensor:
    """PPO's clipped objective, the error of the expected returns, and a little entropy."""
    seen, reset, pushes, likely, advantages, returns = batch
    chances, values, _ = policy(seen, reset=reset)
    ratio = (chances.gather(2, pushes[..., None]).squeeze(2) - likely).exp()
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    objective = torch.minimum(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
    entropy = -(chances.exp() * chances).sum(2).mean()
    total: Tensor = 0.5 * mse_loss(values / 10, returns / 10) - objective - 0.01 * entropy
    return total


@torch.no_grad()
def mean_return(carts: Any, choose: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> float:
    """Play the same sixteen episodes to their ends; return the mean number of steps."""
    state, _ = carts.reset(seed=1)
    going, total, hx = torch.ones(CARTS, dtype=torch.bool), 0, None
    while going.any():
        push, hx = choose(torch.from_numpy(state) @ SEEN, hx)
        state, _, fell, late, _ = carts.step(push.numpy())
        total += int(going.sum())
        going &= ~torch.from_numpy(fell | late)
    return total / CARTS


def by_episodes(policy: Policy, seen: Tensor, reset: Tensor) -> Tensor:
    """What ``reset=`` does, as a loop: each episode of each row goes through the layer alone."""
    y = []
    for row in range(CARTS):
        starts = [*reset[:, row].nonzero().flatten().tolist(), len(seen)]
        parts = [seen[a:b, row : row + 1] for a, b in pairwise(starts)]
        y.append(torch.cat([policy.rnn(part)[0] for part in parts]))
    return torch.cat(y, 1)


def build(options: Options) -> Task:
    """Make the carts and the policy."""
    carts = make_carts()
    policy = Policy(options, 24 if options.quick else 64)
    steps = 64 if options.quick else 256

    def batches() -> Iterator[Batch]:
        played = play(carts, policy, steps)
        for _ in range(4 if options.quick else 8):
            yield played

    def push(seen: Tensor, hx: Any) -> tuple[Tensor, Any]:
        chances, _, hx = policy(seen[None], hx)
        return chances[0].argmax(1), hx

    def leaning(seen: Tensor, hx: Any) -> tuple[Tensor, Any]:
        return (seen[:, 1] > 0).long(), hx

    def draw(axes: Axes) -> None:
        seen, reset, *_ = play(carts, policy, 200)
        for row in range(4):
            angle = seen[:, row, 1].masked_fill(reset[:, row], torch.nan) * 0.21
            axes.plot(angle.rad2deg().tolist(), linewidth=0.8)
        axes.set(xlabel="step", ylabel="angle of the pole, degrees", title="four carts")

    def finish() -> None:
        seen, reset, *_ = play(carts, policy, steps)
        reset = reset | (torch.rand(reset.shape) < 0.02)  # as often as poles fall at first
        with torch.enable_grad():
            ways = (
                lambda: torch.autograd.backward(policy.rnn(seen, reset=reset)[0].sum()),
                lambda: torch.autograd.backward(by_episodes(policy, seen, reset).sum()),
            )
            once, loop = in_turns(ways, torch.device("cpu"))
        print(f"  {int(reset.sum())} episodes forward and backward: {once:.1f} ms in one call with "
              f"reset=, {loop:.1f} ms in a loop over episodes")  # fmt: skip

    return Task(
        data=f"gymnasium's CartPole-v1 without velocities, {CARTS} carts, {steps} steps an epoch",
        model=policy,
        batches=batches,
        loss=loss,
        evaluate=lambda _: mean_return(carts, push),
        metric="mean return",
        show=".1f",
        rises=True,
        baseline="pushing to where the pole leans",
        baseline_value=mean_return(carts, leaning),
        lr=1e-2 if options.quick else 5e-3,
        settles=not options.quick,
        decay=0.0,
        clip=0.5,
        draw=draw,
        finish=finish,
    )


PROGRAM = Program(__file__, __doc__, build, (60, 6), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
