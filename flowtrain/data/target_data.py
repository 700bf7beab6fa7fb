"""A target in place of data: a density that a flow learns from, of which there are no examples."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.spec import DataSpec
from flowtrain.data.split import ArraySplit
from flowtrain.data.vectors import Vectors
from flowtrain.errors import UsageError
from flowtrain.runtime.seeds import generator, seed_from

SIZES = {"train": 2**16, "val": 10_000, "test": 50_000}
SEEDS = {"train": 1, "val": 2, "test": 3}
CELLS = 400  # of the grid, per side, that points to show are drawn from
WIDTH = 5  # half that grid's side, in the target's scale


class TargetData(Vectors):
    """The dataset of runs that learn from a target. What a step trains on are the flow's own samples.

    An example is a number, which fixes the noise of a sample, and a point to start from: normal, of the target's scale.
    Preprocessing and actnorm begin with these. An evaluation takes the mean of log p(x) − log q(x), the evidence lower
    bound, over samples x of the flow.

    Args:
        target: a :class:`flowtrain.targets.Target`.
        common: see :class:`Dataset`.
    """

    native_name = "target"
    own_splits = ("val", "test")
    uses_path = uses_root = False
    default_val = default_test = None

    def __init__(self, *, target, **common):
        super().__init__(**common)
        self.target = target
        self.name = target.name
        self.names = self._names(target)

    @staticmethod
    def _names(target) -> tuple[str, ...] | None:
        """The names of the coordinates; None where the target has none."""
        names = target.names
        if names is None:
            return None
        if isinstance(names, str) or len({*map(str, names)}) != len(names) or len(names) != target.dimensions:
            raise UsageError(f"target {target.name}: names={names} must be {target.dimensions} different names")
        return tuple(map(str, names))

    @property
    def spec(self) -> DataSpec:
        return DataSpec(self.name, (self.target.dimensions,), target=self.target)

    def _open(self, name: str) -> TargetSplit:
        random = np.random.default_rng([self.split_seed, SEEDS[name]])
        points = self.target.scale * random.normal(size=(SIZES[name], self.target.dimensions)).astype(np.float32)
        split = self._make_split(name, points, "to start from")
        return TargetSplit(self.target, split, seed_from(self.split_seed, SEEDS[name]))


class TargetSplit(ArraySplit):
    """Numbers of samples, with points to start from."""

    def __init__(self, target, points: ArraySplit, seed: int):
        super().__init__(points.data, f"{points.description.partition(':')[0]}: samples of the flow", None)
        self.target, self.seed, self.columns = target, seed, points.columns

    def digest(self) -> str:
        """SHA-256 of the target's name, dimensions and scale, and of the seed."""
        what = self.target.name, self.target.dimensions, self.target.scale, len(self), self.seed
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def measure(self, flow, x: Tensor, context: Tensor | None) -> Tensor:
        """log p(x) − log q(x) of as many samples of ``flow`` as there are examples, (B,): the logarithms of their
        importance weights. Their mean is the evidence lower bound."""
        samples, log_q = flow.rsample_and_log_prob(len(x), context)
        return self.target.log_prob(samples) - log_q

    def shown(self, most: int) -> tuple[Tensor | None, Tensor | None]:
        """Exact samples of the target; of one without any in up to two dimensions, points drawn on a grid."""
        points = self.target.sample(most, generator(self.seed))
        if points is None and self.target.dimensions <= 2:
            points = self._points_on_grid(most)
        return None if points is None else points.to(self.device), None

    @torch.no_grad()
    def _points_on_grid(self, most: int) -> Tensor:
        side = WIDTH * self.target.scale
        axis = ((torch.arange(CELLS) + 0.5) / CELLS * 2 - 1) * side
        points = torch.cartesian_prod(*[axis] * self.target.dimensions).reshape(-1, self.target.dimensions)
        values = [self.target.log_prob(part.to(self.device)).double().cpu() for part in points.split(2**14)]
        density = (log_density := torch.cat(values)).sub(log_density.max()).exp().nan_to_num(0)
        random = generator(self.seed)
        chosen = points[density.multinomial(most, replacement=True, generator=random)]
        return chosen + (torch.rand(chosen.shape, generator=random) - 0.5) * (2 * side / CELLS)

    def reference(self, n: int) -> ReferenceSplit | None:
        """n exact samples of the target; None where there are none."""
        points = self.target.sample(n, generator(self.seed))
        return None if points is None else ReferenceSplit(self.target, points)


class ReferenceSplit(ArraySplit):
    """Exact samples of a target."""

    def __init__(self, target, points: Tensor):
        super().__init__(points, f"{target.name}: exact samples")
        self.target = target

    def measure(self, flow, x: Tensor, context: Tensor | None) -> Tensor:
        """log p(x) − log q(x), (B,), of exact samples x."""
        return self.target.log_prob(x) - flow(x, context)
