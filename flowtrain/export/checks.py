"""Whether a program computes what the flow computes, on rows from the centre of the data to far in the tails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.bijections import Dequantize, DequantizeColumns
from flowtrain.bijections.ode import states_only
from flowtrain.data.labels import label_context
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.errors import FlowtrainError
from flowtrain.export.programs import Program
from flowtrain.flow import Flow

ROWS, SIZES = 1000, (1, 7)  # rows that are compared; the first batches
FAR = (1.0, 3.0, 10.0)  # temperatures of a third of the rows each
TOLERANCE = {"log_prob": 1e-5, "sample": 1e-5, "encode": 1e-5, "score": 1e-4}
NUMBERS = 2**20  # most numbers of inputs in a batch
ROUNDS = 10  # of drawing rows, at most
OFF = 2.0**-22  # what libraries' exponentials, sums and products of matrices may be off by, relative

SHARE = 1 / 8  # of the tolerance, by which the flow itself may be off in float32

Inputs = dict[str, Tensor]

_aten = torch.ops.aten
_ROUNDED = {
    *(_aten.exp, _aten.log, _aten.log1p, _aten.expm1, _aten.tanh, _aten.sigmoid, _aten.softplus),
    *(_aten.erf, _aten.erfc, _aten.erfinv, _aten.special_erfcx, _aten.special_ndtri, _aten.sin, _aten.cos, _aten.sqrt),
    *(_aten._softmax, _aten._log_softmax, _aten.logsumexp, _aten.sum, _aten.cumsum),
    *(_aten.mm, _aten.addmm, _aten.bmm, _aten.convolution, _aten.linear),
}


def _inputs(program: Program, spec: DataSpec, seed: int) -> Inputs:
    """:data:`ROWS` inputs: noise, or what the flow makes of noise, at each temperature of :data:`FAR`.

    So data lie within the bounds of their columns and are integers where they must be, and other numbers reach beyond
    the knots of splines. A row that is not finite is one of temperature 1 instead.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    context = _contexts(program, spec, generator)
    for name, one in program.inputs.items():
        if name == "context":
            inputs[name] = context
        elif one.noise == "uniform":
            inputs[name] = torch.rand(ROWS, *one.shape, generator=generator)
        elif one.noise:
            inputs[name] = _noise(program.flow, generator)[int(name.removeprefix("noise") or 1) - 1]
        else:
            inputs[name] = _data(program.flow, context, generator)
    return inputs


def _temperatures(dimensions: int) -> Tensor:
    each = torch.tensor(FAR).repeat_interleave(math.ceil(ROWS / len(FAR)))[:ROWS]
    return each[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))].view(-1, *[1] * dimensions)


def _noise(flow: Flow, generator: torch.Generator) -> list[Tensor]:
    drawn = [(noise, noise.draw(ROWS, generator)) for noise in flow.base.noise]
    return [z if noise.kind == "uniform" else z * _temperatures(z.dim() - 1) for noise, z in drawn]


@torch.no_grad()
def _data(flow: Flow, context: Tensor | None, generator: torch.Generator) -> Tensor:
    """Samples of the flow, as float32."""
    near = flow.base.sample(ROWS, 1.0, context, generator)
    z = near * _temperatures(near.dim() - 1)
    with states_only():
        far_x, near_x = (_invert(flow, latents, context) for latents in (z, near))
    wrong = far_x.isinf() | (far_x.isnan() & ~near_x.isnan())
    return torch.where(wrong.flatten(1).any(1).view(-1, *[1] * (far_x.dim() - 1)), near_x, far_x)


def _invert(flow: Flow, z: Tensor, context: Tensor | None) -> Tensor:
    size = _batch_size(flow.dimensions)
    parts = zip(z.split(size), [None] * len(z) if context is None else context.split(size))
    return torch.cat([flow.bijection.inverse(*part)[0].float() for part in parts])


