"""A target from a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flowtrain.targets.target import Target


class Function(Target):
    """The target of a function from x (B, D) to log-densities (B,), up to a constant.

    The function may have attributes ``dimensions``, ``scale``, ``log_z`` and ``names``, as :class:`Target` describes
    them, and ``sample``. It may also be a class, of which one object is made: that is called, or its ``log_prob`` is.

    Args:
        function: of x, or a class.
        dimensions: D; None: the function's attribute.
        scale: standard deviation at which a flow starts; None: the function's attribute, else 1.

    Raises:
        ValueError: nothing says how many dimensions there are.

    >>> target = Function(lambda x: -0.5 * x.square().sum(1), dimensions=3)
    >>> target.log_prob(torch.ones(2, 3))
    tensor([-1.5000, -1.5000])
    """

    def __init__(self, function: Callable, dimensions: int | None = None, scale: float | None = None):
        if isinstance(function, partial) and not function.args and not function.keywords:
            function = function.func  # as a configuration names it
        named = function.func if isinstance(function, partial) else function
        named = named if hasattr(named, "__qualname__") else type(named)
        self.name = f"{named.__module__}:{named.__qualname__}"
        if inspect.isclass(function):
            function = function()
        given = dimensions if dimensions is not None else getattr(function, "dimensions", None)
        if given is None:
            raise ValueError(
                f"{self.name} does not say its number of dimensions: give target.dimensions=D, or the function an "
                "attribute 'dimensions'"
            )
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ValueError(f"dimensions={given} of {self.name} must be a whole number of at least 1")
        self.function = getattr(function, "log_prob", function)
        self.dimensions = given
        self.scale = float(scale if scale is not None else getattr(function, "scale", 1.0))
        log_z, self.names = getattr(function, "log_z", None), getattr(function, "names", None)
        self.log_z = None if log_z is None else float(log_z)
        self._sample = getattr(function, "sample", None)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} of {self.name} must be above 0")

    def log_prob(self, x: Tensor) -> Tensor:
        return self.function(x)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        return None if self._sample is None else self._sample(n, generator)
