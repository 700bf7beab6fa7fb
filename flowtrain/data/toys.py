"""Six toy densities over the plane, within about ±4, to try flows on (Grathwohl et al. 2019)."""

from __future__ import annotations

import numpy as np

from flowtrain.data.split import ArraySplit, split_indices
from flowtrain.data.vectors import Vectors


class Plane(Vectors):
    """Base class of densities over the plane.

    Args:
        rows: number of points for all splits together, drawn with ``split_seed``.
    """

    dims = 2
    names = ("x", "y")
    uses_path = uses_root = False

    def __init__(self, *, rows: int = 50_000, **keys):
        super().__init__(**keys)
        self.rows = self._check_count("rows", rows, least=10)

    def _draw(self, rows: int, random: np.random.Generator) -> np.ndarray:
        """Draw points (rows, 2), float64."""
        raise NotImplementedError

    def _open(self, name: str) -> ArraySplit:
        # a stream of its own: the split must not depend on the points
        points = self._draw(self.rows, np.random.default_rng([self.split_seed, 1])).astype(np.float32)
        chosen = split_indices(self.rows, self.val_size, self.test_size, self.split_seed)[name]
        return self._make_split(name, points[chosen], self._origin())

    def _origin(self) -> str:
        return f"drawn with seed {self.split_seed}"


class Moons(Plane):
    """Two interlocking half circles."""

    native_name = "moons"

    def _draw(self, rows, random):
        angle, upper = np.pi * random.random(rows), random.random(rows) < 0.5
        x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
        y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
        return 2 * (_points(x, y) - (0.5, 0.25) + 0.1 * random.normal(size=(rows, 2)))


class Rings(Plane):
    """Four concentric circles."""

    native_name = "rings"

    def _draw(self, rows, random):
        angle, radius = 2 * np.pi * random.random(rows), 0.75 * random.integers(1, 5, rows)
        return _points(radius * np.cos(angle), radius * np.sin(angle)) + 0.08 * random.normal(size=(rows, 2))


class Pinwheel(Plane):
    """Five bent blades around a centre."""

    native_name = "pinwheel"

    def _draw(self, rows, random):
        along, across = 1 + 0.3 * random.normal(size=rows), 0.1 * random.normal(size=rows)
        angle = 2 * np.pi / 5 * random.integers(0, 5, rows) + 0.25 * np.exp(along)
        x = along * np.cos(angle) - across * np.sin(angle)
        y = along * np.sin(angle) + across * np.cos(angle)
        return 2 * _points(x, y)


class Checkerboard(Plane):
    """Every other one of the sixteen squares of [−4, 4]², uniformly: the log-likelihood is −log 32 = −3.466 nats."""

    native_name = "checkerboard"

    def _draw(self, rows, random):
        column, row = random.integers(0, 4, rows), random.integers(0, 2, rows)
        corner = _points(column, 2 * row + column % 2)
        return 2 * (corner + random.random((rows, 2))) - 4


class Spirals(Plane):
    """Two spiral arms of one and a half turns."""

    native_name = "spirals"

    def _draw(self, rows, random):
        angle = 3 * np.pi * np.sqrt(random.random(rows))
        arm = _points(-np.cos(angle) * angle, np.sin(angle) * angle) + 0.5 * random.random((rows, 2))
        arm *= random.choice([-1, 1], (rows, 1))
        return arm / 3 + 0.1 * random.normal(size=(rows, 2))


class EightGaussians(Plane):
    """Eight equal round normals on a circle."""

    native_name = "eight_gaussians"

    def _draw(self, rows, random):
        angle = np.pi / 4 * random.integers(0, 8, rows)
        centre = 4 * _points(np.cos(angle), np.sin(angle))
        return (centre + 0.5 * random.normal(size=(rows, 2))) / np.sqrt(2)


def _points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack((x, y), 1)
