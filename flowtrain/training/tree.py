"""The model as a tree: what maps what to what, with how many parameters. Equal parts in a row are folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from flowtrain.bijections import Bijection
from flowtrain.flow import Flow

PERIOD = 8  # most parts of a pattern that is looked for in a row of parts
DEPTH = 2  # levels of a network that are shown


@dataclass(frozen=True)
class Node:
    """A part of a flow. Nodes that differ only in their names are equal in all that is printed."""

    name: str
    kind: str
    shape: str
    parameters: int
    parts: tuple[Node, ...] = ()

    @property
    def key(self) -> tuple:
        return self.kind, self.shape, self.parameters, tuple((part.name, part.key) for part in self.parts)


def model_tree(flow: Flow) -> list[str]:
    """Lines of the tree of ``flow``: name, kind, shape of an event before and after, parameters."""
    nodes = [_node(name, part, DEPTH) for name, part in flow.bijection.named_children()]
    if not nodes:
        nodes = [_node("bijection", flow.bijection, DEPTH)]
    if flow.embedding is not None:
        nodes.insert(0, _node("embedding", flow.embedding, DEPTH))
    nodes.append(_node("base", flow.base, DEPTH))
    rows = [("model", "", "shape", "parameters"), *_rows(nodes, 1)]
    rows.append(("in all", "", "", f"{sum(node.parameters for node in nodes):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {shape:{widths[2]}}  {count:>{widths[3]}}".rstrip()
        for name, kind, shape, count in rows
    ]


def _node(name: str, module: nn.Module, depth: int) -> Node:
    """The part ``module``: bijections at every depth, networks to ``depth`` levels where they have parameters."""
    kind, parts = type(module).__name__, []
    kind = kind.removeprefix("Parametrized")
    for child, part in module.named_children():
        inside = isinstance(part, Bijection)
        count = _parameters(part)
        if inside or count and depth and child != "parametrizations":
            parts.append(_node(child, part, depth if inside else depth - 1))
        elif not count and isinstance(module, Bijection):
            kind += f", {type(part).__name__}"
    return Node(name, kind, _shape(module), _parameters(module), tuple(parts))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(module: nn.Module) -> str:
    if not isinstance(module, Bijection):
        return ""
    before, after = ("×".join(map(str, shape)) for shape in (module.shape, module.out_shape))
    return before if before == after else f"{before} → {after}"


def _rows(nodes: list[Node] | tuple[Node, ...], depth: int) -> Iterator[tuple[str, str, str, str]]:
    """Rows of nodes side by side: one that comes several times is shown once, with the first and the last name."""
    for pattern, times, last in _folded(nodes):
        first = pattern[0]
        if times > 1 and len(pattern) == 1:
            total = f"{times} × {first.parameters:,}" if first.parameters else ""
            yield f"{'  ' * depth}{first.name} … {last}", f"{times} × {first.kind}", first.shape, total
            yield from _rows(first.parts, depth + 1)
        elif times > 1:
            total = f"{times} × {sum(node.parameters for node in pattern):,}"
            yield f"{'  ' * depth}{first.name} … {last}", f"{times} × these:", "", total
            yield from _rows(pattern, depth + 1)
        else:
            yield (
                f"{'  ' * depth}{first.name}",
                first.kind,
                first.shape,
                f"{first.parameters:,}" if first.parameters else "",
            )
            yield from _rows(first.parts, depth + 1)


def _folded(nodes) -> Iterator[tuple[list[Node], int, str]]:
    """Patterns of nodes in a row, how often each comes, and the last name: as many nodes as possible in each."""
    keys, i = [node.key for node in nodes], 0
    while i < len(nodes):
        best = 1, 1
        for period in range(1, min(PERIOD, (len(nodes) - i) // 2) + 1):
            times = 1
            while keys[i + times * period : i + (times + 1) * period] == keys[i : i + period]:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = period, times
        period, times = best
        end = i + period * times
        yield list(nodes[i : i + period]), times, nodes[end - 1].name
        i = end
