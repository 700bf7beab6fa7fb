"""Normalizing flows, trained by likelihood. ``flow = flowtrain.load("outputs/…"); flow.log_prob(x)``."""

__version__ = "0.1.0"

__all__ = ["Flow", "load"]


def __getattr__(name: str):
    """Import on first use: the command line answers ``--help`` without PyTorch."""
    if name == "Flow":
        from flowtrain.flow import Flow

        return Flow
    if name == "load":
        from flowtrain.config.restore import load

        return load
    raise AttributeError(f"module 'flowtrain' has no attribute '{name}'")
