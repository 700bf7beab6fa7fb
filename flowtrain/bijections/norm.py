"""Normalization as a layer of a flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision
from flowtrain.bijections.channels import ChannelAffine, Maps, add, apply
from flowtrain.bijections.native.vector_affine import SCALE, Step
from flowtrain.runtime.global_batch import RunningMoments


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v (C,) as a view that broadcasts with x (B, C, …)."""
    return v.view(-1, *[1] * (x.dim() - 2))


class ActNorm(ChannelAffine):
    """z = (x + bias)·exp(log_scale) for each channel, started from data (Kingma & Dhariwal 2018, section 3.1).

    :meth:`start` sets the parameters so that the output for one batch has mean 0 and variance 1 in each channel, in
    the direction in which that batch passes. :meth:`flowtrain.flow.Flow.initialize` calls it. ``forward`` does not
    test whether it was called. The log-determinant is pixels · Σ log_scale.

    >>> layer = ActNorm((3, 8, 8))
    >>> layer.start(5 + 2 * torch.randn(16, 3, 8, 8))
    >>> layer(torch.randn(16, 3, 8, 8))[0].shape
    torch.Size([16, 3, 8, 8])
    """

    fusible = reversible = True
    floor = 1e-4  # of the standard deviation: a channel may be constant
    started: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.log_scale = nn.Parameter(torch.zeros(self.shape[0]))
        self.bias = nn.Parameter(torch.zeros(self.shape[0]))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor, inverse: bool = False) -> None:
        """Set the parameters from a batch, which is the input of ``forward``, or of ``inverse``."""
        std, mean = torch.std_mean(x, [0, *range(2, x.dim())], correction=0)
        log_std = std.clamp(min=self.floor).log()
        # inverse: x·exp(−log_scale) − bias has mean 0 and variance 1
        self.log_scale.copy_(log_std if inverse else -log_std)
        self.bias.copy_(mean * (-log_std).exp() if inverse else -mean)
        self.started.fill_(True)

    def forward(self, x, context=None):
        with full_precision(x):
            z = (x + per_channel(self.bias, x)) * per_channel(self.log_scale.exp(), x)
            return z, constant_log_det(self.pixels * self.log_abs_det(), x)

    def log_derivatives(self, x, context=None):
        return self(x)[0], per_channel(self.log_scale, x).expand_as(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            x = z * per_channel((-self.log_scale).exp(), z) - per_channel(self.bias, z)
            return x, constant_log_det(-self.pixels * self.log_abs_det(), z)

    def maps(self):
        return _Scales(self.log_scale, self.bias)

    def vector_step(self):
        return Step(SCALE, first=self.bias, second=self.log_scale)


class _Scales(Maps):
    """Of ``log_scale`` and ``bias``."""

    def affine(self, like):
        log_scale, bias = self.tensors
        scale = log_scale.exp()
        return torch.diag_embed(scale), scale * bias

    def then(self, weight, bias):
        log_scale, own = self.tensors
        weight = weight * log_scale.exp().unsqueeze(-2)
        return weight, add(apply(weight, own), bias)

    def log_abs_det(self):
        return self.tensors[0].sum(-1)


class BatchNorm(Bijection):
    """z = (x − mean)/√(var + eps) for each channel (Dinh et al. 2017, section 3.7; Papamakarios et al. 2017).

    The moments are the global batch's in training, with gradients through them, and running ones in evaluation. The
    log-determinant is that of the moments used. The inverse always uses the running ones. There are no weights: an
    ``Elementwise`` after this layer adds a learned scale and shift, where a paper has them.

    Args:
        shape: of one event.
        eps: added to the variance.
        momentum: weight of a new batch in the running moments, in (0, 1].
        context_shape: not used.

    Raises:
        ValueError: ``eps`` not above 0, or ``momentum`` outside (0, 1].

    >>> BatchNorm((3, 8, 8))(torch.randn(16, 3, 8, 8))[0].shape
    torch.Size([16, 3, 8, 8])
    """

    def __init__(self, shape, eps: float = 1e-4, momentum: float = 0.1, context_shape=None):
        super().__init__(shape, context_shape)
        self.pixels = math.prod(self.shape[1:])
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0")
        self.eps = eps
        self.running = RunningMoments(self.shape[0], momentum)

    def forward(self, x, context=None):
        z, log_scale = self._normalize(x)
        return z, constant_log_det(self.pixels * log_scale.sum(), x)

    def log_derivatives(self, x, context=None):
        z, log_scale = self._normalize(x)
        return z, per_channel(log_scale, x).expand_as(x)

    def _normalize(self, x):
        with full_precision(x):
            mean, var = self.running(x)
            log_scale = -0.5 * (var + self.eps).log()
            return (x - per_channel(mean, x)) * per_channel(log_scale.exp(), x), log_scale

    def inverse(self, z, context=None):
        with full_precision(z):
            log_scale = 0.5 * (self.running.var + self.eps).log()
            x = z * per_channel(log_scale.exp(), z) + per_channel(self.running.mean, z)
            return x, constant_log_det(self.pixels * log_scale.sum(), z)
