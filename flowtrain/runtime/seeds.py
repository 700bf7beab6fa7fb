"""Seeds of random numbers."""

import threading

import torch

_WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's step, and the shifts and factors of its output
MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)
# torch's generators belong to the process: a thread holds this from when it seeds them until it has drawn
TURN = threading.RLock()


def seed_from(*numbers: int) -> int:
    """One seed in [0, 2⁶³), for ``manual_seed``, from several integers: splitmix64 (Steele, Lea and Flood 2014) over
    each in turn."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & _WORD)) + GOLDEN) & _WORD
        for shift, factor in MIX:
            state = ((state ^ (state >> shift)) * factor) & _WORD
        state ^= state >> 31
    return state >> 1


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_from`: the same numbers for every device of the data."""
    return torch.Generator().manual_seed(seed_from(*numbers))
