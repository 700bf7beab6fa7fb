"""Typicality: whether a log-likelihood is one that the model's own data have."""

from __future__ import annotations

from torch import Tensor


def entropy(log_prob: Tensor) -> float:
    """An estimate of the entropy in nats: the mean of −log p over rows that the model was not fitted to, (n,)."""
    return -log_prob.double().mean().item()


def typicality(log_prob: Tensor, entropy: float) -> Tensor:
    """|−log p(x) − entropy|, in nats, (B,): large where x is less likely than the data, or more likely.

    The score of Nalisnick et al. 2019 (Detecting out-of-distribution inputs to deep generative models using typicality)
    for a single example. Where it is large, x is outside of the typical set, even if its density is the highest.

    >>> import torch
    >>> typicality(torch.tensor([-10.0, -3.0, 4.0]), entropy(torch.tensor([-2.0, -4.0])))
    tensor([7., 0., 7.])
    """
    return (-log_prob - entropy).abs()
