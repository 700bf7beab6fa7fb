"""log p(x) split over the columns of a row, by the chain rule: Σ log p(xᵢ | the columns before it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.bijections import Autoregressive, Factored, Flatten, Permutation
from flowtrain.bijections.bijection import Bijection, Inverse, is_sequence
from flowtrain.distributions import Distribution
from flowtrain.flow import Flow


class ChainRule:
    """A flow of vectors whose log-likelihood splits over its columns: log p(x) = Σᵢ log p(xᵢ | x₍<ᵢ₎).

    Each layer's zᵢ depends on xᵢ and on the columns before it alone, in one order for all layers. Then so does the
    flow's, its Jacobian is triangular, and log p(xᵢ | x₍<ᵢ₎) = log base(zᵢ) + Σ over layers log|∂zᵢ/∂xᵢ|. Layers that
    map each column alone, such as those of preprocessing, count to their columns. Layers in different orders do not
    factor so: the product of a lower and an upper triangular matrix is not triangular.

    Args:
        flow: of vectors, (D,).

    Attributes:
        order: the columns, D numbers, each after those that its term is conditional on.

    Raises:
        ValueError: the flow does not split so; the message names the layer.

    >>> from flowtrain import flows
    >>> flow = flows.made((3,), hidden=16, order="reversed").eval()
    >>> rule, x = ChainRule(flow), torch.randn(5, 3)
    >>> rule.order, rule.terms(x).shape
    ([2, 1, 0], torch.Size([5, 3]))
    >>> torch.allclose(rule.terms(x).sum(1).float(), flow.log_prob(x), atol=1e-5)
    True
    """

    def __init__(self, flow: Flow):
        if len(flow.shape) != 1:
            raise ValueError(f"this flow takes events of shape {list(flow.shape)}; only rows of columns have an order")
        self.flow = flow
        self.order = [0]
        if flow.dimensions == 1:
            return
        self._names = {layer: name for name, layer in flow.bijection.named_modules()}
        self._orders: list[tuple[str, list[int]]] = []
        columns = self._follow(flow.bijection, list(range(flow.dimensions)))
        for base in flow.base.modules():
            if isinstance(base, Distribution) and type(base).log_density is Distribution.log_density:
                raise ValueError(f"the coordinates of its base, {type(base).__name__}, are not independent")
        found = [column for _, order in self._orders for column in order]
        self.order = found + [column for column in columns if column not in found]

    def _follow(self, layer: Bijection, columns: list[int]) -> list[int]:
        """The columns of a layer's outputs, in order, given those of its inputs. ValueError where it has no place in
        one order."""
        name, kind = self._names[layer], type(layer).__name__
        if is_sequence(layer):
            for part in layer.layers().values():
                columns = self._follow(part, columns)
            return columns
        if isinstance(layer, Factored):
            first = self._follow(layer.first, _pick(columns, layer.of_first))
            return first + self._follow(layer.second, _pick(columns, layer.of_second))
        if isinstance(layer, Permutation):
            return _pick(columns, layer.order)
        inner = layer.bijection if isinstance(layer, Inverse) else layer
        if isinstance(inner, Autoregressive):
            self._check_order(name, columns if inner.sequential else _pick(columns, inner.order))
        elif not isinstance(layer, Flatten) and type(inner).log_derivatives is Bijection.log_derivatives:
            raise ValueError(f"its layer '{name}' ({kind}) mixes columns")
        return columns

    def _check_order(self, name: str, order: list[int]) -> None:
        """Keep the order of an autoregressive layer. ValueError where that of one before it is another."""
        for other, known in self._orders:
            if order == known:
                return
            if not {*order}.isdisjoint(known):
                raise ValueError(f"its layers '{other}' and '{name}' take the columns in different orders")
        self._orders.append((name, order))

    def terms(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(xᵢ | the columns before xᵢ), in nats, float64 (B, D), in the order of the columns of x, (B, D)."""
        if self.flow.dimensions == 1:
            return self.flow(x, context)[:, None].double()
        context, total = self.flow.embed(context), x.new_zeros(x.shape, dtype=torch.float64)
        columns = torch.arange(x.shape[1], device=x.device)
        z, columns = self._add(self.flow.bijection, x, columns, context, total)
        return total.index_add_(1, columns, self.flow.base.log_density(z, context).double())

    def _add(
        self, layer: Bijection, x: Tensor, columns: Tensor, context: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z and its columns, of x and its; add the layer's log-derivatives to ``total``."""
        if is_sequence(layer):
            for part in layer.layers().values():
                x, columns = self._add(part, x, columns, context, total)
            return x, columns
        if isinstance(layer, Factored):
            parts = []
            for part, of_part, given in (
                (layer.first, layer.of_first, context),
                (layer.second, layer.of_second, layer.given(x.index_select(1, layer.of_first), context)),
            ):
                parts.append(self._add(part, x.index_select(1, of_part), columns[of_part], given, total))
            return torch.cat([z for z, _ in parts], 1), torch.cat([found for _, found in parts])
        if isinstance(layer, Permutation):
            return layer(x)[0], columns[layer.order]
        if isinstance(layer, Flatten):
            return x, columns
        z, log_derivatives = layer.log_derivatives(x, context)
        total.index_add_(1, columns, log_derivatives.double())
        return z, columns


def _pick(columns: Sequence[int], places: Tensor) -> list[int]:
    return [columns[place] for place in places.tolist()]
