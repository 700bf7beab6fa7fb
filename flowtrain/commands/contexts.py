"""The contexts that a user samples a conditional flow with: classes, or values of a table's context columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands import SampleConfig
from flowtrain.commands.restored import Restored
from flowtrain.data import Columns
from flowtrain.data.array_context import ArrayContext
from flowtrain.data.array_files import SUFFIXES, open_rows
from flowtrain.data.dataset import Dataset
from flowtrain.data.inputs import input_path, read_contexts
from flowtrain.data.labels import class_number, label_context, list_classes
from flowtrain.data.spec import LabelContext, class_names
from flowtrain.errors import UsageError


@dataclass(frozen=True)
class Contexts:
    """The contexts of samples: ``each`` samples for one row after the other.

    Attributes:
        rows: (m, *context_shape).
        columns: the context columns of a file, m values each as the file has them, by their names.
        classes: of a list of classes, the name of each as a margin shows it.
    """

    rows: Tensor
    each: int
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows) * self.each

    def places(self, samples: slice) -> np.ndarray:
        """The row of each of some samples."""
        return np.arange(samples.start, samples.stop) // self.each

    def turns(self) -> list[Contexts]:
        """The contexts of each class of a list, whose samples share their noise; else these alone."""
        return [Contexts(row[None], self.each) for row in self.rows] if self.classes else [self]

    def __getitem__(self, samples: slice) -> Tensor:
        """The contexts of some samples, (b, *context_shape)."""
        return self.rows[torch.from_numpy(self.places(samples))]


def contexts(config: SampleConfig, restored: Restored) -> Contexts | None:
    """The contexts of the samples; None for an unconditional flow.

    ``config.label`` is the class of the ``config.n`` samples, by its number or its name, or a list, or all: n of each
    class in turn; None: n samples of which each is of the next class. ``config.context`` maps each context column of a
    table to a value, or names a file with those columns: then n samples are drawn for each of its rows. Raises
    UsageError where they do not fit the flow.
    """
    shape, columns, given = restored.flow.context_shape, restored.columns, restored.dataset.spec.context
    if config.label is not None and not isinstance(given, LabelContext):
        raise UsageError(f"label={config.label}: this model is not class-conditional; leave label=null")
    if config.context is not None and not (columns and shape or isinstance(given, ArrayContext)):
        raise UsageError(f"context={config.context}: this model has no context columns; leave context=null")
    if shape is None:
        return None
    if isinstance(given, ArrayContext):
        return _of_array(config, given)
    if columns:
        return _of_columns(config, columns, restored.dataset)
    (classes,), names = shape, class_names(restored.dataset.spec)
    if config.label is None:
        return Contexts(label_context(torch.arange(config.n) % classes, classes), 1)
    every = config.label == "all" and "all" not in names
    given = list(range(classes)) if every else config.label if isinstance(config.label, list) else [config.label]
    if not given:
        raise UsageError(f"label=[]: the classes are {list_classes(names) or f'0 to {classes - 1}'}")
    labels = torch.tensor([class_number(one, classes, names) for one in given])
    shown = [_shorten(names[label]) if names else f"class {label}" for label in labels]
    return Contexts(
        label_context(labels, classes),
        config.n,
        classes=tuple(shown) if every or isinstance(config.label, list) else (),
    )


def _of_array(config: SampleConfig, context: ArrayContext) -> Contexts:
    if not isinstance(config.context, str):
        wanted = f"of shape {['N', *context.shape]}".replace("'", "")
        raise UsageError(f"this flow is conditional on '{context.name}': give context=FILE with an array {wanted}")
    path = input_path(config.context, "context")
    named = path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".npy"
    return Contexts(context.read(open_rows(path, context.name if named else None)), config.n)


def _shorten(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _of_columns(config: SampleConfig, columns: Columns, data: Dataset) -> Contexts:
    given, names = config.context or {}, columns.context_names
    if isinstance(given, str):
        values, rows = read_contexts(input_path(given, "context"), columns, data)
        return Contexts(rows, config.n, {name: _as_written(column) for name, column in values.items()})
    if not isinstance(given, dict) or set(given) != set(names):
        wanted = ", ".join(f"{name}: …" for name in names)
        raise UsageError(f"this flow is conditional on {', '.join(names)}: give context='{{{wanted}}}' or context=FILE")
    return Contexts(columns.encode_context({name: [given[name]] for name in names}), config.n)


def _as_written(values: np.ndarray) -> np.ndarray:
    """Whole numbers as such, which a table's file returns as float64."""
    whole = values.dtype.kind == "f" and (values == np.floor(values)).all() and (np.abs(values) < 2**53).all()
    return values.astype(np.int64) if whole else values
