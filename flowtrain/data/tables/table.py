"""A user's own table: its columns chosen, their types found, its rows split."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flowtrain.data.spec import ColumnContext, DataSpec
from flowtrain.data.split import ArraySplit, split_indices
from flowtrain.data.tables.block import Block, is_missing
from flowtrain.data.tables.column import Column, Constant
from flowtrain.data.tables.columns import Columns, encode_values
from flowtrain.data.tables.inference import Dropped, Survey, survey
from flowtrain.data.tables.table_file import TableFile, name_file, refuse_changes
from flowtrain.data.tables.types import parse_types
from flowtrain.data.tables.weights import check_split_weights, check_weights
from flowtrain.data.vectors import Vectors
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger("flowtrain")

MISSING = ("refuse", "drop", "model")


class Table(Vectors):
    """A file of numbers, texts and times, with the columns to model.

    Rows stay in the units of the file; use it with ``preprocess=standardize``. The type of each column, see
    :class:`flowtrain.data.tables.column.Column`, is found in all rows of the file unless ``types`` says it. Identifiers
    and columns whose values are all the same are left out, with a line that says so. Rows are in memory once.

    Args:
        columns: names of the columns to model, or their numbers for an array; None: all but those of ``context`` and
            ``weights``.
        context: names of the columns to be conditional on, or None. Numbers are standardized by the moments of the
            train split; categories become one-hot.
        weights: the column of weights, at least 0, or None. A row of weight 2 counts as the row twice: in the loss, in
            validation and evaluation, and in the moments that columns are standardized by. The moments of batch
            normalization and data-dependent initialization leave weights out.
        types: of columns by name: real, integer, category, time (or its format), angle, degrees, radians, or a range.
        missing: what to do with missing values: "refuse" them; "drop" their rows; "model" which values are missing and
            the others, for which the likelihood is a lower bound.
        key: the array to read of an .npz or .h5 file that holds several.
        read: options of the reader of the file, by name.
        val_size, test_size: number or fraction of the rows.
    """

    native_name = "table"

    def __init__(
        self,
        *,
        columns: list | None = None,
        weights: str | int | None = None,
        types: Mapping | None = None,
        missing: str = "refuse",
        key: str | None = None,
        read: Mapping | None = None,
        **keys,
    ):
        super().__init__(**keys)
        self._check_list("columns", columns)
        self._check_type("weights", weights, (str, int), "the name of a column")
        if missing not in MISSING:
            self._refuse("missing", missing, f"must be {', '.join(MISSING[:-1])} or {MISSING[-1]}")
        for name, value in (("types", types), ("read", read)):
            if value is not None and not isinstance(value, Mapping):
                self._refuse(name, value, "must be a mapping, such as {zip: category}")
        self.columns, self.weights, self.missing = columns, weights, missing
        self.key, self.read = key, read or {}
        self.types = parse_types(types or {})
        self._known: Columns | None = None
        self._parts: dict[str, tuple[np.ndarray, torch.Tensor | None, np.ndarray | None]] = {}

    @property
    def spec(self) -> DataSpec:
        columns = self._known or self._found[1]
        context = None
        if columns.context:
            context = ColumnContext(tuple(columns.context_names), columns.context_shape)
        return DataSpec(self.name, (len(columns.encoded),), context=context, columns=columns.encoded)

    def use_columns(self, columns: Columns | None) -> None:
        """Encode rows by the columns of a checkpoint, since this file may have other categories and moments. An unknown
        category is refused."""
        self._known = columns

    @cached_property
    def _file(self) -> TableFile:
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs dataset.path=FILE")
        texts = [name for name, declared in self.types.items() if declared.kind == "categorical"]
        file = TableFile(self.path, key=self.key, read=self.read, text=self._known.texts if self._known else texts)
        for note in file.notes:
            log.info("%s: %s", self.path, note)
        return file

    @cached_property
    def _found(self) -> tuple[int, Columns]:
        """The number of rows in the file, and its columns without their moments. Reads the whole file."""
        names, context = self._file.choose(self.columns, self.context, self.weights)
        self._file.find_columns("types", list(self.types))
        named = {*context, *self.types, *(names if self.columns is not None else ())}
        with refuse_changes(self.path), name_file(self.path):
            found = survey(self._file, [*names, *context], self.types, named, self.missing == "model")
        self._check_gaps(found)
        dropped = [column for column in found.columns.values() if isinstance(column, Dropped)]
        for column in dropped:
            how = "" if column.is_constant else f"; dataset.types={{{column.name}: …}} or dataset.columns keeps it"
            log.info("%s: column '%s' is left out: it %s%s", self.path, column.name, column.why, how)
        modelled = tuple(found.columns[name] for name in names if isinstance(found.columns[name], Column))
        if not modelled:
            split_indices(found.rows, self.val_size, self.test_size, self.split_seed)  # in one row, all are constant
            why = f": it {dropped[0].why}" if len(dropped) == 1 else ""
            raise UsageError(f"{self.path}: no column is left to model{why}; name one with dataset.columns=[…]")
        given = [found.columns[name] for name in context if isinstance(found.columns[name], Column)]
        given = tuple(replace(column, kind="real") if column.kind == "integer" else column for column in given)
        return found.rows, Columns(modelled, given, _constants(names, found.columns))

    def _check_gaps(self, found: Survey) -> None:
        if self.missing != "refuse":
            return
        columns = found.columns
        unused = {name for name in found.gaps if isinstance(columns[name], Dropped) and columns[name].value is None}
        gaps = {name: gap for name, gap in found.gaps.items() if name not in unused}
        if not gaps:
            return
        counts = ", ".join(f"'{name}' {count:,} (first in row {row})" for name, (count, row) in [*gaps.items()][:8])
        more = f", and {len(gaps) - 8} more columns" if len(gaps) > 8 else ""
        raise UsageError(
            f"{self.path}: values are missing in {counts}{more}; dataset.missing=drop leaves out these rows,"
            " dataset.missing=model models which are missing"
        )

    def _check_context(self, context) -> None:
        self._check_list("context", context)
        self.context = context

    def _check_list(self, key, value) -> None:
        if value is not None and not isinstance(value, list | tuple):
            self._refuse(key, value, "must be a list of columns, such as [age,income]")

    def _open(self, name: str) -> ArraySplit:
        if not self._parts:
            self._read()
        rows, context, weights = self._parts[name]
        weights = None if weights is None else torch.from_numpy(weights)
        how = self._description(name, len(rows))
        return ArraySplit(torch.from_numpy(rows), how, context, self._known, weights)

    def _description(self, name: str, rows: int) -> str:
        kinds = [column.kind for column in self._known.modelled]
        counts = " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        given = f", conditional on {', '.join(self._known.context_names)}" if self._known.context else ""
        given += "" if self.weights is None else f", weighted by {self.weights}"
        of = f"{self.name} {name}: {rows:,} rows of {self.path}"
        return f"{of}, {counts} columns{given}, cut with seed {self.split_seed}"

    def _read(self) -> None:
        """Read the values of all rows, each into its split."""
        expected = None if self._known else self._found
        columns = self._known or expected[1]
        file = self._file  # which asks for a path
        with refuse_changes(self.path), name_file(self.path):
            if self._known:
                file.find_columns(None, [*columns.names, *columns.context_names])
            blocks = self._encoded(columns)
            if self._known or self.missing == "drop":  # the number of rows is not yet known
                blocks = list(blocks)
                count = sum(len(block.rows) for block in blocks)
            else:
                count = expected[0]
            self._check_count(count, expected)
            parts = split_indices(count, self.val_size, self.test_size, self.split_seed)
            rows, context, weights = _distribute(blocks, parts, self.path)
        if self.weights is not None:
            check_split_weights(self.weights, weights)
        self._known = self._known or columns.with_moments(
            rows["train"], context["train"], None if self.weights is None else weights["train"]
        )
        self._parts = {
            part: (
                rows[part],
                self._known.standardize_context(context[part]) if columns.context else None,
                None if self.weights is None else weights[part],
            )
            for part in parts
        }

    def _check_count(self, count: int, expected: tuple[int, Columns] | None) -> None:
        dropped = expected[0] - count if expected else 0
        if dropped:
            line = "%s: %s of %s rows miss a value and are left out"
            log.info(line, self.path, f"{dropped:,}", f"{expected[0]:,}")
        if not count:
            raise UsageError(f"{self.path} has no rows" + (" without a missing value" if dropped else ""))

    def _encoded(self, columns: Columns) -> Iterator[_Block]:
        """Yield the rows in blocks, without those that ``missing`` drops."""
        weighted = [] if self.weights is None else self._file.find_columns("weights", [self.weights])
        read = [*columns.names, *columns.context_names, *weighted]
        if self.missing == "drop":  # also rows that miss the one value of a constant
            valued = {constant.name for constant in columns.constants if constant.value is not None}
            read += [name for name in self._file.names if name in valued]
        row = 1
        for block in self._file.blocks(read):
            size = len(block[columns.names[0]])
            if self.missing == "drop":
                block = _without_gaps(block)
            rows = encode_values(columns.modelled, block, row)
            context = encode_values(columns.context, block, row) if columns.context else rows[:, :0]
            weights = check_weights(self.weights, block[weighted[0]], row) if weighted else np.empty(len(rows))
            yield _Block(rows, context, weights)
            row += size


class _Block(NamedTuple):
    """Some rows: the modelled columns and those of the context, as :func:`encode_values` returns them, and the weights,
    float64."""

    rows: np.ndarray
    context: np.ndarray
    weights: np.ndarray


def _distribute(blocks: Iterable[_Block], parts: dict[str, np.ndarray], path: Path) -> list[dict[str, np.ndarray]]:
    """Rows, context and weights of each split, whose row numbers ``parts`` holds, in the order of the file.

    Each row goes to its place at once, so that a table of gigabytes is not in memory twice.

    Raises:
        FlowtrainError: there are more or fewer rows.
    """
    names = list(parts)
    owner = np.empty(sum(map(len, parts.values())), dtype=np.uint8)
    for number, name in enumerate(names):
        owner[parts[name]] = number
    out: list[dict[str, np.ndarray]] = [{}, {}, {}]
    filled, start = dict.fromkeys(names, 0), 0
    for block in blocks:
        if not out[0]:
            for found, values in zip(out, block):
                found |= {name: np.empty((len(parts[name]), *values.shape[1:]), values.dtype) for name in names}
        owners = owner[start : start + len(block.rows)]
        start += len(block.rows)
        if start > len(owner):
            break
        for number, name in enumerate(names):
            mine = owners == number
            stop = filled[name] + int(mine.sum())
            for found, values in zip(out, block):
                found[name][filled[name] : stop] = values[mine]
            filled[name] = stop
    if start != len(owner):
        raise FlowtrainError(f"{path} has changed since it was first read")
    return out


def _without_gaps(block: Block) -> Block:
    gaps = [is_missing(values) for values in block.values()]
    kept = ~np.logical_or.reduce(gaps)
    return block if kept.all() else {name: values[kept] for name, values in block.items()}


def _constants(names: Sequence[str], found: Mapping[str, Column | Dropped]) -> tuple[Constant, ...]:
    """The constant columns among ``names``, with their places in a sample, where identifiers are absent."""
    shown = [found[name] for name in names if isinstance(found[name], Column) or found[name].is_constant]
    return tuple(Constant(one.name, one.value, place) for place, one in enumerate(shown) if isinstance(one, Dropped))