def _batch_size(dimensions: int) -> int:
    return max(1, NUMBERS // dimensions)


def _contexts(program: Program, spec: DataSpec, generator: torch.Generator) -> Tensor | None:
    """Classes in turn, or standard normal numbers."""
    if not program.has_context:
        return None
    shape = program.inputs["context"].shape
    if isinstance(spec.context, LabelContext):
        return label_context(torch.arange(ROWS) % shape[0], shape[0])
    return torch.randn(ROWS, *shape, generator=generator)


class Reference:
    """What the flow returns for :data:`ROWS` rows, with which programs are compared.

    Rows are drawn anew where float32 does not determine what the flow returns, so that no two ways to compute it agree:
    where it differs by a :data:`SHARE` of the tolerance in float64, after one more rounding of the input, or with
    functions and sums that are off at random by :data:`OFF` (Monte Carlo arithmetic, Parker 1997). Such are rows next
    to a kink of a rectifier, for the gradient, and some of those far out.

    Attributes:
        inputs: the rows.
        left_out: how many others were drawn.

    Raises:
        FlowtrainError: there are fewer than :data:`ROWS` others among :data:`ROUNDS` times as many.
    """

    def __init__(self, program: Program, spec: DataSpec):
        self.program, self.tolerance, self.left_out = program, TOLERANCE[program.what], 0
        exact = Program(copy.deepcopy(program.flow).double(), program.what)
        kept: list[Inputs] = []
        for seed in range(ROUNDS):
            inputs = _inputs(program, spec, seed)
            wide = {name: value.double() for name, value in inputs.items()}
            apart = self._differences(inputs, lambda part: exact(*part.values()), wide)
            for sign in (1, -1):
                rounded = {name: _round_once(value, sign) for name, value in inputs.items()}
                apart = apart.maximum(self._differences(inputs, lambda part: program(*part.values()), rounded))
            for number in range(2):
                off = self._differences(inputs, lambda part: _compute_off(program, part, 2 * seed + number))
                apart = apart.maximum(off)
            rows = (apart < SHARE * self.tolerance).nonzero()
            self.left_out += ROWS - len(rows)
            kept.append({name: value[rows[:, 0]] for name, value in inputs.items()})
            if sum(len(next(iter(one.values()))) for one in kept) >= ROWS:
                break
        else:
            raise FlowtrainError(
                f"what={program.what}: float32 determines what this flow returns to {self.tolerance:g} at fewer than"
                f" {ROWS} of {ROUNDS * ROWS} rows, so that no program can be compared with it"
            )
        self.inputs = {name: torch.cat([one[name] for one in kept])[:ROWS] for name in inputs}

    def difference(self, run: Callable[[Inputs], Tensor]) -> float:
        """The greatest difference of ``run`` from the flow in any row: absolute where the numbers of the row are all at
        most 1, else relative to the largest of them. Infinite where one of both is not a number."""
        return self._differences(self.inputs, run).max().item()

    def _differences(self, inputs: Inputs, run: Callable[[Inputs], Tensor], given: Inputs | None = None) -> Tensor:
        """Of each row; ``run`` is called with the rows of ``given``."""
        found = []
        dimensions = self.program.flow.dimensions
        for part, other in zip(_batches(inputs, dimensions), _batches(given or inputs, dimensions)):
            with _both_sides(self.program.flow, self.tolerance) as sides:
                value = self.program(*part.values()).double()
            ways = [value, *(side.double() for side in sides)] if self.program.what == "sample" else [value]
            result = run(other).double()
            if result.shape != value.shape:
                return torch.tensor([math.inf])
            apart = torch.stack([_apart(result, way) for way in ways]).amin(0).reshape(len(value), -1).amax(1)
            size = value.abs().nan_to_num(0.0, posinf=0.0).reshape(len(value), -1).amax(1)
            found.append(apart / size.clamp(min=1))
        return torch.cat(found)


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


def _round_once(x: Tensor, sign: int) -> Tensor:
    """x with a rounding up or down of each number that is no integer."""
    return torch.where(x == x.round(), x, x * (1 + sign * torch.finfo(x.dtype).eps / 2))


def _batches(inputs: Inputs, dimensions: int) -> Iterator[Inputs]:
    """The rows in batches of 1, 7 and as many as are left, or fewer where an example is large."""
    size, left = _batch_size(dimensions), ROWS - sum(SIZES)
    sizes = [*SIZES, *[size] * (left // size), *([left % size] if left % size else [])]
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
    layers = [layer for layer in flow.modules() if isinstance(layer, Dequantize | DequantizeColumns)]

    def inverse(layer, z, context=None):
        step = tolerance * z.abs().clamp(min=1)
        sides.extend(type(layer).inverse(layer, side)[0] for side in (z - step, z + step))
        return type(layer).inverse(layer, z, context)

    for layer in layers:
        vars(layer)["inverse"] = lambda z, context=None, layer=layer: inverse(layer, z, context)
    try:
        yield sides
    finally:
        for layer in layers:
            vars(layer).pop("inverse")
