"""What a person sees of a flow while it trains: a grid of samples, or its density beside the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.assemble import decode, is_picture
from flowtrain.data import Split
from flowtrain.engine.evaluate import exact_arithmetic
from flowtrain.flow import Flow
from flowtrain.plots.grid import grid

POINTS = 20_000  # of the data, beside a density
CONTEXTS = 16  # that the density of a conditional flow is averaged over


class View:
    """Called with a flow, one picture of it, (3, H, W) uint8: always of the same noise; None above two dimensions.

    A conditional flow is given the contexts of validation examples.
    """

    def __init__(self, val: Split, cfg):
        self.levels, self.is_picture = cfg.dataset.levels, is_picture(cfg)
        if self.is_picture:
            self.count, self.seed = cfg.trainer.sample_n, cfg.seed
            _, self.context = val.take(torch.arange(self.count) % len(val))
        else:
            self.points, self.context = val.take(torch.arange(min(POINTS, len(val))))

    def __call__(self, flow: Flow) -> Tensor | None:
        if self.is_picture:
            generator = torch.Generator().manual_seed(self.seed)
            latents = flow.latents(self.count, generator=generator, context=self.context)
            return grid(decode(flow, latents, self.context), self.levels)
        if flow.dimensions > 2:
            return None
        from flowtrain.plots.density import panels
        was_training = flow.training
        flow.eval()
        with torch.no_grad(), exact_arithmetic():
            picture = panels(self.points.cpu(), lambda points: self._log_prob(flow, points.to(self.points.device)))
        flow.train(was_training)
        return picture

    def _log_prob(self, flow: Flow, points: Tensor) -> Tensor:
        """Of a conditional flow, the density of the mixture over some of the data's contexts."""
        if self.context is None:
            return flow(points)
        some = self.context[:CONTEXTS]
        each = [flow(points, one.expand(len(points), *one.shape)) for one in some]
        return torch.stack(each).logsumexp(0) - math.log(len(some))
