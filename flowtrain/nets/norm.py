"""Normalization and dropout inside networks. Nothing of it enters a log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowtrain.runtime.globalbatch import RunningMoments, uniform


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


class ActNorm(nn.Module):
    """(x + bias)·exp(log_scale), started from data to mean 0 and variance 1 (Glow's convolutions have it)."""

    floor = 1e-4  # of the standard deviation: a channel may be constant

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x, [0, *range(2, x.dim())], correction=0)
        self.log_scale.copy_(-std.clamp(min=self.floor).log())
        self.bias.copy_(-mean)
        self.started.fill_(True)

    def forward(self, x):
        return (x + per_channel(self.bias, x)) * per_channel(self.log_scale.exp(), x)


class BatchNorm(nn.Module):
    """Batch normalization over the global batch, with learned scale and shift; also without a GPU."""

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
    """Dropout whose mask is drawn for the global batch, the same for any number of processes."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must be at least 0 and below 1")
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = uniform(x.shape, device=x.device) >= self.p
        return x * keep.to(x.dtype).div_(1 - self.p)
