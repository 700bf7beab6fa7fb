"""Multi-scale flows: after each scale half of the channels is split off (Dinh et al. 2017, section 3.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flowtrain.bijections.bijection import Bijection, build, size


class MultiScale(Bijection):
    """(C, H, W) -> (D,), D = CHW: the channels split off after each scale and the output of the last, side by side.

    At each scale but the last, the first half of the channels goes on to the next scale and the second half is split
    off, through ``split_prior`` if there is one.

    Args:
        shape: of one event.
        levels: number of scales.
        level: factory of each scale, squeeze included, or a mapping level0, level1, … where they differ.
        last: factory of the last scale; by default ``level``.
        split_prior: factory of a bijection of the half that is split off, whose context is the half that goes on: with
            ``Conditional`` it is Glow's learned prior (Kingma & Dhariwal 2018, reference code). None: the identity.
        context_shape: of a context that every scale gets, or None.

    Raises:
        ValueError: ``levels`` below 1, a scale that the mapping lacks, a scale with one channel, or what a layer
            refuses, with the layer's name.

    >>> from functools import partial
    >>> from flowtrain import bijections as b
    >>> scale = partial(b.Chain, layers={"squeeze": b.Squeeze, "mixing": b.LULinear})
    >>> MultiScale((3, 8, 8), levels=2, level=scale)(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 192])
    """

    container = True

    def __init__(
        self,
        shape,
        levels: int,
        level: Callable[..., Bijection] | Mapping[str, Callable[..., Bijection]],
        last: Callable[..., Bijection] | None = None,
        split_prior: Callable[..., Bijection] | None = None,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1")
        each = level if isinstance(level, Mapping) else {f"level{i}": level for i in range(levels)}
        names = [f"level{i}" for i in range(levels)]
        if last is not None:
            each, names = {**each, "last": last}, [*names[:-1], "last"]
        if missing := [name for name in names if name not in each]:
            raise ValueError(f"levels={levels} needs {', '.join(missing)} too")
        self.names = names
        event = self.shape
        self.split_shapes: list[tuple[int, ...]] = []  # of the parts of the output
        for name in names:
            layer = build(name, each[name], shape=event, context_shape=context_shape)
            self.add_module(name, layer)
            event = layer.out_shape
            if name == names[-1]:
                break
            channels, *rest = event
            if channels < 2:
                raise ValueError(f"{name}: {channels} channel cannot be halved; squeeze first")
            event, split_off = (channels - channels // 2, *rest), (channels // 2, *rest)
            self.split_shapes.append(split_off)
            if split_prior is not None:
                prior = f"split_prior_{name}"
                self.add_module(prior, build(prior, split_prior, shape=split_off, context_shape=event))
        self.split_shapes.append(event)
        self.out_shape = (size(self.shape),)
        self.exact = all(layer.exact for layer in self.layers().values())

    def layers(self):
        return self._modules

    def forward(self, x, context=None):
        total, parts = 0.0, []
        for name, shape in zip(self.names, self.split_shapes):
            x, log_det = self._modules[name](x, context)
            total = total + log_det
            if name == self.names[-1]:
                break
            x, z = x[:, : -shape[0]], x[:, -shape[0] :]
            if prior := self._modules.get(f"split_prior_{name}"):
                z, log_det = prior(z, x)
                total = total + log_det
            parts.append(z.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), total

    def inverse(self, z, context=None):
        *parts, x = z.split([size(shape) for shape in self.split_shapes], 1)
        x, total = self._modules[self.names[-1]].inverse(x.unflatten(1, self.split_shapes[-1]), context)
        for name, shape, z in reversed(list(zip(self.names, self.split_shapes, parts))):
            z = z.unflatten(1, shape)
            if prior := self._modules.get(f"split_prior_{name}"):
                z, log_det = prior.inverse(z, x)
                total = total + log_det
            x, log_det = self._modules[name].inverse(torch.cat((x, z), 1), context)
            total = total + log_det
        return x, total
