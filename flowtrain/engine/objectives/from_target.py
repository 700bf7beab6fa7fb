"""Objectives of flows that learn from a target, a density known up to a constant, by their own samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flowtrain.distributions import Noise
from flowtrain.engine.evaluate import Evaluation, plus_minus
from flowtrain.engine.importance import effective_share
from flowtrain.engine.objectives.objective import Objective, Score
from flowtrain.flow import Flow
from flowtrain.targets.target import Target


class FromTarget(Objective):
    """What both objectives share: samples of the flow, and the logarithms of their importance weights.

    A step draws as many samples x ~ q as a batch has examples; log w = log p_β(x) − log q(x). Annealed, p_β is
    p^β s^(1−β), between the start s = N(0, scale²), which β = 0 would be, and the target p, which β = 1 is. Losses are
    per dimension, so that rates and clipping suit any number of them.

    Args:
        target: log p, up to a constant.
        path_gradient: leave out the part of the gradient that weights have through log q at fixed x, whose mean is
            known: 0, or for α = 2 a multiple of the rest. What is left vanishes where q is p (Roeder et al. 2017;
            Vaitl et al. 2022). It takes one pass of the likelihood more.
        anneal: share of the run over which β rises to 1, by the same factor in each step; None: it is 1.
        anneal_from: β at the start.

    Raises:
        ValueError: ``anneal`` or ``anneal_from`` outside (0, 1].
    """

    unit = "nats"

    def __init__(
        self, target: Target, path_gradient: bool = False, anneal: float | None = None, anneal_from: float = 0.01
    ):
        for name, value in (("anneal", anneal), ("anneal_from", anneal_from)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be above 0 and at most 1")
        self.target, self.path_gradient = target, path_gradient
        self.anneal, self.anneal_from = anneal, anneal_from
        self.spent = 1.0

    def begin_step(self, spent: float) -> None:
        """Note the share of the run's budget that is spent, which annealing depends on."""
        self.spent = spent

    @property
    def power(self) -> float:
        """β, of the target in the step at hand."""
        return self.anneal_from ** max(0.0, 1 - self.spent / self.anneal) if self.anneal else 1.0

    def log_density(self, x: Tensor) -> Tensor:
        """log p_β, (B,), of x (B, D)."""
        power, value = self.power, self.target.log_prob(x)
        return value if power == 1 else power * value + (1 - power) * self.log_start(x)

    def log_start(self, x: Tensor) -> Tensor:
        """The log-density of the start, (B,), of x (B, D)."""
        scale = self.target.scale
        return -0.5 * (x / scale).square().sum(1) - x.shape[1] * (math.log(scale) + 0.5 * math.log(2 * math.pi))

    def draw(self, flow: Flow, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """As many samples as ``batch`` has examples, (B, D), and their log w, (B,), with gradients."""
        x, context = batch
        samples, log_q = flow.rsample_and_log_prob(() if context is not None else len(x), context)
        if self.path_gradient:
            with frozen(flow):
                log_q = flow(samples, context)
        return samples, self.log_density(samples) - log_q

    def figure(self, flow, loss):
        return loss * flow.dimensions


class ReverseKL(FromTarget):
    """The reverse Kullback-Leibler divergence KL(q‖p) up to log Z: E_q[log q(x) − log p(x)], whose negative, the
    evidence lower bound (ELBO), is what a run reports, in nats. It is at most log Z.

    With ``path_gradient`` the gradient is E[∂x/∂θ · ∇ₓ(log q − log p)(x)], equation 8 of Roeder et al. 2017: it is 0
    for each sample, not on average alone, where q is p.

    Where q misses a part of p that gradient is nearly 0. So ``cover`` times the gradient of KL(p‖q), which is 0 where
    q is p too, is added by importance sampling: E_m[(q − p)/m · ∇ log q] over half of the step's samples of the flow
    and as many others, half of the start s, which is wide, and half of t, the flow with a base 1 + 2/√D times as wide.
    Together they have the density m = q/2 + (s + t)/4 (the balance heuristic, Veach and Guibas 1995). The part of q
    has mean 0, and takes the noise away where q is p.

    Args:
        cover: what that gradient is multiplied by; 0: it is left out, and with it one pass of the likelihood. Only
            flows without a context can have it.
        target, path_gradient, anneal, anneal_from: see :class:`FromTarget`.

    Raises:
        ValueError: ``cover`` below 0.

    >>> from flowtrain import flows, targets
    >>> flow, objective = flows.nsf_coupling((2,), hidden=8), ReverseKL(targets.DoubleWell())
    >>> objective.loss(flow, (torch.zeros(16, 2), None)).shape
    torch.Size([16])
    """

    key = "elbo"

    def __init__(
        self,
        target: Target,
        path_gradient: bool = False,
        anneal: float | None = None,
        anneal_from: float = 0.01,
        cover: float = 0.0,
    ):
        super().__init__(target, path_gradient, anneal, anneal_from)
        if not cover >= 0:
            raise ValueError(f"cover={cover} must be at least 0")
        self.cover = cover

    def loss(self, flow, batch):
        samples, log_w = self.draw(flow, batch)
        loss = -log_w
        if self.cover:
            slope = self.cover * self.cover_term(flow, samples.detach())
            loss = loss + slope - slope.detach()  # the figure remains the ELBO
        return loss / flow.dimensions

    def cover_term(self, flow: Flow, samples: Tensor) -> Tensor:
        """(B,) whose mean over the global batch has the gradient of KL(p_β‖q), from samples of the flow (B, D)."""
        n, dimensions = samples.shape
        start = self.target.scale * Noise("normal", flow.shape).draw(n).to(samples)
        with torch.no_grad():
            wider = 1 + 2 / math.sqrt(dimensions)
            wide, _ = flow.bijection.inverse(wider * flow.base.sample(n)[3::4].to(samples))
        x = torch.cat([samples[::2], start[1::4], wide])
        z, log_det = flow.bijection(x)
        log_q = flow.base.log_prob(z) + log_det
        with torch.no_grad():
            log_t = flow.base.log_prob(z / wider) - dimensions * math.log(wider) + log_det
            log_m = torch.logaddexp(log_q, torch.logaddexp(self.log_start(x), log_t) - math.log(2))
            of_p, of_q = (value - log_m for value in (self.log_density(x), log_q))
            slopes = (of_q - log_mean_of_all(of_q)).exp() - (of_p - log_mean_of_all(of_p)).exp()
        return torch.where(slopes == 0, 0.0, slopes * log_q)

    def figure(self, flow, loss):
        return -super().figure(flow, loss)

    def score(self, evaluation: Evaluation) -> Score:
        value, stderr = evaluation.log_likelihood, evaluation.log_likelihood_stderr
        text = f"ELBO {plus_minus(value, stderr)} nats{_exact(self.target)}"
        return Score(-value, value, text)


class Alpha2(FromTarget):
    """Half the logarithm of E_q[w²], an upper bound of log Z (CUBO with n = 2, equation 2 of Dieng et al. 2017); less
    log Z it is half the Rényi divergence of order 2, D₂(p‖q) = log(1 + χ²(p‖q)), which a run reports in nats. It
    punishes a flow that misses a part of the target, where the reverse divergence does not.

    The estimate of a step is ½ log of the mean of w² over the global batch. It is reported, and weights are selected,
    less the logarithm of the mean of w: that is −½ log(ESS/n), which a flow that no sample of comes near the target
    cannot feign. By default the gradient is that through the samples and through log q, as in that paper's algorithm 1.
    With ``path_gradient`` it is
    −Σ w² ∇ log w along the samples' paths / Σ w²: the mean of the part at fixed x is minus twice as much (Tucker et al.
    2019, section 4), and it vanishes where q is p.

    >>> from flowtrain import flows, targets
    >>> flow, objective = flows.nsf_coupling((2,), hidden=8), Alpha2(targets.DoubleWell(), path_gradient=True)
    >>> objective.loss(flow, (torch.zeros(16, 2), None)).shape
    torch.Size([16])
    """

    key = "half_renyi"

    def loss(self, flow, batch):
        _, log_w = self.draw(flow, batch)
        log_mean = log_mean_of_all(2 * log_w.detach())
        value = 0.5 * log_mean - log_mean_of_all(log_w.detach())
        shares = (2 * log_w.detach() - log_mean).exp()  # of mean 1 over the global batch
        slope = -shares * log_w if self.path_gradient else shares * log_w
        return (value + slope - slope.detach()) / flow.dimensions

    def score(self, evaluation: Evaluation) -> Score:
        log_w = evaluation.each[~evaluation.each.isnan()]
        value = -0.5 * math.log(effective_share(log_w).value)
        text = f"half the Rényi divergence of order 2, {value:.4f} nats; ELBO {evaluation.log_likelihood:.4f} nats"
        return Score(value, value, text + _exact(self.target))


def log_mean_of_all(values: Tensor) -> Tensor:
    """log of the mean of exp(values) over all processes, each of which has as many, without gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values.logsumexp(0) - math.log(len(values))
    top = values.max()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (values - top).exp().sum()
    dist.all_reduce(total)
    return top + total.log() - math.log(len(values) * dist.get_world_size())


@contextmanager
def frozen(flow: Flow) -> Iterator[None]:
    """Within it, no gradient reaches the flow's weights; one reaches what passes through the flow."""
    trained = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _exact(target: Target) -> str:
    return "" if target.log_z is None else f" (log Z = {target.log_z:.4f})"
