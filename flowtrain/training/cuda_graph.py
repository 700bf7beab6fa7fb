"""Whether a run's training passes are one CUDA graph each, as ``trainer.cuda_graph`` says."""

from __future__ import annotations

import torch

from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.bijections.ode import continuous_layers, traced_layers
from flowtrain.config.schema import TrainConfig
from flowtrain.engine.graphed_pass import GraphedPass
from flowtrain.engine.objectives import Objective
from flowtrain.engine.precision import autocast_dtype
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed
from flowtrain.runtime.cuda_graph import SURVIVES_FAILURE


def training_pass_of(config: TrainConfig, flow: Flow, objective: Objective, device: torch.device) -> TrainingPass:
    """The training pass of a run: as one CUDA graph, where that is wanted and possible."""
    autocast, chosen = autocast_dtype(config.precision, device), config.trainer.cuda_graph
    if chosen is False or obstacle(config, flow, device):
        return TrainingPass(flow, objective, config.seed, config.trainer.accumulate, autocast)
    return GraphedPass(flow, objective, config.seed, autocast, required=chosen is True)


def check_cuda_graph(config: TrainConfig, flow: Flow, device: torch.device) -> None:
    """Raise UsageError where ``trainer.cuda_graph=true`` asks for what cannot be."""
    if config.trainer.cuda_graph is True and (why := obstacle(config, flow, device)):
        raise UsageError(f"trainer.cuda_graph=true: {why}; use auto or false")


def obstacle(config: TrainConfig, flow: Flow, device: torch.device) -> str | None:
    """Why a training pass of ``flow`` cannot be one CUDA graph; None where it can."""
    reasons = {
        "it needs a GPU": device.type != "cuda",
        "it needs a single device": distributed.world() > 1,
        "it needs trainer.accumulate=1": config.trainer.accumulate > 1,
        "it needs memory=none": config.memory != "none",  # what is computed again sets the generator back on the host
        "with a target, noise is drawn on the host": config.target is not None,
        "a solver of ODEs reads values on the host": bool(continuous_layers(flow)),
        "the number of terms of a log-determinant is drawn on the host": bool(traced_layers(flow)),
        "this flow trains through one element after another": bool(sequential_layers(flow.bijection)),
        "before torch 2.13 a run could not go on after a failure": (
            config.trainer.cuda_graph == "auto" and not SURVIVES_FAILURE
        ),
    }
    return next((why for why, holds in reasons.items() if holds), None)
