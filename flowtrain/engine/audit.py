"""Is a flow what it says it is? Round trips, log-determinants against Jacobians, total mass, large numbers.

Everything is measured on the flow's exact links: a surjection, such as dequantization, has no Jacobian. Chains are
opened, and the exact links before and after a surjection are audited as one *run* each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtrain.bijections import Bijection, Chain, Inverse, MultiScale
from flowtrain.bijections.bijection import size
from flowtrain.bijections.ode import continuous_layers, exact_trace, states_only, traced_exactly
from flowtrain.engine.evaluate import exact_arithmetic
from flowtrain.engine.jacobian import Piece, affordable, bound, disagreement
from flowtrain.flow import Flow
from flowtrain.runtime import fusion, globalbatch

CONTAINERS = (Chain, Inverse, MultiScale)  # their work is that of the layers in them
SOLVER = 100  # tolerances of a layer with an ODE are at least so many times its solver's
FINER = (
    100  # float64 shows whether an ODE is right, with a solver so much finer; float32 whether its own is fine enough
)
LARGE = 1e4  # the scale of latents and real data that must still map to finite numbers
_JACOBIANS = 2**17  # entries of one layer's Jacobians over all examples, unless one example's are more
_OF_ODES = 4  # Jacobians of what has an ODE in it
_SAMPLES, _OUTSIDE = 5_000, 5e-4  # a density's box holds all but this share of samples on each side
_EXACT_INTEGERS = 2**22  # up to here float32 tells an integer from its neighbours' bins


@dataclass(frozen=True)
class Check:
    """The worst ``value`` that was found, the ``tolerance`` that it must not exceed, and the ``layer`` to blame."""

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
    levels: int | None = None,
    limit: int = 4096,
    scale: float = 1.0,
    seed: int = 0,
) -> Iterator[Check]:
    """Audit ``flow`` in evaluation mode on examples ``x`` (B, *shape) such as data are.

    Args:
        levels: of integer data 0 … levels − 1; None for real numbers.
        limit: the most dimensions of a Jacobian: what has more is audited in pieces, each on the smallest event that
            it takes.
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
    traced = exact_trace if traced_exactly(double) else nullcontext
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), exact_arithmetic():
        torch.manual_seed(seed)
        yield from _ready(double)
        with traced():
            passage = _pass(double, x, context)
            yield from _both_ways(double, passage, x, context, "float64", scale)
            yield from _both_ways(single, _pass(single, x, context), x, context, "float32", scale)
        yield from _log_dets(passage, limit, scale)
        if size(double.bijection.out_shape) <= 2 and passage.ends_exactly:
            yield _mass(double, passage.runs[-1], 5e-3 * scale)
        yield from _large(double, x, context, levels)


def _ready(flow: Flow) -> Iterator[Check]:
    idle = [name for name, buffer in flow.named_buffers() if name.endswith("started") and not buffer.all()]
    yield Check("layers still to be started from data", len(idle), 0, _owner(idle))
    spoilt = [name for name, tensor in flow.state_dict().items() if not _is_sound(tensor)]
    yield Check("weights that are not finite", len(spoilt), 0, _owner(spoilt))


def _is_sound(tensor: Tensor) -> bool:
    """Finite, or a bound at infinity, which only buffers hold."""
    return not tensor.isnan().any() and (tensor.isfinite().all() or tensor.isinf().all()).item()


def _owner(weights: list[str]) -> str | None:
    """The layer of the first of some weights."""
    return weights[0].removeprefix("bijection.").rpartition(".")[0] if weights else None


# ---- what passes through the layers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A layer's part in a pass through a flow."""

    name: str
    layer: Bijection
    backwards: bool  # whether it was its inverse that was called
    given: Tensor
    made: Tensor
    log_det: Tensor
    context: Tensor | None

    @property
    def piece(self) -> Piece:
        return Piece(self.name, self.layer, self.made if self.backwards else self.given, self.context)


