"""Rows: each column's marginal, pairs of columns, samples for single contexts, curves, the density."""

from __future__ import annotations

import numpy as np

from flowtrain.report.grids import share
from flowtrain.report.material import ColumnValues, Curves, Material, Rows
from flowtrain.report.page import Page, Picture, Scale, Section, Series

BINS = 30
FEW = 24  # whole numbers in a range smaller than this get one bin each
WORDS = 16  # most categories with a bar; the rarest share the last
PAIRS, POINTS = 8, 400  # columns, and rows of each kind in the pair plot
CURVES = 8  # of each kind, drawn one over another
NAMES = {"train": "training", "val": "validation", "test": "test"}


def add(page: Page, material: Material) -> None:
    if material.density is not None:
        section = page.section("Density")
        data = "points of the target" if material.has_target else "the training data"
        which = f"a histogram of {data} on the left, the density of the model on the right"
        if material.dimensions == 1:
            which = f"a histogram of {data} as bars, the density of the model as a curve"
        section.pictures(
            [Picture(material.density, f"{material.name}: {which}", width=806)], f"{which[0].upper()}{which[1:]}."
        )
    for note in material.notes.get("density", ()):
        page.section("Density").note(note)
    section = page.section("Columns" if material.rows else "Samples")
    if material.rows:
        _columns(section, material.rows, material.has_target)
        _pairs(page.section("Pairs of columns"), material.rows)
        _answers(page.section("Samples for single contexts"), material.rows)
    if material.curves:
        _curves(section, material.curves)
    for part in ("samples", "contexts"):
        for note in material.notes.get(part, ()):
            section.note(note)


def _columns(section: Section, rows: Rows, has_target: bool) -> None:
    count, drawn = len(rows.columns[0].real), len(rows.columns[0].samples)
    given = f" Each sample has the {', '.join(rows.context)} of a real row." if rows.context else ""
    of_split = f"{count:,} rows of the {NAMES[rows.split]} split beside {drawn:,} samples, in the file's units.{given}"
    section.text(f"{count:,} points of the target beside {drawn:,} samples." if has_target else of_split)
    for column in rows.columns:
        (_bars if column.words else _histogram)(section, column)
    if rows.left_out:
        section.note(f"The first {len(rows.columns)} columns; {rows.left_out} more are left out.")
    if rows.constants:
        section.note(f"Not modelled, since all rows hold the same value: {', '.join(rows.constants)}.")


def _bars(section: Section, column: ColumnValues) -> None:
    """The share of each category, and of missing values."""
    shares = {}
    for name, values in (("real", column.real), ("samples", column.samples)):
        known = values[np.isfinite(values)].astype(int)
        counts = np.bincount(known, minlength=len(column.words))[: len(column.words)]
        shares[name] = np.append(counts, len(values) - len(known)) / len(values)
    order = np.argsort(-shares["real"][:-1], kind="stable")
    names = [column.words[i] for i in order[:WORDS]]
    found = {name: [*one[order[:WORDS]]] for name, one in shares.items()}
    if len(order) > WORDS:
        names.append(f"({len(order) - WORDS} others)")
        for name, one in shares.items():
            found[name].append(one[order[WORDS:]].sum())
    if any(one[-1] for one in shares.values()):
        names.append("(missing)")
        for name, one in shares.items():
            found[name].append(one[-1])
    section.bars(column.name, names, found, x="share of rows")


def _histogram(section: Section, column: ColumnValues) -> None:
    real, samples = (values[np.isfinite(values)] for values in (column.real, column.samples))
    notes = []
    gaps = [share(1 - len(known) / len(every)) for known, every in ((real, column.real), (samples, column.samples))]
    if len(real) < len(column.real) or len(samples) < len(column.samples):
        notes.append(f"Missing: {gaps[0]} of the data, {gaps[1]} of the samples.")
    if not len(real) or not len(samples):
        section.note(f"{column.name}: no values. {' '.join(notes)}")
        return
    edges = _edges(column, real)
    beyond = ((samples < edges[0]) | (samples > edges[-1])).mean()
    if beyond > 0.005:
        notes.append(f"{share(beyond)} of the samples lie beyond the axis.")
    counts = {
        name: np.histogram(known, edges)[0] / len(known) for name, known in (("real", real), ("samples", samples))
    }
    scale: Scale = "time" if column.kind == "time" else "linear"
    x = "date" if column.kind == "time" else f"{column.name} (angle)" if column.kind == "angle" else column.name
    section.histogram(column.name, edges, counts, x=x, y="share of rows", x_scale=scale, note=" ".join(notes))


