"""Check a flow numerically: round trips, log-determinants against Jacobians, total mass, large numbers.

Only exact layers are measured: a surjection, such as dequantization, has no Jacobian. Chains are opened, and the exact
layers before and after a surjection are audited as one *segment* each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtrain.bijections import Bijection, BoundColumns, DequantizeColumns, FillMissing, Support
from flowtrain.bijections.bijection import is_sequence, size
from flowtrain.bijections.ode import continuous_layers, exact_trace, needs_exact_trace, states_only
from flowtrain.bijections.support import support_of
from flowtrain.engine.jacobian import Piece, log_det_errors, max_dimensions, shrink
from flowtrain.engine.precision import exact_arithmetic
from flowtrain.flow import Flow
from flowtrain.runtime import fusion, global_batch

SOLVER = 100  # tolerances of a layer with an ODE are at least so many times its solver's
FINER = 100  # in float64 the solver's tolerances are so much smaller: is the ODE right? in float32: is its solver?
LARGE = 1e4  # the scale of latents and real data that must map to finite numbers
_JACOBIANS = 2**17  # entries of one layer's Jacobians over all examples, unless one example's are more
_OF_ODES = 4  # Jacobians of a layer with an ODE in it
_SAMPLES, _OUTSIDE = 5_000, 5e-4  # samples; the share of them beyond each side of a density's box
_EXACT_INTEGERS = 2**22  # up to here float32 tells an integer from its neighbours' bins


@dataclass(frozen=True)
class Check:
    """The worst ``value``, the ``tolerance`` that it must not exceed, and the ``layer`` responsible."""

    name: str
    value: float
    tolerance: float
    layer: str | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance  # not where the value is not a number


@torch.no_grad()
def audit(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    grey_levels: int | None = None,
    limit: int = 4096,
    scale: float = 1.0,
    seed: int = 0,
) -> Iterator[Check]:
    """Audit ``flow`` in evaluation mode on examples ``x`` (B, *shape), which should be data.

    Args:
        grey_levels: of integer data 0 … grey_levels − 1; None for real numbers.
        limit: the most dimensions of a Jacobian. A segment with more is audited in pieces, each on the smallest event
            that it accepts.
        scale: multiplies every tolerance but those of counts.

    Raises:
        FloatingPointError: an ODE cannot be solved for these examples.
    """
    single = copy.deepcopy(flow).float().eval().requires_grad_(False)
    double = copy.deepcopy(single).double()
    odes = continuous_layers(double)
    for ode in odes:
        ode.rtol, ode.atol, ode.max_steps = ode.rtol / FINER, ode.atol / FINER, 4 * ode.max_steps
        ode.steps, ode.adjoint = 4 * ode.steps, False  # of a fixed solver; gradients are those of its steps
    traced = exact_trace if needs_exact_trace(double) else nullcontext
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), exact_arithmetic():
        torch.manual_seed(seed)
        yield from _check_state(double)
        with traced():
            trace = _trace(double, x, context)
            yield from _check_round_trips(double, trace, x, context, "float64", scale)
            yield from _check_round_trips(single, _trace(single, x, context), x, context, "float32", scale)
        yield from _check_log_dets(trace, limit, scale)
        if size(double.bijection.out_shape) <= 2 and trace.ends_exactly:
            yield _check_mass(double, trace.segments[-1], 5e-3 * scale)
        yield from _check_large(double, x, context, grey_levels)


def _check_state(flow: Flow) -> Iterator[Check]:
    idle = [name for name, buffer in flow.named_buffers() if name.endswith("started") and not buffer.all()]
    yield Check("layers still to be started from data", len(idle), 0, _owner(idle))
    invalid = [name for name, tensor in flow.state_dict().items() if not _is_valid(tensor)]
    yield Check("weights that are not finite", len(invalid), 0, _owner(invalid))


def _is_valid(tensor: Tensor) -> bool:
    """Finite, or all infinite, as the bounds that some buffers hold are."""
    return bool(not tensor.isnan().any() and (tensor.isfinite().all() or tensor.isinf().all()))


def _owner(weights: list[str]) -> str | None:
    """The layer that holds the first of some weights."""
    return weights[0].removeprefix("bijection.").rpartition(".")[0] if weights else None


# ---- layers' inputs and outputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A layer's call in a pass through a flow."""

    name: str
    layer: Bijection
    inverse: bool  # of its inverse
    input: Tensor
    output: Tensor
    log_det: Tensor
    context: Tensor | None

    @property
    def piece(self) -> Piece:
        return Piece(self.name, self.layer, self.output if self.inverse else self.input, self.context)


