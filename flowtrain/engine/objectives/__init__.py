"""Objectives: what training minimizes. YAML names them: see conf/objective/."""

from flowtrain.engine.objectives.likelihood import BitsPerDim, NatsPerRow, maximum_likelihood
from flowtrain.engine.objectives.objective import Objective, Score

__all__ = ["BitsPerDim", "NatsPerRow", "Objective", "Score", "maximum_likelihood"]
