"""Autoregressive maps: each element is mapped with parameters that the elements before it set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from flowtrain.bijections.bijection import Bijection, Inverse, full_precision, sum_event
from flowtrain.bijections.univariate import Univariate


class Autoregressive(Bijection):
    """zᵢ = τ(xᵢ; net(x₁ … xᵢ₋₁)) for a vector (Papamakarios et al. 2017, section 3.1).

    ``net`` is built as ``net(shape=…, out=parameters per element, context_shape=…)``. It gives the parameters of all
    elements at once, ``(B, D, out)``, and in steps: ``memory = begin(z, context)``, then ``step(x, memory)`` takes the
    elements found last, (B, n), at first none, (B, 0), and gives the parameters of the next ones, (B, m, out), mostly
    of one. The inverse goes through the elements once, each step at the cost of its own elements.

    ``order`` says which element comes first: "sequential", "reversed" or "random", drawn when the layer is built.
    """

    reversible = False

    def __init__(
        self,
        shape,
        univariate: Callable[..., Univariate],
        net: Callable[..., nn.Module],
        order: str = "sequential",
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1:
            raise ValueError(f"an autoregressive layer takes vectors, not {list(shape)}; flatten first")
        if order not in ("sequential", "reversed", "random"):
            raise ValueError(f"order='{order}' must be sequential, reversed or random")
        self.univariate = univariate(shape=self.shape)
        if list(self.univariate.parameters()):  # those belong to elements, and the inverse maps one at a time
            name = type(self.univariate).__name__
            raise ValueError(f"{name} has weights of its own; an autoregressive map takes none")
        self.net = net(shape=self.shape, out=self.univariate.params, context_shape=context_shape)
        self.sequential = order == "sequential"
        if not self.sequential:
            (n,) = self.shape
            drawn = torch.arange(n, device="cpu").flip(0) if order == "reversed" else torch.randperm(n, device="cpu")
            self.register_buffer("order", drawn)  # the element that comes first, second, …
            self.register_buffer("back", drawn.argsort())

    def forward(self, x, context=None):
        x = self._ordered(x)
        theta = self.net(x, context).to(x.dtype)
        with full_precision(x):
            z, log_derivative = self.univariate(x, theta)
            return self._back(z), sum_event(log_derivative)

    def inverse(self, z, context=None):
        z = self._ordered(z)
        memory = self.net.begin(z, context)
        rows = z.T.contiguous()  # one for each element: columns of a matrix lie scattered in memory
        found, elements, log_derivatives = 0, [z[:, :0]], []
        while found < len(rows):
            theta = self.net.step(elements[-1], memory).to(z.dtype)
            start, found = found, found + theta.shape[1]
            with full_precision(z):
                element, log_derivative = self.univariate.inverse(rows[start:found].T, theta)
            elements.append(element)
            log_derivatives.append(log_derivative)
        return self._back(_side_by_side(elements)), _side_by_side(log_derivatives).sum(1)

    def _ordered(self, x):
        return x if self.sequential else x.index_select(1, self.order)

    def _back(self, z):
        return z if self.sequential else z.index_select(1, self.back)


def _side_by_side(columns: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([column.T for column in columns]).T.contiguous()  # in rows first, as above


def sequential_layers(module: nn.Module, inverted: bool = False) -> Iterator[Autoregressive]:
    """The autoregressive layers in ``module`` whose ``forward`` goes through the elements one by one: those under an
    odd number of ``Inverse``."""
    if isinstance(module, Autoregressive):
        if inverted:
            yield module
        return
    for child in module.children():
        yield from sequential_layers(child, inverted != isinstance(module, Inverse))


def cost_of_likelihood(module: nn.Module) -> str | None:
    """What ``train`` says of a flow whose likelihood takes as many steps as elements, such as IAF; or None."""
    if not (found := list(sequential_layers(module))):
        return None
    steps, layers = max(layer.shape[0] for layer in found), f"{len(found)} layer{'s' * (len(found) > 1)}"
    return (
        f"likelihood: {steps} sequential steps a layer ({layers}): sampling takes one pass; "
        "model=maf is the other way round"
    )
