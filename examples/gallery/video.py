"""Many to one, frames of a video: what does the paddle do?

    python examples/gallery/video.py

Atari's Pong comes with ale-py, and so do its pictures. In clips of two dozen frames the right
paddle is held still, moved up, moved down, or moved one way and then back, sooner or later, from
wherever it is; ball and opponent play on beside it. No frame alone tells which it was: a layer
turns each into a vector, and a recurrent layer remembers. The baseline takes the movement whose
mean clip is closest.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from _classify import classification
from _gallery import Options, Program, Task, accuracy, package, recurrent

STEPS = 24
FRAMES_A_STEP = 2
STILL, UP, DOWN = 0, 3, 4  # as ale-py numbers actions; Pong takes right and left for up and down
MOVEMENTS: dict[str, tuple[int, int]] = {
    "still": (STILL, STILL),
    "up": (UP, UP),
    "down": (DOWN, DOWN),
    "up, down": (UP, DOWN),
    "down, up": (DOWN, UP),
}
"""What is done in the first and in the second half of each movement."""

COURT = slice(34, 194)
"""Of the 210 rows of a frame those between the walls."""

SIZE = 32


class Watcher(nn.Module):
    """Linear layer on each frame -> recurrent layer -> Linear layer on the last output."""

    def __init__(self, options: Options, hidden: int) -> None:
        """Keep a state of size ``hidden``."""
        super().__init__()
        self.frame = nn.Sequential(nn.Linear(SIZE * SIZE, 64), nn.ReLU(), nn.Dropout(0.2))
        self.rnn = recurrent(options, 64, hidden)
        self.output = nn.Linear(hidden, len(MOVEMENTS))

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips ``[B, STEPS, SIZE * SIZE]`` to logits ``[B, movements]``."""
        logits: Tensor = self.output(self.rnn(self.frame(clips.transpose(0, 1)))[0][-1])
        return logits


def start_console() -> Any:
    """Switch Pong on."""
    ale_py = package("ale_py")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    console = ale_py.ALEInterface()
    console.setInt("random_seed", 1)
    console.setFloat("repeat_action_probability", 0.0)
    console.loadROM(ale_py.roms.get_rom_path("pong"))
    return console


def look(console: Any) -> Tensor:
    """Return the frame on the screen, ``[SIZE * SIZE]``, without what all frames share."""
    frame = torch.from_numpy(console.getScreenGrayscale()[COURT]).float()
    seen = (frame - frame.median()) / 128
    return avg_pool2d(seen[None], frame.shape[0] // SIZE).flatten()


def film(console: Any, movement: tuple[int, int], chance: torch.Generator) -> Tensor:
    """Play on from a new game; return a clip in which ``movement`` is made, ``[STEPS, ...]``."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, [], generator=chance))

    def act(action: int, frames: int) -> None:
        for _ in range(frames):
            console.act(action)

    console.reset_game()
    act(STILL, draw(1, 120))
    act((UP, DOWN)[draw(0, 2)], draw(0, 14))
    act(STILL, 8)  # until it rests
    begin, half = draw(1, 11), draw(2, 7)
    clip = []
    for step in range(STEPS):
        during = begin <= step < begin + 2 * half
        act(movement[(step - begin) // half] if during else STILL, FRAMES_A_STEP)
        clip.append(look(console))
    return torch.stack(clip)


def build(options: Options) -> Task:
    """Film clips of every movement, hold a quarter out, and build the model."""
    console, chance = start_console(), torch.Generator().manual_seed(0)
    count = 80 if options.quick else 1000
    labels = torch.arange(count) % len(MOVEMENTS)
    clips = torch.stack([film(console, list(MOVEMENTS.values())[k], chance) for k in labels])
    cut = 3 * count // 4
    (x, unseen), (y, truth) = (part.tensor_split([cut]) for part in (clips, labels))
    means = torch.stack([x[y == k].mean(0) for k in range(len(MOVEMENTS))])
    nearest = -torch.cdist(unseen.flatten(1), means.flatten(1))
    model = Watcher(options, 64)

    def draw(axes: Axes) -> None:
        clip = unseen[3].view(STEPS, SIZE, SIZE)
        axes.imshow(torch.cat(list(clip[::4]), 1), cmap="gray", aspect="equal")
        said = list(MOVEMENTS)[int(model(unseen[3:4]).argmax())]
        axes.set(title=f"every fourth frame; answer: {said}", xticks=[], yticks=[])

    return classification(
        model,
        (x, y),
        (unseen, truth),
        batch_size=32,
        data=f"ale-py's Pong, {len(x)} clips of {STEPS} frames to learn from, {len(unseen)} held "
        "out",
        baseline="the nearest mean clip",
        baseline_value=accuracy(nearest, truth),
        lr=1e-2 if options.quick else 3e-3,
        draw=draw,
    )


PROGRAM = Program(__file__, __doc__, build, (20, 8), "gru")
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
