"""normflows (Stimper et al.). Its autoregressive affine layers train in their one-pass direction here; as shipped they
train through the direction of D passes."""

from __future__ import annotations

import normflows as nf
from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from normflows.nets.resnet import ResidualNet
from normflows.utils.splines import unconstrained_rational_quadratic_spline
from torch import nn

from flowtrain.benchmarks.peers.common import TAILS, Flip, Layers, MultiScale, spline_autoregressive, spline_couplings


def maf(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    """Build a MAF. Its networks lack the rectifier after the first layer, so nothing agrees with ours."""
    layers = []
    for _ in range(steps):
        layers += [
            MaskedAffineAutoregressive(dimensions, hidden, num_blocks=1, use_residual_blocks=False),
            Flip(),
        ]
    return Layers(layers)


def nsf_autoregressive(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    return spline_autoregressive(ours, dimensions, hidden, MaskedPiecewiseRationalQuadraticAutoregressive)


def nsf_coupling(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    return spline_couplings(ours, dimensions, hidden, PiecewiseRationalQuadraticCoupling, ResidualNet)


def spline(x, widths, heights, slopes):
    return unconstrained_rational_quadratic_spline(x, widths, heights, slopes, **TAILS)


class _Backwards(nn.Module):
    """Inverts a block: normflows' blocks run from latent to data."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.inverse(x)

    def inverse(self, z):
        return self.block(z)


def glow(side: int, hidden: int, levels: int, steps: int) -> MultiScale:
    return MultiScale(levels, steps, lambda channels, _: [_Backwards(nf.flows.GlowBlock(channels, hidden))])