@contextmanager
def record_calls(bijection: Bijection) -> Iterator[list[Call]]:
    """Within it the list fills with the first call of each bijection inside ``bijection``, innermost first."""
    calls: list[Call] = []
    layers = {name: layer for name, layer in bijection.named_modules() if isinstance(layer, Bijection)}
    missing = set(layers)

    def record(name: str, layer: Bijection, direction: str) -> Callable:
        method = getattr(layer, direction)

        def call(x, context=None):
            output, log_det = method(x, context)
            if name in missing:
                missing.remove(name)
                calls.append(Call(name, layer, direction == "inverse", x, output, log_det, context))
            return output, log_det

        return call

    for name, layer in layers.items():
        vars(layer).update({direction: record(name, layer, direction) for direction in ("forward", "inverse")})
    try:
        with fusion.layer_by_layer():  # a fused layer is not called
            yield calls
    finally:
        for layer in layers.values():
            del vars(layer)["forward"], vars(layer)["inverse"]


class Segment(nn.Module):
    """Exact layers in turn, as one bijection of events of ``shape``."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.layers = nn.ModuleList()

    @property
    def shape(self):
        return self.layers[0].shape

    @property
    def support(self) -> Support | None:
        """The first layer, if it bounds the data."""
        first = self.layers[0]
        return first if isinstance(first, Support) else None

    def append(self, name: str, layer: Bijection) -> None:
        self.names.append(name)
        self.layers.append(layer)

    def forward(self, x, context=None):
        total = 0.0
        for layer in self.layers:
            x, log_det = layer(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z, context=None):
        total = 0.0
        for layer in reversed(self.layers):
            z, log_det = layer.inverse(z, context)
            total = total + log_det
        return z, total


@dataclass(frozen=True)
class Trace:
    """A flow's segments and layers, with the inputs of each when examples pass from data to latent.

    Attributes:
        ends_exactly: the last segment reaches to the latent.
    """

    segments: list[Piece]
    calls: list[Call]
    ends_exactly: bool

    @property
    def layers(self) -> list[Piece]:
        """The exact layers that do work of their own."""
        return [call.piece for call in self.calls if call.layer.exact and not call.layer.container]


def _trace(flow: Flow, x: Tensor, context: Tensor | None) -> Trace:
    x, context = _to_weights(flow, x), _embedded(flow, context)
    if support := support_of(flow.bijection):
        x = support.mend(x)
    segments: list[Piece] = []
    segment = None
    with record_calls(flow.bijection) as calls:
        for name, layer in _flatten(flow.bijection):
            if not layer.exact:
                segment = None
            else:
                if segment is None:
                    segment = Segment()
                    segments.append(Piece("", segment, x, context))
                segment.append(name, layer)
            x, _ = layer(x, context)
    return Trace(segments, calls, segment is not None)


def _flatten(bijection: Bijection, name: str = "") -> Iterator[tuple[str, Bijection]]:
    """The layers of a chain and of the chains in it, with their dotted names."""
    if not is_sequence(bijection):
        yield name, bijection
        return
    for child, layer in bijection.layers().items():
        yield from _flatten(layer, f"{name}.{child}" if name else child)


def _to_weights(flow: Flow, x: Tensor | None) -> Tensor | None:
    """x in the precision of the flow's weights; integers as they are."""
    like = next((tensor for tensor in flow.state_dict().values() if tensor.is_floating_point()), None)
    return x if x is None or like is None or not x.is_floating_point() else x.to(like.dtype)


def _embedded(flow: Flow, context: Tensor | None) -> Tensor | None:
    """The context as the flow's layers get it."""
    return flow.embed(_to_weights(flow, context))


def _tolerance(strict: float, layer: nn.Module, scale: float) -> float:
    """A tolerance, wider for a layer with an ODE, which is as accurate as its solver."""
    solver = max((max(ode.rtol, ode.atol) for ode in continuous_layers(layer)), default=0.0)
    return scale * max(strict, SOLVER * solver)


# ---- round trips ---------------------------------------------------------------------------------------------------

_ROUND_TRIPS = {"float64": (1e-9, 1e-6, 1e-7), "float32": (1e-4, 1e-2, 1e-4)}  # median, greatest; sum of log-dets


def _check_round_trips(flow: Flow, trace: Trace, x, context, kind: str, scale: float) -> Iterator[Check]:
    errors = [_round_trip(segment) for segment in trace.segments]
    trips = torch.cat([trip.flatten() for trip, _ in errors])
    totals = torch.cat([total for _, total in errors])
    of_layers = {layer.name: _round_trip(layer) for layer in trace.layers}
    worst_trip = _worst({name: trip for name, (trip, _) in of_layers.items()})
    worst_total = _worst({name: total for name, (_, total) in of_layers.items()})
    median, greatest, sums = (_tolerance(strict, flow, scale) for strict in _ROUND_TRIPS[kind])
    yield Check(f"round trip in {kind}, median", trips.median().item(), median, worst_trip)
    yield Check(f"round trip in {kind}, greatest", trips.max().item(), greatest, worst_trip)
    if not flow.bijection.exact:
        yield Check(f"integers that come back as others in {kind}", _count_changes(flow, x, context), 0, worst_trip)
    yield Check(f"log-dets cancel in {kind}", totals.max().item(), sums, worst_total, "nats/dim")


