"""Images of a flow: a grid of samples, or its density beside the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.commands.draws import draw_samples
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Split
from flowtrain.data.labels import label_context
from flowtrain.data.spec import DataSpec, LabelContext, class_names
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.engine.precision import exact_arithmetic
from flowtrain.flow import Flow
from flowtrain.plots.density import density_image
from flowtrain.plots.grid import image_grid, labelled_rows

POINTS = 20_000  # data points beside a density or samples
CELLS = 200  # of the density's grid, per side
CONTEXTS = 16  # that a conditional density is averaged over


class Preview:
    """Draws an image of a flow, (3, H, W) uint8: samples of the same noise each time, or a density in up to two
    dimensions without gaps; else None.

    A class-conditional flow has a row of samples for each class, where ``trainer.sample_n`` has room for one of each;
    any other conditional flow gets the contexts of validation examples.
    """

    def __init__(self, val: Split, spec: DataSpec, config: TrainConfig):
        self.grey_levels, self.is_image = spec.grey_levels, spec.is_image
        if self.is_image:
            self.count, self.seed = config.trainer.sample_n, config.seed
            self.rows: list[str] = []
            classes = spec.context.classes if isinstance(spec.context, LabelContext) else 0
            if 0 < classes <= self.count:
                self.rows = [name[:24] for name in class_names(spec)] or [f"class {one}" for one in range(classes)]
                each = self.count // classes
                self.count = each * classes
                self.context = label_context(torch.arange(classes).repeat_interleave(each), classes)
            else:
                _, self.context = val.take(torch.arange(self.count) % len(val))
        else:
            self.points, self.context = val.shown(POINTS)

    def __call__(self, flow: Flow) -> Tensor | None:
        device = next(flow.parameters()).device
        if self.is_image:
            with out_of_memory(device, f"{self.count} samples", "a smaller trainer.sample_n would need less"):
                samples = draw_samples(flow, self.count, self.seed, self.context)
            if self.rows:
                return labelled_rows(samples, self.grey_levels, self.rows)
            return image_grid(samples, self.grey_levels)
        if flow.dimensions > 2 or self.points is None or self.points.isnan().any():
            return None
        with out_of_memory(device, f"the density on a grid of {CELLS} × {CELLS} points"):
            return density_of(flow, self.points, self.context)


def density_of(flow: Flow, points: Tensor, context: Tensor | None = None, cells: int = CELLS) -> Tensor:
    """An image of data points beside the flow's density on a grid of cells × cells, (3, H, W) uint8.

    The density of a conditional flow is averaged over the contexts of some points.
    """

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
        image = density_image(log_prob, points, cells=cells)
    flow.train(was_training)
    return image
