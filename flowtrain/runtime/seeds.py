"""One seed out of several numbers."""

import torch

_WORD = 2**64 - 1


def mix(*numbers: int) -> int:
    """One well-mixed seed in [0, 2⁶³) from several integers (splitmix64 over each); fit for ``manual_seed``."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & _WORD)) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by :func:`mix`: the same numbers whatever device the data live on."""
    return torch.Generator().manual_seed(mix(*numbers))
