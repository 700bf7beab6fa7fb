"""What a report shows of a flow and its data, as plain arrays: gathered where the flow is, rendered without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class SplitLikelihoods:
    """The log-likelihoods of examples of a split, in nats.

    Attributes:
        split: train, val or test.
        mean, stderr: over ``examples`` of them, by their weights; no standard error (None) of one example.
        examples, total: that the mean is over, and all in the split.
        each: (n,), of some examples.
        index: (n,), their numbers in the split.
        source: where the mean comes from: a file of the run, or "" where it was computed for the report.
    """

    split: str
    mean: float
    stderr: float | None
    examples: int
    total: int
    each: np.ndarray
    index: np.ndarray
    source: str = ""


@dataclass(frozen=True)
class Extreme:
    """An example among the most or the least likely ones: its log-likelihood in nats, and its image (H, W, C) uint8 or
    the values of its row as texts."""

    nats: float
    pixels: np.ndarray | None = None
    row: Sequence[str] | None = None


@dataclass(frozen=True)
class Extremes:
    split: str
    most: list[Extreme]
    least: list[Extreme]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Neighbours:
    """Nearest training examples by the Euclidean distance of all pixels, integers as numbers from 0 to 1.

    Attributes:
        pictures: pairs (sample, its nearest training image), each (H, W, C) uint8, with their distance.
        samples, validation: distances of samples and of validation images to their nearest training image.
        searched, total: training images searched, and how many there are.
    """

    pictures: list[tuple[np.ndarray, np.ndarray, float]]
    samples: np.ndarray
    validation: np.ndarray
    searched: int
    total: int


@dataclass(frozen=True)
class Images:
    """Grids of images, each (n, H, W, C) uint8 with C of 1 or 3.

    Attributes:
        real: of the validation split.
        samples: by temperature; those of a conditional flow are of the contexts of ``real``.
        interpolations: rows of steps between two real images, which are the ends, (rows, steps, H, W, C).
        classes: rows of samples of each class, by its name.
        shrunk: whether they are smaller than the data's.
        labels: the class of each of ``real``; () without classes.
    """

    real: np.ndarray
    samples: dict[float, np.ndarray] = field(default_factory=dict)
    interpolations: np.ndarray | None = None
    classes: dict[str, np.ndarray] = field(default_factory=dict)
    neighbours: Neighbours | None = None
    shrunk: bool = False
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class ColumnValues:
    """A column of a table: its values in the file's units, real and sampled; times in seconds since 1970, categories as
    their numbers, missing values NaN."""

    name: str
    kind: Literal["real", "integer", "categorical", "time", "angle"]
    real: np.ndarray
    samples: np.ndarray
    words: Sequence[str] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Answer:
    """Samples for the context of one real row: the context, and of each column its name, the row's value, and the
    samples' median with the range of 90 %, or their most frequent category; all as texts."""

    context: Sequence[str]
    columns: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Rows:
    """Rows of a table, real and sampled, column by column.

    Attributes:
        split: of the real rows.
        columns: what is shown of them.
        left_out: columns beyond those.
        context: names of the context columns.
        answers: samples for the contexts of some real rows.
        constants: names of columns that are not modelled since they are constant.
    """

    split: str
    columns: list[ColumnValues]
    left_out: int = 0
    context: Sequence[str] = ()
    answers: list[Answer] = field(default_factory=list)
    constants: Sequence[str] = ()


@dataclass(frozen=True)
class Curves:
    """Vectors of an array, such as spectra: real and sampled, (n, L) each."""

    real: np.ndarray
    samples: np.ndarray


@dataclass
class Material:
    """Attributes:
    name: of the data.
    dimensions: D.
    has_bits: whether bits per dimension mean something.
    grey_levels: of integers, else None.
    is_image: whether an example is an image or a field.
    has_target: whether the flow learned from a target; ``likelihoods`` then hold log p(x) − log q(x) of its samples.
    sizes: examples of each split that was opened.
    published: the published figure with ours in its unit, as eval.json has it, or None.
    likelihoods: by split.
    notes: what was left out and why, by the part of the report: one sentence each.
    seconds: that gathering took.
    """

    name: str
    dimensions: int
    has_bits: bool
    grey_levels: int | None
    is_image: bool
    lower_bound: bool = False
    has_target: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    published: dict | None = None
    likelihoods: dict[str, SplitLikelihoods] = field(default_factory=dict)
    images: Images | None = None
    rows: Rows | None = None
    curves: Curves | None = None
    density: np.ndarray | None = None
    extremes: Extremes | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def unit(self) -> str:
        """The unit of the figures."""
        return "bits/dim" if self.has_bits else "nats"

    def to_unit(self, nats):
        """Log-likelihoods in nats as figures in :attr:`unit`."""
        return -nats / (self.dimensions * np.log(2)) if self.has_bits else nats

    def leave_out(self, part: str, why: str) -> None:
        self.notes.setdefault(part, []).append(why)
