"""Autoregressive flows: each element is mapped with parameters computed from the elements before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, full_precision, sum_event, walk
from flowtrain.bijections.univariate import Univariate
from flowtrain.runtime.cuda_graph import as_graph

GRAPH = 1024  # elements, dozens of kernels each, that a CUDA graph may hold


class Autoregressive(Bijection):
    """zᵢ = τ(xᵢ; net(x₁ … xᵢ₋₁)) for a vector: MAF with an affine τ (Papamakarios et al. 2017, section 3.1).

    ``forward`` takes one pass of the network. ``inverse`` goes through the elements once, in steps that reuse the
    network's activations in a cache, so that each step costs as much as its own elements. On a GPU, where gradients are
    off, its kernels become one CUDA graph when batches of one size come again.

    Args:
        shape: of one event, (D,).
        univariate: factory of τ, without weights of its own.
        net: factory ``net(shape=…, out=parameters per element, context_shape=…)`` of the conditioner. Called as
            ``net(x, context)`` it returns the parameters of all elements, (B, D, out), row i a function of the elements
            before i. In steps: ``cache = net.init_cache(x, context)``, for a batch like x; then ``net.step(x, cache)``
            takes the newest elements, (B, n), at first none, (B, 0), and returns the parameters of the next m ones,
            (B, m, out).
        order: of the elements: "sequential", "reversed", or "random", drawn by the constructor.
        context_shape: of a context that the conditioner reads too, or None.

    Raises:
        ValueError: not a vector, an unknown ``order``, or a ``univariate`` with weights.

    >>> from flowtrain import bijections as b, nets
    >>> maf = b.Autoregressive((4,), b.ExpAffine, nets.MADE, order="reversed")
    >>> maf.inverse(torch.randn(5, 4))[0].shape
    torch.Size([5, 4])
    """

    order: Tensor
    back: Tensor

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
            elements = torch.arange(n, device="cpu").flip(0) if order == "reversed" else torch.randperm(n, device="cpu")
            self.register_buffer("order", elements)  # the element that comes first, second, …
            self.register_buffer("back", elements.argsort())

    def forward(self, x, context=None):
        z, log_derivative = self._map(self._sort(x), context)
        return self._unsort(z), sum_event(log_derivative)

    def log_derivatives(self, x, context=None):
        z, log_derivative = self._map(self._sort(x), context)
        return self._unsort(z), self._unsort(log_derivative)

    def _map(self, x, context):
        theta = self.net(x, context).to(x.dtype)
        with full_precision(x):
            return self.univariate(x, theta)

    def inverse(self, z, context=None):
        if self.shape[0] > GRAPH:
            return self._one_by_one(z, context)
        return as_graph(self, self._one_by_one, z, context)

    def _one_by_one(self, z, context):
        z = self._sort(z)
        cache = self.net.init_cache(z, context)
        rows = z.T.contiguous()  # one for each element: the columns of a matrix are scattered in memory
        end, elements, log_derivatives = 0, [z[:, :0]], []
        while end < len(rows):
            theta = self.net.step(elements[-1], cache).to(z.dtype)
            start, end = end, end + theta.shape[1]
            with full_precision(z):
                element, log_derivative = self.univariate.inverse(rows[start:end].T, theta)
            elements.append(element)
            log_derivatives.append(log_derivative)
        return self._unsort(_concatenate(elements)), _concatenate(log_derivatives).sum(1)

    def _sort(self, x):
        return x if self.sequential else x.index_select(1, self.order)

    def _unsort(self, z):
        return z if self.sequential else z.index_select(1, self.back)


def _concatenate(columns: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([column.T for column in columns]).T.contiguous()  # in rows first, as above


def sequential_layers(bijection: Bijection) -> list[Autoregressive]:
    """The autoregressive layers that ``bijection.forward`` runs backwards, so that it takes one element at a time."""
    return [layer for layer, inverted in walk(bijection) if inverted and isinstance(layer, Autoregressive)]
