"""The layers that flows are made of. Everything in ``__all__`` can be named in YAML."""

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.bijection import Bijection, Chain, Inverse
from flowtrain.bijections.columns import (
    BoundColumns,
    CircleToLine,
    DequantizeColumns,
    FillMissing,
    QuantileColumns,
    Standardize,
    Turns,
)
from flowtrain.bijections.coupling import Alternate, Checkerboard, Coupling, Halves, PackedCheckerboard
from flowtrain.bijections.elementwise import Conditional, Elementwise
from flowtrain.bijections.factored import Factored
from flowtrain.bijections.histogram import DiscretizedLogistic, PiecewiseLinear
from flowtrain.bijections.linear import DenseLinear, DiagonalFirst, LULinear, Permutation, Reverse, Shuffle
from flowtrain.bijections.mixture import MixtureLogistic, MixtureNormal
from flowtrain.bijections.multiscale import MultiScale
from flowtrain.bijections.noise import AddNoise
from flowtrain.bijections.norm import ActNorm, BatchNorm
from flowtrain.bijections.ode import Continuous
from flowtrain.bijections.preprocess import Center, Dequantize, Logit
from flowtrain.bijections.radial import Radial
from flowtrain.bijections.regression import Regression
from flowtrain.bijections.residual import Residual
from flowtrain.bijections.shape import Flatten, Patches, Squeeze, Unsqueeze
from flowtrain.bijections.spline import (
    AffineRationalQuadratic,
    CircularRationalQuadratic,
    RationalQuadratic,
    SoftClippedRationalQuadratic,
)
from flowtrain.bijections.standardize import StandardizeChannels
from flowtrain.bijections.support import Box, Positive, Simplex, Support
from flowtrain.bijections.univariate import (
    Additive,
    DoubleSigmoidAffine,
    ExpAffine,
    Scale,
    ScaleShift,
    SigmoidAffine,
    TanhAffine,
)
from flowtrain.bijections.variational import VariationalDequantize

__all__ = [
    "ActNorm",
    "AddNoise",
    "Additive",
    "AffineRationalQuadratic",
    "Alternate",
    "Autoregressive",
    "BatchNorm",
    "Bijection",
    "BoundColumns",
    "Box",
    "Center",
    "Chain",
    "Checkerboard",
    "CircleToLine",
    "CircularRationalQuadratic",
    "Conditional",
    "Continuous",
    "Coupling",
    "DenseLinear",
    "Dequantize",
    "DequantizeColumns",
    "DiagonalFirst",
    "DiscretizedLogistic",
    "DoubleSigmoidAffine",
    "Elementwise",
    "ExpAffine",
    "Factored",
    "FillMissing",
    "Flatten",
    "Halves",
    "Inverse",
    "LULinear",
    "Logit",
    "MixtureLogistic",
    "MixtureNormal",
    "MultiScale",
    "PackedCheckerboard",
    "Patches",
    "Permutation",
    "PiecewiseLinear",
    "Positive",
    "QuantileColumns",
    "Radial",
    "RationalQuadratic",
    "Regression",
    "Residual",
    "Reverse",
    "Scale",
    "ScaleShift",
    "Shuffle",
    "SigmoidAffine",
    "Simplex",
    "SoftClippedRationalQuadratic",
    "Squeeze",
    "Standardize",
    "StandardizeChannels",
    "Support",
    "TanhAffine",
    "Turns",
    "Unsqueeze",
    "VariationalDequantize",
]
