"""Containers for the peers' layers, and copies of our weights into networks that are built like ours."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.benchmarks.ours import BINS

TAILS = {"tails": "linear", "tail_bound": 3.0}  # of a spline, in nflows and normflows


class Peer(nn.Module):
    """A peer's flow: ``forward`` is the log-density under a standard normal base distribution.

    ``same`` is true if it has our flow's weights and so must have our flow's density. ``nets`` are the networks that
    must agree with ours.
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
        """Latent (B, D) -> data (B, …)."""
        raise NotImplementedError


class Layers(Peer):
    """A flow of layers whose ``forward`` and ``inverse`` return an output and its log-determinant."""

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


class Flip(nn.Module):
    """Reverses the elements of a vector."""

    def forward(self, x):
        return x.flip(1), 0.0

    inverse = forward


class MultiScale(Peer):
    """A flow of images: a squeeze and layers at each scale; then half of the channels become latents."""

    def __init__(self, levels: int, steps: int, step):
        """``step(channels, factor)`` returns the layers of one step of flow; ``factor`` is how much smaller than the
        image its input is."""
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
                x, latents = x.chunk(2, 1)
                done.append(latents.flatten(1))
        self.last = x.shape[1:]
        return torch.cat([*done, x.flatten(1)], 1), total

    def decode(self, z):
        sizes = [math.prod(self.last)]
        for _ in self.levels[1:]:
            sizes.insert(0, sizes[0] * (1 if len(sizes) == 1 else 2))
        *done, x = z.split(sizes, 1)
        x = x.unflatten(1, self.last)
        for layers, latents in zip(reversed(self.levels), [None, *reversed(done)]):
            if latents is not None:
                x = torch.cat((x, latents.unflatten(1, x.shape[1:])), 1)
            for layer in reversed(layers):
                x, _ = layer.inverse(x)
            x = F.pixel_shuffle(x, 2)
        return x


@torch.no_grad()
def copy_masked_network(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy the weights and masks of our masked network into one of nflows or normflows."""
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
def copy_residual_network(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy the weights of our residual network into one of nflows or normflows."""
    pairs = [(ours.first, theirs.initial_layer), (ours.last, theirs.final_layer)]
    for one, other, block in zip(ours.ones, ours.others, theirs.blocks, strict=True):
        pairs += [(one, block.linear_layers[0]), (other, block.linear_layers[1])]
    for mine, other in pairs:
        other.load_state_dict(mine.state_dict())


@torch.no_grad()
def convert_spline_parameters(
    layer: nn.Linear, bins: int, params_first: bool, hidden: int | None, min_derivative=1e-3
) -> None:
    """Change a copied network's last layer so that its outputs describe our spline to nflows or normflows.

    Their parameters are grouped by element, those of our couplings by parameter (``params_first``). They divide the
    logits of bins by √hidden, unless it is None. Our slopes are shifted so that 0 means a slope of 1.
    """
    params = 3 * bins - 1
    scale = torch.ones(params)
    scale[: 2 * bins] = math.sqrt(hidden or 1)
    shift = torch.zeros(params)
    shift[2 * bins :] = math.log(math.expm1(1 - min_derivative))
    for parameter, offset in ((layer.weight, 0.0), (layer.bias, shift)):
        by_element = (
            parameter.unflatten(0, (params, -1)).transpose(0, 1)
            if params_first
            else parameter.unflatten(0, (-1, params))
        )
        changed = by_element.movedim(1, -1) * scale + offset
        parameter.copy_(changed.movedim(-1, 1).flatten(0, 1))


def spline_autoregressive(ours, dimensions: int, hidden: int, kind: type[nn.Module]) -> Layers:
    """Build our autoregressive spline flow from a library's layers, with our weights."""
    layers = []
    for net in ours:
        layer = kind(dimensions, hidden, num_blocks=2, num_bins=BINS, **TAILS)
        masked = layer.autoregressive_net
        copy_masked_network(net, masked)
        convert_spline_parameters(masked.final_layer, BINS, False, getattr(masked, "hidden_features", None))
        layers += [Flip(), layer]
    return Layers([*layers, Flip()], same=True)


def spline_couplings(ours, dimensions: int, hidden: int, kind: type[nn.Module], network: type[nn.Module]) -> Layers:
    """Build our flow of spline couplings from a library's layers and residual networks, with our weights."""
    layers = []
    for i, net in enumerate(ours):
        mask = torch.tensor([(j + i + 1) % 2 for j in range(dimensions)])
        layer = kind(mask, lambda inputs, out: network(inputs, out, hidden, num_blocks=2), num_bins=BINS, **TAILS)
        copy_residual_network(net, layer.transform_net)
        convert_spline_parameters(layer.transform_net.final_layer, BINS, True, hidden)
        layers.append(layer)
    return Layers(layers, same=True)
