"""What a linear regression on the context leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, full_precision, zero_log_det

PENALTIES = [10 ** (k / 2) for k in range(-10, 3)]  # for each row of standardized numbers


class Regression(Bijection):
    """z = x − A·context − b for vectors, with A and b trained. The log-determinant is 0.

    :meth:`start` sets them from data by ridge regression, whose penalty has the least error of leave-one-out
    predictions. A flow after it learns the shape of p(x | context) around a mean that it does not have to find.

    Args:
        shape: (D,).
        context_shape: (C,).

    Raises:
        ValueError: one of them is not a vector's, or there is no context.

    >>> layer = Regression((3,), context_shape=(2,))
    >>> context = torch.randn(50, 2)
    >>> x = context @ torch.randn(2, 3)
    >>> layer.start(x, context)
    >>> layer(x, context)[0].abs().max() < 0.1
    tensor(True)
    """

    starts_with_context = True  # as Flow.initialize does
    started: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        if context_shape is None:
            raise ValueError("a Regression needs a context")
        for name, sizes in {"shape": self.shape, "context_shape": context_shape}.items():
            if len(sizes) != 1:
                raise ValueError(f"a Regression takes vectors; {name} is {list(sizes)}")
        self.weight = nn.Parameter(torch.zeros(self.shape[0], context_shape[0]))
        self.bias = nn.Parameter(torch.zeros(self.shape[0]))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor, context: Tensor, inverse: bool = False) -> None:
        """Set A and b from a batch, which is the input of ``forward``, or of ``inverse``."""
        weight, bias = ridge(x, context)
        sign = -1 if inverse else 1
        self.weight.copy_(sign * weight)
        self.bias.copy_(sign * bias)
        self.started.fill_(True)

    def forward(self, x, context=None):
        with full_precision(x):
            return x - self._mean(context, x), zero_log_det(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            return z + self._mean(context, z), zero_log_det(z)

    def _mean(self, context: Tensor, like: Tensor) -> Tensor:
        return nn.functional.linear(context.to(like.dtype), self.weight, self.bias)


def ridge(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (D, C) and b (D,) of y ≈ A·x + b, for rows y (N, D) and x (N, C), with the penalty in :data:`PENALTIES` whose
    leave-one-out errors, exact from one decomposition, have the least product over dimensions."""
    y, x = y.double(), x.double()
    mean_y, mean_x, scale = y.mean(0), x.mean(0), x.std(0, correction=0)
    scale = scale.where(scale > 1e-6 * x.abs().amax(0), 1)  # of a constant, all is rounding
    u, s, vt = torch.linalg.svd((x - mean_x) / scale, full_matrices=False)
    along = u.T @ (y - mean_y)
    best = torch.inf, s
    for penalty in PENALTIES:
        shrink = s.square() / (s.square() + len(x) * penalty)
        leverage = u.square() @ shrink + 1 / len(x)
        errors = (y - mean_y - u @ (shrink[:, None] * along)) / (1 - leverage).clamp(min=1e-6)[:, None]
        best = min(best, (float(errors.square().mean(0).log().sum()), shrink), key=lambda pair: pair[0])
    weight = (vt.T @ ((best[1] / s.clamp(min=torch.finfo(s.dtype).tiny))[:, None] * along)).T / scale
    return weight, mean_y - weight @ mean_x
