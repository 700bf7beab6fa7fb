"""nflows (Durkan et al.)."""

from __future__ import annotations

from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    OneByOneConvolution,
    PiecewiseRationalQuadraticCouplingTransform,
)
from nflows.transforms.splines import unconstrained_rational_quadratic_spline
from torch import nn

from flowtrain.benchmarks.ours import convolutions
from flowtrain.benchmarks.peers.common import (
    TAILS,
    Flip,
    Layers,
    MultiScale,
    copy_masked_network,
    spline_autoregressive,
    spline_couplings,
)


def maf(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    """Build a MAF. Its scale is a softplus, so only its networks agree with ours."""
    layers, nets = [], []
    for net in ours:
        layer = MaskedAffineAutoregressiveTransform(dimensions, hidden, num_blocks=1, use_residual_blocks=False)
        copy_masked_network(net, layer.autoregressive_net)
        nets.append(layer.autoregressive_net)
        layers += [layer, Flip()]
    return Layers(layers, nets=nets)


def nsf_autoregressive(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    return spline_autoregressive(ours, dimensions, hidden, MaskedPiecewiseRationalQuadraticAutoregressiveTransform)


def nsf_coupling(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    return spline_couplings(ours, dimensions, hidden, PiecewiseRationalQuadraticCouplingTransform, ResidualNet)


def spline(x, widths, heights, slopes):
    return unconstrained_rational_quadratic_spline(x, widths, heights, slopes, **TAILS)


class _Convolutions(nn.Module):
    """Our convolutions, with nflows' argument ``context``."""

    def __init__(self, *sizes):
        super().__init__()
        self.net = convolutions(*sizes)

    def forward(self, x, context=None):
        return self.net(x)


def glow(side: int, hidden: int, levels: int, steps: int) -> MultiScale:
    def step(channels, _):
        mask = [int(i >= channels // 2) for i in range(channels)]
        net = AffineCouplingTransform(mask, lambda inputs, out: _Convolutions(inputs, hidden, out))
        return ActNorm(channels), OneByOneConvolution(channels), net

    return MultiScale(levels, steps, step)
