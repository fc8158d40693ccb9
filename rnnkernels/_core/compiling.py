"""What torch.compile is told of functions, without importing the compiler, which takes more than a
second: torch.compiler's own decorators do when they are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """As ``torch.compiler.assume_constant_result``: compiled code has what it returned."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def left_alone(function: F) -> F:
    """As ``torch.compiler.disable``: compilers do not look into it."""
    return _disable_dynamo(function)  # type: ignore[return-value]
