"""Whether a program computes what the flow computes, on rows from the centre of the data to far in the tails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.bijections import Dequantize, DequantizeColumns
from flowtrain.bijections.ode import states_only
from flowtrain.data.labels import label_context
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.errors import FlowtrainError
from flowtrain.export.programs import Program
from flowtrain.flow import Flow
from flowtrain.runtime import modes

ROWS, SIZES = 1000, (1, 7)  # rows that are compared; the first batches
FAR = (1.0, 3.0, 10.0)  # temperatures of a third of the rows each
TOLERANCE = {"log_prob": 1e-5, "sample": 1e-4, "encode": 1e-4, "score": 1e-4}
NUMBERS = 2**20  # most numbers of inputs in a batch
ROUNDS = 10  # of drawing rows, at most
PROBES, NEAR = 16, 1e-4  # of a row whose gradient may jump, and how far away they are
OFF = 2.0**-22  # what libraries' exponentials, sums and products of matrices may be off by, relative
# the flow itself may be off in float32 by this share of the tolerance
SHARE = {"log_prob": 1 / 8, "sample": 1 / 4, "encode": 1 / 4, "score": 1 / 4}

Inputs = dict[str, Tensor]

_aten = torch.ops.aten
_ROUNDED = {
    *(_aten.exp, _aten.log, _aten.log1p, _aten.expm1, _aten.tanh, _aten.sigmoid, _aten.softplus),
    *(_aten.erf, _aten.erfc, _aten.erfinv, _aten.special_erfcx, _aten.special_ndtri, _aten.sin, _aten.cos, _aten.sqrt),
    *(_aten._softmax, _aten._log_softmax, _aten.logsumexp, _aten.sum, _aten.cumsum),
    *(_aten.mm, _aten.addmm, _aten.bmm, _aten.convolution, _aten.linear),
}


def _inputs(program: Program, spec: DataSpec, rows: int, seed: int) -> Inputs:
    """Inputs: noise, or what the flow makes of noise, at each temperature of :data:`FAR`.

    So data lie within the bounds of their columns and are integers where they must be, and other numbers reach beyond
    the knots of splines. Of noise whose data are not finite, that of temperature 1 is taken.
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
    return inputs