def _round_trip(piece: Piece) -> tuple[Tensor, Tensor]:
    """|x̂ − x|/(1 + |x|) of every number, and |log-det + log-det of the inverse| per dimension of every example."""
    with global_batch.bin_centres():  # an ODE's stochastic trace has the same noise in both directions
        z, log_det = piece.layer.forward(piece.x, piece.context)
        back, back_log_det = piece.layer.inverse(z, piece.context)
    trip = (back - piece.x).abs() / (1 + piece.x.abs())
    return trip, (log_det + back_log_det).abs() / piece.dimensions


def _worst(found: dict[str, Tensor]) -> str | None:
    """The name with the greatest number, if that is not zero; NaN counts as infinity."""
    greatest = {name: values.max().nan_to_num(math.inf).item() for name, values in found.items()}
    name = max(greatest, key=lambda name: greatest[name], default=None)
    return name if name and greatest[name] > 0 else None


def _count_changes(flow: Flow, x: Tensor, context: Tensor | None) -> int:
    """The number of integers in the data that come back as another integer."""
    x, context = _to_weights(flow, x), _embedded(flow, context)
    try:
        with global_batch.bin_centres(), states_only():
            back, _ = flow.bijection.inverse(flow.bijection(x, context)[0], context)
    except FloatingPointError:
        return x.numel()
    if not x.is_floating_point():
        return int((back != x).sum())
    whole = (x == x.round()) & (x.abs() < _EXACT_INTEGERS)  # a table may have columns of real numbers
    changed = whole & ~((back - x).abs() < 0.5)
    return int((changed | (x.isnan() != back.isnan())).sum())


# ---- log-determinants ----------------------------------------------------------------------------------------------


def _check_log_dets(trace: Trace, limit: int, scale: float) -> Iterator[Check]:
    """Of every layer alone, and of the segments in as few pieces as ``limit`` allows."""
    calls = {call.name: call.piece for call in trace.calls}
    pieces = []
    for segment in trace.segments:
        if segment.dimensions <= max_dimensions(segment.layer, limit):
            pieces.append(segment)
        else:
            pieces += [piece for name in segment.layer.names for piece in _split(calls[name], calls, limit)]
    layers = {layer.name: shrink(layer, limit) for layer in trace.layers}
    missing = [name for name, piece in layers.items() if piece is None]
    note = f"nats/dim; without {', '.join(missing)}: too many dimensions" if missing else "nats/dim"
    of_layers = [(piece, log_det_errors(_fewer(piece))) for piece in layers.values() if piece]
    of_pieces = [(piece, log_det_errors(_fewer(piece))) for piece in pieces]
    for index, direction in enumerate(("forward", "inverse")):
        value, tolerance, worst = _greatest(of_layers, index, scale)
        yield Check(f"log-det of each layer, {direction}", value, tolerance, worst, note)
        value, tolerance, name = _greatest(of_pieces, index, scale)
        yield Check(f"log-det of the flow, {direction}", value, tolerance, name or worst, "nats/dim")


def _greatest(found: list[tuple[Piece, tuple[Tensor, Tensor]]], index: int, scale: float) -> tuple:
    """The error that is greatest relative to its tolerance, that tolerance, and the piece's name."""
    rows = [
        (errors[index].nan_to_num(math.inf).max().item(), _tolerance(1e-7, piece.layer, scale), piece.name)
        for piece, errors in found
    ]
    return max(rows, key=lambda row: row[0] / row[1], default=(math.nan, scale, None))


def _split(piece: Piece, calls: dict[str, Piece], limit: int) -> list[Piece]:
    """``piece`` on a small event, or the same for each layer inside it."""
    if small := shrink(piece, limit):
        return [small]
    inner = [name for name in calls if name.startswith(f"{piece.name}.")]
    outermost = [name for name in inner if not any(name.startswith(f"{other}.") for other in inner)]
    return [small for name in outermost for small in _split(calls[name], calls, limit)]


