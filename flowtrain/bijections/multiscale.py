"""Factoring out: after each level half of the channels are done, and the rest go on (Dinh et al. 2017, section 3.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from flowtrain.bijections.bijection import Bijection, built, size


class MultiScale(Bijection):
    """(C, H, W) -> (D,), D = CHW: the parts that left at each level, then what the last level made, side by side.

    ``level`` builds each of the first ``levels - 1`` levels, squeeze included, or is a mapping level0, level1, … where
    they differ; ``last`` (by default ``level``) builds the final one. The first half of a level's channels stays, the
    second leaves, through ``split_prior`` where given: a bijection whose context is the half that stays.
    """

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
            raise ValueError(f"levels={levels} must be at least 1 (sides that are odd cannot be halved)")
        each = level if isinstance(level, Mapping) else {f"level{i}": level for i in range(levels)}
        names = [f"level{i}" for i in range(levels)]
        if last is not None:
            each, names = {**each, "last": last}, [*names[:-1], "last"]
        if missing := [name for name in names if name not in each]:
            raise ValueError(f"levels={levels} needs {', '.join(missing)} too")
        self.names = names
        event = self.shape
        self.leaving = []  # shapes of what leaves
        for name in names:
            layer = built(name, each[name], shape=event, context_shape=context_shape)
            self.add_module(name, layer)
            event = layer.out_shape
            if name == names[-1]:
                break
            channels, *rest = event
            if channels < 2:
                raise ValueError(f"{name}: {channels} channel cannot be halved; squeeze first")
            event, leaving = (channels - channels // 2, *rest), (channels // 2, *rest)
            self.leaving.append(leaving)
            if split_prior is not None:
                prior = f"split_prior_{name}"
                self.add_module(prior, built(prior, split_prior, shape=leaving, context_shape=event))
        self.leaving.append(event)
        self.out_shape = (size(self.shape),)
        self.exact = all(layer.exact for layer in self._modules.values())

    def forward(self, x, context=None):
        total, done = 0.0, []
        for name, leaving in zip(self.names, self.leaving):
            x, log_det = self._modules[name](x, context)
            total = total + log_det
            if name == self.names[-1]:
                break
            x, z = x[:, : -leaving[0]], x[:, -leaving[0] :]
            if prior := self._modules.get(f"split_prior_{name}"):
                z, log_det = prior(z, x)
                total = total + log_det
            done.append(z.flatten(1))
        return torch.cat([*done, x.flatten(1)], 1), total

    def inverse(self, z, context=None):
        *done, x = z.split([size(shape) for shape in self.leaving], 1)
        x, total = self._modules[self.names[-1]].inverse(x.unflatten(1, self.leaving[-1]), context)
        for name, leaving, z in reversed(list(zip(self.names, self.leaving, done))):
            z = z.unflatten(1, leaving)
            if prior := self._modules.get(f"split_prior_{name}"):
                z, log_det = prior.inverse(z, x)
                total = total + log_det
            x, log_det = self._modules[name].inverse(torch.cat((x, z), 1), context)
            total = total + log_det
        return x, total
