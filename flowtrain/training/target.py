"""Which flows can learn from a target."""

from __future__ import annotations

from flowtrain.config.schema import TrainConfig
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch

STARTING_POINTS = 256  # that a target is tried on


def check_flow(config: TrainConfig, flow: Flow) -> None:
    """Raise UsageError where samples of ``flow`` have no gradient, or the run asks for what a target does not allow."""
    if global_batch.has_moments(flow):
        raise UsageError(
            "norm: batch normalization has no moments in the direction from latent to data, in which a target is "
            "learned; use norm=actnorm or norm=none"
        )
    if not flow.base.reparameterized:
        kind = type(flow.base).__name__
        raise UsageError(f"base: samples of a {kind} have no gradient, which a target needs; use base=normal")
    if config.compile is True:
        raise UsageError("compile=true: a target needs the layers' inverses, which are not compiled; use auto or false")
    if config.objective["_target_"].endswith(".Alpha2") and config.trainer.accumulate > 1:
        raise UsageError("trainer.accumulate: objective=alpha2 compares all samples of a batch at once; it must be 1")
    if config.objective.get("path_gradient") and config.model.get("dropout"):
        raise UsageError(
            "objective.path_gradient=true: its passes must not differ by dropout; use model.dropout=0, or false"
        )
