"""Conditioners: networks that make the parameters of univariate maps. Everything in ``__all__`` can be named in YAML.

A conditioner is built as ``net(shape=…, out=…, context_shape=…)`` and maps (B, *shape) to (B, out, …), an image
keeping its size; that of an autoregressive map gives (B, D, out).
"""

from flowtrain.nets.attention import CausalTransformer
from flowtrain.nets.conv import ConvNet, PreactivatedConvNet, ResidualConvNet, ZeroConv
from flowtrain.nets.dynamics import ConvODENet, ODENet
from flowtrain.nets.made import MADE, ResidualMADE
from flowtrain.nets.mlp import MLP, ResidualMLP
from flowtrain.nets.norm import ActNorm, BatchNorm, Dropout

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "BatchNorm",
    "CausalTransformer",
    "ConvNet",
    "ConvODENet",
    "Dropout",
    "ODENet",
    "PreactivatedConvNet",
    "ResidualConvNet",
    "ResidualMADE",
    "ResidualMLP",
    "ZeroConv",
]
