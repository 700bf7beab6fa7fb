"""Flows: one constructor for each family, to be read beside its paper.

A constructor takes the ``shape`` of one example and returns a :class:`flowtrain.flow.Flow`. Its other arguments are the
knobs of ``flowtrain train model=…`` and factories of what can be exchanged. All share these:

    base: factory of the base distribution, called with the latent's ``shape`` and with ``context_shape``.
    preprocess: factory of the first layer, which maps raw data to what the other layers work on; None for real numbers
        as they are. For integers: ``partial(parts.logit, grey_levels=256, alpha=0.05)``, or ``parts.center``.
        For bounded numbers: ``bijections.Positive``, ``bijections.Simplex`` or
        ``partial(bijections.Box, low=0, high=1)``.
    context_shape: shape of the context of each example, on which the density depends; None if there is none.
    embedding: network that the flow trains with its layers, which get its output for the context: a torch module, or a
        factory called with ``context_shape``, such as ``partial(nets.DeepSet, features=16)``; None: they get the
        context itself.

:mod:`flowtrain.flows.parts` holds the parts that several flows share.
"""

from flowtrain.flows.autoregressive import autoregressive
from flowtrain.flows.cnf import cnf, cnf_image
from flowtrain.flows.custom import custom
from flowtrain.flows.ffjord import ffjord, ffjord_image
from flowtrain.flows.flowpp import flowpp
from flowtrain.flows.glow import glow, glow_vector
from flowtrain.flows.hybrid import hybrid, hybrid_image
from flowtrain.flows.jet import jet
from flowtrain.flows.maf import iaf, made, maf, maf_mog
from flowtrain.flows.nice import nice
from flowtrain.flows.nsf import nsf_autoregressive, nsf_coupling, nsf_image
from flowtrain.flows.pixelcnn import pixelcnn
from flowtrain.flows.realnvp import realnvp, realnvp_vector
from flowtrain.flows.residual import residual, residual_image
from flowtrain.flows.tarflow import tarflow

__all__ = [
    "autoregressive",
    "cnf",
    "cnf_image",
    "custom",
    "ffjord",
    "ffjord_image",
    "flowpp",
    "glow",
    "glow_vector",
    "hybrid",
    "hybrid_image",
    "iaf",
    "jet",
    "made",
    "maf",
    "maf_mog",
    "nice",
    "nsf_autoregressive",
    "nsf_coupling",
    "nsf_image",
    "pixelcnn",
    "realnvp",
    "realnvp_vector",
    "residual",
    "residual_image",
    "tarflow",
]
