"""A page: sections of text, figures, tables, charts and images, as one HTML file that loads nothing else.

A page follows the reader's light or dark scheme, fits a phone, prints, and shows its figures, tables and images without
JavaScript; a chart is drawn by a script of the page from numbers in the page, and shows its values to a mouse, a finger
and the arrow keys.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
DIGITS = 6  # significant, of the numbers in a chart
Scale = Literal["linear", "log", "time"]  # time: in seconds since 1970


@dataclass(frozen=True)
class Figure:
    """A headline number, such as ``Figure("test", "1.873 ± 0.012", "bits/dim", "359 examples")``."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a chart. NaN leaves a gap.

    Attributes:
        low, high: ends of the error bars or of the band, as long as ``y``.
        labels: a text for each point, which the chart shows beside its value.
        colour: its number among the colours, 0 to 7; None: its place in the chart.
        dashed: whether a line is.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    labels: Sequence[str] | None = None
    colour: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Picture:
    """An image (H, W), (H, W, 3) or (3, H, W), uint8, an array or a tensor.

    Attributes:
        alt: what it shows, for those who do not see it.
        caption: below it.
        width: on the page, in pixels, or less where the page is narrower; None: a whole multiple of its own, up to
            640. Enlarged pixels stay sharp.
    """

    pixels: Any
    alt: str
    caption: str = ""
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._rows().shape[:2]

    @property
    def shown_width(self) -> int:
        own = self.shape[1]
        return self.width or own * max(1, 640 // own)

    @property
    def uri(self) -> str:
        """The image as a data URI of a PNG."""
        from PIL import Image

        file = BytesIO()
        Image.fromarray(self._rows()).save(file, format="png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def _rows(self) -> np.ndarray:
        pixels = np.asarray(self.pixels, dtype=np.uint8)
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
            pixels = np.moveaxis(pixels, 0, 2)
        return np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


@dataclass
class Block:
    """A piece of a section: its kind, which the template has a macro for, and what that needs."""

    kind: str
    content: dict


@dataclass
class Section:
    """A part of a page under a heading. Its methods add one block each, in the order in which they are called."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text=text)

    def note(self, text: str) -> None:
        """A small paragraph: what was left out, and why."""
        self._add("note", text=text)

    def figures(self, figures: Sequence[Figure]) -> None:
        """Headline numbers side by side."""
        self._add("figures", figures=figures)

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence], caption: str = "", best: Mapping | None = None
    ) -> None:
        """A table. Columns of numbers, or of texts that begin like one, are aligned to the right.

        Args:
            best: cells to emphasize, as ``{(row, column): why}``; the reason is shown as their title.
        """
        cells = [[("" if cell is None else str(cell)) for cell in row] for row in rows]
        columns = [[cell for cell in column if cell not in ("", "–")] for column in zip(*cells)]
        numeric = [i > 0 and len(column) > 0 and all(map(_is_number, column)) for i, column in enumerate(columns)]
        self._add("table", head=head, rows=cells, numeric=numeric, caption=caption, best=dict(best or {}))

    def code(self, text: str, caption: str = "") -> None:
        """Text as a terminal shows it, such as a command."""
        self._add("code", text=text, caption=caption)

    def fold(self, title: str, text: str) -> None:
        """Long text as a terminal shows it, which a click unfolds."""
        self._add("fold", title=title, text=text)

    def pictures(self, pictures: Sequence[Picture], caption: str = "") -> None:
        """Images side by side, each with its caption, and one caption for all."""
        self._add("pictures", pictures=pictures, caption=caption)

    def lines(
        self,
        title: str,
        series: Sequence[Series],
        *,
        x: str,
        y: str,
        x_scale: Scale = "linear",
        y_scale: Scale = "linear",
        note: str = "",
    ) -> None:
        """Curves. ``x`` and ``y`` are the labels of the axes, with their units; ``low`` and ``high`` become a band."""
        self._chart("lines", title, note, series=_plain(series), x=_axis(x, x_scale), y=_axis(y, y_scale))

    def scatter(
        self,
        title: str,
        series: Sequence[Series],
        *,
        x: str,
        y: str,
        x_scale: Scale = "linear",
        y_scale: Scale = "linear",
        note: str = "",
    ) -> None:
        """Points, with error bars where they have ``low`` and ``high``."""
        self._chart("scatter", title, note, series=_plain(series), x=_axis(x, x_scale), y=_axis(y, y_scale))

    def histogram(
        self,
        title: str,
        edges: Sequence[float],
        counts: Mapping[str, Sequence[float]],
        *,
        x: str,
        y: str = "share of examples",
        x_scale: Scale = "linear",
        marks: Mapping[str, float] | None = None,
        note: str = "",
    ) -> None:
        """Histograms over the same bins. ``counts`` maps each name to its heights, one fewer than ``edges``; ``marks``
        maps some of these names to a place, such as the mean, where a line stands."""
        series = [{"name": name, "y": _numbers(heights)} for name, heights in counts.items()]
        for one in series:
            if marks and one["name"] in marks:
                one["mark"] = _number(marks[one["name"]])
        self._chart("histogram", title, note, edges=_numbers(edges), series=series, x=_axis(x, x_scale), y=_axis(y))

    def bars(
        self,
        title: str,
        names: Sequence[str],
        values: Mapping[str, Sequence[float]],
        *,
        x: str,
        errors: Mapping[str, Sequence[float]] | None = None,
        from_zero: bool = True,
        note: str = "",
    ) -> None:
        """A horizontal bar for each of ``names`` and each name in ``values``; with ``errors``, its error bar.

        Args:
            x: the label of the values' axis.
            from_zero: False: dots instead of bars, on an axis that need not contain 0.
        """
        series = [{"name": name, "y": _numbers(row)} for name, row in values.items()]
        for one in series:
            if errors and one["name"] in errors:
                one["error"] = _numbers(errors[one["name"]])
        kind = "bars" if from_zero else "dots"
        self._chart(kind, title, note, names=[str(name) for name in names], series=series, x=_axis(x), y=_axis(""))

    def pairs(self, title: str, columns: Sequence[dict], tables: Mapping[str, np.ndarray], note: str = "") -> None:
        """All pairs of columns: points of the first table below the diagonal, of the second above it, histograms on it.

        Args:
            columns: of each, its ``name``, the ``low`` and ``high`` end of its axis, ``bins``, and ``words`` where its
                values are the numbers of words.
            tables: one or two, (n, D) each, by their names.
        """
        content = [{"name": name, "rows": [_numbers(row) for row in rows]} for name, rows in tables.items()]
        self._chart("pairs", title, note, columns=list(columns), tables=content)

    def _chart(self, kind: str, title: str, note: str, **content) -> None:
        self._add("chart", title=title, note=note, data={"kind": kind, "title": title, **content})

    def _add(self, kind: str, **content) -> None:
        self.blocks.append(Block(kind, content))


@dataclass
class Page:
    """A page under construction.

    >>> page = Page("Two runs", "What a longer run gains.")
    >>> section = page.section("Figures")
    >>> section.figures([Figure("test", "1.87 ± 0.01", "bits/dim")])
    >>> section.table(["run", "bits/dim"], [["a", "1.87 ± 0.01"], ["b", "1.91 ± 0.01"]])
    >>> curve = Series("validation", [0, 100, 200], [2.5, 2.0, 1.9], low=[2.4, 1.9, 1.8], high=[2.6, 2.1, 2.0])
    >>> section.lines("Validation", [curve], x="step", y="bits/dim")
    >>> html = page.html()
    >>> html.count("<h2"), "https://" in html
    (1, False)
    """

    title: str
    subtitle: str = ""
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """A new section at the end of the page."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def html(self) -> str:
        """The whole page; sections without a block are left out."""
        sections = [section for section in self.sections if section.blocks]
        parts = {name: Markup((HERE / name).read_text()) for name in ("style.css", "charts.js")}
        return _template().render(page=self, sections=sections, style=parts["style.css"], script=parts["charts.js"])


def _plain(series: Sequence[Series]) -> list[dict]:
    found = []
    for one in series:
        plain: dict = {"name": one.name, "x": _numbers(one.x), "y": _numbers(one.y)}
        plain |= {key: _numbers(getattr(one, key)) for key in ("low", "high") if getattr(one, key) is not None}
        plain |= {key: getattr(one, key) for key in ("labels", "colour") if getattr(one, key) is not None}
        found.append(plain | ({"dashed": True} if one.dashed else {}))
    return found


def _axis(label: str, scale: Scale = "linear") -> dict:
    return {"label": label, "scale": scale}


def _numbers(values) -> list[float | None]:
    return [_number(value) for value in np.asarray(values, dtype=np.float64).tolist()]


def _number(value: float) -> float | int | None:
    """A number as JSON has it: None for one that is not finite."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS if abs(value) < 10**DIGITS else 12}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def _json(value) -> Markup:
    """JSON that may stand in a <script>."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _is_number(text: str) -> bool:
    return re.match(r"[−+-]?[\d.]", text) is not None and not re.match(r"\d{4}-\d\d", text)


def _runs(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Blocks in runs of charts and of others: charts that follow each other stand side by side."""
    found: list[tuple[str, list[Block]]] = []
    for block in blocks:
        kind = "charts" if block.kind == "chart" and block.content["data"]["kind"] != "pairs" else "blocks"
        if not found or found[-1][0] != kind:
            found.append((kind, []))
        found[-1][1].append(block)
    return found


@cache
def _template():
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"json": _json, "runs": _runs}
    return environment.from_string((HERE / "page.html").read_text())
