"""Autoregressive flows: each element is mapped with parameters computed from the elements before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, full_precision, sum_event, walk
from flowtrain.bijections.decoding import Guided, Jacobi
from flowtrain.bijections.univariate import Univariate
from flowtrain.runtime import fusion, modes
from flowtrain.runtime.cuda_graph import as_graph

GRAPH = 1024  # elements, dozens of kernels each, that a CUDA graph may hold


class Autoregressive(Bijection):
    """zᵢ = τ(xᵢ; net(x₁ … xᵢ₋₁)) for a vector: MAF with an affine τ (Papamakarios et al. 2017, section 3.1). For a row
    of tokens, xᵢ is a token, of whose numbers each has its τ: TarFlow's block (Zhai et al. 2024).

    ``forward`` takes one pass of the network. ``inverse`` goes through the elements once, in steps that reuse the
    network's activations in a cache, so that each step costs as much as its own elements. On a GPU, where gradients are
    off, its kernels become one CUDA graph when batches of one size come again. Within
    :func:`flowtrain.bijections.decoding.jacobi` it iterates all elements at once to the fixed point, and within
    :func:`flowtrain.bijections.decoding.guidance` the context counts for more.

    Args:
        shape: of one event, (D,), or (D, n): D tokens of n numbers.
        univariate: factory of τ, without weights of its own.
        net: factory ``net(shape=…, out=parameters per element, context_shape=…)`` of the conditioner. Called as
            ``net(x, context)`` it returns the parameters of all elements, (B, D, out), row i a function of the elements
            before i. In steps: ``cache = net.init_cache(x, context)``, for a batch like x; then ``net.step(x, cache)``
            takes the newest elements, (B, k), at first none, (B, 0), and returns the parameters of the next m ones,
            (B, m, out). Of tokens these are (B, D, n, out), (B, k, n), (B, 0, n) and (B, m, n, out).
        order: of the elements: "sequential", "reversed", or "random", drawn by the constructor.
        context_shape: of a context that the conditioner reads too, or None.

    Raises:
        ValueError: an unknown ``order``, a ``univariate`` with weights, or a shape that the network does not take.

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
        if order not in ("sequential", "reversed", "random"):
            raise ValueError(f"order='{order}' must be sequential, reversed or random")
        self.univariate = univariate(shape=self.shape)
        if list(self.univariate.parameters()):  # those belong to elements, and the inverse maps one at a time
            name = type(self.univariate).__name__
            raise ValueError(f"{name} has weights of its own; an autoregressive map takes none")
        self.net = net(shape=self.shape, out=self.univariate.params, context_shape=context_shape)
        self.sequential = order == "sequential"
        if not self.sequential:
            n = self.shape[0]
            elements = torch.arange(n, device="cpu").flip(0) if order == "reversed" else torch.randperm(n, device="cpu")
            self.register_buffer("order", elements)  # the element that comes first, second, …
            self.register_buffer("back", elements.argsort())

    def forward(self, x, context=None):
        x = self._sort(x)
        z, log_det = self._map(x, self.net(x, context).to(x.dtype), False)
        return self._unsort(z), log_det

    def _map(self, x, theta, inverse):
        """The elements by τ in one of its directions, and the log-determinant (B,)."""

        def by_torch(x, theta):
            with full_precision(x):
                z, log_derivative = (self.univariate.inverse if inverse else self.univariate)(x, theta)
            return z, sum_event(log_derivative)

        whole = fusion.may_fuse(self.univariate) and self.univariate.of_vectors(x, theta, None, inverse, by_torch)
        return whole or by_torch(x, theta)

    def log_derivatives(self, x, context=None):
        x = self._sort(x)
        theta = self.net(x, context).to(x.dtype)
        with full_precision(x):
            z, log_derivative = self.univariate(x, theta)
        return self._unsort(z), self._unsort(log_derivative)

    def inverse(self, z, context=None):
        mode = modes.current()
        # a number on the device: that of a CUDA graph's next call may be another
        weight = torch.full((), mode.guidance, device=z.device) if mode.guidance and context is not None else None
        if mode.jacobi is not None and not torch.is_grad_enabled():
            return self._all_at_once(mode.jacobi, z, context, weight)
        if self.shape[0] > GRAPH:
            return self._one_by_one(z, context, weight)
        return as_graph(self, self._one_by_one, z, context, weight)

    def _conditioner(self, weight):
        return self.net if weight is None else Guided(self.net, self.univariate, weight)

    def _all_at_once(self, iteration: Jacobi, z, context, weight):
        x, log_derivative = iteration.solve(self._conditioner(weight), self.univariate, self._sort(z), context)
        return self._unsort(x), sum_event(log_derivative)

    def _one_by_one(self, z, context, weight):
        z, net = self._sort(z), self._conditioner(weight)
        cache = net.init_cache(z, context)
        rows = z.movedim(1, 0).contiguous()  # one for each element: the columns of a matrix are scattered in memory
        end, elements, log_dets = 0, [z[:, :0]], []
        while end < len(rows):
            theta = net.step(elements[-1], cache).to(z.dtype)
            start, end = end, end + theta.shape[1]
            element, log_det = self._map(rows[start:end].movedim(0, 1), theta, True)
            elements.append(element)
            log_dets.append(log_det)
        return self._unsort(_concatenate(elements)), torch.stack(log_dets).sum(0)

    def _sort(self, x):
        return x if self.sequential else x.index_select(1, self.order)

    def _unsort(self, z):
        return z if self.sequential else z.index_select(1, self.back)


def _concatenate(columns: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([column.movedim(1, 0) for column in columns]).movedim(0, 1).contiguous()  # in rows first, as above


def sequential_layers(bijection: Bijection) -> list[Autoregressive]:
    """The autoregressive layers that ``bijection.forward`` runs backwards, so that it takes one element at a time."""
    return [layer for layer, inverted in walk(bijection) if inverted and isinstance(layer, Autoregressive)]
