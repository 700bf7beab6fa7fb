"""Densities that are known up to a constant, for flows that learn from a density in place of data.

Ready ones, with exact normalization and exact samples where there are any, and :class:`Function` for your own. Nothing
here knows of flows.
"""

from flowtrain.targets.eight_schools import EightSchools
from flowtrain.targets.function import Function
from flowtrain.targets.funnel import Funnel
from flowtrain.targets.mixture import Mixture40
from flowtrain.targets.phi4 import Phi4
from flowtrain.targets.target import Target
from flowtrain.targets.wells import DoubleWell, ManyWell

__all__ = ["DoubleWell", "EightSchools", "Function", "Funnel", "ManyWell", "Mixture40", "Phi4", "Target"]
