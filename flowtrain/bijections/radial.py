"""Radial Gaussianization: the norm of an event to that of normal noise."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, full_precision, size
from flowtrain.bijections.columns.quantile import QuantileColumns

TINY = 1e-30  # least square of a norm


class Radial(Bijection):
    """y = x·|y|/|x|, with log|y| a monotone spline of log|x| that takes the quantiles of the norms of a batch to those
    of the norms of standard normal events (Lyu and Simoncelli 2009, section 3).

    Of events that are alike in all directions, such as whitened patches of photographs whose contrasts differ by orders
    of magnitude, it makes normal ones. :meth:`flowtrain.flow.Flow.initialize` starts it; before, it is the identity. It
    has no parameters. The log-determinant is D·log(|y|/|x|) + log(d log|y| / d log|x|).

    Args:
        shape: of one event.
        bins: of the spline.
        context_shape: not used.

    Raises:
        ValueError: ``bins`` below 2.

    >>> layer = Radial((3,))
    >>> layer.start(torch.randn(1000, 3) * torch.rand(1000, 1))
    >>> layer(torch.randn(5, 3))[1].shape
    torch.Size([5])
    """

    started: Tensor

    def __init__(self, shape, bins: int = 32, context_shape=None):
        super().__init__(shape, context_shape)
        self.spline = QuantileColumns((1,), bins)
        self.register_buffer("started", torch.tensor(False))

    def layers(self):
        return {}  # the spline is of norms, not of events

    @torch.no_grad()
    def start(self, x: Tensor, inverse: bool = False) -> None:
        """Fit the spline to the norms of a batch, which is the input of ``forward``, or of ``inverse``."""
        from scipy.special import gammaincinv  # brings all of scipy

        reach = torch.special.ndtri(torch.tensor(1 - 0.5 / (len(x) + 1), dtype=torch.float64)).clamp(max=3)
        shares = torch.special.ndtr(reach * torch.linspace(-1, 1, self.spline.x.shape[1], dtype=torch.float64))
        own = torch.quantile(log_norm(x)[:, 0].double().cpu(), shares)
        normal = torch.from_numpy(2 * gammaincinv(size(self.shape) / 2, shares.numpy())).log() / 2
        self.spline.fit_column(0, *((normal, own) if inverse else (own, normal)))
        self.started.fill_(True)

    def forward(self, x, context=None):
        return self._scale(x, self.spline)

    def inverse(self, z, context=None):
        return self._scale(z, self.spline.inverse)

    def _scale(self, x, spline):
        with full_precision(x):
            before = log_norm(x)
            after, log_slope = spline(before)
            longer = (after - before)[:, 0]
            y = x * longer.exp().view(-1, *[1] * (x.dim() - 1))
            return y, size(self.shape) * longer + log_slope


def log_norm(x: Tensor) -> Tensor:
    """log|x| of each event, (B, 1)."""
    return x.flatten(1).square().sum(1, keepdim=True).clamp(min=TINY).log() / 2