@contextmanager
def watching(bijection: Bijection) -> Iterator[list[Call]]:
    """Within it the list fills with the first call of each bijection inside ``bijection``, innermost first."""
    calls: list[Call] = []
    layers = {name: layer for name, layer in bijection.named_modules() if isinstance(layer, Bijection)}
    silent = set(layers)

    def watched(name: str, layer: Bijection, direction: str) -> Callable:
        method = getattr(layer, direction)

        def call(given, context=None):
            made, log_det = method(given, context)
            if name in silent:
                silent.remove(name)
                calls.append(Call(name, layer, direction == "inverse", given, made, log_det, context))
            return made, log_det

        return call

    for name, layer in layers.items():
        vars(layer).update({direction: watched(name, layer, direction) for direction in ("forward", "inverse")})
    try:
        with fusion.layer_by_layer():  # what is joined with others is not called
            yield calls
    finally:
        for layer in layers.values():
            del vars(layer)["forward"], vars(layer)["inverse"]


class Run(nn.Module):
    """Exact links in a row, as one bijection of events of ``shape``."""

    def __init__(self):
        super().__init__()
        self.names, self.links = [], nn.ModuleList()

    @property
    def shape(self):
        return self.links[0].shape

    def append(self, name: str, link: Bijection) -> None:
        self.names.append(name)
        self.links.append(link)

    def forward(self, x, context=None):
        total = 0.0
        for link in self.links:
            x, log_det = link(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z, context=None):
        total = 0.0
        for link in reversed(self.links):
            z, log_det = link.inverse(z, context)
            total = total + log_det
        return z, total


@dataclass(frozen=True)
class Passage:
    """A flow's runs and layers, with what each is given when examples pass from data to latent."""

    runs: list[Piece]
    calls: list[Call]
    ends_exactly: bool

    @property
    def layers(self) -> list[Piece]:
        return [call.piece for call in self.calls if call.layer.exact and not isinstance(call.layer, CONTAINERS)]


def _pass(flow: Flow, x: Tensor, context: Tensor | None) -> Passage:
    x, context = _as_weights(flow, x), _as_weights(flow, context)
    runs, run = [], None
    with watching(flow.bijection) as calls:
        for name, link in _links(flow.bijection):
            if link.exact and run is None:
                run = Run()
                runs.append(Piece("", run, x, context))
            if link.exact:
                run.append(name, link)
            else:
                run = None
            x, _ = link(x, context)
    return Passage(runs, calls, run is not None)


def _links(bijection: Bijection, name: str = "") -> Iterator[tuple[str, Bijection]]:
    """The links of a chain and of the chains in it."""
    if not isinstance(bijection, Chain):
        yield name, bijection
        return
    for child, link in bijection.named_children():
        yield from _links(link, f"{name}.{child}" if name else child)


def _as_weights(flow: Flow, x: Tensor | None) -> Tensor | None:
    """x in the precision of the flow's weights; integers as they are."""
    like = next((tensor for tensor in flow.state_dict().values() if tensor.is_floating_point()), None)
    return x if x is None or like is None or not x.is_floating_point() else x.to(like.dtype)


def _allowed(strict: float, layer: nn.Module, scale: float) -> float:
    """A tolerance, wider for what is as exact as its solver."""
    solver = max((max(ode.rtol, ode.atol) for ode in continuous_layers(layer)), default=0.0)
    return scale * max(strict, SOLVER * solver)


# ---- round trips ---------------------------------------------------------------------------------------------------

_ROUND_TRIPS = {"float64": (1e-9, 1e-6, 1e-7), "float32": (1e-4, 1e-2, 1e-4)}  # median, greatest; sum of log-dets


def _both_ways(flow: Flow, passage: Passage, x, context, kind: str, scale: float) -> Iterator[Check]:
    errors = [_there_and_back(run) for run in passage.runs]
    trips = torch.cat([trip.flatten() for trip, _ in errors])
    totals = torch.cat([total for _, total in errors])
    of_layers = {layer.name: _there_and_back(layer) for layer in passage.layers}
    worst_trip = _worst({name: trip for name, (trip, _) in of_layers.items()})
    worst_total = _worst({name: total for name, (_, total) in of_layers.items()})
    median, greatest, sums = (_allowed(strict, flow, scale) for strict in _ROUND_TRIPS[kind])
    yield Check(f"round trip in {kind}, median", trips.median().item(), median, worst_trip)
    yield Check(f"round trip in {kind}, greatest", trips.max().item(), greatest, worst_trip)
    if not flow.bijection.exact:
        yield Check(f"integers that come back as others in {kind}", _changed(flow, x, context), 0, worst_trip)
    yield Check(f"log-dets cancel in {kind}", totals.max().item(), sums, worst_total, "nats/dim")


