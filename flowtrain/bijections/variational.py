"""Variational dequantization: noise from a flow of its own, which depends on the integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, build, full_precision, sum_event
from flowtrain.bijections.preprocess import Dequantize
from flowtrain.runtime import global_batch, modes


class VariationalDequantize(Dequantize):
    """Integers x in 0 … grey_levels − 1 to (x + ε)/grey_levels, ε in [0, 1)^D from a flow q(ε | x) (Ho et al. 2019,
    section 3.1).

    A uniform u becomes ε = sigmoid(noise(logit(u))), where the layers of ``noise`` depend on x through the network
    ``net``. The log-determinant is −log q(ε | x) − D·log(grey_levels). So E[log p] is a lower bound of log P(x) for
    every q, and the nearer to it, the more alike q(ε | x) and p(x + ε) are. Layers that are the identity, as new
    couplings are, make uniform noise, that of :class:`Dequantize`. Noise is only ever drawn: ``noise`` runs forward.

    Where ``Flow.encode`` asks for the centres of bins, and in ``inverse``, this is :class:`Dequantize`.

    Args:
        shape: of one event.
        grey_levels: of the integers.
        noise: factory of a bijection of the real line in each dimension that keeps its shape, called with ``shape`` and
            ``context_shape``, the shape of what ``net`` returns.
        net: factory of a network called with ``context_shape``, here that of x, which maps x, scaled to [−1, 1], to
            (B, *net.out_shape).
        context_shape: not used: ε depends on x alone.

    Raises:
        ValueError: what :class:`Dequantize` refuses; a ``noise`` that changes its shape, or is a surjection.
        FloatingPointError: in ``inverse``, for NaN, which no integer can represent.

    >>> from functools import partial
    >>> from flowtrain import bijections as b, nets
    >>> noise = partial(b.Coupling, univariate=b.ExpAffine, net=nets.MLP)
    >>> layer = VariationalDequantize((2,), grey_levels=256, noise=noise, net=partial(nets.Features, features=4))
    >>> layer.inverse(layer(torch.tensor([[0, 255]]))[0])[0]
    tensor([[  0, 255]], dtype=torch.uint8)
    """

    log_derivatives = Bijection.log_derivatives  # the noise of an element may depend on all others

    def __init__(
        self,
        shape,
        grey_levels: int,
        noise: Callable[..., Bijection],
        net: Callable[..., nn.Module],
        context_shape=None,
    ):
        super().__init__(shape, grey_levels, context_shape)
        self.net = build("net", net, context_shape=self.shape)
        self.noise = build("noise", noise, shape=self.shape, context_shape=self.net.out_shape)
        if self.noise.out_shape != self.shape:
            raise ValueError(f"noise: takes layers that keep the shape, not {self.noise.extra_repr()}")
        if not self.noise.exact:
            raise ValueError("noise: takes bijections, not a surjection")

    def forward(self, x, context=None):
        if modes.current().bin_centres:
            return super().forward(x)
        x = x.to(self.anchor.dtype)
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
        features = self.net((2 * x + 1) / self.grey_levels - 1).to(x.dtype)
        with full_precision(x):
            u = u.clamp(min=torch.finfo(x.dtype).eps / 2)
            logits = u.log() - torch.log1p(-u)
            line, log_det = self.noise(logits, features)
            log_q = sum_event(_log_slope(line) - _log_slope(logits)) - log_det
            return self.into_bin(x, torch.sigmoid(line)), self.log_det - log_q


def _log_slope(logits: Tensor) -> Tensor:
    """The logarithm of the slope of the logit where it has these values."""
    return F.softplus(logits) + F.softplus(-logits)
