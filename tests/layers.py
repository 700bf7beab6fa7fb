"""A constructor of every bijection. A new layer needs one line here for all tests of test_bijections.py."""

import re
from functools import partial

import torch

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections.univariate import Univariate
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.columns import Columns
from flowtrain.flows.parts import noise_couplings

mlp = partial(nets.MLP, hidden=8)
conv = partial(nets.ConvNet, hidden=6)
ode = partial(b.Continuous, trace="exact", adjoint=False, rtol=1e-10, atol=1e-10)
looser = partial(ode, solver="dopri8", rtol=1e-9, atol=1e-9)  # the logarithm of the time takes many steps
pixels = partial(nets.PixelCNN, hidden=6, depth=1)
causal = partial(nets.CausalTransformer, hidden=8, heads=2, offsets=[1, 3])
gated = partial(nets.GatedAttentionConvNet, hidden=4, heads=2, blocks=2)
vision = partial(nets.VisionTransformer, hidden=4, heads=2, depth=2)
residual = partial(nets.ResidualConvNet, hidden=4, blocks=1)
contracting = partial(nets.LipschitzMLP, hidden=8)
masked = partial(nets.MADE, hidden=12)
circular = partial(nets.CircularMADE, hidden=12)
residual_masked = partial(nets.ResidualMADE, hidden=12)
noise = partial(noise_couplings, hidden=6, univariate=b.SigmoidAffine)
image, vector, tokens = (4, 4, 6), (5,), (4, 3)

ARGUMENTS = {  # arguments of the univariate maps that need them
    b.DiscretizedLogistic: {"bins": 5, "components": 3},
    b.PiecewiseLinear: {"bins": 5},
    b.RationalQuadratic: {"bins": 5},
    b.AffineRationalQuadratic: {"bins": 5},
    b.CircularRationalQuadratic: {"bins": 5},
    b.MixtureLogistic: {"components": 3},
    b.MixtureNormal: {"components": 3},
}
UNIVARIATE = {  # every exported map; ExpAffine is exp_affine
    re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower(): partial(map, **ARGUMENTS.get(map, {}))
    for name, map in vars(b).items()
    if isinstance(map, type) and issubclass(map, Univariate)
}

glow_step = partial(
    b.Chain,
    repeat=2,
    layers={
        "actnorm": b.ActNorm,
        "mixing": b.LULinear,
        "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=conv),
    },
)


COLUMNS = Columns(
    tuple(Column(f"x{i}", "real", mean=mean, std=std) for i, (mean, std) in enumerate([(0, 1), (3, 0.2), (-2, 5)]))
    + (Column("n", "integer", mean=0.5, std=2.0), Column("when", "time", mean=9.0, std=30.0))
)


