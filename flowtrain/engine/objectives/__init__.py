"""Objectives: what training minimizes. YAML names them: see conf/objective/."""

from flowtrain.engine.objectives.from_target import Alpha2, ReverseKL
from flowtrain.engine.objectives.likelihood import BitsPerDim, NatsPerRow, maximum_likelihood
from flowtrain.engine.objectives.objective import Objective, Score

__all__ = ["Alpha2", "BitsPerDim", "NatsPerRow", "Objective", "ReverseKL", "Score", "maximum_likelihood"]
