"""A comparison as a terminal shows it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from flowtrain.report.comparison import Comparison, Row, significant_digits

COLUMNS, LONGEST = 8, 44  # most runs beside each other; letters of a value


def terminal_text(found: Comparison, split: str, width: int = 120) -> str:
    """The keys that differ, a table of figures for each group, and what else a reader should know."""
    parts = [_keys(found, width)] if found.keys else ["the configurations do not differ"]
    for group in found.groups:
        title = f"{split}, {group.unit}, {group.examples:,} examples: {group.description}"
        parts.append("\n".join([textwrap.shorten(title, width, placeholder=" …"), *_figures(found, group.rows, width)]))
    if found.others:
        title = f"without a figure on {split}:"
        parts.append("\n".join([title, *_figures(found, found.others, width)]))
    lines = [*found.notes, *(f"{row.run.name}: {line}" for row in found.rows for line in row.run.missing)]
    if lines:
        parts.append("\n".join(line for text in lines for line in textwrap.wrap(text, width, subsequent_indent="  ")))
    text = "\n\n".join(parts)
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def number_of(found: Comparison, row: Row) -> str:
    """The number that stands for a run in all tables."""
    return str(next(number for number, one in enumerate(found.rows, 1) if one is row))


def figure_cells(row: Row) -> list[str]:
    """The figure, the reading of the difference, validation, parameters, steps and seconds, as texts."""
    summary = row.run.summary
    name = "bits_per_dim" if "bits_per_dim" in summary else "log_likelihood"
    validation = plus_minus(summary.get(name), summary.get(f"{name}_stderr"))
    count = [f"{summary[key]:,}" if isinstance(summary.get(key), int) else "" for key in ("parameters", "steps")]
    seconds = f"{summary['seconds']:,.0f}" if isinstance(summary.get("seconds"), int | float) else ""
    if row.difference:
        reading = row.difference.words.removesuffix(f" {row.difference.unit}")
    elif row.is_reference:
        reading = "the reference"
    else:
        reading = ""
    return [plus_minus(row.figure, row.stderr), reading, validation, *count, seconds]


HEAD = ["on the same examples", "validation", "parameters", "steps", "seconds"]


def plus_minus(value: float | None, error: float | None) -> str:
    """A figure with two digits of its error.

    >>> plus_minus(2.16434, 0.0166), plus_minus(None, None)
    ('2.164 ± 0.017', '')
    """
    if not isinstance(value, int | float):
        return ""
    if not isinstance(error, int | float):
        return f"{value:.4f}"
    digits = significant_digits(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _figures(found: Comparison, rows: Sequence[Row], width: int) -> list[str]:
    cells = [["", "run", "figure", *HEAD]]
    cells += [[number_of(found, row), row.run.name, *figure_cells(row)] for row in rows]
    return _table(cells, width, right=(0, 5, 6, 7))


def _keys(found: Comparison, width: int) -> str:
    """Keys below each other with a column for each run, or for many runs the other way round."""
    runs = found.rows
    if len(runs) <= COLUMNS:
        cells = [["", *(number_of(found, row) for row in runs)]]
        cells += [[key, *(row.run.keys.get(key, "–") for row in runs)] for key in found.keys]
        return "\n".join(_table(cells, width))
    keys = found.keys[:COLUMNS]
    cells = [["", *keys]] + [[number_of(found, row), *(row.run.keys.get(key, "–") for key in keys)] for row in runs]
    more = [f"and {len(found.keys) - COLUMNS} more keys: compare.csv"] if len(found.keys) > COLUMNS else []
    return "\n".join([*_table(cells, width, right=(0,)), *more])


def _table(cells: list[list[str]], width: int, right: Sequence[int] = ()) -> list[str]:
    """Columns without those that are empty; what is wider than the terminal is cut."""
    cut = [[text if len(text) <= LONGEST else text[: LONGEST - 1] + "…" for text in row] for row in cells]
    kept = [i for i in range(len(cells[0])) if i == 0 or any(row[i] for row in cells[1:])]
    widths = {i: max(len(row[i]) for row in cut) for i in kept}
    lines = []
    for row in cut:
        texts = [row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in kept]
        lines.append("  ".join(texts).rstrip())
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
