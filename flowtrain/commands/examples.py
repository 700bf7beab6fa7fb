"""Real examples of a split, and what a flow makes of them and of their latents."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands.restored import Restored
from flowtrain.data import Columns
from flowtrain.data.inputs import unnamed_columns
from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.engine.memory_budget import even_batches, few_rows, rows_within_budget
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.plots.curves import plot_paths

log = logging.getLogger("flowtrain")


@dataclass(frozen=True)
class Examples:
    """Attributes:
    numbers: of the examples in their split, from 0.
    x, context: (n, *shape) and (n, *context_shape) or None, on the flow's device.
    """

    numbers: list[int]
    x: Tensor
    context: Tensor | None


def take_examples(restored: Restored, split: str, n: int, given: list[int] | None, seed: int) -> Examples:
    """The examples ``given`` by their numbers in a split, else n of them at random, the same for a seed.

    Raises:
        UsageError: the split has no such examples.
        FlowtrainError: one cannot be read.
    """
    rows = restored.split(split)
    if given is not None and (wrong := [number for number in given if number >= len(rows)]):
        raise UsageError(f"examples={given}: the {split} split has {len(rows):,} examples, from 0: none is {wrong[0]}")
    if given is None and n > len(rows):
        raise UsageError(f"n={n}: needs {n} examples, and the {split} split has {len(rows):,}")
    numbers = np.random.default_rng(seed).choice(len(rows), n, replace=False).tolist() if given is None else given
    x, context = rows.to(next(restored.flow.parameters()).device).take(torch.tensor(numbers))
    if rows.bad:
        raise FlowtrainError("; ".join(rows.bad.values()))
    return Examples(numbers, x, context)


def encode(restored: Restored, x: Tensor, context: Tensor | None) -> Tensor:
    """The latents of examples, (n, *latent shape). Raises FlowtrainError where one has none that is finite."""
    return _in_parts(restored, restored.flow.encode, x, context)


def decode(restored: Restored, z: Tensor, context: Tensor | None) -> Tensor:
    """The data of latents, (n, *shape). Raises FlowtrainError where that is not finite."""
    return _in_parts(restored, restored.flow.decode, z, context)


def _in_parts(restored: Restored, function, rows: Tensor, context: Tensor | None) -> Tensor:
    start, size, done = 0, few_rows(restored.flow.dimensions), []

    def work(first: int, size: int) -> None:
        part = slice(first, first + size)
        done.append(function(rows[part], None if context is None else context[part]))

    try:
        with out_of_memory(rows.device, "latents and data"), torch.no_grad(), evaluation_mode(rows.device):
            if len(rows) > 2 * size:  # else there is little to gain
                most = rows_within_budget(partial(work, 0, size), size, rows.device)
                start, size = size, even_batches(len(rows) - size, most)
            for first in range(start, len(rows), size):
                work(first, size)
    except ValueError as error:
        raise FlowtrainError(f"{error}; flowtrain check looks at each layer") from error
    return torch.cat(done)


def columns_of(restored: Restored, x: Tensor) -> Columns | None:
    """What each number of a row is; None for images and fields. Those of an array have names x0, x1, …, and the
    standard deviation of all numbers of ``x``."""
    spec = restored.dataset.spec
    if spec.is_image or restored.columns:
        return restored.columns
    columns = unnamed_columns(math.prod(spec.shape), spec.grey_levels)
    std = x.double().std().nan_to_num(0).item() or 1.0
    return replace(columns, modelled=tuple(replace(column, std=std) for column in columns.modelled))


def draw_curves(path: Path, rows: np.ndarray, labels: list[str]) -> dict[str, Path]:
    """Plot curves (n, steps, L), a panel for each n, where matplotlib is installed: {"curves": path}, else {}."""
    try:
        plot_paths(path, rows, labels)
    except UsageError as error:
        log.info("without a plot: %s", error)
        return {}
    return {"curves": path}
