"""NICE (Dinh et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import Additive, Alternate, Coupling, Elementwise, Flatten, Scale
from flowtrain.distributions import Logistic
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain
from flowtrain.nets import MLP


def nice(
    shape: Sequence[int],
    *,
    pairs: int = 2,
    hidden: int = 256,
    depth: int = 3,
    dropout: float = 0.0,
    univariate: Factory = Additive,
    base: Factory = Logistic,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Additive couplings on alternating dimensions, then a diagonal scaling (Dinh et al. 2015, section 5).

    Args:
        shape: of one example; it is flattened to D dimensions.
        pairs: of couplings: the first transforms the even dimensions, the second the odd ones.
        hidden, depth: units of a hidden layer of a conditioner, and hidden layers.
        dropout: in the conditioners.
        univariate: factory of the couplings' map.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> import torch
    >>> flow = nice((2,), pairs=1, hidden=16)
    >>> flow.log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """
    net = partial(MLP, hidden=hidden, depth=depth, dropout=dropout)
    even = partial(Coupling, univariate=univariate, net=net, partition=partial(Alternate, first=0))
    odd = partial(Coupling, univariate=univariate, net=net, partition=partial(Alternate, first=1))
    layers = chain(
        preprocess=preprocess,
        flatten=Flatten,
        couplings=chain(repeat=pairs, even=even, odd=odd),
        scaling=partial(Elementwise, univariate=Scale),
    )
    return Flow(shape, layers, base, context_shape, embedding)
