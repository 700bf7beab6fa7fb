"""FrEIA (Ardizzone et al.). Its block has a fixed rotation of the channels, where Glow learns a 1×1 convolution."""

from __future__ import annotations

from FrEIA.modules import AllInOneBlock
from torch import nn

from flowtrain.benchmarks.ours import convolutions
from flowtrain.benchmarks.peers.common import MultiScale


class _Block(nn.Module):
    def __init__(self, shape, hidden: int):
        super().__init__()
        self.block = AllInOneBlock(
            [shape], subnet_constructor=lambda inputs, out: convolutions(inputs, hidden, out), permute_soft=True
        )

    def forward(self, x):
        (z,), log_det = self.block([x])
        return z, log_det

    def inverse(self, z):
        (x,), log_det = self.block([z], rev=True)
        return x, log_det


def glow(side: int, hidden: int, levels: int, steps: int) -> MultiScale:
    def step(channels, factor):
        return [_Block((channels, side // factor, side // factor), hidden)]

    return MultiScale(levels, steps, step)