@torch.no_grad()
def _noise_and_data(
    flow: Flow, context: Tensor | None, rows: int, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The base's noise at each temperature, and the data that the flow makes of it, as float32."""
    near = [one.draw(rows, generator) for one in flow.base.noise]
    temperatures = torch.tensor(FAR)[torch.arange(rows) % len(FAR)]
    far = [z if one.kind == "uniform" else z * _per_row(temperatures, z.dim()) for one, z in zip(flow.base.noise, near)]
    far_x, near_x = (_invert(flow, flow.base.from_noise(z, 1.0, context), context) for z in (far, near))
    wrong = (far_x.isinf() | (far_x.isnan() & ~near_x.isnan())).flatten(1).any(1)
    noise = [torch.where(_per_row(wrong, z.dim()), z, other) for z, other in zip(near, far)]
    return noise, torch.where(_per_row(wrong, far_x.dim()), near_x, far_x)


def _per_row(values: Tensor, dimensions: int) -> Tensor:
    return values.view(-1, *[1] * (dimensions - 1))


def _invert(flow: Flow, z: Tensor, context: Tensor | None) -> Tensor:
    """Data, as float32; NaN where a number was not finite before it was rounded."""
    size = _batch_size(flow.dimensions)
    parts = zip(z.split(size), [None] * len(z) if context is None else context.split(size))
    found, finite = [], []
    with states_only(), modes.using(tracing=True), _before_rounding(flow, lambda _, z: finite.append(z.isfinite())):
        for part in parts:
            finite.clear()
            x = flow.bijection.inverse(*part)[0].float()
            for each in finite:
                x = x.where(each, math.nan)
            found.append(x)
    return torch.cat(found)


def _batch_size(dimensions: int) -> int:
    return max(1, NUMBERS // dimensions)


def _contexts(program: Program, spec: DataSpec, rows: int, generator: torch.Generator) -> Tensor | None:
    """Classes in turn, or standard normal numbers."""
    if not program.has_context:
        return None
    shape = program.inputs["context"].shape
    if isinstance(spec.context, LabelContext):
        return label_context(torch.arange(rows) % shape[0], shape[0])
    return torch.randn(rows, *shape, generator=generator)


class Reference:
    """What the flow returns for :data:`ROWS` rows, with which programs are compared.

    Rows are drawn anew where float32 does not determine what the flow returns, so that no two ways to compute it agree:
    where it differs by a :data:`SHARE` of the tolerance in float64, or with functions and sums that are off at random
    by :data:`OFF` (Monte Carlo arithmetic, Parker 1997). Such are rows next to a kink of a rectifier, for the gradient,
    and some of those far out.

    Attributes:
        inputs: the rows.
        left_out: how many others were drawn.

    Raises:
        FlowtrainError: after :data:`ROUNDS` drawings there are fewer than :data:`ROWS` others.
    """

    def __init__(self, program: Program, spec: DataSpec):
        self.program, self.tolerance, self.left_out = program, TOLERANCE[program.what], 0
        self.exact = Program(copy.deepcopy(program.flow).double(), program.what)
        kept: list[Inputs] = []
        missing = ROWS
        for seed in range(ROUNDS):
            drawn = missing if seed == 0 else min(ROWS, missing * ROWS // max(1, ROWS - self.left_out) + SIZES[-1])
            inputs = _inputs(program, spec, drawn, seed)
            rows = (self._uncertainty(inputs) < SHARE[program.what] * self.tolerance).nonzero()[:missing, 0]
            kept.append({name: value[rows] for name, value in inputs.items()})
            missing -= len(rows)
            if not missing:
                break
            self.left_out += drawn - len(rows)
        else:
            raise FlowtrainError(
                f"what={program.what}: float32 determines what this flow returns to {self.tolerance:g} at so few rows"
                f" that {ROUNDS} drawings found {ROWS - missing} of {ROWS}; no program can be compared with it"
            )
        self.inputs = {name: torch.cat([one[name] for one in kept]) for name in inputs}

    def _uncertainty(self, inputs: Inputs) -> Tensor:
        """Of each row, how much the flow itself is off in float32."""
        wide = {name: value.double() for name, value in inputs.items()}
        apart = self._differences(inputs, lambda part: self.exact(*part.values()), wide)
        for seed in range(2):
            apart = apart.maximum(self._differences(inputs, lambda part: _compute_off(self.program, part, seed)))
        return apart.maximum(self._apart_before_rounding(inputs, wide)) if self.program.what == "sample" else apart

    def _apart_before_rounding(self, inputs: Inputs, wide: Inputs) -> Tensor:
        """Of each row, how far from each other float32 and float64 are where the flow is about to round data."""
        found = []
        dimensions = self.program.flow.dimensions
        for part, other in zip(_batches(inputs, dimensions), _batches(wide, dimensions)):
            seen: list[list[Tensor]] = [[], []]
            for program, given, own in zip((self.program, self.exact), (part, other), seen):
                with _before_rounding(program.flow, lambda _, z, own=own: own.append(z.double())):
                    program(*given.values())
            worst = torch.zeros(len(next(iter(part.values()))), dtype=torch.float64)
            for one, two in zip(*seen):
                apart, size = (value.flatten(1).amax(1) for value in (_apart(one, two), two.abs().nan_to_num(0.0)))
                worst = worst.maximum(apart / size.clamp(min=1))
            found.append(worst)
        return torch.cat(found)

    def difference(self, run: Callable[[Inputs], Tensor]) -> float:
        """The greatest difference of ``run`` from the flow in any row: absolute where the numbers of the row are all at
        most 1, else relative to the largest of them. Infinite where one of both is not a number."""
        apart = self._differences(self.inputs, run)
        if self.program.what == "score":
            apart = self._without_jumps(apart)
        return apart.max().item()

    def _without_jumps(self, apart: Tensor) -> Tensor:
        """0 for rows beyond the tolerance where the flow's own gradient jumps as far within :data:`NEAR`: a rectifier
        has a kink there, and on which side of it a row lies is a matter of rounding."""
        rows = (apart > self.tolerance).nonzero()[:, 0]
        if not 0 < len(rows) <= ROWS // 50:
            return apart
        generator = torch.Generator().manual_seed(0)
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        jumps = torch.zeros(len(rows), dtype=torch.float64)
        for _ in range(PROBES):
            near = {name: _nudge(value, generator) for name, value in inputs.items()}
            jumps = jumps.maximum(self._differences(inputs, lambda part: self.program(*part.values()), near))
        apart = apart.clone()
        apart[rows] = apart[rows].where(jumps < apart[rows] / 2, 0.0)
        self.left_out += int((apart[rows] == 0).sum())
        return apart

    def _differences(self, inputs: Inputs, run: Callable[[Inputs], Tensor], given: Inputs | None = None) -> Tensor:
        """Of each row; ``run`` is called with the rows of ``given``."""
        found = []
        dimensions = self.program.flow.dimensions
        for part, other in zip(_batches(inputs, dimensions), _batches(given or inputs, dimensions)):
            with _both_sides(self.program.flow, self.tolerance) as sides:
                value = self.program(*part.values()).double()
            result = run(other).double()
            if result.shape != value.shape:
                return torch.tensor([math.inf])
            if self.program.what == "sample" and sides:
                low, *_, high = torch.stack([value, *(side.double() for side in sides)]).sort(0).values
                value = torch.where(value == value.round(), result.clamp(low, high), value)
            apart = _apart(result, value).reshape(len(value), -1).amax(1)
            size = value.abs().nan_to_num(0.0, posinf=0.0).reshape(len(value), -1).amax(1)
            found.append(apart / size.clamp(min=1))
        return torch.cat(found)


def _nudge(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with the numbers that are no integers moved by about :data:`NEAR`."""
    moved = x + NEAR * torch.randn(x.shape, generator=generator)
    return torch.where(x == x.round(), x, moved)


class _Off(TorchDispatchMode):
    """Within it, float32 results of functions, sums and products of matrices are off at random by :data:`OFF`."""

    supports_higher_order_operators = True  # loops, within which nothing is off

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            getattr(func, "overloadpacket", None) not in _ROUNDED
            or not isinstance(result, Tensor)
            or result.dtype != torch.float32
        ):
            return result
        return result * (1 + OFF * (2 * torch.rand(result.shape, generator=self.generator) - 1))


def _compute_off(program: Program, inputs: Inputs, seed: int) -> Tensor:
    with _Off(seed):
        return program(*inputs.values())


def _batches(inputs: Inputs, dimensions: int) -> Iterator[Inputs]:
    """The rows in batches of 1, 7 and as many as are left, or fewer where an example is large."""
    rows, size = len(next(iter(inputs.values()))), _batch_size(dimensions)
    first = SIZES if rows > sum(SIZES) else ()
    left = rows - sum(first)
    sizes = [*first, *[size] * (left // size), *([left % size] if left % size else [])]
    for part in zip(*(value.split(sizes) for value in inputs.values())):
        yield dict(zip(inputs, part))


def _apart(one: Tensor, other: Tensor) -> Tensor:
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one - other).abs().nan_to_num(nan=math.inf))


@contextmanager
def _both_sides(flow: Flow, tolerance: float) -> Iterator[list[Tensor]]:
    """Within it, data that the flow rounds are appended as they are with ``tolerance`` more and less before rounding:
    next to the end of a bin, a rounding of float32 decides on which side a number is."""
    sides: list[Tensor] = []

    def look(layer, z: Tensor) -> None:
        step = tolerance * _per_row(z.abs().flatten(1).amax(1).clamp(min=1), z.dim())
        sides.extend(type(layer).inverse(layer, side)[0] for side in (z - step, z + step))

    with _before_rounding(flow, look):
        yield sides


@contextmanager
def _before_rounding(flow: Flow, look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
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
