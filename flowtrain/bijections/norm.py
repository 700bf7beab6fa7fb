"""Normalization as a layer of a flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision
from flowtrain.bijections.channels import ChannelAffine
from flowtrain.runtime.globalbatch import RunningMoments


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to meet (B, C, …)."""
    return v.view(-1, *[1] * (x.dim() - 2))


class ActNorm(ChannelAffine):
    """z = (x + bias)·exp(log_scale) for each channel, started from data (Kingma & Dhariwal 2018, section 3.1).

    ``start`` sets the parameters so that the output for one batch has mean 0 and variance 1 in each channel, in
    whichever direction that batch passes. :meth:`flowtrain.flow.Flow.initialize` calls it; ``forward`` never asks
    whether it has been.
    """

    joins = True
    floor = 1e-4  # of the standard deviation: a channel may be constant

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.log_scale = nn.Parameter(torch.zeros(self.shape[0]))
        self.bias = nn.Parameter(torch.zeros(self.shape[0]))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor, inverse: bool = False) -> None:
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

    def inverse(self, z, context=None):
        with full_precision(z):
            x = z * per_channel((-self.log_scale).exp(), z) - per_channel(self.bias, z)
            return x, constant_log_det(-self.pixels * self.log_abs_det(), z)

    def affine(self, like):
        scale = self.log_scale.exp()
        return torch.diag(scale), scale * self.bias

    def before(self, weight, bias):
        weight = weight * self.log_scale.exp()
        own = weight.mv(self.bias)
        return weight, own if bias is None else bias + own

    def log_abs_det(self):
        return self.log_scale.sum()


class BatchNorm(Bijection):
    """z = (x − mean)/√(var + eps) for each channel (Dinh et al. 2017, section 3.7; Papamakarios et al. 2017).

    The moments are the global batch's in training, with gradients through them, and remembered ones in evaluation;
    the log-determinant is that of whichever were used. The inverse always uses the remembered ones. It has
    no weights of its own: an ``Elementwise`` after it adds a learned scale and shift, where a paper has them.
    """

    def __init__(self, shape, eps: float = 1e-4, momentum: float = 0.1, context_shape=None):
        super().__init__(shape, context_shape)
        self.pixels = math.prod(self.shape[1:])
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0")
        self.eps = eps
        self.running = RunningMoments(self.shape[0], momentum)

    def forward(self, x, context=None):
        with full_precision(x):
            mean, var = self.running(x)
            log_scale = -0.5 * (var + self.eps).log()
            z = (x - per_channel(mean, x)) * per_channel(log_scale.exp(), x)
            return z, constant_log_det(self.pixels * log_scale.sum(), x)

    def inverse(self, z, context=None):
        with full_precision(z):
            log_scale = 0.5 * (self.running.var + self.eps).log()
            x = z * per_channel(log_scale.exp(), z) + per_channel(self.running.mean, z)
            return x, constant_log_det(self.pixels * log_scale.sum(), z)
