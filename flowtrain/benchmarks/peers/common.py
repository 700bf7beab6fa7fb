"""What the peers' flows are put together with, and our weights for networks that are built like ours."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.benchmarks.ours import BINS

TAILS = {"tails": "linear", "tail_bound": 3.0}  # of a spline, as the bayesiains family says it


class Peer(nn.Module):
    """A peer's flow: ``forward`` is the log-density under a standard normal latent.

    ``same`` says whether it has our flow's weights and with them our flow's density; ``nets`` are those of its networks
    that must give what ours give.
    """

    same = False
    nets: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.encode(x)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data (B, …) -> latent (B, D), log-determinant (B,)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Layers(Peer):
    """Layers whose ``forward`` and ``inverse`` give their output and its log-determinant."""

    def __init__(self, layers, same: bool = False, nets=()):
        super().__init__()
        self.layers, self.same, self.nets = nn.ModuleList(layers), same, tuple(nets)

    def encode(self, x):
        total = 0.0
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def decode(self, z):
        for layer in reversed(self.layers):
            z, _ = layer.inverse(z)
        return z


class Turn(nn.Module):
    """The order of a vector's elements turned round."""

    def forward(self, x):
        return x.flip(1), 0.0

    inverse = forward


class Levels(Peer):
    """Images: at each level a squeeze and layers, then the second half of the channels leaves."""

    def __init__(self, levels: int, steps: int, step):
        """``step(channels, side)`` gives the layers of one step, ``side`` counted in halvings of the image's."""
        super().__init__()
        channels = [3 * 2 ** (level + 2) for level in range(levels)]
        self.levels = nn.ModuleList(
            nn.ModuleList(layer for _ in range(steps) for layer in step(count, 2 ** (level + 1)))
            for level, count in enumerate(channels)
        )

    def encode(self, x):
        total, done = 0.0, []
        for level, layers in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for layer in layers:
                x, log_det = layer(x)
                total = total + log_det
            if level < len(self.levels) - 1:
                x, leaves = x.chunk(2, 1)
                done.append(leaves.flatten(1))
        self.last = x.shape[1:]
        return torch.cat([*done, x.flatten(1)], 1), total

    def decode(self, z):
        sizes = [math.prod(self.last)]
        for _ in self.levels[1:]:
            sizes.insert(0, sizes[0] * (1 if len(sizes) == 1 else 2))
        *done, x = z.split(sizes, 1)
        x = x.unflatten(1, self.last)
        for layers, leaves in zip(reversed(self.levels), [None, *reversed(done)]):
            if leaves is not None:
                x = torch.cat((x, leaves.unflatten(1, x.shape[1:])), 1)
            for layer in reversed(layers):
                x, _ = layer.inverse(x)
            x = F.pixel_shuffle(x, 2)
        return x


@torch.no_grad()
def copy_made(ours: nn.Module, theirs: nn.Module) -> None:
    """Give a masked network of the bayesiains family the weights, and so the masks, of one of ours."""
    blocks = [getattr(block, "linear_layers", None) or [block.linear] for block in theirs.blocks]
    layers = [theirs.initial_layer, *(layer for block in blocks for layer in block), theirs.final_layer]
    for mine, other in zip(ours.linears, layers, strict=True):
        mine = copy.deepcopy(mine).double()
        eye = torch.eye(mine.in_features, dtype=torch.float64, device=mine.weight.device)
        bias = mine(torch.zeros_like(eye[:1]))
        weight = (mine(eye) - bias).T
        other.weight.copy_(weight)
        other.mask.copy_(weight != 0)
        other.bias.copy_(bias[0])


@torch.no_grad()
def copy_residual(ours: nn.Module, theirs: nn.Module) -> None:
    """The same for a dense residual network."""
    pairs = [(ours.first, theirs.initial_layer), (ours.last, theirs.final_layer)]
    for one, other, block in zip(ours.ones, ours.others, theirs.blocks, strict=True):
        pairs += [(one, block.linear_layers[0]), (other, block.linear_layers[1])]
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())


@torch.no_grad()
def as_splines(layer: nn.Linear, bins: int, params_first: bool, hidden: int | None, min_derivative=1e-3) -> None:
    """Change the last layer of a copied network so that its outputs mean in the bayesiains family what they mean to us.

    Theirs come element by element, ours of a coupling parameter by parameter (``params_first``); logits of bins are
    divided by √hidden there (None: not); our slopes are shifted so that 0 is a slope of 1.
    """
    params = 3 * bins - 1
    scale = torch.ones(params)
    scale[: 2 * bins] = math.sqrt(hidden or 1)
    shift = torch.zeros(params)
    shift[2 * bins :] = math.log(math.expm1(1 - min_derivative))
    for parameter, plus in ((layer.weight, 0.0), (layer.bias, shift)):
        by_element = (
            parameter.unflatten(0, (params, -1)).transpose(0, 1)
            if params_first
            else parameter.unflatten(0, (-1, params))
        )
        changed = by_element.movedim(1, -1) * scale + plus
        parameter.copy_(changed.movedim(-1, 1).flatten(0, 1))


def spline_autoregressive(ours, dimensions: int, hidden: int, kind: type[nn.Module]) -> Layers:
    """Our autoregressive spline flow of a family's layers of that ``kind``."""
    layers = []
    for net in ours:
        layer = kind(dimensions, hidden, num_blocks=2, num_bins=BINS, **TAILS)
        made = layer.autoregressive_net
        copy_made(net, made)
        as_splines(made.final_layer, BINS, False, getattr(made, "hidden_features", None))
        layers += [Turn(), layer]
    return Layers([*layers, Turn()], same=True)


def spline_couplings(ours, dimensions: int, hidden: int, kind: type[nn.Module], network: type[nn.Module]) -> Layers:
    """Our flow of spline couplings of a family's ``kind``, with its residual ``network``."""
    layers = []
    for i, net in enumerate(ours):
        moves = torch.tensor([(j + i + 1) % 2 for j in range(dimensions)])
        layer = kind(moves, lambda inputs, out: network(inputs, out, hidden, num_blocks=2), num_bins=BINS, **TAILS)
        copy_residual(net, layer.transform_net)
        as_splines(layer.transform_net.final_layer, BINS, True, hidden)
        layers.append(layer)
    return Layers(layers, same=True)
