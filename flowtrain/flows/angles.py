"""Flows of rows some of whose columns are angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flowtrain.bijections import Autoregressive, CircleToLine, CircularRationalQuadratic, Factored, Turns
from flowtrain.distributions import Joint, StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain
from flowtrain.nets import CircularMADE


def with_angles(
    make: Callable[..., Flow],
    shape: Sequence[int],
    *,
    angles: Sequence[int],
    bins: int = 8,
    hidden: int = 64,
    depth: int = 2,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
) -> Flow:
    """p(x) = p(others)·p(angles | others): a flow of the other columns, and circular splines (Rezende et al. 2020).

    Each angle has a spline of the circle whose parameters a masked network computes from the other columns, from the
    context and from the sines and cosines of the angles before it. So the density is the same at both ends of an angle,
    whatever the flow of the other columns is. Without other columns it has no part.

    Args:
        make: constructor of the flow of the other columns, called with ``shape`` and ``context_shape``.
        shape: of a row, (D,).
        angles: numbers of the columns that are angles.
        bins: of a spline.
        hidden, depth: units of a hidden layer of the masked network, and hidden layers.
        preprocess: factory of the first layer, for all columns; it leaves angles as they are.
        context_shape: of the context of each row, or None.

    >>> from flowtrain import flows
    >>> with_angles(partial(flows.maf, hidden=16), (3,), angles=[1]).sample(5).shape
    torch.Size([5, 3])
    """
    splines = partial(
        Autoregressive,
        univariate=partial(CircularRationalQuadratic, bins=bins),
        net=partial(CircularMADE, hidden=hidden, depth=depth),
    )
    circular = chain(turns=Turns, splines=splines, line=CircleToLine)
    others = shape[0] - len(angles)
    if not others:
        return Flow(shape, chain(preprocess=preprocess, angles=circular), StandardNormal, context_shape)
    inner = make(shape=(others,), context_shape=context_shape)
    both = partial(Factored, columns=angles, first=lambda **_: inner.bijection, second=circular)
    base = partial(Joint, parts=(inner.base, StandardNormal((len(angles),))))
    return Flow(shape, chain(preprocess=preprocess, factored=both), base, context_shape)
