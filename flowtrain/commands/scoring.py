"""Scoring examples, a group at a time, of which each process takes its share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands import ScoreConfig
from flowtrain.commands.restored import Restored
from flowtrain.data.array_context import ArrayContext
from flowtrain.data.image_sources import SUFFIXES
from flowtrain.data.inputs import (
    ARCHIVES,
    Group,
    ImageFiles,
    Input,
    TableRows,
    input_path,
    open_arrays,
    unnamed_columns,
)
from flowtrain.data.labels import class_number, label_context, list_classes
from flowtrain.data.spec import LabelContext, class_names
from flowtrain.engine.evaluate import log_likelihoods, over_draws
from flowtrain.engine.memory_budget import few_rows, rows_within_budget
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import distributed
from flowtrain.scores.chain_rule import ChainRule

ARRAYS = "an array (npy, npz, h5, zarr)"


def open_input(config: ScoreConfig, restored: Restored, given: str, key: str = "input") -> Input:
    """The reader of ``key=given``. Raises UsageError where that is not the model's kind of data."""
    path, data = input_path(given, key), restored.dataset
    grey_levels = data.spec.grey_levels
    suffix = "" if path.is_dir() else path.suffix.lower()
    if restored.columns is None and (arrays := open_arrays(path, data, config.on_bad)):
        return arrays
    if not data.spec.is_image:
        columns = restored.columns or unnamed_columns(restored.flow.dimensions, grey_levels)
        return TableRows(path, columns, config.on_bad, data)
    if grey_levels is None:
        raise UsageError(f"{key}={given}: this model takes real numbers: {ARRAYS}")
    if suffix and suffix not in (*ARCHIVES, *SUFFIXES) or not suffix and not path.is_dir():
        raise UsageError(f"{key}={given}: this model takes a folder, .zip or .tar of images, an image, or {ARRAYS}")
    if grey_levels & (grey_levels - 1) or grey_levels > 256:
        raise UsageError(
            f"{key}={given}: this model has {grey_levels} grey levels: give {ARRAYS}, of 0 … {grey_levels - 1}"
        )
    return ImageFiles(
        path,
        data.spec.shape,
        8 - int(math.log2(grey_levels)),
        config.on_bad,
        getattr(data, "box", None),
        getattr(data, "exact", False),
        config.trainer.workers,
    )


def find_label(config: ScoreConfig, restored: Restored, source: Input) -> Tensor | None:
    """The context of all examples, (1, classes), or None where there is none or ``source`` has it."""
    shape, names = restored.flow.context_shape, class_names(restored.dataset.spec)
    if shape is None or restored.columns:
        if config.label is not None:
            raise UsageError(f"label={config.label}: this model is not class-conditional; leave label=null")
        return None
    if isinstance(restored.dataset.spec.context, ArrayContext):
        raise UsageError("this model is conditional on an array, which score does not read; flow.log_prob takes one")
    if config.label is not None:
        return label_context(torch.tensor([class_number(config.label, shape[0], names)]), shape[0])
    if names and isinstance(source, ImageFiles) and source.find_labels(names):
        return None
    folders = ", or a folder for each class" if isinstance(source, ImageFiles) else ""
    raise UsageError(f"label=null: give the class, {list_classes(names) or f'0 to {shape[0] - 1}'}{folders}")


@dataclass(frozen=True)
class Scores:
    """Of examples that follow one another.

    Attributes:
        names: (B,).
        log_prob: their log-likelihoods in nats, float64 (B,); NaN where there is none.
        problems: a line for each that has none.
        classes: of class-conditional models, int64 (B,); else None.
        terms: with a chain rule, the share of each encoded column in the log-likelihood, (B, D); else None.
        outside: the columns in which each row lies outside the range of the train split, by name, bool (B,).
    """

    names: np.ndarray
    log_prob: np.ndarray
    problems: list[str]
    classes: np.ndarray | None = None
    terms: np.ndarray | None = None
    outside: dict[str, np.ndarray] = field(default_factory=dict)