def _fewer(piece: Piece) -> Piece:
    """The piece with as many examples as there is time for Jacobians."""
    n = max(1, _JACOBIANS // piece.dimensions**2)
    return piece.first(min(n, _OF_ODES) if continuous_layers(piece.layer) else n)


# ---- the density as a whole ----------------------------------------------------------------------------------------


def _check_mass(flow: Flow, segment: Piece, tolerance: float) -> Check:
    """The integral of the density over a box against the share of samples in it."""
    context = None if segment.context is None else segment.context[:1]

    def contexts(n: int) -> Tensor | None:
        return None if context is None else context.expand(n, *context.shape[1:])

    support = segment.layer.support

    def density(x: Tensor) -> Tensor:
        """Of data, or of what a support maps them to: at the edges of one, a density of data may be infinite."""
        change = 0.0
        if support is not None:
            x, change = support.inverse(x.view(-1, *support.out_shape))
        z, log_det = segment.layer.forward(x.view(-1, *segment.layer.shape), contexts(len(x)))
        return (flow.base.log_prob(z, contexts(len(x))) + log_det + change).exp()

    z = flow.base.sample(_SAMPLES, context=contexts(_SAMPLES)).to(segment.x)
    samples = segment.layer.inverse(z, contexts(len(z)))[0]
    samples = (samples if support is None else support(samples)[0]).flatten(1)
    low, high = samples.quantile(torch.tensor([_OUTSIDE, 1 - _OUTSIDE]).to(samples), 0)
    share = ((samples >= low) & (samples <= high)).all(1).double().mean().item()
    with exact_trace():
        mass, points = _integral(density, low, high, tolerance / 4)
    note = f"{mass:.4f} on {points} points of a box that holds {share:.4f} of the samples"
    return Check("mass of the density", abs(mass - share), tolerance, None, note)


def _integral(function: Callable, low: Tensor, high: Tensor, enough: float) -> tuple[float, str]:
    """∫ function over a box of one or two dimensions by the midpoint rule, on finer grids until it changes by less than
    ``enough``; and the grid."""
    sides = (512, 2048, 8192, 32768) if len(low) == 1 else (64, 128, 256, 512, 1024)
    before = math.inf
    for side in sides:
        axes = [a + (b - a) * (torch.arange(side).to(low) + 0.5) / side for a, b in zip(low, high)]
        points = torch.cartesian_prod(*axes).view(-1, len(low))
        cell = ((high - low) / side).prod()
        total = sum((function(part).sum() * cell).item() for part in points.split(2**14))
        if abs(total - before) <= enough:
            break
        before = total
    return total, "×".join([str(side)] * len(low))


# ---- large numbers -------------------------------------------------------------------------------------------------


def _check_large(flow: Flow, x: Tensor, context: Tensor | None, grey_levels: int | None) -> Iterator[Check]:
    """Samples, large latents, large real data and extreme integers must map to finite numbers, or raise an error."""
    context = _embedded(flow, context)
    latents = _to_weights(flow, flow.base.sample(len(x), context=context).to(x.device))
    if any(
        isinstance(layer, BoundColumns | FillMissing | Support) for layer in flow.modules()
    ):  # not all numbers are data
        extremes, _ = flow.bijection.inverse(LARGE * latents, context)
    elif grey_levels is None:
        extremes = _to_weights(flow, LARGE * torch.randn(x.shape, device=x.device))
    else:
        extremes = torch.randint(0, 2, x.shape, device=x.device) * (grey_levels - 1)
        extremes[0], extremes[-1] = 0, grey_levels - 1
    for name, method, start in (
        ("numbers not finite in samples", flow.bijection.inverse, latents),
        ("numbers not finite from extreme data", flow.bijection.forward, extremes),
        (f"numbers not finite from latents of {LARGE:g}", flow.bijection.inverse, LARGE * latents),
    ):
        note = ""
        with record_calls(flow.bijection) as calls:
            try:
                method(start, context)
            except FloatingPointError as error:  # an error is as good as a finite number
                note = f"refused: {error}"
        counts = {call.name: _count_not_finite(flow, call) for call in calls if not call.layer.container}
        worst = next((name for name, count in counts.items() if count), None)
        yield Check(name, sum(counts.values()), 0, worst, note)


def _count_not_finite(flow: Flow, call: Call) -> int:
    output = call.output
    if isinstance(call.layer, FillMissing | DequantizeColumns):  # the layers that see missing values
        output = flow.hide_missing(output)
    return sum(int((~numbers.isfinite()).sum()) for numbers in (output, call.log_det))


# ---- an untrained flow ---------------------------------------------------------------------------------------------


@torch.no_grad()
def perturb(flow: Flow, x: Tensor, context: Tensor | None = None, noise: float = 0.1) -> None:
    """Add noise to a new flow's weights, and start the modules that start from data from ``x``.

    Many layers start as the identity, whose log-determinant 0 would hide errors. The noise is normal, with standard
    deviation ``noise``, in matrices and filters divided by the square root of the number of inputs of an output.
    """
    for parameter in flow.parameters():
        inputs = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.add_(noise / math.sqrt(inputs) * torch.randn_like(parameter))
    flow.initialize(x, context)
    if global_batch.has_moments(flow):
        with global_batch.reestimate(flow):
            flow(x, context)
