"""A model for torch.compile and torch.export, and an aot backend that keeps its graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config

import rnnkernels

VOCABULARY, H = 11, 6


class Model(nn.Module):
    """Embedding, a recurrent layer, Linear."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.layer = getattr(rnnkernels, kind)(5, H, **options)
        halves = 2 if self.layer.bidirectional and self.layer.merge_mode == "concat" else 1
        self.head = nn.Linear((self.layer.proj_size or H) * halves, 3)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.head(self.layer(self.embedding(tokens), **options)[0])


def few_kernels() -> AbstractContextManager[None]:
    """Inductor as it suits a fresh cache and a few kernels: it does not first compile headers,
    nor programs that find out what the compiler can do, which take longer than the kernels."""
    settings = {"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}
    return config.patch(settings)


def tokens(T: int, B: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (T, B), generator=torch.Generator().manual_seed(T + B))


def options_for(T: int, B: int, *names: str) -> dict[str, Tensor]:
    """lengths and reset as far as they are named."""
    gen = torch.Generator().manual_seed(T * B)
    lengths = torch.randint(0, T + 1, (B,), generator=gen)
    reset = torch.rand(T, B, generator=gen) < 0.3
    return {k: v for k, v in (("lengths", lengths), ("reset", reset)) if k in names}


def result(
    model: nn.Module, run: Callable[..., Tensor], *args: Any, **options: Any
) -> list[Tensor]:
    """The output and the gradient of every parameter."""
    model.zero_grad()
    y = run(*args, **options)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Graphs:
    """An aot backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

        def keep(to: list[torch.fx.GraphModule]) -> Any:
            def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
                to.append(graph)
                return make_boxed_func(graph.forward)

            return compiler

        self.backend = aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))

    @staticmethod
    def ops(graph: torch.fx.GraphModule) -> list[str]:
        return [str(n.target) for n in graph.graph.nodes if "rnnkernels" in str(n.target)]
