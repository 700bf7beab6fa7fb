"""Flows of rows some of whose columns are angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flowtrain.bijections import Bijection, Factored
from flowtrain.distributions import Joint, StandardNormal
from flowtrain.embedding import build_embedding
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, circular


def with_angles(
    make: Callable[..., Flow],
    shape: Sequence[int],
    *,
    columns: Sequence[int],
    angles: Factory = circular,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """p(x) = p(others)·p(angles | others): any flow of the other columns, and circular splines of the angles.

    So the density is the same at both ends of an angle, whatever the flow of the other columns is. Where there are no
    other columns, that flow has no part.

    Args:
        make: constructor of the flow of the other columns, called with ``shape`` and ``context_shape``.
        shape: of a row, (D,).
        columns: numbers of the columns that are angles.
        angles: factory of the bijection of the angles, whose context is the other columns, with the context after them;
            its latents are standard normal.
        preprocess: factory of the first layer, for all columns; it leaves angles as they are.
        context_shape: of the context of each row, or None.
        embedding: see :mod:`flowtrain.flows`.

    >>> from flowtrain import flows
    >>> with_angles(partial(flows.maf, hidden=16), (3,), columns=[1]).sample(5).shape
    torch.Size([5, 3])
    """
    others = shape[0] - len(columns)
    if not others:
        return Flow(shape, chain(preprocess=preprocess, angles=angles), StandardNormal, context_shape, embedding)
    net, embedded = build_embedding(embedding, context_shape)
    inner = make(shape=(others,), context_shape=embedded)
    both = partial(Factored, columns=columns, first=partial(_built, inner.bijection), second=angles)
    base = partial(Joint, parts=(inner.base, StandardNormal((len(columns),))))
    return Flow(shape, chain(preprocess=preprocess, factored=both), base, context_shape, net)


def _built(bijection: Bijection, **_) -> Bijection:
    """A factory of what is built already."""
    return bijection
