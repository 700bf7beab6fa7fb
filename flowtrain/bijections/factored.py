"""Two groups of columns: the first through one bijection, the second through another that depends on the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, build
from flowtrain.bijections.columns import fit_to_columns


class Factored(Bijection):
    """z = (first(a), second(b; a)) for a row x of columns a and b: p(x) = p(a)·p(b | a).

    Args:
        shape: of a row, (D,).
        columns: numbers of the columns of b, in order; a is the others, of which there must be one.
        first: factory of the bijection of a, called with ``shape`` and ``context_shape``, which keeps its shape.
        second: factory of the bijection of b, which keeps its shape too. Its context is a, with the context after it if
            there is one.
        context_shape: of a context vector of both, or None.

    Raises:
        ValueError: not a vector, no columns on one side, a context that is not a vector, a layer that changes its
            shape, or what a factory refuses.

    >>> from functools import partial
    >>> from flowtrain import bijections as b, nets
    >>> second = partial(b.Conditional, univariate=b.ExpAffine, net=nets.MLP)
    >>> Factored((3,), [1], b.ActNorm, second)(torch.randn(5, 3))[0].shape
    torch.Size([5, 3])
    """

    container = True
    of_first: Tensor
    of_second: Tensor
    back: Tensor

    def __init__(
        self,
        shape,
        columns: Sequence[int],
        first: Callable[..., Bijection],
        second: Callable[..., Bijection],
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1:
            raise ValueError(f"takes rows of a table, not shape {list(self.shape)}")
        if self.context_shape is not None and len(self.context_shape) != 1:
            raise ValueError(f"takes a context vector, not {list(self.context_shape)}")
        others = sorted({*range(*self.shape)} - {*columns})
        if not columns or not others:
            raise ValueError(f"columns={list(columns)} must leave some of {self.shape[0]} columns, and name some")
        given = len(others) + sum(self.context_shape or ())
        self.register_buffer("of_first", torch.tensor(others), persistent=False)
        self.register_buffer("of_second", torch.tensor(list(columns)), persistent=False)
        self.register_buffer("back", torch.cat((self.of_first, self.of_second)).argsort(), persistent=False)
        self.first = build("first", first, shape=(len(others),), context_shape=self.context_shape)
        self.second = build("second", second, shape=(len(columns),), context_shape=(given,))
        for name, layer in self.layers().items():
            if layer.out_shape != layer.shape:
                raise ValueError(f"{name}: takes layers that keep their shape, not {layer.extra_repr()}")
        self.exact = self.first.exact and self.second.exact

    def fit(self, columns, rows: Tensor) -> None:
        """Fit the layers inside to a table's columns; see :func:`flowtrain.bijections.columns.fit_to_columns`."""
        for layer, index in ((self.first, self.of_first), (self.second, self.of_second)):
            encoded = None if columns is None else tuple(columns.encoded[i] for i in index.tolist())
            fit_to_columns(layer, encoded and SimpleNamespace(encoded=encoded), rows.index_select(1, index))

    def forward(self, x, context=None):
        a, b = x.index_select(1, self.of_first), x.index_select(1, self.of_second)
        z, log_det = self.first(a, context)
        rest, rest_log_det = self.second(b, self.given(a, context))
        return torch.cat((z, rest), 1), log_det + rest_log_det

    def inverse(self, z, context=None):
        z, rest = z.split([len(self.of_first), len(self.of_second)], 1)
        a, log_det = self.first.inverse(z, context)
        b, rest_log_det = self.second.inverse(rest, self.given(a, context))
        return torch.cat((a, b), 1).index_select(1, self.back), log_det + rest_log_det

    def given(self, a: Tensor, context: Tensor | None) -> Tensor:
        """The context of ``second``."""
        return a if context is None else torch.cat((a, context.to(a.dtype)), 1)
