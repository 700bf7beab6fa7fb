"""Objectives: what training minimizes. YAML names them: see conf/objective/."""

from flowtrain.engine.objectives.flow_matching import FlowMatching, flow_matching
from flowtrain.engine.objectives.from_target import Alpha2, ReverseKL
from flowtrain.engine.objectives.likelihood import BitsPerDim, NatsPerRow, maximum_likelihood
from flowtrain.engine.objectives.objective import Objective, Score

__all__ = [
    "Alpha2",
    "BitsPerDim",
    "FlowMatching",
    "NatsPerRow",
    "Objective",
    "ReverseKL",
    "Score",
    "flow_matching",
    "maximum_likelihood",
]
