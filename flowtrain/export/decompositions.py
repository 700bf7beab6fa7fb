"""Operators that ONNX lacks, by operators that it has."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from numpy.polynomial import chebyshev
from torch import Tensor

aten = torch.ops.aten


def _fit(function: Callable[[Tensor], Tensor], low: float, high: float, degree: int) -> list[float]:
    """The coefficients of a polynomial near a function on [low, high], in t from −1 at low to 1 at high."""
    values = chebyshev.chebinterpolate(
        lambda t: function(torch.as_tensor(low + (high - low) * (t + 1) / 2)).numpy(), degree
    )
    return chebyshev.cheb2poly(values).tolist()


def _polynomial(coefficients: list[float], x: Tensor, low: float, high: float) -> Tensor:
    """The polynomial of :func:`_fit` at x, by Horner's rule."""
    t = ((x - low) * (2 / (high - low)) - 1).clamp(-1, 1)
    *rest, last = coefficients
    value = last * t + rest.pop()
    for coefficient in reversed(rest):
        value = value * t + coefficient
    return value


def _log_scaled_erfcx(t: Tensor) -> Tensor:
    t = t.clamp(min=1e-12)
    return (torch.special.erfcx(2 / t - 2) / t).log()


def _erfinv_ratio(w: Tensor) -> Tensor:
    """erfinv(x)/x at 1 − x² = exp(−w)."""
    log_x = torch.log1p(-torch.exp(-w.clamp(min=1e-12))) / 2
    return torch.special.ndtri(-torch.expm1(log_x) / 2) / (-math.sqrt(2) * log_x.exp())


_LIMIT, _END = 5.0, 9.5  # of w, and of √w beyond
_ERFCX = _fit(_log_scaled_erfcx, 0, 1, 12)
_NEAR = _fit(_erfinv_ratio, 0, _LIMIT, 10)
_FAR = _fit(lambda root: _erfinv_ratio(root.square()), math.sqrt(_LIMIT), _END, 20)


def erfcx(x: Tensor) -> Tensor:
    """exp(x²)·erfc(x)."""
    t = 1 / (1 + x.abs() / 2)
    right = t * _polynomial(_ERFCX, t, 0, 1).exp()
    return torch.where(x < 0, 2 * (x * x).exp() - right, right)


def erfc(x: Tensor) -> Tensor:
    return torch.where(x < 1, 1 - torch.erf(x), erfcx(x.clamp(min=1)) * (-x * x).exp())


def _erfinv(x: Tensor, rest: Tensor) -> Tensor:
    """erfinv of x, with 1 − x² given (Giles 2010, with the two ranges of w = −log(1 − x²))."""
    w = -rest.log()
    near = _polynomial(_NEAR, w, 0, _LIMIT)
    far = _polynomial(_FAR, w.clamp(min=_LIMIT).sqrt(), math.sqrt(_LIMIT), _END)
    return x * torch.where(w < _LIMIT, near, far)


def erfinv(x: Tensor) -> Tensor:
    return _erfinv(x, (1 - x) * (1 + x))


def ndtri(p: Tensor) -> Tensor:
    return math.sqrt(2) * _erfinv(2 * p - 1, 4 * p * (1 - p))


def ndtr(x: Tensor) -> Tensor:
    return erfc(-x / math.sqrt(2)) / 2


def searchsorted(sorted_sequence, values, *, out_int32=False, right=False, side=None, sorter=None):
    edges, values = sorted_sequence.unsqueeze(-2), values.unsqueeze(-1)
    below = edges <= values if right or side == "right" else edges < values
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def convolution_backward(
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    """The gradient in x alone, of a convolution that keeps the image's size."""
    if transposed or output_mask[1] or output_mask[2]:
        return NotImplemented
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, [0, 0], groups), None, None


TABLE = {
    aten.special_erfcx.default: erfcx,
    aten.erfc.default: erfc,
    aten.erfinv.default: erfinv,
    aten.special_ndtri.default: ndtri,
    aten.special_ndtr.default: ndtr,
    aten.searchsorted.Tensor: searchsorted,
    aten.convolution_backward.default: convolution_backward,
}
