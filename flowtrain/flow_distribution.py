"""A flow as a ``torch.distributions.Distribution``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from flowtrain.runtime import global_batch


class FlowDistribution(Distribution):
    """p(x | context) for a batch of contexts; see :meth:`flowtrain.Flow.to_distribution`.

    Its density is one function, in training mode too: batch normalization takes its stored moments, in ``log_prob`` as
    in samples, and leaves them as they are. To train it by the moments of batches, call the flow itself.

    Args:
        flow: a :class:`flowtrain.Flow`, whose weights it shares.
        context: (*batch, *context_shape), or None.
        validate_args: whether ``log_prob`` checks that values lie in the support; None: as torch.distributions does.

    Raises:
        ValueError: a context of another shape, or none where the flow needs one; in ``log_prob``, values of another
            shape or outside the support; in ``rsample``, a flow whose samples have no gradient.

    >>> from flowtrain import flows
    >>> normal = FlowDistribution(flows.maf((3,), hidden=8))
    >>> normal.rsample((5,)).shape, normal.expand((4,)).sample().shape
    (torch.Size([5, 3]), torch.Size([4, 3]))
    """

    arg_constraints: dict = {}

    def __init__(self, flow: Any, context: Tensor | None = None, validate_args: bool | None = None):
        self.flow, self.context = flow, flow.as_context(context)
        super().__init__(flow.context_batch(self.context), torch.Size(flow.shape), validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.flow.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.bijection.exact and self.flow.base.reparameterized

    def sample(self, sample_shape=()) -> Tensor:
        return self.flow.sample(*self._each(sample_shape))

    def rsample(self, sample_shape=()) -> Tensor:
        return self.flow.rsample_and_log_prob(*self._each(sample_shape))[0]

    def rsample_and_log_prob(self, sample_shape=()) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities in one pass: see :meth:`flowtrain.Flow.rsample_and_log_prob`."""
        return self.flow.rsample_and_log_prob(*self._each(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(self.flow.hide_missing(value))
        with global_batch.stored_moments():
            log_prob = self.flow.log_prob(value, self.context)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def expand(self, batch_shape, _instance=None) -> FlowDistribution:
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.context = self.flow, self.context
        if self.context is not None:
            event = self.context.shape[self.context.dim() - len(self.flow.context_shape) :]
            new.context = self.context.expand(*batch_shape, *event)
        Distribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _each(self, sample_shape) -> tuple[tuple[int, ...], Tensor | None]:
        """The shape and the context of :meth:`flowtrain.Flow.sample`."""
        shape = tuple(sample_shape)
        return (shape, self.context) if self.context is not None else ((*shape, *self.batch_shape), None)


class LazyDistribution(nn.Module):
    """A flow that is called with a context and returns a distribution, as zuko's flows are.

    Args:
        flow: a :class:`flowtrain.Flow`.

    >>> from flowtrain import flows
    >>> flow = LazyDistribution(flows.maf((3,), hidden=8, context_shape=(2,)))
    >>> flow(torch.zeros(2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(self, flow: nn.Module):
        super().__init__()
        self.flow = flow

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """p(x | context)."""
        return FlowDistribution(self.flow, context)
