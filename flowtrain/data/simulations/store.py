"""Simulations on disk: blocks of rows, each written whole or not at all, so that an interrupted run continues."""

from __future__ import annotations

import fcntl
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowtrain.errors import FlowtrainError
from flowtrain.runtime import files
from flowtrain.runtime.interrupts import interruptible

log = logging.getLogger("flowtrain")

NAME = re.compile(r"(\d+)-(\d+)\.npz")


@dataclass(frozen=True)
class Block:
    """Some rows, from row ``first`` on.

    Attributes:
        theta: parameters, float32 (n, D).
        x: simulations, float32 (n, C); rows that failed are NaN.
        reason: why the first of the rows that failed did; "" where none did.
    """

    first: int
    theta: np.ndarray
    x: np.ndarray
    reason: str

    @property
    def stop(self) -> int:
        return self.first + len(self.theta)


class Store:
    """The simulations of one simulator, prior and seed: a folder with a file for each block.

    Several runs may use it at once: one writes at a time, within :meth:`lock`, and others read meanwhile.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Within it, this process alone writes into the folder; it waits for another that does.

        Raises:
            Interrupted: a signal, while it waits.
            WriteError: the disk does not take the file.
        """
        path = self.folder / "lock"
        with files.convert_errors(path, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another run, which simulates into %s", self.folder)
                with interruptible():
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def missing(self, rows: int) -> list[tuple[int, int]]:
        """The ranges below ``rows`` that no file has."""
        gaps, at = [], 0
        for first, stop in self._ranges():
            if first > at:
                gaps.append((at, min(first, rows)))
            at = max(at, stop)
            if at >= rows:
                return gaps
        return [*gaps, (at, rows)]

    def write(self, block: Block) -> None:
        """Raises WriteError."""
        buffer = io.BytesIO()
        np.savez(buffer, theta=block.theta, x=block.x, reason=np.array(block.reason))
        files.write(self.folder / f"{block.first:09d}-{block.stop:09d}.npz", buffer.getvalue())

    def read(self, rows: int) -> list[Block]:
        """The blocks of the first ``rows`` rows, which must be there, in order, each row once.

        Raises:
            FlowtrainError: a file is damaged.
        """
        found = self._ranges()
        try:
            return self._blocks(found, rows)
        except FileNotFoundError as error:
            if self._ranges() == found:
                raise FlowtrainError(f"{self.folder}: lacks simulations ({error})") from error
            return self.read(rows)  # another run has put them into a larger file

    def _blocks(self, ranges: list[tuple[int, int]], rows: int) -> list[Block]:
        blocks, at = [], 0
        for first, stop in ranges:
            if first <= at < min(stop, rows):
                block = self._read(first, stop)
                part = slice(at - first, min(stop, rows) - first)
                blocks.append(Block(at, block.theta[part], block.x[part], block.reason))
                at = min(stop, rows)
        if at < rows:
            raise FileNotFoundError(f"row {at}")
        return blocks

    def merge(self, rows: int) -> None:
        """Put the first ``rows`` rows into one file in place of many, within :meth:`lock`."""
        old = self._ranges()
        if len(old) < 2:
            return
        blocks = self.read(rows)
        theta, x = (np.concatenate([getattr(block, key) for block in blocks]) for key in ("theta", "x"))
        reason = next((block.reason for block in blocks if block.reason), "")
        self.write(Block(0, theta, x, reason))
        for first, stop in old:
            if stop <= rows and (first, stop) != (0, rows):
                files.discard(self._path(first, stop))

    def _ranges(self) -> list[tuple[int, int]]:
        found = [NAME.fullmatch(path.name) for path in self.folder.glob("*.npz")]
        return sorted(
            ((int(match[1]), int(match[2])) for match in found if match), key=lambda ends: (ends[0], -ends[1])
        )

    def _path(self, first: int, stop: int) -> Path:
        return self.folder / f"{first:09d}-{stop:09d}.npz"

    def _read(self, first: int, stop: int) -> Block:
        path = self._path(first, stop)
        try:
            with np.load(path, allow_pickle=False) as held:
                block = Block(first, held["theta"], held["x"], str(held["reason"]))
        except FileNotFoundError:
            raise
        except Exception as error:  # of a damaged zip archive, one of many kinds
            raise FlowtrainError(f"{path}: damaged ({error}); remove it, and it is simulated again") from error
        if len(block.theta) != stop - first or len(block.x) != stop - first:
            raise FlowtrainError(f"{path}: damaged; remove it, and it is simulated again")
        return block


def gather(blocks: list[Block]) -> tuple[np.ndarray, np.ndarray, int, str]:
    """θ (N, D) and x (N, C) of the rows that did not fail, how many did, and why the first of them did."""
    theta, x = (np.concatenate([getattr(block, key) for block in blocks]) for key in ("theta", "x"))
    good = np.isfinite(x).all(1)
    return theta[good], x[good], int((~good).sum()), next((block.reason for block in blocks if block.reason), "")
