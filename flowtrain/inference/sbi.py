"""Flows as density estimators of the package sbi."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from flowtrain import flows
from flowtrain.bijections import BoundColumns, Regression, SoftClippedRationalQuadratic, Standardize
from flowtrain.data import Columns
from flowtrain.data.simulations.prior import broadcast_ends, each_end, limits, support_ends
from flowtrain.data.tables.column import Column
from flowtrain.flow import Flow
from flowtrain.flows.parts import chain
from flowtrain.runtime.global_batch import RunningMoments

try:
    from sbi.inference.trainers.nle.nle_base import LikelihoodEstimatorTrainer
    from sbi.neural_nets.estimators import ConditionalDensityEstimator
    from sbi.utils.sbiutils import standardizing_net, z_score_parser, z_standardization
except ModuleNotFoundError as error:
    raise ImportError("flowtrain.sbi needs the package sbi: pip install 'flowtrain[sbi]'") from error

Scores = Literal["independent", "structured", "none"] | None
SPLINES = ("nsf_autoregressive", "nsf_coupling")
MOST_ROWS = 4096  # of the first batch that the flow starts from
PRIOR_OF_LIKELIHOOD = "prior: it bounds θ, and a likelihood is a density of x; give bounds= for x"

__all__ = ["FlowEstimator", "estimator"]


def estimator(
    model: str | Callable[..., Flow] = "nsf_autoregressive",
    *,
    density: Literal["posterior", "likelihood"] | None = None,
    prior: Distribution | None = None,
    bounds: tuple[Any, Any] | None = None,
    embedding_net: nn.Module | None = None,
    z_score_theta: Scores = "independent",
    z_score_x: Scores = "independent",
    average: float = 0.98,
    **knobs,
) -> Callable[[Tensor, Tensor], FlowEstimator]:
    """A builder for the ``density_estimator`` of sbi's NPE and NLE: it makes a flow that fits the first simulations.

    The flow starts from a linear regression on the features: see :class:`flowtrain.bijections.Regression`. Splines
    without a ``univariate=`` are :class:`flowtrain.bijections.SoftClippedRationalQuadratic`, which reach from −5 to 5.

    Args:
        model: the name of a function of :mod:`flowtrain.flows` that takes vectors, or such a function.
        density: whose density it is: p(θ | x), the posterior, or p(x | θ), the likelihood. None: the likelihood where
            sbi's NLE calls the builder, else the posterior.
        prior: bounds θ by its support, an interval or a half-line in each dimension: no sample of the posterior lies
            outside, and the density there is 0.
        bounds: (low, high) of what is modelled instead, two numbers or tensors; None for no bound.
        embedding_net: maps what is conditional on, (B, *shape), z-scored, to features, (B, n); trained with the flow.
        z_score_theta, z_score_x: whether each dimension is standardized ("independent"), all by one mean and
            deviation ("structured": series and images), or none; of bounded ones, after their map to the line.
        average: decay of the moving average of the weights, which validation and samples use; 0 for no average.
        knobs: of the model, such as ``steps=5, hidden=50``.

    Raises:
        ValueError: an unknown model; ``average`` outside [0, 1); ``prior`` with ``bounds`` or for a likelihood; a prior
            of another support, such as a simplex.
        ImportError: sbi is not installed.

    >>> import flowtrain
    >>> build = flowtrain.sbi.estimator("nsf_coupling", hidden=16)
    >>> theta, x = torch.randn(100, 2), torch.randn(100, 3)
    >>> posterior = build(theta, x)
    >>> posterior.sample((5,), x[:4]).shape, posterior.log_prob(theta[:4], x[:4]).shape
    (torch.Size([5, 4, 2]), torch.Size([1, 4]))
    """
    if isinstance(model, str):
        if model not in flows.__all__:
            raise ValueError(f"model='{model}': must be one of {', '.join(flows.__all__)}")
        if model in SPLINES:
            knobs = {"univariate": SoftClippedRationalQuadratic, **knobs}
        model = getattr(flows, model)
    if density not in (None, "posterior", "likelihood"):
        raise ValueError(f"density='{density}': must be 'posterior' or 'likelihood'")
    if not 0 <= average < 1:
        raise ValueError(f"average={average} must be at least 0 and below 1")
    if prior is not None and bounds is not None:
        raise ValueError("prior and bounds: give one of them")
    for z_score in (z_score_theta, z_score_x):
        if z_score == "transform_to_unconstrained":
            raise ValueError("z_score='transform_to_unconstrained': give prior= or bounds= instead")
        z_score_parser(z_score)
    if density == "likelihood" and prior is not None:
        raise ValueError(PRIOR_OF_LIKELIHOOD)
    prior_ends = None if prior is None else _prior_ends(prior)

    def build(batch_theta: Tensor, batch_x: Tensor) -> FlowEstimator:
        """The estimator for simulations θ (N, *) and x (N, *), whose moments and shapes it takes."""
        # NPE and NLE call a builder in the same way: only the caller tells which of them it is
        caller = sys._getframe(1).f_locals.get("self")
        is_likelihood = density == "likelihood" or density is None and isinstance(caller, LikelihoodEstimatorTrainer)
        if is_likelihood and prior is not None:
            raise ValueError(PRIOR_OF_LIKELIHOOD)
        rows, conditions, scores = batch_theta, batch_x, (z_score_theta, z_score_x)
        if is_likelihood:
            rows, conditions, scores = conditions, rows, scores[::-1]
        if rows.dim() != 2:
            raise ValueError(f"what is modelled has shape {list(rows.shape[1:])} for each simulation: it must be a row")
        ends = prior_ends or [(None, None)]
        if bounds is not None:
            ends = [*zip(*(each_end(end, rows.shape[1]) for end in bounds))]
        ends = broadcast_ends(ends, rows.shape[1])
        low, high = limits(ends)
        if ((rows < low) | (rows > high)).any():
            raise ValueError("some of the simulations lie beyond the bounds")
        z_scored, structured = z_score_parser(scores[1])
        nets = [standardizing_net(conditions, structured)] if z_scored else []
        nets += [] if embedding_net is None else [embedding_net]
        flow = model(
            tuple(rows.shape[1:]),
            context_shape=tuple(conditions.shape[1:]),
            embedding=nn.Sequential(*nets, nn.Flatten()),
            preprocess=chain(bound=BoundColumns, standardize=Standardize, regression=Regression),
            **knobs,
        )
        _fit_links(flow, rows, ends, scores[0])
        flow.initialize(rows[:MOST_ROWS], conditions[:MOST_ROWS])
        return FlowEstimator(flow, ends, average)

    return build


class FlowEstimator(ConditionalDensityEstimator):
    """A flow with sbi's contract of a conditional density estimator, whose shapes are those of sbi:

    inputs (samples, batch, *input_shape) or (batch, *input_shape), conditions (batch, *condition_shape) or with a
    sample dimension in front. Outside the bounds the density is 0.

    Args:
        flow: of rows, with conditions as context.
        ends: (low, high) of each dimension of the input, None where it has no bound.
        average: decay of a moving average of the weights and of the moments of batch normalization; 0 for none. In
            training mode it takes in the weights before each density that is computed with gradients, if they have
            changed since the last one. In evaluation mode the weights are the average, and so is the state_dict; a
            density that was computed before the mode changed has no gradients any more.
    """

    net: Flow
    decay = 0.0  # of an estimator that was pickled without one
    _set_aside: list[Tensor] = []  # in training mode the average, in evaluation mode the weights to train on
    _counted: list[int] = []  # versions of the weights that the average has taken in last

    def __init__(self, flow: Flow, ends, average: float = 0.0):
        super().__init__(flow, torch.Size(flow.shape), torch.Size(flow.context_shape))
        self.decay = average
        self._set_aside = []
        self.register_load_state_dict_post_hook(_forget)
        for name, limit in zip(("low", "high"), limits(ends)):
            self.register_buffer(name, limit)

    def train(self, mode: bool = True) -> FlowEstimator:
        """Training or evaluation mode, with the weights of it."""
        if mode != self.training and self._set_aside:
            if not mode:
                self._update_average()
            weights = self._weights()
            others = [one.detach().clone() for one in weights]
            with torch.no_grad():
                torch._foreach_copy_(weights, self._set_aside)
            self._set_aside, self._counted = others, self._versions()
        return super().train(mode)

    def _weights(self) -> list[Tensor]:
        moments = [module for module in self.modules() if isinstance(module, RunningMoments)]
        return [*self.parameters(), *(buffer for module in moments for buffer in module.buffers())]

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters()]

    @torch.no_grad()
    def _update_average(self) -> None:
        """Take in the weights, unless no step has been made since they were taken in last."""
        versions = self._versions()
        if not self.decay or versions == self._counted:
            return
        if self._set_aside:
            torch._foreach_lerp_(self._set_aside, self._weights(), 1 - self.decay)
        else:
            self._set_aside = [one.detach().clone() for one in self._weights()]
        self._counted = versions

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._set_aside = [fn(one) for one in self._set_aside]
        return self

    @property
    def embedding_net(self) -> nn.Module:
        """From conditions to features, (B, n), z-scoring included."""
        return self.net.embedding

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        """log p(input | condition) in nats, (samples, batch); −∞ outside the bounds."""
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        if self.training and torch.is_grad_enabled():
            self._update_average()
        input, _, batch = self._broadcast_and_align(input, condition)
        # each condition is embedded once, then repeated for all samples
        given = condition.shape[: condition.dim() - len(self.condition_shape)]
        features = self.net.embed(condition.reshape(-1, *self.condition_shape)).unflatten(0, given)
        features = features.expand(len(input), batch, -1)
        inside = ((input >= self.low) & (input <= self.high)).all(-1)
        rows = input.clamp(self.low, self.high)  # a value of NaN would give gradients of NaN
        log_prob = self.net.log_prob_given(rows.flatten(0, 1), features.flatten(0, 1))
        log_prob = log_prob.unflatten(0, (len(input), batch))
        return torch.where(inside, log_prob, -torch.inf)

    def loss(self, input: Tensor, condition: Tensor, **kwargs) -> Tensor:
        """−log p(input | condition) of rows (batch, *input_shape), (batch,)."""
        return -self.log_prob(input[None], condition)[0]

    def sample(self, sample_shape: Sequence[int], condition: Tensor, **kwargs) -> Tensor:
        """Samples for each of a batch of conditions, (*sample_shape, batch, *input_shape), without gradients."""
        self._check_condition_shape(condition)
        return self.net.sample(tuple(sample_shape), condition)

    def sample_and_log_prob(self, sample_shape: Sequence[int], condition: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """Samples as :meth:`sample` draws them, with gradients, and their log-densities, in one pass."""
        self._check_condition_shape(condition)
        return self.net.rsample_and_log_prob(tuple(sample_shape), condition)

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        """The latents of inputs, in the broadcast batch of both."""
        self._check_condition_shape(condition)
        return self.net.encode(input, condition)


def _forget(module: nn.Module, _) -> None:
    """Weights that are loaded are those to train on, and a new average begins."""
    module._set_aside, module._counted = [], []


def _prior_ends(prior: Distribution) -> list[tuple[float | None, float | None]]:
    try:
        return list(support_ends(prior.support))
    except ValueError as error:
        raise ValueError(f"prior: {error}") from error


@torch.no_grad()
def _fit_links(flow: Flow, rows: Tensor, ends: Sequence[tuple], z_score: Scores) -> None:
    """Fit the first layers of a flow, its bounds and z-scoring, to rows."""
    links = flow.bijection.layers()["preprocess"].layers()
    columns = [
        Column(f"x{i}", "real", mean=mean, low=low, high=high)
        for i, (mean, (low, high)) in enumerate(zip(rows.mean(0).tolist(), ends))
    ]
    links["bound"].fit(Columns(tuple(columns)), rows)
    z_scored, structured = z_score_parser(z_score)
    if z_scored:
        mean, std = z_standardization(links["bound"](rows)[0], structured)
        links["standardize"].mean.copy_(mean)
        links["standardize"].std.copy_(std)
