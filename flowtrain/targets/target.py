"""What every target offers."""

from __future__ import annotations

import torch
from torch import Tensor


class Target:
    """A density over vectors, known up to a constant.

    Attributes:
        name: in messages and of the data that a run names.
        dimensions: D, of one vector.
        scale: standard deviation of the normal, around 0, at which a flow starts.
        log_z: log ∫ exp(log_prob(x)) dx in nats, where it is known.
        names: of the coordinates; None: x0, x1, ….
        modes: number of modes, where they can be told apart.

    >>> class Ring(Target):
    ...     name, dimensions = "ring", 2
    ...
    ...     def log_prob(self, x):
    ...         return -0.5 * ((x.norm(dim=1) - 2) / 0.3) ** 2
    >>> Ring().log_prob(torch.tensor([[0.0, 2.0]]))
    tensor([-0.])
    """

    name: str
    dimensions: int
    scale: float = 1.0
    log_z: float | None = None
    names: tuple[str, ...] | None = None
    modes: int | None = None

    def log_prob(self, x: Tensor) -> Tensor:
        """The logarithm of the density, up to a constant, (B,), of x (B, D); differentiable."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """n exact samples, (n, D) float32 on the CPU; None where there is no way to draw them."""
        return None

    def mode_of(self, x: Tensor) -> Tensor:
        """The number of the mode that each of x (B, D) is at, (B,) int64; −1: at none. For targets with ``modes``."""
        raise NotImplementedError

    def mode_weights(self) -> Tensor:
        """The share of each mode, (modes,), in order."""
        raise NotImplementedError
