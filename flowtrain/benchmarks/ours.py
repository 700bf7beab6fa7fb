"""The flows that are measured, composed from conf/ as ``flowtrain train`` composes them, and their bare networks.

What a peer lacks or does in a way of its own is left out on all sides: preprocessing, norms between autoregressive
layers, a spline for the half that is seen, Glow's learned priors and the actnorms inside its networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections import Autoregressive, Coupling
from flowtrain.config.build import build, build_flow
from flowtrain.config.compose import compose
from flowtrain.engine.audit import perturb
from flowtrain.flow import Flow

# that of all variants, fused as the trainer has it; hardly learning, so that weights stay put
OPTIMIZER = ("optimizer=adam", "optimizer.lr=1e-6", "+optimizer.fused=true")
VECTOR = ("dataset=miniboone", "model.flow.bijection.layers.preprocess=null", *OPTIMIZER)
IMAGE = ("dataset=synthetic", "model=glow", "model.dropout=0", *OPTIMIZER)
BINS = 8


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


def maf(dimensions: int, hidden: int, steps: int) -> tuple[str, ...]:
    """Autoregressive affine layers, each of a network of two hidden layers, the order turned after each."""
    return (
        "model=maf",
        *VECTOR,
        f"dataset.shape=[{dimensions}]",
        f"model.steps={steps}",
        f"model.hidden={hidden}",
        "model.depth=2",
        "model.step.layers.norm=null",
    )


def nsf_autoregressive(dimensions: int, hidden: int, steps: int) -> tuple[str, ...]:
    """Autoregressive splines of networks of two residual blocks, the order turned before each and at the end."""
    return (
        "model=nsf_autoregressive",
        "mixing=reverse",
        *VECTOR,
        f"dataset.shape=[{dimensions}]",
        f"model.steps={steps}",
        f"model.hidden={hidden}",
        "model.blocks=2",
        f"univariate.bins={BINS}",
    )


def nsf_coupling(dimensions: int, hidden: int, steps: int) -> tuple[str, ...]:
    """Couplings of splines on even and odd dimensions in turn, of networks of two residual blocks."""
    return (
        "model=nsf_coupling",
        *VECTOR,
        f"dataset.shape=[{dimensions}]",
        f"model.pairs={steps // 2}",
        f"model.hidden={hidden}",
        "model.blocks=2",
        f"univariate.bins={BINS}",
        "model.even.unconditional=null",
        "model.odd.unconditional=null",
        "model.pair.layers.mixing_even=null",
        "model.pair.layers.mixing_odd=null",
        "model.flow.bijection.layers.mixing=null",
    )


def glow(side: int, hidden: int, levels: int, steps: int) -> tuple[str, ...]:
    """Actnorm, 1×1 convolution and affine coupling of plain convolutions, on real numbers."""
    return (
        *IMAGE,
        f"dataset.image_size={side}",
        f"model.levels={levels}",
        f"model.steps={steps}",
        f"model.hidden={hidden}",
        "model.net.norm=null",
        "model.split_prior=null",
        "model.last.layers.top=null",
        "model.flow.bijection.layers.preprocess=null",
    )


def shipped_glow(side: int, hidden: int, levels: int, steps: int) -> tuple[str, ...]:
    """Glow as conf/ has it: with dequantization, learned priors and actnorms inside its networks."""
    return (
        *IMAGE,
        f"dataset.image_size={side}",
        f"model.levels={levels}",
        f"model.steps={steps}",
        f"model.hidden={hidden}",
    )


def started(overrides: tuple[str, ...], x: Tensor, seed: int) -> Flow:
    """The flow of a configuration, its weights moved off their neutral start and its norms started from ``x``."""
    flow = build_flow(compose("train", [*overrides, f"seed={seed}"]), x.device)
    with torch.no_grad():
        perturb(flow, x)
    return flow


def optimizer() -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer of every variant from its parameters."""
    return build(compose("train", list(OPTIMIZER)).optimizer)


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
