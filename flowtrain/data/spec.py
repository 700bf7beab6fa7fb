"""The description of a dataset, known before its data are loaded: what models and commands need to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowtrain.data.array_context import ArrayContext
from flowtrain.data.tables.column import Column


@dataclass(frozen=True)
class LabelContext:
    """Each example comes with its class, as a one-hot vector of length ``classes``.

    Attributes:
        names: of the classes in order; () where they have none.
    """

    classes: int
    names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.classes,)


@dataclass(frozen=True)
class ColumnContext:
    """Each row comes with the values of other columns of its table: numbers standardized, text one-hot.

    Attributes:
        names: of these columns.
        shape: ``(C,)``: one for each column of numbers, the number of categories for each column of text.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DataSpec:
    """What a flow of these data must fit.

    Attributes:
        name: of the dataset, as in ``dataset=name``.
        shape: of one example without a batch: ``(channels, height, width)`` of an image or a field, ``(D,)`` of a
            vector.
        grey_levels: the values are the integers 0 … grey_levels − 1. None for real numbers, such as those of a field,
            and for tables, which may have columns of integers all the same.
        context: what a conditional flow is given with each example, or None.
        columns: of a user's table, what each of the D numbers of a row is (``Columns.encoded``), which decides the
            links of its preprocessing; else None. Their moments are not yet known.
        target: of a flow that learns from a density in place of data, a :class:`flowtrain.targets.Target`; else None.
    """

    name: str
    shape: tuple[int, ...]
    grey_levels: int | None = None
    context: LabelContext | ColumnContext | ArrayContext | None = None
    columns: tuple[Column, ...] | None = None
    target: Any = None

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        return None if self.context is None else self.context.shape

    @property
    def has_gaps(self) -> bool:
        """Whether missing values are modelled, so that a likelihood is a lower bound of that of the others."""
        return any(column.missing for column in self.columns or ())

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3


def class_names(spec: DataSpec) -> tuple[str, ...]:
    """The names of the classes of labelled data, () where they have none."""
    return spec.context.names if isinstance(spec.context, LabelContext) else ()


def has_bits(spec: DataSpec, columns) -> bool:
    """Whether the data are integers, so that bits per dimension mean something.

    Args:
        columns: of a table, a :class:`flowtrain.data.Columns`; else None.
    """
    return spec.grey_levels is not None or columns is not None and columns.all_integer
