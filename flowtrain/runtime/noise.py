"""Random numbers that belong to examples, whatever batch, process or device computes them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flowtrain.runtime.seeds import GOLDEN, MIX, seed_from


class ExampleNoise:
    """Uniform numbers of the examples ``index`` (B,): hashes of (seed, example, call, place in the event).

    The hash is that of splitmix64 (Steele, Lea and Flood 2014): the key of an example is the hash of its number, and
    its numbers are those of a splitmix64 generator that starts at the key.

    >>> few, more = ExampleNoise(torch.tensor([7]), 0), ExampleNoise(torch.tensor([3, 7]), 0)
    >>> torch.equal(few.uniform((1, 4))[0], more.uniform((2, 4))[1])
    True
    """

    def __init__(self, index: Tensor, *seed: int):
        self.index, self.seed, self.calls = index, seed, 0

    def uniform(self, shape, device=None, dtype=torch.float32) -> Tensor:
        """The next numbers in [0, 1) of ``shape`` (B, …); 53 bits of each in float64, else 24."""
        start = _signed(seed_from(*self.seed, self.calls))
        self.calls += 1
        keys = _hash(self.index.to(device or "cpu", torch.int64) * _signed(GOLDEN) + start)
        size = math.prod(shape[1:])
        places = torch.arange(1, size + 1, device=keys.device) * _signed(GOLDEN)
        bits = 53 if dtype == torch.float64 else 24
        numbers = _shift(_hash(keys[:, None] + places), 64 - bits)
        return numbers.to(torch.float64 if bits == 53 else torch.float32).mul_(2.0**-bits).to(dtype).reshape(shape)


class GivenNoise:
    """The uniform numbers in ``numbers``: a tensor for each call, in order.

    >>> GivenNoise([torch.tensor([0.25])]).uniform((1,))
    tensor([0.2500])
    """

    def __init__(self, numbers: Iterable[Tensor]):
        self.numbers = iter(numbers)

    def uniform(self, shape, device=None, dtype=torch.float32) -> Tensor:
        """The next tensor, of ``shape``, which is not looked at: a program may be traced for any batch."""
        return next(self.numbers).to(dtype)


def _hash(x: Tensor) -> Tensor:
    """splitmix64's output function, in place."""
    for shift, factor in MIX:
        x.bitwise_xor_(_shift(x, shift)).mul_(_signed(factor))
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits as if x had no sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word