def _edges(column: ColumnValues, real: np.ndarray) -> np.ndarray:
    if column.kind == "angle" and column.low is not None and column.high is not None:
        return np.linspace(column.low, column.high, BINS + 1)
    if column.kind == "integer" and np.ptp(real) < FEW:
        return np.arange(real.min() - 0.5, real.max() + 1)
    low, high = np.quantile(real, [0.002, 0.998])
    margin = 0.06 * (high - low) or 0.5
    low = max(low - margin, real.min() - margin) if column.low is None else max(low - margin, column.low)
    high = min(high + margin, real.max() + margin) if column.high is None else min(high + margin, column.high)
    if column.kind == "integer":
        step = max(1, round((high - low) / BINS))
        return np.arange(np.floor(low) - 0.5, high + step, step)
    return np.linspace(low, high, BINS + 1)


def _pairs(section: Section, rows: Rows) -> None:
    columns = rows.columns[:PAIRS]
    if len(columns) < 2:
        return
    axes, tables = [], {"data": [], "samples": []}
    draw = np.random.default_rng(0)
    for column in columns:
        if column.words:
            axis = {"low": -0.5, "high": len(column.words) - 0.5, "words": [*column.words]}
        else:
            known = column.real[np.isfinite(column.real)]
            edges = _edges(column, known) if len(known) else np.array([0.0, 1.0])
            axis = {"low": float(edges[0]), "high": float(edges[-1]), "bins": min(len(edges) - 1, BINS)}
        axes.append({"name": column.name, "scale": "time" if column.kind == "time" else "linear", **axis})
        for name, values in (("data", column.real), ("samples", column.samples)):
            some = values[:: max(1, len(values) // POINTS)][:POINTS]
            discrete = bool(column.words) or column.kind == "integer" and axis["high"] - axis["low"] <= FEW
            tables[name].append(some + (draw.uniform(-0.3, 0.3, len(some)) if discrete else 0.0))
    section.pairs(
        "Data below the diagonal, samples above it",
        axes,
        {name: np.stack(values, 1) for name, values in tables.items()},
        "Histograms of both on the diagonal. Dots of whole numbers and categories are spread out a little."
        + (f" The first {PAIRS} of {len(rows.columns) + rows.left_out} columns." if len(rows.columns) > PAIRS else ""),
    )


def _answers(section: Section, rows: Rows) -> None:
    if not rows.answers:
        return
    table = []
    for answer in rows.answers:
        for i, column in enumerate(answer.columns):
            table.append([*(answer.context if i == 0 else [""] * len(answer.context)), *column])
    section.table(
        [*rows.context, "column", "real row", "samples"],
        table,
        "The contexts of some real rows, those rows, and 100 samples for each context: the median and the range of"
        " 90 %, or the most frequent value.",
    )


def _curves(section: Section, curves: Curves) -> None:
    place = np.arange(curves.real.shape[1])
    bands = []
    for name, values in (("real", curves.real), ("samples", curves.samples)):
        low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
        bands.append(Series(name, place, middle, low, high))
    section.lines("Median, and the range of 90 %", bands, x="place", y="value")
    for colour, (name, values) in enumerate((("data", curves.real), ("samples", curves.samples))):
        some = values[:CURVES]
        x = np.tile(np.append(place, np.nan), len(some))
        y = np.concatenate([np.append(one, np.nan) for one in some])
        one = Series(name, x, y, colour=colour)
        section.lines(f"{len(some)} of the {name}", [one], x="place", y="value")
