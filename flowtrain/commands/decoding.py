"""Whether a flow can be sampled as a user asks: all elements at once, with guidance, without noise."""

from __future__ import annotations

from flowtrain.bijections import Autoregressive
from flowtrain.bijections.bijection import walk
from flowtrain.bijections.univariate import Univariate
from flowtrain.commands import SampleConfig
from flowtrain.errors import UsageError
from flowtrain.flow import Flow


def check_decoding(config: SampleConfig, flow: Flow) -> None:
    """Raise UsageError where ``flow`` cannot do what ``config`` asks of its inverse."""
    layers = [layer for layer, inverted in walk(flow.bijection) if isinstance(layer, Autoregressive) and not inverted]
    if config.decoding == "jacobi" and not layers:
        raise UsageError("decoding=jacobi: no layer of this model takes one element after the other; leave it out")
    if config.decoding == "jacobi" and (config.weights is True or config.mcmc):
        raise UsageError("decoding=jacobi: importance weights and mcmc=true need exact samples; leave it out")
    if config.denoise and flow.noise is None:
        raise UsageError("denoise=true: this model was trained without preprocess=noise; leave denoise=null")
    if not config.guidance:
        return
    if not getattr(flow.embedding, "share", 0):  # that of a nets.HiddenContext
        raise UsageError(
            f"guidance={config.guidance}: this model never learned without its labels; train model=tarflow with"
            " dataset.context=label model.hide_context=0.1"
        )
    for layer in layers:
        if type(layer.univariate).guide is Univariate.guide:
            name = type(layer.univariate).__name__
            raise UsageError(
                f"guidance={config.guidance}: a layer's map is {name}; only that of affine_exp has guidance"
            )
