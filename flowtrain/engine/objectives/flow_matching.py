"""Flow matching: the velocity of a continuous flow by regression, without a solver (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowtrain.bijections import Continuous, Flatten, Reverse, Shuffle, Squeeze, Unsqueeze, VariationalDequantize
from flowtrain.bijections.bijection import at_least_float32, sum_event, walk
from flowtrain.bijections.ode import accuracy, continuous_layers, replace_solutions
from flowtrain.engine.evaluate import Evaluation
from flowtrain.engine.objectives.likelihood import maximum_likelihood
from flowtrain.engine.objectives.objective import Objective, Score
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch

COUPLINGS, TIMES, SELECTIONS = ("independent", "optimal_transport"), ("likelihood", "uniform"), ("likelihood", "loss")
MODELS = "model=cnf, cnf_image, ffjord or ffjord_image"
REARRANGEMENTS = Flatten, Reverse, Shuffle, Squeeze, Unsqueeze
FLOOR = 1e-3  # of the times of ``likelihood``: they are as dense as 1/(t + FLOOR)
FEW = 64  # dimensions up to which a run selects its weights by likelihoods, which need a solver
TOLERANCE = 1e-3  # of the solver in validations, which compare weights with the same errors


def flow_matching(
    grey_levels: int | None,
    shape: Sequence[int],
    coupling: str = "independent",
    times: str = "likelihood",
    select: str = "auto",
) -> FlowMatching:
    """Flow matching for data of ``shape`` that are integers of ``grey_levels`` values, or real numbers (None).

    ``select="auto"`` is "likelihood" for up to 64 dimensions, else "loss". See :class:`FlowMatching` for the rest.
    """
    if select == "auto":
        select = "likelihood" if prod(shape) <= FEW else "loss"
    return FlowMatching(grey_levels, coupling, times, select)


class FlowMatching(Objective):
    """The mean squared difference between a flow's velocity and that of straight paths from data to noise (Lipman et
    al. 2023, eq. 23, with its time reversed: here data are at time 0 and noise at 1).

    x_t = (1 − t)·x + t·ε moves with the velocity ε − x. A network that predicts it from x_t alone learns the mean
    velocity there, and the ODE of that takes the density of the data to that of the noise. No step solves an ODE.

    Several equations, one after another, share the path: the k-th of n learns the times from (k − 1)/n to k/n. Where
    channels leave between two scales, each variable's path ends where it leaves. So every continuous flow can be
    learned whose other layers are fixed: those before the first equation, which are started from data and then stay as
    they are, and rearrangements after it.

    Args:
        grey_levels: of the data; None: real numbers.
        coupling: of data and noise: "independent", or "optimal_transport" within each batch, and each process's part of
            it, which straightens the paths (Pooladian et al. 2023; Tong et al. 2024).
        times: "uniform", as in the paper; or "likelihood": t of density ∝ 1/(t + 10⁻³), each squared difference times
            1 − t. That weighs all orders of magnitude of the noise alike, as the bound of the likelihood of a diffusion
            does (Kingma et al. 2021, section 4; Song et al. 2021, theorem 1).
        select: what validation compares: "likelihood", by the solver with tolerance 10⁻³ and one trace noise for each
            example; or "loss", with the same noise and times each time.

    Raises:
        ValueError: an unknown name.

    >>> from flowtrain import flows
    >>> flow, objective = flows.cnf((2,), hidden=8), FlowMatching()
    >>> objective.prepare(flow)
    >>> objective.loss(flow, (torch.randn(16, 2), None)).shape
    torch.Size([16])
    """

    train_key, train_unit = "matching_loss", "a dimension"
    runs_layers = False
    start_rows = 10_000  # examples from which the layers are started that this does not train

    def __init__(
        self,
        grey_levels: int | None = None,
        coupling: str = "independent",
        times: str = "likelihood",
        select: str = "likelihood",
    ):
        for name, value, options in (
            ("coupling", coupling, COUPLINGS),
            ("times", times, TIMES),
            ("select", select, SELECTIONS),
        ):
            if value not in options:
                raise ValueError(f"{name}={value} must be one of {', '.join(options)}")
        self.coupling, self.times, self.select = coupling, times, select
        self.likelihood = maximum_likelihood(grey_levels)
        by_loss = select == "loss"
        self.key = self.train_key if by_loss else self.likelihood.key
        self.unit = self.train_unit if by_loss else self.likelihood.unit
        self._routes: WeakKeyDictionary[Flow, list[Route]] = WeakKeyDictionary()

    def prepare(self, flow: Flow) -> None:
        """Fix the layers that this does not train. ValueError, naming the key, where it cannot train ``flow``."""
        check(flow)
        learned = {*(weight for layer in continuous_layers(flow) for weight in layer.parameters())}
        if flow.embedding is not None:
            learned |= {*flow.embedding.parameters()}
        for parameter in flow.parameters():
            parameter.requires_grad_(parameter in learned)

    def loss(self, flow, batch):
        x, context = batch
        context = flow.embed(context)
        data = at_first_equation(flow, x, context)
        noise = flow.base.sample(len(x)).to(data).view_as(data)
        if self.coupling == "optimal_transport":
            noise = nearest(data, noise)
        if flow not in self._routes:
            self._routes[flow] = routes_of(flow, x, context)
        routes = self._routes[flow]
        share = global_batch.stratified(len(x), data.device, data.dtype)
        if len(routes) == 1:
            return self._losses(routes[0], 1, data, noise, share, context) / flow.dimensions
        turn = (torch.arange(len(x), device=x.device) + global_batch.first_row()) % len(routes)
        rows = [(turn == route.number).nonzero()[:, 0] for route in routes]  # each equation learns from its share
        losses = [
            self._losses(
                route, len(routes), data[mine], noise[mine], share[mine], None if context is None else context[mine]
            )
            for route, mine in zip(routes, rows)
        ]
        return torch.cat(losses)[torch.cat(rows).argsort()] / flow.dimensions

    def _losses(self, route: Route, equations: int, data, noise, share, context) -> Tensor:
        """Of the rows that an equation learns from, (B,): squared differences summed over its variables."""
        t, weight = self._times(share, route.number / equations, (route.number + 1) / equations)
        data, noise = route.take(data), route.take(noise)
        t = t.view(-1, *[1] * (data.dim() - 1))
        level = t * equations / route.last
        layer, end_time = route.layer, route.layer.end_time
        velocity = end_time * layer.net(
            end_time * (t * equations - route.number), torch.lerp(data, noise, level), context
        )
        return weight * sum_event((route.last * velocity.to(data.dtype) - (noise - data)).square())

    def _times(self, share: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        """Times between ``start`` and ``end`` from uniform numbers, and the weights of what is learned at them."""
        if self.times == "uniform":
            return start + (end - start) * share, torch.ones_like(share)
        t = (start + FLOOR) * ((end + FLOOR) / (start + FLOOR)) ** share - FLOOR
        return t, 1 - t

    def figure(self, flow, loss):
        return loss

    def score(self, evaluation: Evaluation) -> Score:
        if self.select == "likelihood":
            return self.likelihood.score(evaluation)
        value = -evaluation.log_likelihood
        return Score(value, value, f"flow-matching loss {value:.5f}")

    # ---- what validation averages

    def measure(self, flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
        """What a validation averages over examples, (B,): log-likelihoods or negative losses."""
        return -self.loss(flow, (x, context)) if self.select == "loss" else self.log_prob(flow, x, context)

    def log_prob(self, flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
        """Log-likelihoods, (B,), as exact as a comparison of weights needs."""
        with accuracy(TOLERANCE):
            return flow(x, context)


@dataclass(frozen=True)
class Route:
    """Where the variables of an equation are among those of the first, and where their paths end.

    Attributes:
        number: of the equation, from 0.
        index: of its variables among those of the first equation, (D,); None: they are the same, in the same places.
        last: how many equations each variable passes, in the equation's shape with a batch of 1.
    """

    layer: Continuous
    number: int
    index: Tensor | None
    last: Tensor

    def take(self, x: Tensor) -> Tensor:
        """The equation's variables, (B, *shape), of events at the first equation."""
        return x if self.index is None else x.flatten(1)[:, self.index].view(-1, *self.layer.shape)


