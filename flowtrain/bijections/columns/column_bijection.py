"""What the links of a table have in common: numbers for each column, which the train split sets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, is_sequence

LARGEST = torch.finfo(torch.float32).max  # stands for no bound, since weights are finite numbers


class ColumnBijection(Bijection):
    """A bijection with numbers for each column, which ``fit`` sets; until then it is the identity."""

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1:
            raise ValueError(f"takes rows of a table, not shape {list(self.shape)}")

    def fit(self, columns, rows: Tensor) -> None:
        """Set the numbers.

        Args:
            columns: a :class:`flowtrain.data.Columns`, with the moments of the train split.
            rows: of the train split, (n, D), as this layer receives them.

        Raises:
            ValueError: the number of columns is not D.
        """
        found = None if columns is None else len(columns.encoded)
        if found != self.shape[0]:
            raise ValueError(f"needs what is known of {self.shape[0]} columns, not {found}")
        self._fit(columns.encoded, rows)

    def _fit(self, columns, rows: Tensor) -> None:
        raise NotImplementedError

    def _set(self, **values) -> None:
        for name, value in values.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.as_tensor(value, dtype=torch.float64 if buffer.is_floating_point() else buffer.dtype))


@torch.no_grad()
def fit_to_columns(bijection: Bijection, columns, rows: Tensor) -> None:
    """Fit the layers of a flow that have a ``fit``, in order, each to the rows that the layers before it return.

    Args:
        columns: a :class:`flowtrain.data.Columns`, with the moments of the train split; None for data of other kinds.
        rows: of the train split, (n, D).

    Raises:
        ValueError: a layer cannot be fitted to these columns. The message begins with the layer's class.
    """
    layers = list(_in_order(bijection))
    last = max((i for i, layer in enumerate(layers) if hasattr(layer, "fit")), default=-1)
    for i, layer in enumerate(layers[: last + 1]):
        if fit := getattr(layer, "fit", None):
            try:
                fit(columns, rows)
            except ValueError as error:
                raise ValueError(f"{type(layer).__name__}: {error}") from error
        if i < last:
            rows, _ = layer(rows)


def _in_order(bijection: Bijection) -> Iterator[Bijection]:
    """The layers of a chain and of the chains in it."""
    if is_sequence(bijection):
        for layer in bijection.layers().values():
            yield from _in_order(layer)
    else:
        yield bijection
