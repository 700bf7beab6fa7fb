"""A flow of any layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from flowtrain.bijections import Chain
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory


def custom(
    shape: Sequence[int],
    *,
    layers: Mapping[str, Factory | None],
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """The named layers one after another, each built for the shape that the one before leaves.

    Args:
        shape: of one example.
        layers: name -> factory ``layer(shape=…, context_shape=…)`` of a bijection; a None is left out.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> from flowtrain.bijections import ActNorm, LULinear
    >>> custom((3,), layers={"norm": ActNorm, "mixing": LULinear}).sample(5).shape
    torch.Size([5, 3])
    """
    return Flow(shape, partial(Chain, layers={"preprocess": preprocess, **layers}), base, context_shape, embedding)
