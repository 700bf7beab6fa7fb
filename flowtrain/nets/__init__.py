"""Conditioners: networks that compute the parameters of univariate maps. All names in ``__all__`` can be used in YAML.

A conditioner is constructed as ``net(shape=…, out=…, context_shape=…)`` and called as ``net(x, context)``. It maps
(B, *shape) to (B, out) for vectors, (B, out, H, W) for images, and (B, D, out) for autoregressive maps. Its last layer
is 0 at the start, so that a new flow starts as the identity or near it.

An embedding is constructed as ``net(context_shape=…)`` and called as ``net(context)``. It has an ``out_shape``.
"""

from flowtrain.nets.attention import CausalTransformer
from flowtrain.nets.conv import ConvNet, PreactivatedConvNet, ResidualConvNet, ZeroConv
from flowtrain.nets.dynamics import ConvODENet, ODENet
from flowtrain.nets.embedding import ConvEmbedding, DeepSet, HiddenContext, MLPEmbedding
from flowtrain.nets.features import Features
from flowtrain.nets.gated import GatedAttentionConvNet
from flowtrain.nets.lipschitz import LipschitzConvNet, LipschitzMLP
from flowtrain.nets.made import MADE, CircularMADE, ResidualMADE
from flowtrain.nets.mlp import MLP, ResidualMLP
from flowtrain.nets.norm import ActNorm, BatchNorm, Dropout
from flowtrain.nets.pixelcnn import PixelCNN
from flowtrain.nets.velocity import VelocityConvNet, VelocityGains, VelocityMLP
from flowtrain.nets.vision import VisionTransformer

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "BatchNorm",
    "CausalTransformer",
    "CircularMADE",
    "ConvEmbedding",
    "ConvNet",
    "ConvODENet",
    "DeepSet",
    "Dropout",
    "Features",
    "GatedAttentionConvNet",
    "HiddenContext",
    "LipschitzConvNet",
    "LipschitzMLP",
    "MLPEmbedding",
    "ODENet",
    "PreactivatedConvNet",
    "PixelCNN",
    "ResidualConvNet",
    "ResidualMADE",
    "ResidualMLP",
    "VelocityConvNet",
    "VelocityGains",
    "VelocityMLP",
    "VisionTransformer",
    "ZeroConv",
]
