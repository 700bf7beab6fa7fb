"""What layers count while they run, such as an ODE's evaluations."""

from __future__ import annotations

from flowtrain.flow import Flow


def layer_statistics(flow: Flow) -> dict[str, float]:
    """The ``statistics()`` of a flow and its layers, summed over the layers."""
    total: dict[str, float] = {}
    for module in flow.modules():
        if hasattr(module, "statistics"):
            for name, value in module.statistics().items():
                total[name] = total.get(name, 0) + value
    return total
