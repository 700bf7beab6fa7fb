"""What layers count while they run, such as an ODE's evaluations, and what passes through each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.bijections.columns import FillMissing
from flowtrain.flow import Flow
from flowtrain.runtime import distributed


def counts(flow: Flow) -> dict[str, float]:
    """The ``statistics()`` of a flow and its layers, summed over the layers."""
    total: dict[str, float] = {}
    for module in flow.modules():
        if hasattr(module, "statistics"):
            for name, value in module.statistics().items():
                total[name] = total.get(name, 0) + value
    return total


def computing_layers(flow: Flow) -> Iterator[tuple[str, Bijection]]:
    """The layers that compute, by their dotted names; a container only if it runs the inverses of its layers, which
    have no hooks."""
    for name, layer in flow.bijection.named_modules():
        if isinstance(layer, Bijection) and (layer.inverts_layers or not layer.container):
            yield name or "bijection", layer


class LayerStatistics:
    """What passes through each layer of a flow within :meth:`watch`.

    - ``layers/NAME/log_det``, the mean log-determinant in nats per dimension of the flow. Their sum is the mean of
      (log p(x) − log p(z)) / D, with p(z) the density of the base.
    - ``layers/NAME/scale``, the root mean square of its output: 1 where that is standardized.

    The batch may come in parts and in slices of several processes. Missing values do not count.
    """

    def __init__(self, flow: Flow):
        self.flow = flow
        self.sums: dict[str, Tensor] = {}  # of log-determinants, their number, of squares, their number
        self.has_gaps = any(isinstance(module, FillMissing) for module in flow.modules())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the layers: every one has to be called by itself (``modes.using(layer_by_layer=True)``)."""
        handles = [
            layer.register_forward_hook(lambda _layer, _inputs, outputs, name=name: self._add(name, *outputs))
            for name, layer in computing_layers(self.flow)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, z: Tensor, log_det: Tensor) -> None:
        z, log_det = z.detach().double(), log_det.detach().double()
        known = ~z.isnan() if self.has_gaps else torch.ones_like(z, dtype=torch.bool)
        squares = torch.where(known, z.square(), 0.0).sum()
        new = torch.stack([log_det.sum(), log_det.new_tensor(float(len(log_det))), squares, known.sum().double()])
        self.sums[name] = self.sums[name] + new if name in self.sums else new

    def read(self) -> dict[str, float]:
        """The figures of all processes, each of which calls this, in one read from the device."""
        if not self.sums:
            return {}
        log_det, rows, squares, numbers = distributed.all_sum(torch.stack([*self.sums.values()])).unbind(1)
        figures = torch.stack([log_det / rows / self.flow.dimensions, (squares / numbers).sqrt()]).tolist()
        return {
            f"layers/{name}/{what}": value
            for what, values in zip(("log_det", "scale"), figures)
            for name, value in zip(self.sums, values)
        }
