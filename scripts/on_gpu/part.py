"""A part of what is measured: rows that belong together, each with a function that measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flowtrain.engine.precision import autocast_dtype
from flowtrain.errors import UsageError
from flowtrain.runtime import distributed

GPU = "needs a GPU"


class NotHere(Exception):
    """A row cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a row is measured.

    Attributes:
        folder: for files, in which no other row writes.
        end: the ``time.time()`` by which its process is ended.
        tiny: in a rehearsal, whose figures mean nothing.
        data: the folder with CIFAR-10, if there is one.
    """

    folder: Path
    end: float
    tiny: bool
    data: Path | None = None

    @property
    def device(self) -> torch.device:
        return distributed.device()

    def need_gpu(self) -> None:
        """Raises NotHere without a GPU."""
        if self.device.type != "cuda":
            raise NotHere(GPU)

    def need_precision(self, precision: str) -> None:
        """Raises NotHere where the hardware has no such arithmetic."""
        try:
            autocast_dtype(precision, self.device)
        except UsageError as error:
            raise NotHere(str(error)) from error

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Part:
    """Rows of one table.

    Attributes:
        title: the sentence above its table in docs/gpu.md.
        rows: name -> function that measures it. Its figures hold "passed" if the row is a check.
        columns: heading -> the cell's text for a row's figures.
        seconds: that it may take, on a GPU.
        processes: that divide its rows among them.
        rehearsed: the rows of a rehearsal; (): all.
        last: it runs alone at the end, in the time that is left; the others leave it its ``seconds``.
    """

    name: str
    title: str
    rows: dict[str, Callable[[Place], dict]]
    columns: dict[str, Callable[[dict], str]]
    seconds: float
    processes: int = 1
    rehearsed: tuple[str, ...] = ()
    last: bool = False


def number(key: str, digits: str = ".3g") -> Callable[[dict], str]:
    """A column: the figure ``key``, if a row has it."""
    return lambda figures: "–" if figures.get(key) is None else f"{figures[key]:{digits}}"


def verdict(figures: dict) -> str:
    return "yes" if figures["passed"] else "**no**"
