"""What a step is estimated to take on a GPU: ``python -m benchmarks.gpu_estimates``."""

from __future__ import annotations

import argparse

from rnnkernels.cuda_plan import DEVICES, Device, plan

CELLS = ("lstm", "gru")
SIZES = ((1, 256), (16, 256), (64, 512), (64, 1024), (128, 1024))  # B, H
PRECISIONS = ("bfloat16", "tf32", "float32")


def table(device: Device, megahertz: float) -> str:
    """Estimated microseconds per step, forward and backward, as Markdown."""
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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_estimates",
        description="Layouts of LSTM and GRU layers over a GPU, and estimated times of a step.",
    )
    parser.add_argument("--device", choices=DEVICES, default="H100", help="default: H100")
    parser.add_argument(
        "--megahertz", type=float, default=1755.0, help="its clock; default: %(default)s"
    )
    args = parser.parse_args()
    print(table(DEVICES[args.device], args.megahertz))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
