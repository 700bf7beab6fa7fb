"""Rows: a table's columns, real beside sampled; vectors of an array; the density over the plane."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands.collecting.source import Source, attempt, spread
from flowtrain.commands.previews import CELLS, CONTEXTS, POINTS, density_of
from flowtrain.data.tables.column import Column
from flowtrain.errors import FlowtrainError
from flowtrain.report.material import Answer, ColumnValues, Curves, Material, Rows

ROWS, FEW = 1000, 300  # real rows and samples; of fewer validation rows, training rows are shown
COLUMNS = 24  # most that are shown
ANSWERS, DRAWN = 4, 100  # contexts that samples are drawn for, and samples of each
OF_ANSWER = 6  # most columns of them that are shown
MOST_DENSITY = 0.25  # of the budget of time


def gather(material: Material, source: Source) -> None:
    """Fill in the rows, curves and density of vectors."""
    split = "val" if len(source.split("val")) >= FEW else "train"
    x, context = _real_rows(material, source, split, ROWS)
    if x is None:
        material.leave_out("samples", "The target has no exact samples to show beside the flow's.")
        return
    x, context = x.cpu(), None if context is None else context.cpu()
    with attempt(material, "samples"):
        samples = source.draw(len(x), source.share(0.3), 1.0, context)
        if len(samples) < len(x):
            material.leave_out("samples", f"Only {len(samples):,} samples were drawn, for lack of time.")
        if source.columns:
            material.rows = _rows(material, source, split, x, samples, context)
        else:
            material.curves = Curves(x.double().numpy(), samples.double().numpy())
    if source.flow.dimensions <= 2:
        with attempt(material, "density"):
            material.density = _density(material, source)


def _rows(material: Material, source: Source, split: str, x: Tensor, samples: Tensor, context: Tensor | None) -> Rows:
    columns, shown = source.columns, source.columns.modelled[:COLUMNS]
    found = []
    for i, column in enumerate(shown):
        real, drawn = ((rows[:, i].double() + column.offset).numpy() for rows in (x, samples))
        low, high = (None if end is None else end + column.offset for end in (column.low, column.high))
        found.append(ColumnValues(column.name, column.kind, real, drawn, tuple(column.categories), low, high))
    answers: list[Answer] = []
    if columns.context and context is not None:
        with attempt(material, "contexts"):
            answers = _answers(source, x, context)
    return Rows(
        split,
        found,
        len(columns.modelled) - len(shown),
        tuple(columns.context_names),
        answers,
        tuple(constant.name for constant in columns.constants),
    )


def _answers(source: Source, x: Tensor, context: Tensor) -> list[Answer]:
    """Samples for the contexts of some real rows."""
    columns = source.columns
    _, same = context.unique(dim=0, return_inverse=True)
    first = torch.tensor([int((same == one).nonzero()[0]) for one in spread(int(same.max()) + 1, ANSWERS)])
    places = first.sort().values
    given = context[places].repeat_interleave(DRAWN, 0)
    samples = source.draw(len(given), source.share(0.15), 1.0, given)
    if len(samples) < len(given):
        raise FlowtrainError("samples for single contexts take too long for this report's time")
    texts = decode_context(columns.context, context[places])
    real, drawn = columns.decode(x[places]), columns.decode(samples)
    found = []
    for i, text in enumerate(texts):
        part = slice(i * DRAWN, (i + 1) * DRAWN)
        each = [
            (name, show(real[name][i]), _spread(samples[part, j].numpy(), drawn[name][part], column.categories))
            for j, (name, column) in enumerate(zip(columns.names, columns.modelled))
        ]
        found.append(Answer(text, each[:OF_ANSWER]))
    return found


def show(value, digits: int = 5) -> str:
    """A value of a table as a text: numbers with some digits.

    >>> show(12345.678), show(0.000012345), show(3), show(None), show("red")
    ('12346', '1.2345e-05', '3', '–', 'red')
    """
    if value is None or value != value:
        return "–"
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.0f}" if 10 ** (digits - 1) <= abs(value) < 1e9 else f"{value:.{digits}g}"


def _spread(encoded: np.ndarray, decoded: np.ndarray, categories: tuple[str, ...]) -> str:
    """The most frequent of texts; of numbers and times the median and the 5 % and 95 % quantiles."""
    order = np.argsort(encoded)[: np.isfinite(encoded).sum()]
    if not len(order):
        return "–"
    if categories:
        kinds, counts = np.unique(decoded[order].astype(str), return_counts=True)
        return f"{kinds[counts.argmax()]} ({100 * counts.max() / len(encoded):.0f} %)"
    low, middle, high = (show(decoded[order[int(part * (len(order) - 1))]], 4) for part in (0.05, 0.5, 0.95))
    return f"{middle} ({low} to {high})"


def decode_context(columns: tuple[Column, ...], context: Tensor) -> list[list[str]]:
    """The rows of an encoded context (n, C) as texts, one for each context column."""
    out: list[list[str]] = [[] for _ in context]
    at = 0
    for column in columns:
        width = len(column.categories) or (2 if column.kind == "angle" else 1)
        part, at = context[:, at : at + width].double(), at + width
        gaps = torch.zeros(len(context))
        if column.missing:
            gaps, at = context[:, at], at + 1
        for row, values, gap in zip(out, part.tolist(), gaps.tolist()):
            row.append("–" if gap else _context_text(column, values))
    return out


def _context_text(column: Column, values: list[float]) -> str:
    if column.categories:
        return column.categories[int(np.argmax(values))]
    if column.kind == "angle":
        turn = column.high - column.low
        return f"{(math.atan2(values[1], values[0]) * turn / (2 * math.pi) - column.low) % turn + column.low:.4g}"
    number = values[0] * column.std + column.mean + column.offset
    if column.kind == "time":
        from flowtrain.data.tables import times

        return str(times.to_texts(np.array([round(number)], dtype=np.float64), column.written)[0])
    return f"{number:.5g}"


def _real_rows(material: Material, source: Source, split: str, most: int):
    """Rows of a split, evenly spaced, with their contexts; of a target, what it can show."""
    rows = source.split(split)
    return rows.shown(most) if material.has_target else rows.take(spread(len(rows), most))


def _density(material: Material, source: Source) -> np.ndarray:
    """The data beside the model's density, (H, W, 3) uint8."""
    points, context = _real_rows(material, source, "train", POINTS)
    if points.isnan().any():
        raise FlowtrainError("the density of rows with missing values has no picture")
    some, few = points[:FEW], None if context is None else context[:FEW]
    seconds, began = source.share(MOST_DENSITY), time.monotonic()
    if len(some) * source.example_seconds < max(seconds, 0.1):
        with torch.no_grad():
            source.flow(some, few)
        each = (time.monotonic() - began) / len(some) * (1 if context is None else CONTEXTS)
        for cells in (CELLS, CELLS // 2, CELLS // 4):
            if cells ** min(2, source.flow.dimensions) * each <= max(seconds, 0.1):
                return density_of(source.flow, points, context, cells).movedim(0, 2).numpy()
    raise FlowtrainError("the density on a grid takes too long for this report's time")
