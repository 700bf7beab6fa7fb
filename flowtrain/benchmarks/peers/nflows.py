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

from flowtrain.benchmarks.ours import BINS, convolutions
from flowtrain.benchmarks.peers.parts import Layers, Levels, Turn, as_splines, copy_made, copy_residual

BOUND = 3.0


def maf(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    """Its scale is a softplus, so that only the networks agree."""
    layers, nets = [], []
    for net in ours:
        layer = MaskedAffineAutoregressiveTransform(dimensions, hidden, num_blocks=1, use_residual_blocks=False)
        copy_made(net, layer.autoregressive_net)
        nets.append(layer.autoregressive_net)
        layers += [layer, Turn()]
    return Layers(layers, nets=nets)


def nsf_autoregressive(ours, dimensions: int, hidden: int, steps: int) -> Layers:
    layers = []
    for net in ours:
        layer = MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
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
        layer = PiecewiseRationalQuadraticCouplingTransform(
            [(j + i + 1) % 2 for j in range(dimensions)],
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


class _Convolutions(nn.Module):
    """With the context that it is handed."""

    def __init__(self, *sizes):
        super().__init__()
        self.net = convolutions(*sizes)

    def forward(self, x, context=None):
        return self.net(x)


def glow(side: int, hidden: int, levels: int, steps: int) -> Levels:
    def step(channels, _):
        mask = [int(i >= channels // 2) for i in range(channels)]
        net = AffineCouplingTransform(mask, lambda inputs, out: _Convolutions(inputs, hidden, out))
        return ActNorm(channels), OneByOneConvolution(channels), net

    return Levels(levels, steps, step)
