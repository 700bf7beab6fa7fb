"""Flows: one constructor for each family, to be read beside its paper.

A constructor takes the ``shape`` of one example and returns a :class:`flowtrain.flow.Flow`. Its other arguments are the
knobs of ``flowtrain train model=…`` and factories of what can be exchanged. All share these:

    base: of the base distribution, called with the latent's ``shape`` and ``context_shape``.
    preprocess: of the first link, from raw data to what the layers work on, called like a layer; None for real numbers
        as they are. For integers: ``partial(logit, grey_levels=256, alpha=0.05)``, or ``center``.
    context_shape: of the context that comes with each example, or None: what the flow is conditional on.
"""

from flowtrain.flows.autoregressive import autoregressive
from flowtrain.flows.custom import custom
from flowtrain.flows.ffjord import ffjord, ffjord_image
from flowtrain.flows.glow import glow, glow_vector
from flowtrain.flows.hybrid import hybrid, hybrid_image
from flowtrain.flows.maf import iaf, made, maf, maf_mog
from flowtrain.flows.nice import nice
from flowtrain.flows.nsf import nsf_autoregressive, nsf_coupling, nsf_image
from flowtrain.flows.parts import (
    batchnorm_affine,
    center,
    logit,
    permuted_lu,
    permuted_lu_actnorm,
    single_scale,
    standardize,
)
from flowtrain.flows.realnvp import realnvp, realnvp_vector

__all__ = [
    "autoregressive",
    "batchnorm_affine",
    "center",
    "custom",
    "ffjord",
    "ffjord_image",
    "glow",
    "glow_vector",
    "hybrid",
    "hybrid_image",
    "iaf",
    "logit",
    "made",
    "maf",
    "maf_mog",
    "nice",
    "nsf_autoregressive",
    "nsf_coupling",
    "nsf_image",
    "permuted_lu",
    "permuted_lu_actnorm",
    "realnvp",
    "realnvp_vector",
    "single_scale",
    "standardize",
]
