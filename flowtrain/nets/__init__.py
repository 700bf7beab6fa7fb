"""Conditioners: networks that make the parameters of univariate maps. Everything in ``__all__`` can be named in YAML.

A conditioner is built as ``net(shape=…, out=…, context_shape=…)`` and maps (B, *shape) to (B, out, …), a picture
keeping its size.
"""

from flowtrain.nets.attention import CausalTransformer
from flowtrain.nets.conv import ConvNet, ResidualConvNet, ZeroConv
from flowtrain.nets.mlp import MLP
from flowtrain.nets.norm import ActNorm, BatchNorm, Dropout

__all__ = ["ActNorm", "BatchNorm", "CausalTransformer", "ConvNet", "Dropout", "MLP", "ResidualConvNet", "ZeroConv"]