def fitted(kind, shape):
    """Build a layer that is fitted to a table's columns and rows."""
    layer = kind(shape)
    layer.fit(COLUMNS, torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    return layer


def standardize_channels(shape):
    """Build a StandardizeChannels that is fitted to examples far from 0."""
    layer = b.StandardizeChannels(shape)
    layer.fit(None, torch.arange(1.0, shape[0] + 1).view(-1, 1, 1) * torch.randn(9, *shape) - 7)
    return layer


class Pair(b.Bijection):
    """A minimal container of two layers."""

    container = True

    def __init__(self, shape, first, second, context_shape=None):
        super().__init__(shape, context_shape)
        self.first = first(shape=shape, context_shape=context_shape)
        self.second = second(shape=shape, context_shape=context_shape)

    def forward(self, x, context=None):
        x, log_det = self.first(x, context)
        z, other = self.second(x, context)
        return z, log_det + other

    def inverse(self, z, context=None):
        z, log_det = self.second.inverse(z, context)
        x, other = self.first.inverse(z, context)
        return x, log_det + other


class Backwards(b.Bijection):
    """A minimal container that inverts its layer."""

    container = inverts_layers = True

    def __init__(self, shape, layer, context_shape=None):
        super().__init__(shape, context_shape)
        self.layer = layer(shape=shape, context_shape=context_shape)

    def forward(self, x, context=None):
        return self.layer.inverse(x, context)

    def inverse(self, z, context=None):
        return self.layer(z, context)


coupling = partial(b.Coupling, univariate=b.RationalQuadratic, net=mlp)
vector_step = partial(b.Chain, layers={"mixing": b.LULinear, "coupling": coupling}, repeat=2)
autoregressive = partial(b.Autoregressive, univariate=b.ExpAffine, net=masked)

LAYERS = {
    "pair": partial(Pair, vector, vector_step, partial(Backwards, layer=vector_step), context_shape=(3,)),
    "actnorm": partial(b.ActNorm, image),
    "actnorm_vector": partial(b.ActNorm, vector),
    "batchnorm": partial(b.BatchNorm, image),
    "dense_linear": partial(b.DenseLinear, image),
    "lu_linear": partial(b.LULinear, image),
    "lu_linear_vector": partial(b.LULinear, vector, start="permutation"),
    "permutation": partial(b.Permutation, image, order=[2, 0, 3, 1]),
    "reverse": partial(b.Reverse, vector),
    "shuffle": partial(b.Shuffle, image),
    "diagonal_first": partial(b.DiagonalFirst, (8, 2, 2)),
    "squeeze": partial(b.Squeeze, image),
    "squeeze_patches": partial(b.Squeeze, (1, 3, 6), size=3),
    "unsqueeze": partial(b.Unsqueeze, image),
    "flatten": partial(b.Flatten, image),
    "patches": partial(b.Patches, image, size=2),
    **{
        f"tokens_{name}": partial(
            b.Autoregressive, tokens, UNIVARIATE[name], causal, order="reversed", context_shape=(3,)
        )
        for name in ("exp_affine", "rational_quadratic", "mixture_logistic")
    },
    "pixels": partial(
        b.Autoregressive, (24,), b.ExpAffine, partial(pixels, image=(2, 3, 4)), order="reversed", context_shape=(3,)
    ),
    "center": partial(b.Center, image),
    "standardize": partial(fitted, b.Standardize, vector),
    "quantile_columns": partial(fitted, b.QuantileColumns, vector),
    "standardize_channels": partial(standardize_channels, image),
    "conditional": partial(b.Conditional, (2, 4, 4), b.ExpAffine, nets.ZeroConv, context_shape=(3, 4, 4)),
    **{
        f"conditional_{name}": partial(b.Conditional, vector, UNIVARIATE[name], mlp, context_shape=(3,))
        for name in ("piecewise_linear", "rational_quadratic")
    },
    "inverse": partial(b.Inverse, vector, b.ActNorm),
    "regression": partial(b.Regression, vector, context_shape=(3,)),
    "factored": partial(
        b.Factored,
        vector,
        [3, 1],
        vector_step,
        partial(b.Autoregressive, univariate=b.CircularRationalQuadratic, net=circular),
        context_shape=(3,),
    ),
    "circular": partial(b.Autoregressive, vector, partial(b.CircularRationalQuadratic, bins=4), circular),
    "chain": partial(
        b.Chain, vector, {"a": b.ActNorm, "none": None, "b": b.Reverse, "c": b.LULinear}, order=["c", "a", "none", "b"]
    ),
    "glow_step": partial(glow_step, image),
    "coupling_swap": partial(b.Coupling, vector, b.SigmoidAffine, mlp, partial(b.Halves, swap=True)),
    "coupling_context": partial(b.Coupling, vector, b.SigmoidAffine, mlp, context_shape=(3,)),
    "coupling_zero_conv_context": partial(b.Coupling, image, b.SigmoidAffine, nets.ZeroConv, context_shape=(3,)),
    "coupling_conv_context": partial(b.Coupling, image, b.TanhAffine, conv, context_shape=(3,)),
    "coupling_residual_context": partial(
        b.Coupling, image, b.TanhAffine, residual, partial(b.Checkerboard, colour=1), context_shape=(3,)
    ),
    "coupling_preactivated_context": partial(
        b.Coupling,
        image,
        b.RationalQuadratic,
        partial(nets.PreactivatedConvNet, hidden=4, blocks=2),
        partial(b.Halves, swap=True),
        context_shape=(3,),
    ),
    **{
        f"coupling_{name}_map": partial(b.Coupling, image, b.SigmoidAffine, net, context_shape=(3, 4, 6))
        for name, net in {"conv": conv, "zero_conv": nets.ZeroConv, "residual": residual}.items()
    },
    "noise_couplings": partial(noise, (1, 4, 6), context_shape=(3, 2, 3)),
    "noise_couplings_checkerboard": partial(noise, (2, 3, 5), steps=2, context_shape=(3, 3, 5)),
    "noise_couplings_vector": partial(noise, vector, steps=2, context_shape=(3,)),
    "coupling_alone": partial(
        b.Coupling, (1,), b.RationalQuadratic, mlp, unconditional=partial(b.Elementwise, univariate=b.ExpAffine)
    ),
    "coupling_alone_context": partial(
        b.Coupling, (1,), b.SigmoidAffine, mlp, partial(b.Alternate, first=1), context_shape=(3,)
    ),
    "alternate": partial(b.Coupling, vector, b.TanhAffine, mlp, b.Alternate),
    "alternate_other": partial(b.Coupling, vector, b.Additive, mlp, partial(b.Alternate, first=1)),
    "checkerboard": partial(b.Coupling, image, b.TanhAffine, residual, b.Checkerboard),
    "checkerboard_other": partial(b.Coupling, image, b.Additive, conv, partial(b.Checkerboard, colour=1)),
    "flowpp": partial(
        b.Coupling, image, UNIVARIATE["mixture_logistic"], gated, b.PackedCheckerboard, context_shape=(3,)
    ),
    "jet": partial(b.Coupling, image, b.DoubleSigmoidAffine, vision, context_shape=(3,)),
    "jet_spatial": partial(b.Coupling, image, b.DoubleSigmoidAffine, vision, partial(b.PackedCheckerboard, colour=1)),
    "multiscale": partial(
        b.MultiScale,
        (1, 8, 8),
        levels=3,
        level=partial(b.Chain, layers={"squeeze": b.Squeeze, "step": glow_step}),
        split_prior=partial(b.Conditional, univariate=b.ExpAffine, net=nets.ZeroConv),
    ),
    "multiscale_last": partial(b.MultiScale, (2, 4, 4), levels=2, level=b.Squeeze, last=b.ActNorm),
    **{f"elementwise_{name}": partial(b.Elementwise, vector, univariate=map) for name, map in UNIVARIATE.items()},
    **{
        f"autoregressive_{name}": partial(b.Autoregressive, vector, map, causal)
        for name, map in UNIVARIATE.items()
        if name != "tanh_affine"  # its rescale has one number a channel; a vector's elements come one by one
    },
    "autoregressive_context": partial(b.Autoregressive, vector, b.SigmoidAffine, causal, context_shape=(3,)),
    "masked_reversed": partial(b.Autoregressive, vector, b.ExpAffine, masked, order="reversed"),
    "masked_random_context": partial(
        b.Autoregressive, vector, b.SigmoidAffine, partial(masked, degrees="random"), order="random", context_shape=(3,)
    ),
    "masked_residual": partial(b.Autoregressive, vector, b.ExpAffine, residual_masked),
    "iaf": partial(
        b.Inverse, vector, partial(b.Autoregressive, univariate=b.ExpAffine, net=masked), context_shape=(3,)
    ),
    "coupling_unconditional": partial(
        b.Coupling,
        vector,
        b.SigmoidAffine,
        partial(nets.ResidualMLP, hidden=8),
        b.Alternate,
        unconditional=partial(b.Elementwise, univariate=b.ExpAffine),
        context_shape=(3,),
    ),
    "continuous": partial(ode, vector, partial(nets.ODENet, hidden=6, depth=1)),
    "continuous_context": partial(
        ode,
        vector,
        partial(nets.ODENet, hidden=6, depth=1, layer="concat", activation="softplus"),
        learn_time=True,
        context_shape=(3,),
    ),
    "continuous_image": partial(
        ode, (2, 2, 2), partial(nets.ConvODENet, hidden=3, depth=1), solver="dopri8", context_shape=(3,)
    ),
    "continuous_image_squash": partial(
        ode, (2, 2, 2), partial(nets.ConvODENet, hidden=3, depth=1, layer="concatsquash", activation="tanh")
    ),
    "continuous_gains": partial(
        looser, vector, partial(nets.VelocityGains, filters=7, hidden=6, depth=1), context_shape=(3,)
    ),
    "continuous_velocity": partial(looser, vector, partial(nets.VelocityMLP, hidden=6, depth=1), context_shape=(3,)),
    "continuous_velocity_image": partial(looser, (2, 2, 2), partial(nets.VelocityConvNet, hidden=4)),
    "residual": partial(b.Residual, vector, contracting, trace="exact", context_shape=(3,)),
    "residual_image": partial(
        b.Residual, (2, 4, 4), partial(nets.LipschitzConvNet, hidden=4), trace="exact", context_shape=(3,)
    ),
    "radial": partial(b.Radial, image),
    "elementwise_shared": partial(b.Elementwise, image, b.ExpAffine, share=[1, 2]),
    **{f"coupling_{name}": partial(b.Coupling, vector, map, mlp) for name, map in UNIVARIATE.items()},
}