class Scorer:
    """Scores groups of the examples of ``source``.

    Args:
        where: the examples' path in messages.
        label: the context of all examples, or None.
        seed: of the noise of the examples.
        rule: splits their log-likelihoods over columns; None: they stay whole.
        outside: whether to compare rows with the range of the train split.
    """

    def __init__(
        self,
        config: ScoreConfig,
        restored: Restored,
        source: Input,
        where: str,
        label: Tensor | None,
        seed: int,
        rule: ChainRule | None = None,
        outside: bool = False,
    ):
        self.flow, self.source, self.where, self.label, self.seed = restored.flow, source, where, label, seed
        self.columns = restored.columns if outside else None
        self.has_classes = isinstance(restored.dataset.spec.context, LabelContext)
        self.draws, self.rule = config.draws, rule
        self.batch = None if config.batch == "auto" else config.batch

    def scores(self) -> Iterator[Scores]:
        """Of all groups in order, on every process, each of which computes its own."""
        groups = self.source.groups(distributed.rank(), distributed.world())
        while True:
            group = next(groups, None)
            turns = distributed.all_gather_object(None if group is None else self(group))
            turns = [turn for turn in turns if turn is not None]
            if not turns:
                return
            yield from turns

    def __call__(self, group: Group) -> Scores:
        context = group.context if self.label is None else self.label.expand(len(group.x), -1)
        try:
            terms = self._terms(group, context)
        except FloatingPointError as error:
            raise FlowtrainError(f"{self.where}: from {self.source.label} {group.names[0]} on: {error}") from error
        values = terms.sum(1)
        values[list(group.bad)] = math.nan
        problems = dict(group.bad)
        for place in (~values.isfinite()).nonzero().flatten().tolist():
            if place not in problems:
                name = group.names[place]
                name = f"row {name} (the first is 1)" if self.source.label == "row" else name
                why = self.flow.explain(group.x[place])
                problems[place] = f"{name}: its log-likelihood is {values[place]:g}{why}"
                self.source.refuse(f"{self.where}: {problems[place]}")
                values[place] = math.nan
        terms[values.isnan()] = math.nan
        outside = {} if self.columns is None else self.columns.outside(group.x, context)
        readable = torch.ones(len(values), dtype=torch.bool)
        readable[list(group.bad)] = False
        return Scores(
            group.names,
            values.numpy(),
            [problems[place] for place in sorted(problems)],
            context.argmax(1).numpy() if self.has_classes and context is not None else None,
            terms.numpy() if self.rule else None,
            {name: (found & readable).numpy() for name, found in outside.items()},
        )

    def _terms(self, group: Group, context: Tensor | None) -> Tensor:
        """Terms of the log-likelihoods, one or one for each column, float64 (B, terms) on the CPU; the noise of an
        example is that of its number."""
        device, count = next(self.flow.parameters()).device, self.flow.dimensions if self.rule else 1
        terms = torch.empty(len(group.x), count, dtype=torch.float64)
        less = "a smaller batch=N would need less"
        if self.batch is None and len(terms):
            few = min(few_rows(self.flow.dimensions), len(terms))
            work = self._batches(group, context, few)
            with out_of_memory(device, f"{few} likelihoods at once", less):
                self.batch = rows_within_budget(lambda: next(work), few, device)
        size, start = self.batch or 1, 0
        with out_of_memory(device, f"{min(size, len(terms))} likelihoods at once", less):
            for part in self._batches(group, context, size):
                terms[start : start + len(part)] = part
                start += len(part)
        return terms

    def _batches(self, group: Group, context: Tensor | None, size: int) -> Iterator[Tensor]:
        device = next(self.flow.parameters()).device
        for start in range(0, len(group.x), size):
            part = slice(start, start + size)
            x, given = group.x[part].to(device), None if context is None else context[part].to(device)
            index = torch.arange(group.first + start, group.first + start + len(x), device=device)
            if self.rule:
                each = over_draws(partial(self.rule.terms, x, given), index, self.draws, self.seed)
                yield (sum(each) / self.draws).cpu()
            else:
                yield log_likelihoods(self.flow, index, x, given, self.draws, self.seed)[0][:, None].cpu()
