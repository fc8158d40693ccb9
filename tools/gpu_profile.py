"""Where the time of a training step on a GPU goes: one LSTM layer, by torch's profiler."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

import rnnkernels

ROWS, STEPS, HIDDEN = 16, 512, 256


def main() -> None:
    layer = rnnkernels.LSTM(HIDDEN, HIDDEN).to("cuda", torch.bfloat16)
    x = torch.randn(STEPS, ROWS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        y, _ = layer(x)
        y.sum().backward()  # type: ignore[no-untyped-call]

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    print(rnnkernels.explain(layer, x))
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=15))


if __name__ == "__main__":
    main()
