"""A comparison as a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowtrain.report.compare_text import COLUMNS, HEAD, figure_cells, number_of
from flowtrain.report.comparison import ComparedRun, Comparison, Group, Row
from flowtrain.report.page import Figure, Page, Picture, Section, Series

LINES, BINS, KEYS = 8, 40, 12  # runs in a chart of curves or histograms; bins; swept keys with a chart


def compare_page(found: Comparison, split: str) -> str:
    """The HTML of a comparison."""
    rows = found.rows
    page = Page(f"{len(rows)} runs compared", f"{split} split; the best first, each with its number")
    _figures(page.section("Figures"), found, split)
    _differences(page.section("Differences"), found)
    _keys(page.section("Configuration"), found)
    _swept(page.section("Settings"), found)
    _curves(page.section("Curves"), found)
    _samples(page.section("Samples"), found)
    _missing(page.section("Missing"), found)
    return page.html()


def _name(found: Comparison, row: Row) -> str:
    return f"{number_of(found, row)}. {row.run.name}"


def _figures(section: Section, found: Comparison, split: str) -> None:
    for group in found.groups:
        best = group.rows[0]
        cells = figure_cells(best)
        headline = [Figure(f"best: {best.run.name}", cells[0], group.unit, f"{group.examples:,} examples of {split}")]
        if len(group.rows) > 1:
            second = group.rows[1]
            reading = (second if second.difference else best).difference.words
            headline.append(Figure(f"the next: {second.run.name}", figure_cells(second)[0], group.unit, reading))
        section.figures(headline)
        head = ["run", f"{split}, {group.unit}", *HEAD]
        cells = [[_name(found, row), *figure_cells(row)] for row in group.rows]
        section.table(head, cells, caption=group.description, best={(0, 1): "the best figure"})
        if len(group.rows) > 1:
            names = [_name(found, row) for row in group.rows]
            section.bars(
                f"{split}, {group.unit}",
                names,
                {split: [row.figure for row in group.rows]},
                errors={split: [row.stderr or 0.0 for row in group.rows]},
                x=group.unit,
                from_zero=False,
                note=f"± one standard error over {group.examples:,} examples. Bars that overlap say little: examples "
                "that are hard for one run are hard for all, which paired differences take out.",
            )
    if found.others:
        cells = [[_name(found, row), *figure_cells(row)[2:], row.run.state] for row in found.others]
        section.table(["run", *HEAD[1:], "state"], cells, caption=f"without a figure on {split}")
    for note in found.notes:
        section.note(note)


def _keys(section: Section, found: Comparison) -> None:
    if not found.keys:
        section.text("The configurations do not differ.")
        return
    if len(found.rows) <= COLUMNS:
        cells = [[key, *(row.run.keys.get(key, "–") for row in found.rows)] for key in found.keys]
        section.table(["key", *(_name(found, row) for row in found.rows)], cells)
    else:
        cells = [[_name(found, row), *(row.run.keys.get(key, "–") for key in found.keys)] for row in found.rows]
        section.table(["run", *found.keys], cells)


def _differences(section: Section, found: Comparison) -> None:
    for group in found.groups:
        compared = [row for row in group.rows if row.difference]
        if not compared:
            continue
        lower = compared[0].difference.lower_is_better
        reference = compared[0].reference
        section.bars(
            f"Difference from {reference}",
            [_name(found, row) for row in compared],
            {"difference": [row.difference.mean for row in compared]},
            errors={"difference": [row.difference.stderr or 0.0 for row in compared]},
            x=f"{group.unit}, {'below' if lower else 'above'} 0 is better",
            from_zero=False,
            note=f"Mean difference on the same {group.examples:,} examples, ± one standard error. Within two of them "
            "of 0, there is no difference beyond noise.",
        )
        _difference_histogram(section, found, group, compared[:LINES])
        if len(compared) > LINES:
            section.note(f"The histogram shows the first {LINES} of {len(compared)} runs.")


def _difference_histogram(section: Section, found: Comparison, group: Group, rows: Sequence[Row]) -> None:
    values = np.concatenate([row.difference.each for row in rows])
    low, high = np.quantile(values, [0.002, 0.998])
    if not high > low:
        return
    edges = np.linspace(low, high, BINS + 1)
    counts = {_name(found, row): np.histogram(row.difference.each, edges)[0] / len(row.difference.each) for row in rows}
    section.histogram(
        f"Difference of each example from {rows[0].reference}",
        edges,
        counts,
        x=group.unit,
        marks={_name(found, row): row.difference.mean for row in rows},
        note="The lines are the means; the most extreme 0.4 % of the examples are left out.",
    )


def _swept(section: Section, found: Comparison) -> None:
    """The figure against each key that the command lines set differently."""
    for group in found.groups:
        words = [row.run.overrides for row in group.rows]
        keys = [
            key
            for key in dict.fromkeys(key for one in words for key in one)
            if len({one.get(key) for one in words}) > 1
        ]
        if len(group.rows) < 3:
            continue
        for key in keys[:KEYS]:
            rows = [row for row in group.rows if key in row.run.overrides]
            values = [row.run.overrides[key] for row in rows]
            numbers = [_number(value) for value in values]
            if len(rows) < 2 or len(set(values)) < 2:
                continue
            labels = [_name(found, row) for row in rows]
            if None not in numbers:
                positive = [number for number in numbers if number > 0]
                log = len(positive) == len(numbers) and max(numbers) > 20 * min(numbers)
                series = _series("figure", numbers, rows, labels)
                scale = "log" if log else "linear"
                section.scatter(f"{group.unit} by {key}", [series], x=key, y=group.unit, x_scale=scale)
            else:
                order = sorted(range(len(rows)), key=lambda i: values[i])
                section.bars(
                    f"{group.unit} by {key}",
                    [f"{values[i]}: {number_of(found, rows[i])}" for i in order],
                    {group.unit: [rows[i].figure for i in order]},
                    errors={group.unit: [rows[i].stderr or 0.0 for i in order]},
                    x=group.unit,
                    from_zero=False,
                )
        if len(keys) > KEYS:
            section.note(f"{len(keys) - KEYS} more keys differ: compare.csv.")


def _series(name: str, x: Sequence[float], rows: Sequence[Row], labels: Sequence[str]) -> Series:
    y, errors = [row.figure for row in rows], [row.stderr or 0.0 for row in rows]
    low, high = ([value + sign * error for value, error in zip(y, errors)] for sign in (-1, 1))
    return Series(name, x, y, low=low, high=high, labels=labels)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _curves(section: Section, found: Comparison) -> None:
    """Validation and training curves of the first runs of each unit, over steps and over time."""
    rows = [row for row in found.rows if row.run.curves]
    for name, title in (
        ("val/bits_per_dim", "Validation, bits/dim"),
        ("val/log_likelihood", "Validation, nats"),
        ("train/bits_per_dim", "Training, bits/dim"),
        ("train/log_likelihood", "Training, nats"),
    ):
        have = [row for row in rows if name in row.run.curves and not _in_bits(row.run, name)]
        series = [
            Series(_name(found, row), row.run.curves[name].steps, row.run.curves[name].values) for row in have[:LINES]
        ]
        if series and any(len(one.x) > 1 for one in series):
            section.lines(title, series, x="step", y=title.rpartition(", ")[2])
            if len(have) > LINES:
                section.note(f"{title}: the first {LINES} of {len(have)} runs.")


def _in_bits(run: ComparedRun, name: str) -> bool:
    """Whether a curve in nats repeats one in bits/dim."""
    return name.endswith("log_likelihood") and f"{name.partition('/')[0]}/bits_per_dim" in run.curves


def _samples(section: Section, found: Comparison) -> None:
    rows = [row for row in found.rows if row.run.picture is not None]
    pictures = [
        Picture(row.run.picture, f"samples of {row.run.name}", _name(found, row), min(320, row.run.picture.shape[1]))
        for row in rows
    ]
    if pictures:
        section.pictures(pictures)
    if rows and len(found.rows) > len(rows):
        section.note(f"Samples of {len(rows)} of {len(found.rows)} runs.")


def _missing(section: Section, found: Comparison) -> None:
    rows = [[_name(found, row), line] for row in found.rows for line in row.run.missing]
    if rows:
        section.table(["run", "what is missing"], rows)