def _there_and_back(piece: Piece) -> tuple[Tensor, Tensor]:
    """|x̂ − x|/(1 + |x|) of every number, and |log-det there + log-det back| per dimension of every example."""
    with globalbatch.centred():  # an ODE's stochastic trace has the same noise both ways
        z, log_det = piece.layer.forward(piece.x, piece.context)
        back, back_log_det = piece.layer.inverse(z, piece.context)
    trip = (back - piece.x).abs() / (1 + piece.x.abs())
    return trip, (log_det + back_log_det).abs() / piece.dimensions


def _worst(found: dict[str, Tensor]) -> str | None:
    """The name with the greatest number, where that is not zero; what is not a number is greater than all."""
    greatest = {name: values.max().nan_to_num(math.inf).item() for name, values in found.items()}
    name = max(greatest, key=greatest.get, default=None)
    return name if name and greatest[name] > 0 else None


def _changed(flow: Flow, x: Tensor, context: Tensor | None) -> int:
    """How many of the data's integers another integer comes back for."""
    x, context = _as_weights(flow, x), _as_weights(flow, context)
    try:
        with globalbatch.centred(), states_only():
            back, _ = flow.bijection.inverse(flow.bijection(x, context)[0], context)
    except FloatingPointError:
        return x.numel()
    if not x.is_floating_point():
        return int((back != x).sum())
    whole = (x == x.round()) & (x.abs() < _EXACT_INTEGERS)  # of a table's columns some are real
    return int((whole & ~((back - x).abs() < 0.5)).sum())


# ---- log-determinants ----------------------------------------------------------------------------------------------


def _log_dets(passage: Passage, limit: int, scale: float) -> Iterator[Check]:
    """Of every layer alone, and of the runs in as few pieces as ``limit`` allows."""
    calls = {call.name: call.piece for call in passage.calls}
    runs = []
    for run in passage.runs:
        if run.dimensions <= bound(run.layer, limit):
            runs.append(run)
        else:
            runs += [piece for name in run.layer.names for piece in _pieces(calls[name], calls, limit)]
    layers = {layer.name: affordable(layer, limit) for layer in passage.layers}
    beyond = [name for name, piece in layers.items() if piece is None]
    note = f"nats/dim; without {', '.join(beyond)}: too many dimensions" if beyond else "nats/dim"
    of_layers = [(piece, disagreement(_fewer(piece))) for piece in layers.values() if piece]
    of_runs = [(piece, disagreement(_fewer(piece))) for piece in runs]
    for way, direction in enumerate(("forward", "inverse")):
        value, tolerance, worst = _furthest(of_layers, way, scale)
        yield Check(f"log-det of each layer, {direction}", value, tolerance, worst, note)
        value, tolerance, name = _furthest(of_runs, way, scale)
        yield Check(f"log-det of the flow, {direction}", value, tolerance, name or worst, "nats/dim")


def _furthest(found: list[tuple[Piece, tuple[Tensor, Tensor]]], way: int, scale: float) -> tuple:
    """The error that is the greatest for its tolerance, that tolerance, and whose it is."""
    rows = [
        (errors[way].nan_to_num(math.inf).max().item(), _allowed(1e-7, piece.layer, scale), piece.name)
        for piece, errors in found
    ]
    return max(rows, key=lambda row: row[0] / row[1], default=(math.nan, scale, None))


def _pieces(piece: Piece, calls: dict[str, Piece], limit: int) -> list[Piece]:
    """``piece`` on an affordable event, else the pieces of what it is made of."""
    if small := affordable(piece, limit):
        return [small]
    inner = [name for name in calls if name.startswith(f"{piece.name}.")]
    outermost = [name for name in inner if not any(name.startswith(f"{other}.") for other in inner)]
    return [small for name in outermost for small in _pieces(calls[name], calls, limit)]