@torch.no_grad()
def at_first_equation(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """The input that the first equation of ``flow`` gets for the data x."""
    inputs: list[Tensor] = []

    def note(layer: Continuous, h: Tensor, context: Tensor | None) -> Tensor:
        inputs.append(h)
        return h

    with replace_solutions(note):
        flow.bijection(x, context)
    return inputs[0]


@torch.no_grad()
def routes_of(flow: Flow, x: Tensor, context: Tensor | None) -> list[Route]:
    """The equations of ``flow`` in their order. ``x``, ``context``: any examples."""
    found: list[tuple[Continuous, Tensor]] = []

    def number(layer: Continuous, h: Tensor, context: Tensor | None) -> Tensor:
        if not found:
            h = torch.arange(h[0].numel(), device=h.device, dtype=torch.float64).view(1, *h.shape[1:])
        found.append((layer, h[0].flatten().long()))
        return h

    with replace_solutions(number):
        flow.bijection(x, context)
    same = found[0][1]
    passed = torch.stack([torch.isin(same, index) for _, index in found]).sum(0)
    return [
        Route(
            layer,
            i,
            None if torch.equal(index, same) else index,
            passed[index].view(1, *layer.shape).to(at_least_float32(x.dtype)),
        )
        for i, (layer, index) in enumerate(found)
    ]


def nearest(data: Tensor, noise: Tensor) -> Tensor:
    """``noise`` in the order that makes the sum of squared distances from ``data`` least."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(data.flatten(1), noise.flatten(1)).square()
    return noise[torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(noise.device)]


def check(flow: Flow) -> None:
    """Raise ValueError, with the key at fault, for a flow that flow matching cannot train."""
    layers = [(layer, inverted) for layer, inverted in walk(flow.bijection) if not layer.container]
    if any(isinstance(layer, VariationalDequantize) for layer, _ in layers):
        raise ValueError("dequantize: flow matching does not train a density of noise; use dequantize=uniform")
    first = next((i for i, (layer, _) in enumerate(layers) if isinstance(layer, Continuous)), None)
    if first is None:
        raise ValueError(f"model: it has no differential equation, whose velocity flow matching learns; use {MODELS}")
    if any(inverted and isinstance(layer, Continuous) for layer, inverted in layers):
        raise ValueError(
            f"model: it has an equation from noise to data, and flow matching needs the other; use {MODELS}"
        )
    for i, (layer, _) in enumerate(layers):
        fixed = not any(True for _ in layer.parameters()) or i < first and hasattr(layer, "start")
        rearranges = i < first or isinstance(layer, REARRANGEMENTS)
        if not isinstance(layer, Continuous) and not (fixed and rearranges):
            raise ValueError(
                f"model: flow matching trains differential equations, and no {type(layer).__name__}; use {MODELS}"
            )
    if any(True for _ in flow.base.parameters()):
        raise ValueError(f"base: flow matching does not train a {type(flow.base).__name__}; use base=normal")
