"""Rows on which a program is compared with its flow, from the centre of the data to far in the tails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from flowtrain.bijections import Dequantize, DequantizeColumns
from flowtrain.bijections.columns import FillMissing
from flowtrain.bijections.ode import states_only
from flowtrain.data.labels import label_context
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.export.programs import Program
from flowtrain.flow import Flow
from flowtrain.runtime import modes

FAR = (1.0, 3.0, 10.0)  # temperatures of a third of the rows each
LARGEST = 2.0**16  # a pixel before it is rounded, in units of its range: far beyond, float32 has no grey levels
NUMBERS = 2**20  # most numbers of inputs in a batch

Inputs = dict[str, Tensor]


def draw_inputs(program: Program, spec: DataSpec, rows: int, seed: int) -> Inputs:
    """Inputs: noise, or what the flow makes of noise, at each temperature of :data:`FAR`.

    So data lie within the bounds of their columns and are integers where they must be, and other numbers reach beyond
    the knots of splines. Of noise whose data are not finite, or pixels beyond :data:`LARGEST`, that of temperature 1 is
    taken; where that is of no use either, the row is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    flow, inputs = program.flow, {}
    context = _contexts(program, spec, rows, generator)
    noise, data = _noise_and_data(flow, context, rows, generator)
    for name, one in program.inputs.items():
        if name == "context":
            inputs[name] = context
        elif program.what == "sample":
            inputs[name] = noise[int(name.removeprefix("noise") or 1) - 1]
        elif one.noise:
            inputs[name] = torch.rand(rows, *one.shape, generator=generator)
        else:
            inputs[name] = data
    usable = ~data.isinf().flatten(1).any(1)
    return {name: value[usable] for name, value in inputs.items()}


@torch.no_grad()
def _noise_and_data(
    flow: Flow, context: Tensor | None, rows: int, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The base's noise at each temperature, and what :func:`_invert` makes of it."""
    context = flow.embed(context)
    near = [one.draw(rows, generator) for one in flow.base.noise]
    temperatures = torch.tensor(FAR)[torch.arange(rows) % len(FAR)]
    far = [z if one.kind == "uniform" else z * per_row(temperatures, z.dim()) for one, z in zip(flow.base.noise, near)]
    far_x, near_x = (_invert(flow, flow.base.from_noise(z, 1.0, context), context) for z in (far, near))
    wrong = (far_x.isinf() | (far_x.isnan() & ~near_x.isnan())).flatten(1).any(1)
    noise = [torch.where(per_row(wrong, z.dim()), z, other) for z, other in zip(near, far)]
    return noise, torch.where(per_row(wrong, far_x.dim()), near_x, far_x)


def per_row(values: Tensor, dimensions: int) -> Tensor:
    return values.view(-1, *[1] * (dimensions - 1))


def _invert(flow: Flow, z: Tensor, context: Tensor | None) -> Tensor:
    """Data given the embedded context, as float32: NaN where a value is missing, infinity where it was not finite, or a
    pixel too large, before it was rounded."""
    unknown = math.nan if any(isinstance(layer, FillMissing) for layer in flow.modules()) else math.inf
    size = batch_size(flow.dimensions)
    parts = zip(z.split(size), [None] * len(z) if context is None else context.split(size))
    found, seen = [], []

    def look(layer, z: Tensor) -> None:
        usable = z.abs() < (LARGEST if isinstance(layer, Dequantize) else math.inf)
        seen.append((usable, torch.where(z.isnan(), unknown, math.inf)))

    with states_only(), modes.using(tracing=True), before_rounding(flow, look):
        for part in parts:
            seen.clear()
            x = flow.bijection.inverse(*part)[0].float()
            for usable, instead in seen:
                x = x.where(usable, instead)
            found.append(x.where(~x.isnan(), unknown))
    return torch.cat(found)


def batch_size(dimensions: int) -> int:
    return max(1, NUMBERS // dimensions)


def _contexts(program: Program, spec: DataSpec, rows: int, generator: torch.Generator) -> Tensor | None:
    """Classes in turn, or standard normal numbers."""
    if not program.has_context:
        return None
    shape = program.inputs["context"].shape
    if isinstance(spec.context, LabelContext):
        return label_context(torch.arange(rows) % shape[0], shape[0])
    return torch.randn(rows, *shape, generator=generator)


@contextmanager
def before_rounding(flow: Flow, look: Callable[[Dequantize | DequantizeColumns, Tensor], object]) -> Iterator[None]:
    """Within it, ``look`` is called with each layer that rounds data, and what it is to round."""
    layers = [layer for layer in flow.modules() if isinstance(layer, Dequantize | DequantizeColumns)]

    def inverse(layer, z, context=None):
        look(layer, z)
        return type(layer).inverse(layer, z, context)

    for layer in layers:
        vars(layer)["inverse"] = partial(inverse, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("inverse")