def _fewer(piece: Piece) -> Piece:
    """With as many examples as there is time for Jacobians."""
    n = max(1, _JACOBIANS // piece.dimensions**2)
    return piece.first(min(n, _OF_ODES) if continuous_layers(piece.layer) else n)


# ---- the density as a whole ----------------------------------------------------------------------------------------


def _mass(flow: Flow, run: Piece, tolerance: float) -> Check:
    """The integral of the density over a box against the share of samples in it."""
    context = None if run.context is None else run.context[:1]

    def contexts(n: int) -> Tensor | None:
        return None if context is None else context.expand(n, *context.shape[1:])

    def density(x: Tensor) -> Tensor:
        z, log_det = run.layer.forward(x.view(-1, *run.layer.shape), contexts(len(x)))
        return (flow.base.log_prob(z, contexts(len(x))) + log_det).exp()

    z = flow.base.sample(_SAMPLES, context=contexts(_SAMPLES)).to(run.x)
    samples = run.layer.inverse(z, contexts(len(z)))[0].flatten(1)
    low, high = samples.quantile(torch.tensor([_OUTSIDE, 1 - _OUTSIDE]).to(samples), 0)
    share = ((samples >= low) & (samples <= high)).all(1).double().mean().item()
    with exact_trace():
        mass, points = _integral(density, low, high, tolerance / 4)
    note = f"{mass:.4f} on {points} points of a box that holds {share:.4f} of the samples"
    return Check("mass of the density", abs(mass - share), tolerance, None, note)


def _integral(function: Callable, low: Tensor, high: Tensor, enough: float) -> tuple[float, str]:
    """∫ function over a box of one or two dimensions by the midpoint rule, on finer grids until it hardly changes."""
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


def _large(flow: Flow, x: Tensor, context: Tensor | None, levels: int | None) -> Iterator[Check]:
    """Samples, large latents, large real data and the extremes of integer data give finite numbers, or an error."""
    context = _as_weights(flow, context)
    if levels is None:
        extremes = _as_weights(flow, LARGE * torch.randn(x.shape, device=x.device))
    else:
        extremes = torch.randint(0, 2, x.shape, device=x.device) * (levels - 1)
        extremes[0], extremes[-1] = 0, levels - 1
    latents = _as_weights(flow, flow.base.sample(len(x), context=context).to(x.device))
    for name, method, start in (
        ("numbers not finite in samples", flow.bijection.inverse, latents),
        ("numbers not finite from extreme data", flow.bijection.forward, extremes),
        (f"numbers not finite from latents of {LARGE:g}", flow.bijection.inverse, LARGE * latents),
    ):
        note = ""
        with watching(flow.bijection) as calls:
            try:
                method(start, context)
            except FloatingPointError as error:  # said aloud, not lost
                note = f"refused: {error}"
        lost = [call for call in calls if _lost(call)]
        count = sum(_lost(call) for call in lost if not isinstance(call.layer, CONTAINERS))
        yield Check(name, count, 0, lost[0].name if lost else None, note)


def _lost(call: Call) -> int:
    return sum(int((~numbers.isfinite()).sum()) for numbers in (call.made, call.log_det))


# ---- a flow to audit before it has been trained --------------------------------------------------------------------


@torch.no_grad()
def unsettle(flow: Flow, x: Tensor, context: Tensor | None = None, noise: float = 0.1) -> None:
    """Take a new flow away from its neutral start, and start from ``x`` what starts from data.

    Every weight gets normal noise of standard deviation ``noise``, those of matrices and filters over the square root
    of what each output sums: many layers begin as the identity, whose log-determinant 0 no error could spoil.
    """
    for parameter in flow.parameters():
        summed = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.add_(noise / math.sqrt(summed) * torch.randn_like(parameter))
    flow.initialize(x, context)
    if globalbatch.has_moments(flow):
        with globalbatch.reestimating(flow):
            flow(x, context)
