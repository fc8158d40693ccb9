"""What a step is estimated to take on a GPU: ``python -m benchmarks.gpu_estimates``."""

from __future__ import annotations

import argparse

from rnnkernels._backends.cuda_plan import DEVICES, Device, plan

CELLS = ("lstm", "gru")
SIZES = ((1, 64), (1, 256), (16, 256), (64, 512), (64, 1024), (128, 1024))  # B, H
PRECISIONS = ("bfloat16", "tf32", "float32")
STACKS = (
    (2, 16, 256),
    (4, 1, 256),
    (4, 16, 256),
    (6, 10, 256),
    (4, 64, 256),
    (4, 16, 512),
)  # L, B, H
STEPS = 512


def of_layers(device: Device, megahertz: float) -> str:
    """Estimated microseconds per step of a layer, forward and backward, as Markdown."""
    lines = [
        "| cell | B, H | numbers | forward | µs | backward | µs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in CELLS:
        for B, H in SIZES:
            for precision in PRECISIONS:
                row = [cell, f"{B}, {H}", precision]
                for backward in (False, True):
                    p = plan(cell, backward, precision, H, B, 1, device)
                    layout = (
                        f"{p.family}, {p.groups} x {p.blocks} blocks, {p.tiles} x {p.rows} rows"
                    )
                    row += ["step by step", "–"] if p.reason else [layout, ""]
                    if not p.reason:
                        row[-1] = f"{p.cycles / megahertz:.2f}"
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def of_stacks(device: Device, megahertz: float) -> str:
    """The same per step of all layers of a stack, over a sequence of STEPS, and how many times
    faster that is than one layer after another."""
    lines = [
        "| cell | layers | B, H | numbers | forward | µs | gain | backward | µs | gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in CELLS:
        for layers, B, H in STACKS:
            for precision in PRECISIONS:
                row = [cell, str(layers), f"{B}, {H}", precision]
                for backward in (False, True):
                    sizes = cell, backward, precision, H, B, 1, device
                    one, p = plan(*sizes, steps=STEPS), plan(*sizes, layers=layers, steps=STEPS)
                    layout = f"{p.stages} at a time, {p.family}, {p.groups} x {p.blocks} blocks"
                    row += ["one by one" if p.stages == 1 else layout]
                    row.append(f"{p.all_cycles / STEPS / megahertz:.2f}")
                    row.append(f"{layers * one.all_cycles / p.all_cycles:.2f}")
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_estimates",
        description="Layouts of LSTM and GRU layers and of stacks of them over a GPU, and "
        "estimated times of a step.",
    )
    parser.add_argument("--device", choices=DEVICES, default="H100", help="default: H100")
    parser.add_argument(
        "--megahertz", type=float, default=1755.0, help="its clock; default: %(default)s"
    )
    args = parser.parse_args()
    device = DEVICES[args.device]
    print(of_layers(device, args.megahertz), of_stacks(device, args.megahertz), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
