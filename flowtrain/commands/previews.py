"""What a person sees of a flow while it trains: a grid of samples, or its density beside the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.commands.data import is_image
from flowtrain.commands.draws import draw_samples
from flowtrain.data import Split
from flowtrain.engine.evaluate import exact_arithmetic
from flowtrain.flow import Flow
from flowtrain.plots.density import density_image
from flowtrain.plots.grid import image_grid

POINTS = 20_000  # of the data, beside a density or samples
CELLS = 200  # a side, where a density is evaluated
CONTEXTS = 16  # that the density of a conditional flow is averaged over


class View:
    """Called with a flow, one image of it, (3, H, W) uint8: always of the same noise; None above two dimensions.

    A conditional flow is given the contexts of validation examples.
    """

    def __init__(self, val: Split, cfg):
        self.levels, self.is_image = cfg.dataset["levels"], is_image(cfg)
        if self.is_image:
            self.count, self.seed = cfg.trainer.sample_n, cfg.seed
            _, self.context = val.take(torch.arange(self.count) % len(val))
        else:
            self.points, self.context = val.take(torch.arange(min(POINTS, len(val))))

    def __call__(self, flow: Flow) -> Tensor | None:
        if self.is_image:
            return image_grid(draw_samples(flow, self.count, self.seed, self.context), self.levels)
        if flow.dimensions > 2:
            return None
        return density_of(flow, self.points, self.context)


def density_of(flow: Flow, points: Tensor, context: Tensor | None = None) -> Tensor:
    """Points of the data beside the flow's density, one image; that of a conditional flow is the mixture over some
    of the points' contexts."""

    def log_prob(at: Tensor) -> Tensor:
        at = at.to(points.device)
        if context is None:
            return flow(at)
        some = context[:: max(1, len(context) // CONTEXTS)][:CONTEXTS]
        each = [flow(at, one.expand(len(at), *one.shape)) for one in some]
        return torch.stack(each).logsumexp(0) - math.log(len(some))

    was_training = flow.training
    flow.eval()
    with exact_arithmetic():
        image = density_image(log_prob, points, cells=CELLS)
    flow.train(was_training)
    return image
