"""normflows (Stimper et al.), its autoregressive affine layers trained in their direction of one pass: as shipped, it
trains through the one of D passes."""

from __future__ import annotations

import normflows as nf
import torch
from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from normflows.nets.resnet import ResidualNet
from normflows.utils.splines import unconstrained_rational_quadratic_spline
from torch import nn

from flowtrain.benchmarks.ours import BINS
from flowtrain.benchmarks.peers.parts import Layers, Levels, Turn, as_splines, copy_made, copy_residual

BOUND = 3.0


def maf(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    """Its networks lack the rectifier after the first layer, so that nothing agrees with ours."""
    layers = []
    for _ in range(steps):
        layers += [
            MaskedAffineAutoregressive(dimensions, hidden, num_blocks=1, use_residual_blocks=False),
            Turn(),
        ]
    return Layers(layers)


def nsf_autoregressive(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    layers = []
    for net in ours:
        layer = MaskedPiecewiseRationalQuadraticAutoregressive(
            dimensions, hidden, num_bins=BINS, tails="linear", tail_bound=BOUND, num_blocks=2
        )
        made = layer.autoregressive_net
        copy_made(net, made)
        as_splines(made.final_layer, BINS, False, getattr(made, "hidden_features", None))
        layers += [Turn(), layer]
    return Layers([*layers, Turn()], same=True)


def nsf_coupling(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    layers = []
    for i, net in enumerate(ours):
        layer = PiecewiseRationalQuadraticCoupling(
            torch.tensor([(j + i + 1) % 2 for j in range(dimensions)]),
            lambda inputs, out: ResidualNet(inputs, out, hidden, num_blocks=2),
            num_bins=BINS,
            tails="linear",
            tail_bound=BOUND,
        )
        copy_residual(net, layer.transform_net)
        as_splines(layer.transform_net.final_layer, BINS, True, hidden)
        layers.append(layer)
    return Layers(layers, same=True)


def spline(x, widths, heights, slopes):
    return unconstrained_rational_quadratic_spline(x, widths, heights, slopes, tails="linear", tail_bound=BOUND)


class _Backwards(nn.Module):
    """Its blocks run from latent to data."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.inverse(x)

    def inverse(self, z):
        return self.block(z)


def glow(side: int, hidden: int, levels: int, steps: int) -> Levels:
    return Levels(levels, steps, lambda channels, _: [_Backwards(nf.flows.GlowBlock(channels, hidden))])
