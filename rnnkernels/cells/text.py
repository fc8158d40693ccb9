"""A cell's expressions as text: of torch operations, of C++, of Triton."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rnnkernels.cells.derivative import Derived, Maybe
from rnnkernels.cells.graph import CONSTANT, POWER, Node, below

#: Statements, and the texts of some groups of expressions.
Parts = tuple[list[str], list[list[str]]]

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_LONGEST = 60  # characters of an expression that is written where it is used


@dataclass(frozen=True)
class Language:
    """How operations are written. ``calls`` are those that are no call of a function of their own
    name; in them ``{0}`` and so on are the arguments, ``{like}`` is some value of the cell."""

    assign: str  # a temporary
    constant: str
    calls: Mapping[str, str]

    def write(self, node: Node, args: Sequence[str], like: str) -> str:
        if node.op in _INFIX:
            return f"({args[0]} {_INFIX[node.op]} {args[1]})"
        if node.op == "neg":
            return f"(-{args[0]})"
        places = {"like": like, "exponent": repr(node.value)}
        if node.op in self.calls:
            return self.calls[node.op].format(*args, **places)
        return f"{node.op}({', '.join(args)})"


TORCH = Language(
    "{name} = {value}",
    "{value}",
    {
        "softplus": "torch.nn.functional.softplus({0})",
        "less": "torch.where({0} < {1}, {2}, {3})",
        "at_most": "torch.where({0} <= {1}, {2}, {3})",
        "equal": "torch.where({0} == {1}, {2}, {3})",
        POWER: "{0} ** {exponent}",
        **{
            name: f"torch.{name}({{0}})"
            for name in ("sigmoid", "tanh", "exp", "log", "sqrt", "relu", "abs")
        },
        **{name: f"torch.{name}({{0}}, {{1}})" for name in ("minimum", "maximum")},
    },
)
CPP = Language(
    "const V {name} = {value};",
    "V({value})",
    {
        "less": "where_less({0}, {1}, {2}, {3})",
        "at_most": "where_at_most({0}, {1}, {2}, {3})",
        "equal": "where_equal({0}, {1}, {2}, {3})",
        "relu": "where_at_most_zero({0}, V(0), {0})",
        POWER: "power({0}, {exponent})",
    },
)
TRITON = Language(
    "{name} = {value}",
    "{value}",
    {
        "less": "tl.where({0} < {1}, {2}, {3})",
        "at_most": "tl.where({0} <= {1}, {2}, {3})",
        "equal": "tl.where({0} == {1}, {2}, {3})",
        "relu": "tl.where({0} < 0, 0.0, {0})",
        POWER: "tl.exp({exponent} * tl.log({0}))",
        **{name: f"tl.{name}({{0}})" for name in ("exp", "log", "sqrt", "abs")},
        **{
            name: f"tl.{name}({{0}}, {{1}}, propagate_nan=tl.PropagateNan.ALL)"
            for name in ("minimum", "maximum")
        },
    },
)


class _Writer:
    """Statements that compute expressions: one for each that is used twice or is long."""

    def __init__(
        self, language: Language, known: Mapping[int, Node], like: str, roots: Iterable[Node]
    ) -> None:
        self._language, self._known, self._like = language, known, like
        self.lines: list[str] = []
        self._text: dict[int, str] = {}
        nodes = below(roots, lambda n: n.index in known)
        uses = [a.index for n in nodes if n.index not in known for a in n.args]
        uses += [n.index for n in roots]
        for node in nodes:
            self._text[node.index] = self._of(node, uses.count(node.index))

    def _of(self, node: Node, uses: int) -> str:
        node = self._known.get(node.index, node)
        if not node.args:
            if node.op == CONSTANT:
                return self._language.constant.format(value=_number(node.value))
            return f"{node.op}[{int(node.value)}]"
        args = [self._text[a.index] for a in node.args]
        if self._language is TORCH:
            args = self._as_tensors(node, args)
        text = self._language.write(node, args, self._like)
        twice = node.op == "relu" and self._language is not TORCH  # whose argument stands twice
        if uses < 2 and len(text) <= _LONGEST and not twice:
            return text
        name = f"v{len(self.lines)}"
        value = text[1:-1] if _enclosed(text) else text
        self.lines.append(self._language.assign.format(name=name, value=value))
        return name

    def _as_tensors(self, node: Node, args: list[str]) -> list[str]:
        """torch takes numbers for tensors in most places; not in all."""
        asked: Sequence[int] = ()
        if node.op in ("minimum", "maximum"):
            asked = (0, 1)
        elif len(node.args) == 4:  # a choice of two numbers has no dtype; one of them brings it
            asked = (2,) if node.args[2].is_constant and node.args[3].is_constant else ()
        return [
            f"{self._like}.new_full((), {text})" if i in asked and arg.is_constant else text
            for i, (arg, text) in enumerate(zip(node.args, args, strict=True))
        ]

    def __getitem__(self, node: Node) -> str:
        text = self._text[node.index]
        return text[1:-1] if _enclosed(text) else text


def _enclosed(text: str) -> bool:
    """Whether the first bracket of a text is closed by the last."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text.startswith("(") and i == len(text) - 1
    return False


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**31 else repr(value)


def _parts(
    language: Language,
    known: Mapping[int, Node],
    like: str,
    zero: str,
    outputs: Sequence[Sequence[Maybe]],
) -> Parts:
    """Statements, and the text of each output; ``zero`` is that of one that is None."""
    roots = [node for group in outputs for node in group if node is not None]
    writer = _Writer(language, known, like, roots)

    def text(node: Maybe) -> str:
        if node is None:
            return zero
        found = writer[node]
        return f"{like}.new_full((), {found}).expand_as({like})" if (
            node.is_constant and language is TORCH) else found  # fmt: skip

    return writer.lines, [[text(node) for node in group] for group in outputs]


def torch_text(of: Derived, title: str) -> str:
    """Three functions, as :class:`rnnkernels.cells.contract.Cell` has them."""
    forward = _parts(TORCH, {}, "gx[0]", "", (of.next, of.saved))
    zero = "torch.zeros_like(dnext[0])"
    backward = _parts(TORCH, of.known, "dnext[0]", zero, (of.dgx, of.dgh, of.dprev))
    tangents = _parts(TORCH, of.known, "dgx[0]", "torch.zeros_like(dgx[0])", (of.dsaved,))

    def function(signature: str, parts: Parts) -> str:
        lines, groups = parts
        found = [f"[{', '.join(group)}]" for group in groups]
        return "\n    ".join([f"def {signature}:", *lines, f"return {', '.join(found)}"])

    return "\n\n\n".join(
        (
            f'"""{title}"""',
            "import torch",
            function("forward(gx, gh, prev)", forward),
            function("backward(saved, prev, next, dnext)", backward),
            function("tangents(saved, prev, next, dgx, dgh, dprev)", tangents),
            "",
        )
    )


def triton_text(of: Derived, title: str) -> str:
    """A pair of functions as those of :mod:`rnnkernels._backends.triton.cells`."""
    zero = "tl.zeros_like(dnext[0])"
    forward = _parts(TRITON, {}, "gx[0]", "", (of.next, of.saved))
    backward = _parts(TRITON, of.known, "dnext[0]", zero, (of.dgx, of.dgh, of.dprev))

    def function(signature: str, parts: Parts) -> str:
        lines, groups = parts
        found = [f"({', '.join(g)}{',' * (len(g) == 1)})" for g in groups]
        head = f"@triton.jit\ndef {signature}:"
        return "\n    ".join([head, *lines, f"return {', '.join(found)}"])

    return "\n\n\n".join(
        (
            f'"""{title}"""',
            "import triton\nimport triton.language as tl",
            "from rnnkernels._backends.triton.cells import sigmoid, softplus, tanh",
            function("forward(gx, gh, prev)", forward),
            function("backward(saved, prev, next, dnext)", backward),
            "",
        )
    )


def cpp_text(
    of: Derived,
    name: str,
    gates: Sequence[str],
    params: Sequence[str],
    states: int,
    split: int,
    recurrent: bool,
    noise: int,
) -> str:
    """A file with a struct as those of ``csrc/common/cells.h``."""

    def function(name: str, reads: str, writes: str, parts: Parts) -> str:
        lines, groups = parts
        body = list(lines)
        for to, texts in zip(writes.split(), groups, strict=True):
            body += [f"{to}[{i}] = {text};" for i, text in enumerate(texts)]
        read = [a if any(f"{a}[" in line for line in body) else "" for a in reads.split()]
        wrote = [a if any(f"{a}[" in line for line in body) else "" for a in writes.split()]
        taken = [f"const V* {a}".rstrip() for a in read] + [f"V* {a}".rstrip() for a in wrote]
        head = f"  template <class V>\n  static RNN_HD void {name}({', '.join(taken)}) {{"
        return "\n    ".join([head, *body]) + "\n  }"

    sizes = f"G = {len(gates)}, S = {states}, K = {len(of.saved)}, A = {split}"
    own = ""
    if params:
        sizes += f", P = {len(params)}"
        own = f'\n  static constexpr const char* kParams = "{" ".join(params)}";'
    if not recurrent:
        own += "\n  static constexpr bool kRecurrent = false;"
    if noise:
        sizes += f", E = {noise}"
    forward = _parts(CPP, {}, "", "", (of.next, of.saved))
    backward = _parts(CPP, of.known, "", "V(0)", (of.dgx, of.dgh, of.dprev))
    return f"""\
// Written by rnnkernels.cell: {name}.
#pragma once

#include "common/cells.h"

namespace rnn {{

struct UserCell {{
  static constexpr const char* kName = "{name}";
  static constexpr const char* kGates = "{" ".join(gates)}";{own}
  static constexpr int {sizes};
  static constexpr bool kReadsH = {str(of.reads_h).lower()};

{function("forward", "gx gh prev", "next saved", forward)}

{function("backward", "saved prev next dnext", "dgx dgh dprev", backward)}
}};

}}  // namespace rnn
"""
