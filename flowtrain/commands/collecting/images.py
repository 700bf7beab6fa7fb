"""Images: real ones beside samples, interpolations, samples of each class, nearest training images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.commands.collecting.source import Source, attempt, spread
from flowtrain.commands.interpolate import spherical
from flowtrain.data.batch import Batch
from flowtrain.data.labels import label_context
from flowtrain.data.spec import LabelContext
from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.engine.memory_budget import few_rows
from flowtrain.errors import FlowtrainError
from flowtrain.plots.grid import field_ends, to_pixels
from flowtrain.report.material import Images, Material, Neighbours

SIDE = 96  # most pixels of a side, of those that are shown
PIXELS = 10 * SIDE**2  # in all images of a grid
ROWS, STEPS = 5, 9  # of interpolations
CLASSES, EACH = 10, 8  # most classes, and samples of each
PICTURES, QUERIES = 8, 200  # samples shown beside their nearest training image, and images whose distance is taken
SEARCHED = 10_000  # most training images that are searched
NUMBERS = 2**25  # in them


class Thumbnails:
    """Turns images of the data (n, C, H, W) into pixels for a page, (n, H, W, 1 or 3) uint8: at most ``SIDE`` wide and
    high, and fields in the colours that suit the real ones."""

    def __init__(self, real: Tensor, grey_levels: int | None):
        self.grey_levels = grey_levels
        self.ends = None if grey_levels is not None else field_ends(real)
        self.times = max(1.0, max(real.shape[-2:]) / SIDE)

    def __call__(self, images: Tensor):
        pixels = to_pixels(images, self.grey_levels, self.ends)
        if self.times > 1:
            size = [max(1, round(side / self.times)) for side in pixels.shape[-2:]]
            pixels = torch.nn.functional.interpolate(pixels.float(), size, mode="area").round().to(torch.uint8)
        return pixels.movedim(1, 3).numpy()


def gather(material: Material, source: Source) -> None:
    """Fill in the images."""
    val = source.split("val")
    height, width = source.spec.shape[1:]
    shrink = max(1.0, max(height, width) / SIDE)
    most = max(4, int(PIXELS / (height * width / shrink**2)))
    n = min(source.amounts.n, most)
    real, context = val.take(spread(len(val), n))
    n = n if context is None else len(real)  # each sample has the context of a real image
    to_thumbnails = Thumbnails(real, source.spec.grey_levels)
    found: dict = {"real": to_thumbnails(real), "samples": {}, "shrunk": to_thumbnails.times > 1}
    if isinstance(source.spec.context, LabelContext) and context is not None:
        found["labels"] = [_class_name(source, number) for number in context.argmax(1).tolist()]
    plain = None
    temperatures = sorted({*source.amounts.temperatures, 1.0}, key=lambda one: (one != 1.0, one))  # 1 first: the model
    for i, temperature in enumerate(temperatures):
        with attempt(material, "samples"):
            seconds = source.share(0.25 if i == 0 else 0.12)
            drawn = source.draw(n, seconds, temperature, None if context is None else context.cpu())
            if temperature == 1.0:
                plain = drawn
            if temperature in source.amounts.temperatures:
                found["samples"][temperature] = to_thumbnails(drawn)
                if len(drawn) < n:
                    few = f"Only {len(drawn)} of {n} at temperature {temperature:g}, for lack of time."
                    material.leave_out("samples", few)
    with attempt(material, "interpolations"):
        rows = max(1, min(ROWS, most // STEPS))
        found["interpolations"] = _interpolations(source, to_thumbnails, rows)
    if isinstance(source.spec.context, LabelContext):
        with attempt(material, "classes"):
            found["classes"] = _classes(source, to_thumbnails, most)
    if plain is not None:
        with attempt(material, "neighbours"):
            found["neighbours"] = _neighbours(source, to_thumbnails, plain)
    material.images = Images(**found)


def _class_name(source: Source, number: int) -> str:
    names = source.spec.context.names
    return names[number] if names else str(number)


@torch.no_grad()
def _interpolations(source: Source, to_thumbnails: Thumbnails, rows: int):
    """Pictures (rows, STEPS, H, W, C) between pairs of real images; of one class where the flow is conditional."""
    flow, val = source.flow, source.split("val")
    if len(val) < 2:
        raise FlowtrainError("there are fewer than two validation images")
    if rows * STEPS * source.example_seconds > source.share(0.15) + 0.2:
        raise FlowtrainError("decoding takes too long for this report's time")
    x, context = val.take(spread(len(val), min(len(val), max(64, 2 * rows))))
    first, second = _pairs(context, len(x), rows)
    given = None if context is None else context[first]
    with evaluation_mode(source.device):
        ends = [_in_parts(flow.encode, x[index], given, flow.dimensions) for index in (first, second)]
        latents = spherical(*ends, torch.linspace(0, 1, STEPS, device=source.device, dtype=torch.float64))
        repeated = None if given is None else given.repeat_interleave(STEPS, 0)
        decoded = _in_parts(flow.decode, latents.flatten(0, 1), repeated, flow.dimensions).cpu()
    pixels = to_thumbnails(decoded)
    return pixels.reshape(len(first), STEPS, *pixels.shape[1:])


def _in_parts(function: Callable, x: Tensor, context: Tensor | None, dimensions: int) -> Tensor:
    """``function(x, context)``, a few rows at a time."""
    parts = Batch(x, context).chunk(-(-len(x) // few_rows(dimensions)))
    return torch.cat([function(part.x, part.context) for part in parts])


def _pairs(context: Tensor | None, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Numbers of the first and the second image of each pair, with the same context where there is one."""
    if context is None:
        rows = min(rows, count // 2)
        return torch.arange(rows), torch.arange(rows) + count // 2
    same = (context.flatten(1)[:, None] == context.flatten(1)[None]).all(2).cpu().triu(1)
    first, second, used = [], [], set()
    for a, b in same.nonzero().tolist():
        if not {a, b} & used and len(first) < rows:
            first.append(a), second.append(b)
            used |= {a, b}
    if not first:
        raise FlowtrainError("no two of the validation images have the same context")
    return torch.tensor(first), torch.tensor(second)


def _classes(source: Source, to_thumbnails: Thumbnails, most: int) -> dict:
    """Samples of each class, at temperature 1."""
    classes = source.spec.context.classes
    shown = spread(classes, CLASSES)
    each = max(2, min(EACH, most // len(shown)))
    context = label_context(shown.repeat_interleave(each), classes)
    samples = source.draw(len(context), source.share(0.2), 1.0, context)
    rows = len(samples) // each
    if not rows:
        raise FlowtrainError("a sample of this model takes too long for this report's time")
    return {
        _class_name(source, int(number)): to_thumbnails(samples[i * each : (i + 1) * each])
        for i, number in enumerate(shown[:rows])
    }


def _neighbours(source: Source, to_thumbnails: Thumbnails, samples: Tensor) -> Neighbours:
    train, val = source.split("train"), source.split("val")
    limit = SEARCHED if not train.streams else 500
    searched = spread(len(train), max(1, min(limit, NUMBERS // source.flow.dimensions)))
    scale = 1.0 if source.spec.grey_levels is None else 1 / (source.spec.grey_levels - 1)
    queries, _ = val.take(spread(len(val), QUERIES))
    sets = [samples[:QUERIES], queries.cpu()]
    best = [torch.full((len(one),), float("inf")) for one in sets]
    place = [torch.zeros(len(one), dtype=torch.int64) for one in sets]
    for part in searched.split(50 if train.streams else 1000):
        if source.left < 0:
            raise FlowtrainError("the time of this report is spent")
        rows = train.take(part)[0].cpu().flatten(1).float() * scale
        for one, least, at in zip(sets, best, place):
            distance, index = torch.cdist(one.flatten(1).float() * scale, rows).min(1)
            nearer = distance < least
            least[nearer], at[nearer] = distance[nearer], part[index[nearer]]
    nearest, _ = train.take(place[0][:PICTURES])
    pictures = zip(to_thumbnails(samples[:PICTURES]), to_thumbnails(nearest), best[0][:PICTURES].tolist())
    return Neighbours([*pictures], best[0].numpy(), best[1].numpy(), len(searched), len(train))
