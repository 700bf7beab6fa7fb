"""The flows that are measured, and their bare networks.

What a peer lacks or does in a way of its own is left out on all sides: preprocessing, norms between autoregressive
layers, a spline for the half that is seen, Glow's learned priors and the actnorms inside its networks.
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

# that of all variants; it hardly learns, so that weights stay put
optimizer = partial(torch.optim.Adam, lr=1e-6, fused=True)


class Encoded(nn.Module):
    """A flow with the peers' three methods: ``encode`` gives the log-determinant too, ``decode`` takes gradients."""

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
    """Autoregressive affine layers, each with a network of two hidden layers, the order reversed after each."""
    return flows.maf((dimensions,), steps=steps, hidden=hidden, norm=None)


def nsf_autoregressive(dimensions: int, hidden: int, steps: int) -> Flow:
    """Autoregressive splines with networks of two residual blocks, the order reversed before each and at the end."""
    return flows.nsf_autoregressive((dimensions,), steps=steps, hidden=hidden, univariate=SPLINE, mixing=Reverse)


def nsf_coupling(dimensions: int, hidden: int, steps: int) -> Flow:
    """Couplings of splines on even and odd dimensions in turn, with networks of two residual blocks."""
    return flows.nsf_coupling(
        (dimensions,), pairs=steps // 2, hidden=hidden, univariate=SPLINE, unconditional=False, mixing=None
    )


def glow(side: int, hidden: int, levels: int, steps: int) -> Flow:
    """Actnorm, 1×1 convolution and affine coupling of plain convolutions, on real numbers."""
    sizes = {"levels": levels, "steps": steps, "hidden": hidden}
    return flows.glow((3, side, side), **sizes, dropout=0.0, net_norm=False, learned_prior=False)


def whole_glow(side: int, hidden: int, levels: int, steps: int) -> Flow:
    """Glow of 256 grey levels: with dequantization, learned priors and actnorms inside its networks."""
    sizes = {"levels": levels, "steps": steps, "hidden": hidden}
    return flows.glow((3, side, side), **sizes, dropout=0.0, preprocess=partial(flows.center, grey_levels=256))


def started(make: Callable[[], Flow], x: Tensor, seed: int) -> Flow:
    """The flow that ``make`` builds, its weights moved off their neutral start and its norms started from ``x``."""
    torch.manual_seed(seed)
    flow = make().to(x.device)
    perturb(flow, x)
    return flow


def networks(flow: Flow) -> list[nn.Module]:
    """The conditioners of a flow's layers, in order."""
    return [module.net for module in flow.modules() if isinstance(module, Autoregressive | Coupling)]


# Bare networks: the conditioners' dense networks, one on what the other gives, with no mask, map or log-determinant.


class Bare(nn.Module):
    """``forward`` stands for a log-density: a number for each example that every output of every network goes into."""

    def __init__(self, nets, params: int, first: slice = slice(None)):
        super().__init__()
        self.nets, self.params, self.first = nn.ModuleList(nets), params, first

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, self.first]
        for net in self.nets:
            h = net(h).unflatten(1, (-1, self.params)).sum(2)
        return -h.square().flatten(1).mean(1)


class BareLevels(nn.Module):
    """Bare convolutions, level after level: between two, what was squeezed is folded onto as many channels as the next
    one's networks take."""

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
        self.one, self.other = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h):
        return h + self.other(F.relu(self.one(F.relu(h))))


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
    """Glow's conditioner of plain layers."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, out, 3, padding=1),
    )


def bare_glow(side: int, hidden: int, levels: int, steps: int) -> BareLevels:
    halves = [3 * 2**level * 2 for level in range(levels)]  # half of a level's channels
    return BareLevels([convolutions(half, hidden, 2 * half) for _ in range(steps)] for half in halves)
