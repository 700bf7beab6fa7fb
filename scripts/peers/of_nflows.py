"""nflows' transforms as flowtrain layers, to train both libraries in the same loop on the same batches:

flowtrain train --config-dir scripts/peers model=nflows_maf allow=[scripts.peers.of_nflows] …
"""

from __future__ import annotations

from functools import partial

import torch
from nflows import transforms as t
from nflows.nn.nets import ResidualNet
from torch.nn import functional as F

from flowtrain.bijections import Bijection, Flatten
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import chain


class _Transform(Bijection):
    inner: t.Transform

    def forward(self, x, context=None):
        return self.inner(x, context)

    def inverse(self, z, context=None):
        return self.inner.inverse(z, context)


class MAF(_Transform):
    """Reversals and masked affine layers with batch normalization, as nflows ships them."""

    def __init__(self, shape, steps: int, hidden: int, depth: int, context_shape=None):
        super().__init__(shape, context_shape)
        (features,) = self.shape
        layers = []
        for _ in range(steps):
            layers += [
                t.MaskedAffineAutoregressiveTransform(
                    features, hidden, num_blocks=depth, use_residual_blocks=False, activation=F.relu
                ),
                t.BatchNorm(features),
                t.ReversePermutation(features),
            ]
        self.inner = t.CompositeTransform(layers)


class NSF(_Transform):
    """Neural spline flow on vectors: permutation, LU, rational-quadratic spline; ``coupling`` or ``autoregressive``."""

    def __init__(
        self,
        shape,
        kind: str,
        steps: int,
        hidden: int,
        blocks: int,
        bins: int,
        bound: float,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        (features,) = self.shape
        with torch.device("cpu"):  # nflows selects by values; tensors on the meta device have none
            layers = []
            for step in range(steps):
                layers += [t.RandomPermutation(features), t.LULinear(features, identity_init=True)]
                spline = {"num_bins": bins, "tails": "linear", "tail_bound": bound}
                if kind == "autoregressive":
                    layers.append(
                        t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                            features, hidden, num_blocks=blocks, dropout_probability=dropout, **spline
                        )
                    )
                else:
                    layers.append(
                        t.PiecewiseRationalQuadraticCouplingTransform(
                            [(i + step) % 2 for i in range(features)],
                            lambda n_in, n_out: ResidualNet(
                                n_in, n_out, hidden_features=hidden, num_blocks=blocks, dropout_probability=dropout
                            ),
                            apply_unconditional_transform=True,
                            **spline,
                        )
                    )
            layers += [t.RandomPermutation(features), t.LULinear(features, identity_init=True)]
            self.inner = t.CompositeTransform(layers)


def maf(
    shape,
    *,
    steps: int = 5,
    hidden: int = 256,
    depth: int = 2,
    base=StandardNormal,
    preprocess=None,
    context_shape=None,
) -> Flow:
    """A flow of nflows' MAF."""
    layer = partial(MAF, steps=steps, hidden=hidden, depth=depth)
    return Flow(shape, chain(preprocess=preprocess, flatten=Flatten, flow=layer), base, context_shape)


def nsf(
    shape,
    *,
    kind: str,
    steps: int = 5,
    hidden: int = 128,
    blocks: int = 2,
    bins: int = 8,
    bound: float = 3.0,
    dropout: float = 0.0,
    base=StandardNormal,
    preprocess=None,
    context_shape=None,
) -> Flow:
    """A flow of nflows' splines."""
    sizes = {"kind": kind, "steps": steps, "hidden": hidden, "blocks": blocks}
    layer = partial(NSF, **sizes, bins=bins, bound=bound, dropout=dropout)
    return Flow(shape, chain(preprocess=preprocess, flatten=Flatten, flow=layer), base, context_shape)
