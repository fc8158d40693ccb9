"""How gradients flow back through time, recorded while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rnnkernels import _backends
from rnnkernels._core.call import Call, Result, needs_gradient, norms_dtype
from rnnkernels.diagnostics import _module_hooks as watch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Record:
    """One backward of one layer.

    Attributes:
        module: name of the module inside the model, ``''`` for the model itself.
        layer: number of the layer, -1 for a cell.
        norms: Euclidean norm of the gradient of every row's h_t, ``[T, B, D]``, zero past the end
            of a row; float64 for float64 layers, else float32.
    """

    module: str
    layer: int
    _of_call: _Norms

    @property
    def norms(self) -> Tensor:
        return self._of_call.of_layer(self.layer)


class _Norms:
    """What a backward fills with the norms of all layers of a call [L, T, B, D]; packed
    [L, N, D]."""

    def __init__(self, values: Tensor, padded: Callable[[Tensor], Tensor] | None) -> None:
        self.values, self._padded = values, padded

    def of_layer(self, layer: int) -> Tensor:
        norms = self.values[max(layer, 0)]
        return norms if self._padded is None else self._padded(norms)

    def keep(self) -> None:
        """Another backward is about to fill the same memory."""
        self.values = self.values.clone()


class GradientFlow:
    """What :func:`gradient_flow` recorded.

    Attributes:
        records: a :class:`Record` per backward of a layer, in the order in which they ran. The
            list grows with every backward; :meth:`clear` empties it.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._latest: dict[tuple[str, int], Record | None] = {}  # in the order of forward

    def clear(self) -> None:
        """Forgets all records."""
        self.records.clear()
        self._latest = dict.fromkeys(self._latest)

    def norms(self, module: str = "", layer: int = 0) -> Tensor:
        """The norms ``|dL/dh_t|`` over the whole batch of a layer's latest backward.

        Args:
            module: name of the module inside the model, ``''`` for the model itself.
            layer: number of the layer, -1 for a cell.

        Returns:
            ``[T, D]`` in float64 on the CPU. In a layer of two directions the reverse one, 1,
            runs from the last t to the first, and its gradient from the first t to the last.

        Raises:
            RuntimeError: nothing was recorded.
            ValueError: no backward of this layer was; the message names those that were.
        """
        found = self._found()
        for record in found:
            if (record.module, record.layer) == (module, layer):
                return _over_batch(record.norms)
        known = ", ".join(f"({r.module!r}, {r.layer})" for r in found)
        raise ValueError(f"module, layer: expected one of {known}, got ({module!r}, {layer})")

    def table(self) -> str:
        """The latest backward of every layer and direction as text.

        A line has the norms at the first, middle and last t, and what of the gradient at the end
        of the direction's own way is left at its start (for the reverse direction: at the last t):
        far below 1 it vanishes, far above 1 it explodes.

        Raises:
            RuntimeError: nothing was recorded.
        """
        rows = [("", "T", "first t", "middle t", "last t", "start / end")]
        for name, _, d, norms in self._lines():
            n = len(norms)
            values = [float(norms[t]) for t in (0, n // 2, n - 1)] if n else []
            numbers = [f"{value:.2e}" for value in values] or ["-"] * 3
            start, end = (values[-d], values[d - 1]) if n else (0.0, 0.0)
            ratio = f"{start / end:.2e}" if end else "-"
            rows.append((name, str(n), numbers[0], numbers[1], numbers[2], ratio))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *right]))
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the norms of the latest backward over t, with a line per layer and direction.

        Args:
            ax: where to draw; None makes a new figure.

        Returns:
            The axes. Where a gradient is zero the line has a gap, as its axis is logarithmic.

        Raises:
            RuntimeError: nothing was recorded.
            ImportError: matplotlib is not installed.
        """
        lines = self._lines()
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError(
                    "plot: matplotlib draws the picture and is not installed; "
                    "pip install matplotlib, or print table() instead"
                ) from error
            ax = pyplot.subplots(layout="constrained")[1]
        for name, number, d, norms in lines:
            values = norms.masked_fill(norms == 0, torch.nan)
            (line,) = ax.plot(values.tolist(), "--" if d else "-", color=f"C{number}", label=name)
            if len(norms) == 1:
                line.set_marker("o")
        ax.set_yscale("log")
        ax.set(xlabel="t", ylabel="|dL/dh_t|")
        ax.legend()
        return ax

    def _found(self) -> list[Record]:
        found = [record for record in self._latest.values() if record is not None]
        if not found:
            raise RuntimeError(
                "gradient_flow has recorded nothing: run the model inside its block, and backward "
                "inside or after it"
            )
        return found

    def _lines(self) -> list[tuple[str, int, int, Tensor]]:
        """Name, number of the layer among all, direction and norms [T] of every line."""
        lines = []
        for number, record in enumerate(self._found()):
            name = watch.label(record.module, record.layer)
            directions = _over_batch(record.norms).unbind(1)
            for d, norms in enumerate(directions):
                which = ("", ", reverse")[d] if len(directions) > 1 else ""
                lines.append((name + which, number, d, norms))
        return lines

    def _watch(self, module: str, call: Call, flow: Tensor, result: Result) -> None:
        """Has every backward of a call recorded, whose norms it writes into ``flow``."""
        layers = list(call.numbers)
        for layer in layers:
            self._latest.setdefault((module, layer), None)
        latest: _Norms | None = None

        def begins(_: Any) -> None:
            nonlocal latest
            if latest is not None:
                latest.keep()
            latest = _Norms(flow.zero_(), call.padded)  # filled from now on
            for layer in reversed(layers):
                record = Record(module, layer, latest)
                self.records.append(record)
                self._latest[module, layer] = record

        outputs = [result.y, result.h_n, result.c_n, *(result.h or ()), *(result.c or ())]
        seen = [t for t in outputs if t is not None and t.requires_grad]
        torch.autograd.graph.register_multi_grad_hook(seen, begins, mode="any")


@contextmanager
def gradient_flow(model: nn.Module) -> Iterator[GradientFlow]:
    """Records ``|dL/dh_t|`` of every layer of rnnkernels in a model while it trains.

    What a forward inside the block leads to is recorded, whether its backward runs inside the
    block or after it; results and gradients stay the same to the bit. The norms are those of the
    whole gradient of h_t, from the outputs and from later steps, before it is bounded
    (``grad_clip``) and cut (``truncate``). They fall out of backward on the way, at the cost of a
    sum of squares per step.

    A cell is recorded as layer -1 with T = 1, every step on its own. Blocks nest, and each of
    them records. Calls of :mod:`rnnkernels.functional`, and layers outside ``model``, are left
    alone. In a model made by ``torch.compile`` the layers run outside of its graphs.

    Args:
        model: a layer, a cell, or any model that holds some.

    Yields:
        A :class:`GradientFlow`, good after the block as well.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no layer of rnnkernels.
        RuntimeError: while it runs: the ``torch`` backend was asked for, which does not know the
            norms, or ``torch.compile`` with ``fullgraph=True``.
        NotImplementedError: while it runs: a layer truncates with a pair ``(k1, k2)``.

    Example::

        with rnnkernels.diagnostics.gradient_flow(model) as flow:
            loss_of(model(x)).backward()
        print(flow.table())
        flow.norms("encoder.rnn", layer=1)  # [T, D]
        flow.plot().figure.savefig("flow.png")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not watch.layers(model):
        raise ValueError(
            f"model: expected layers of rnnkernels inside, found none in {type(model).__name__}; "
            "rnnkernels.convert(model) puts them in place of torch.nn's"
        )
    flow = GradientFlow()

    def record(call: Call, name: str | None) -> Result:
        if not running or not needs_gradient(call.tensors):
            return onward(call, name)
        if call.flow is None:  # else another block around this one has brought it
            if call.heads > 1:
                raise NotImplementedError(
                    f"heads: gradient_flow records one norm of each h_t, and a layer of "
                    f"{call.heads} heads has one for each head. Run it outside of the block"
                )
            shape = (call.layers, *call.x.shape[:-1], call.directions)
            call = call._replace(flow=call.x.new_zeros(shape, dtype=norms_dtype(call.x.dtype)))
        result = onward(call, name)
        assert call.flow is not None
        flow._watch(running[-1], call, call.flow, result)
        return result

    outside: _backends.Run = torch.compiler.disable(  # type: ignore[no-untyped-call]
        record,
        reason="gradient_flow records layers outside of graphs: inside its block, run the model "
        "itself, or compile it without fullgraph=True",
    )

    def observer(call: Call, name: str | None) -> Result:
        return outside(call, name)  # a disabled function itself is nothing that guards look at

    with watch.running(model, _refuse_pairs) as running, _backends.observe(observer) as onward:
        yield flow


def _refuse_pairs(module: nn.Module, kwargs: dict[str, Any]) -> None:
    truncate = kwargs.get("truncate", ...)
    if truncate is ...:
        truncate = getattr(module, "truncate", None)  # a cell has none
    if isinstance(truncate, (tuple, list)) and torch.is_grad_enabled():
        raise NotImplementedError(
            f"truncate: the overlapping windows of {truncate!r} keep several gradients of one h_t "
            "apart, and gradient_flow records one; use truncate=k"
        )


def _over_batch(norms: Tensor) -> Tensor:
    """The norm over all rows: [T, B, D] to [T, D], in float64, of numbers of any magnitude."""
    norms = norms.detach().cpu().double()
    largest = norms.amax(1) if norms.size(1) else norms.sum(1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return (norms / scale[:, None]).square().sum(1).sqrt() * scale
