"""The flows that the suites measure, and their bare networks.

The flows lack what some peer lacks or does differently: preprocessing, norms between autoregressive layers, a spline
for the conditioning half, Glow's learned priors, and the actnorms inside its networks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain import flows
from flowtrain.bijections import Autoregressive, Coupling, RationalQuadratic, Reverse
from flowtrain.engine.audit import perturb
from flowtrain.flow import Flow

BINS = 8
SPLINE = partial(RationalQuadratic, bins=BINS)

# the optimizer of all variants; its rate is so small that the weights hardly change
optimizer = partial(torch.optim.Adam, lr=1e-6, fused=True)


class AsPeer(nn.Module):
    """Gives a flow a peer's interface: ``encode`` also returns the log-determinant, ``decode`` is differentiable."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow, self.shape = flow, flow.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.bijection(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.flow.bijection.inverse(z)[0]


def maf(dimensions: int, hidden: int, steps: int) -> Flow:
    """Build autoregressive affine layers with networks of two hidden layers; the order is reversed after each."""
    return flows.maf((dimensions,), steps=steps, hidden=hidden, norm=None)


def nsf_autoregressive(dimensions: int, hidden: int, steps: int) -> Flow:
    """Build autoregressive splines with networks of two residual blocks; the order is reversed before each and at the
    end."""
    return flows.nsf_autoregressive((dimensions,), steps=steps, hidden=hidden, univariate=SPLINE, mixing=Reverse)


def nsf_coupling(dimensions: int, hidden: int, steps: int) -> Flow:
    """Build spline couplings that transform even and odd dimensions in turn, with networks of two residual blocks."""
    return flows.nsf_coupling(
        (dimensions,), pairs=steps // 2, hidden=hidden, univariate=SPLINE, unconditional=False, mixing=None
    )


def glow(side: int, hidden: int, levels: int, steps: int) -> Flow:
    """Build a Glow of actnorms, 1×1 convolutions and affine couplings with plain convolutions, for real numbers."""
    sizes = {"levels": levels, "steps": steps, "hidden": hidden}
    return flows.glow((3, side, side), **sizes, dropout=0.0, net_norm=False, learned_prior=False)


def whole_glow(side: int, hidden: int, levels: int, steps: int) -> Flow:
    """Build a Glow for 256 grey levels with dequantization, learned priors, and actnorms inside its networks."""
    sizes = {"levels": levels, "steps": steps, "hidden": hidden}
    return flows.glow((3, side, side), **sizes, dropout=0.0, preprocess=partial(flows.parts.center, grey_levels=256))


def build_perturbed(make: Callable[[], Flow], x: Tensor, seed: int) -> Flow:
    """Build a flow, move its weights away from their neutral start, and initialize its norms from ``x``."""
    torch.manual_seed(seed)
    flow = make().to(x.device)
    perturb(flow, x)
    return flow


def networks(flow: Flow) -> list[nn.Module]:
    """The conditioner networks of a flow's layers, in order."""
    return [module.net for module in flow.modules() if isinstance(module, Autoregressive | Coupling)]


# Bare networks: the conditioners' dense networks, applied one after another, without masks, maps or log-determinants.


class Bare(nn.Module):
    """Dense networks in sequence. ``forward`` returns one number for each example, which depends on every output of
    every network, in place of a log-density."""

    def __init__(self, nets, params: int, first: slice = slice(None)):
        super().__init__()
        self.nets, self.params, self.first = nn.ModuleList(nets), params, first

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, self.first]
        for net in self.nets:
            h = net(h).unflatten(1, (-1, self.params)).sum(2)
        return -h.square().flatten(1).mean(1)


class BareMultiScale(nn.Module):
    """Convolutional networks in sequence, scale by scale.

    A squeeze starts each scale. Sums of channels reduce its output to the number of channels that the networks take.
    """

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(nets) for nets in levels)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for nets in self.levels:
            h = F.pixel_unshuffle(h, 2).unflatten(1, (2, -1)).sum(1)
            for net in nets:
                h = net(h).unflatten(1, (2, -1)).sum(1)
        return -h.square().flatten(1).mean(1)


def bare_maf(dimensions: int, hidden: int, steps: int) -> Bare:
    def net():
        return nn.Sequential(
            nn.Linear(dimensions, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * dimensions),
        )

    return Bare((net() for _ in range(steps)), 2)


class _Block(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h):
        return h + self.second(F.relu(self.first(F.relu(h))))


def _residual(inputs: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), _Block(hidden), _Block(hidden), nn.Linear(hidden, out))


def bare_nsf_autoregressive(dimensions: int, hidden: int, steps: int) -> Bare:
    params = 3 * BINS - 1
    return Bare((_residual(dimensions, hidden, params * dimensions) for _ in range(steps)), params)


def bare_nsf_coupling(dimensions: int, hidden: int, steps: int) -> Bare:
    params, sizes = 3 * BINS - 1, (dimensions // 2, dimensions - dimensions // 2)  # odd ones, even ones
    nets = (_residual(sizes[i % 2], hidden, params * sizes[1 - i % 2]) for i in range(steps))
    return Bare(nets, params, slice(1, None, 2))


def convolutions(inputs: int, hidden: int, out: int) -> nn.Sequential:
    """Build Glow's conditioner without norms: convolutions with kernels of 3, 1 and 3."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, out, 3, padding=1),
    )


def bare_glow(side: int, hidden: int, levels: int, steps: int) -> BareMultiScale:
    halves = [3 * 2**level * 2 for level in range(levels)]  # half of a scale's channels
    return BareMultiScale([convolutions(half, hidden, 2 * half) for _ in range(steps)] for half in halves)
