"""Normalizing flows: ``flow = flowtrain.fit(x); flow.log_prob(x)``, ``flowtrain.load("outputs/…")`` for a run's, or one
built by ``flowtrain.flows``."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time, __getattr__ imports them
    from flowtrain import bijections, distributions, flows, nets
    from flowtrain.config.restore import load
    from flowtrain.flow import Flow
    from flowtrain.flow_distribution import LazyDistribution
    from flowtrain.inference import sbi as sbi
    from flowtrain.inference.density_estimator import DensityEstimator
    from flowtrain.inference.fit import fit

__version__ = "0.1.0"

__all__ = [
    "DensityEstimator",
    "Flow",
    "LazyDistribution",
    "bijections",
    "distributions",
    "fit",
    "flows",
    "load",
    "nets",
]

_MODULES = {
    "DensityEstimator": "inference.density_estimator",
    "Flow": "flow",
    "LazyDistribution": "flow_distribution",
    "fit": "inference.fit",
    "load": "config.restore",
    "sbi": "inference.sbi",
}  # others are modules themselves, as sbi is, which needs an extra package


def __getattr__(name: str):
    """Import on first use, so that the command line answers ``--help`` without PyTorch."""
    if name not in (*__all__, *_MODULES):
        raise AttributeError(f"module 'flowtrain' has no attribute '{name}'")
    module = importlib.import_module(f"flowtrain.{_MODULES.get(name, name)}")
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted([*__all__, "sbi", *(name for name in globals() if name.startswith("__"))])
