"""Normalization and dropout inside networks. They do not enter the log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowtrain.runtime.global_batch import RunningMoments, dropout_mask


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v (C,) in x's dtype as a view that broadcasts with x (B, C, …)."""
    return v.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


class ActNorm(nn.Module):
    """(x + bias)·exp(log_scale) for each channel, started from data to mean 0 and variance 1 (Kingma & Dhariwal 2018,
    reference code). See :meth:`flowtrain.flow.Flow.initialize`.

    >>> ActNorm(4)(torch.randn(5, 4, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    floor = 1e-4  # of the standard deviation: a channel may be constant
    started: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set the parameters from a batch (B, C, …)."""
        std, mean = torch.std_mean(x, [0, *range(2, x.dim())], correction=0)
        self.log_scale.copy_(-std.clamp(min=self.floor).log())
        self.bias.copy_(-mean)
        self.started.fill_(True)

    def forward(self, x):
        return (x + per_channel(self.bias, x)) * per_channel(self.log_scale.exp(), x)


class BatchNorm(nn.Module):
    """Batch normalization over the global batch, with learned scale and shift (Ioffe & Szegedy 2015), on any device.

    Raises:
        ValueError: ``eps`` not above 0, or ``momentum`` outside (0, 1].

    >>> BatchNorm(4)(torch.randn(5, 4, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(self, channels: int, eps: float = 1e-4, momentum: float = 0.1):
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0")
        self.eps = eps
        self.running = RunningMoments(channels, momentum)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean, var = self.running(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * per_channel(scale, x) + per_channel(self.bias - mean * scale, x)


class Dropout(nn.Module):
    """Dropout with probability ``p``. The mask is drawn for the global batch: the same for any number of processes.
    Before a rectifier it computes the same as after it, and less is kept for the gradient: the output and no sign.

    Raises:
        ValueError: ``p`` outside [0, 1).

    >>> Dropout(0.5).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must be at least 0 and below 1")
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return x * dropout_mask(x, self.p)
