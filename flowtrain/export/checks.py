"""Whether a program computes what the flow computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.bijections import Dequantize, DequantizeColumns
from flowtrain.data.spec import DataSpec
from flowtrain.errors import FlowtrainError
from flowtrain.export.programs import Program
from flowtrain.export.rows import Inputs, batch_size, before_rounding, draw_inputs, per_row

ROWS, SIZES = 1000, (1, 7)  # rows that are compared; the first batches
TOLERANCE = {"log_prob": 1e-5, "sample": 1e-4, "encode": 1e-4, "score": 1e-4}
ROUNDS = 10  # of drawing rows, at most
PROBES, NEAR = 16, 1e-4  # of a row whose gradient may jump, and how far away they are
OFF = 2.0**-22  # what libraries' exponentials, sums and products of matrices may be off by, relative
SHARE = 1 / 8  # of the tolerance, that the flow itself may be off by in float32

_aten = torch.ops.aten
_ROUNDED = {
    *(_aten.exp, _aten.log, _aten.log1p, _aten.expm1, _aten.tanh, _aten.sigmoid, _aten.softplus),
    *(_aten.erf, _aten.erfc, _aten.erfinv, _aten.special_erfcx, _aten.special_ndtri, _aten.sin, _aten.cos, _aten.sqrt),
    *(_aten._softmax, _aten._log_softmax, _aten.logsumexp, _aten.sum, _aten.cumsum),
    *(_aten.mm, _aten.addmm, _aten.bmm, _aten.convolution, _aten.linear),
}


class Reference:
    """What the flow returns for :data:`ROWS` rows, with which programs are compared.

    Rows are drawn anew where float32 does not determine what the flow returns, so that no two ways to compute it agree:
    where it differs by a :data:`SHARE` of the tolerance in float64, or with functions and sums that are off at random
    by :data:`OFF` (Monte Carlo arithmetic, Parker 1997). Such are rows next to a kink of a rectifier, for the gradient,
    and some of those far out. So are rows where the flow's inverse grows without bound.

    Attributes:
        inputs: the rows.
        results: what the flow returns for each batch of them.
        left_out: how many others were drawn.

    Raises:
        FlowtrainError: after :data:`ROUNDS` drawings there are fewer than :data:`ROWS` others.
    """

    def __init__(self, program: Program, spec: DataSpec):
        self.program, self.tolerance, self.left_out = program, TOLERANCE[program.what], 0
        exact = Program(copy.deepcopy(program.flow).double(), program.what)
        kept: list[Inputs] = []
        missing = ROWS
        for seed in range(ROUNDS):
            drawn = missing if seed == 0 else min(ROWS, missing * ROWS // max(1, ROWS - self.left_out) + SIZES[-1])
            inputs = draw_inputs(program, spec, drawn, seed)
            every = [_uncertainty(program, exact, part) for part in self._batches(inputs)]
            uncertainty = torch.cat([torch.zeros(0), *every])
            rows = (uncertainty < SHARE * self.tolerance).nonzero()[:missing, 0]
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
        self.results = [Result.of(program, part) for part in self._batches(self.inputs)]

    def difference(self, run: Callable[[Inputs], Tensor]) -> float:
        """The greatest difference of ``run`` from the flow in any row: absolute where the numbers of the row are all at
        most 1, else relative to the largest of them. Infinite where one of both is not a number."""
        parts = zip(self.results, self._batches(self.inputs), strict=True)
        apart = torch.cat([result.apart_from(run(part)) for result, part in parts])
        if self.program.what == "score" and apart.isfinite().all():
            apart = self._without_jumps(apart)
        return apart.max().item()

    def _without_jumps(self, apart: Tensor) -> Tensor:
        """0 for rows beyond the tolerance where the flow's own gradient jumps as far within :data:`NEAR`: a rectifier
        has a kink there, and on which side of it a row lies is a matter of rounding."""
        rows = (apart > self.tolerance).nonzero()[:, 0]
        if not 0 < len(rows) <= ROWS // 50:
            return apart
        generator = torch.Generator().manual_seed(0)
        jumps = torch.zeros(len(rows), dtype=torch.float64)
        for _ in range(PROBES):
            found = []
            for part in self._batches({name: value[rows] for name, value in self.inputs.items()}):
                near = {name: _nudge(value, generator) for name, value in part.items()}
                found.append(Result.of(self.program, part).apart_from(self.program(*near.values())))
            jumps = jumps.maximum(torch.cat(found))
        apart = apart.clone()
        apart[rows] = apart[rows].where(jumps < apart[rows] / 2, 0.0)
        self.left_out += int((apart[rows] == 0).sum())
        return apart

    def _batches(self, inputs: Inputs) -> Iterator[Inputs]:
        """The rows in batches of 1, 7 and as many as are left, or fewer where an example is large."""
        rows, size = len(next(iter(inputs.values()))), batch_size(self.program.flow.dimensions)
        first = SIZES if rows > sum(SIZES) else ()
        left = rows - sum(first)
        sizes = [*first, *[size] * (left // size), *([left % size] if left % size else [])]
        for part in zip(*(value.split(sizes) for value in inputs.values())):
            yield dict(zip(inputs, part))


@dataclass(frozen=True)
class Result:
    """What a flow returns for a batch.

    Attributes:
        value: as float64.
        before: data as they are before the flow rounds them; [] where it rounds none.
        low, high: ``value``, where ``before`` is less or more by the tolerance: next to the end of a bin, a rounding of
            float32 decides on which side a number is.
    """

    value: Tensor
    before: list[Tensor]
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, program: Program, inputs: Inputs) -> Result:
        seen: list[tuple[Dequantize | DequantizeColumns, Tensor]] = []
        with before_rounding(program.flow, lambda layer, z: seen.append((layer, z))):
            value = program(*inputs.values()).double()
        sides = [value]
        for layer, z in seen:
            step = TOLERANCE[program.what] * per_row(z.abs().flatten(1).amax(1).clamp(min=1), z.dim())
            sides += [type(layer).inverse(layer, side)[0].double() for side in (z - step, z + step)]
        low, high = torch.stack(sides).sort(0).values[[0, -1]] if seen else (value, value)
        return cls(value, [z.double() for _, z in seen], low, high)

    def apart_from(self, other: Tensor) -> Tensor:
        """Of each row, how far it is from another result."""
        if other.shape != self.value.shape:
            return torch.tensor([math.inf])
        other = other.double()
        return _apart(
            other, torch.where(self.value == self.value.round(), other.clamp(self.low, self.high), self.value)
        )


def _uncertainty(program: Program, exact: Program, inputs: Inputs) -> Tensor:
    """Of each row, how much the flow itself is off in float32, also where it is about to round data."""
    own = Result.of(program, inputs)
    wide = Result.of(exact, {name: value.double() for name, value in inputs.items()})
    apart = own.apart_from(wide.value)
    for one, other in zip(own.before, wide.before, strict=True):
        apart = apart.maximum(_apart(one, other))
    for seed in range(2):
        with _Off(seed):
            value = program(*inputs.values())
        apart = apart.maximum(own.apart_from(value))
    return apart


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


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Of each row, the greatest difference: relative to the largest number of ``other``, where that is more than 1."""
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs().nan_to_num(nan=math.inf))
    size = other.abs().nan_to_num(0.0, posinf=0.0)
    return apart.reshape(len(apart), -1).amax(1) / size.reshape(len(size), -1).amax(1).clamp(min=1)
