"""Importance weights of samples, and independence Metropolis with a flow as its proposal."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.ode import exact_trace
from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime.seeds import generator

CHAINS, BURN_IN = 64, 100  # chains side by side, and the steps of each that are left out


@torch.no_grad()
def log_weights(flow: Flow, target, samples: Tensor) -> Tensor:
    """log p(x) − log q(x) of ``samples`` (B, D), float64 (B,) on the CPU, −∞ where p is 0; of ODEs with the exact
    trace.

    Raises:
        FlowtrainError: one is neither a number nor −∞.
    """
    x = samples.to(next(flow.parameters()).device)
    with evaluation_mode(x.device), exact_trace():
        log_w = (target.log_prob(x).double() - flow(x).double()).cpu()
    if wrong := int((log_w.isnan() | (log_w == torch.inf)).sum()):
        raise FlowtrainError(f"target {target.name}: {wrong:,} of {len(log_w):,} samples have no importance weight")
    return log_w


class Metropolis:
    """Chains of independence Metropolis (Tierney 1994): a step of a chain moves to the next sample x′ of the flow with
    probability min(1, w(x′)/w(x)), where w = p/q. Their stationary distribution is the target.

    >>> chains = Metropolis(seed=0, chains=2, burn_in=0)
    >>> chains.feed(torch.arange(6.0)[:, None], torch.tensor([0.0, 0.0, 1.0, -50.0, 2.0, 1.0])).flatten()
    tensor([0., 1., 2., 1., 4., 5.])
    >>> chains.acceptance
    0.75
    """

    def __init__(self, seed: int, chains: int = CHAINS, burn_in: int = BURN_IN):
        self.chains, self.burn_in = chains, burn_in
        self.random = generator(seed, chains)
        self.x, self.log_w = None, None
        self.step = self.moves = self.tries = 0

    def proposals(self, n: int) -> int:
        """The number of samples of the flow that n states take."""
        return self.chains * (self.burn_in - (-n // self.chains))

    def feed(self, x: Tensor, log_w: Tensor) -> Tensor:
        """The states (m, *shape) after each step, all chains of a step side by side, without those of the burn-in, for
        proposals x of a whole number of steps."""
        states = []
        for proposed, log_weight in zip(x.split(self.chains), log_w.split(self.chains), strict=True):
            if self.x is None:
                self.x, self.log_w = proposed.clone(), log_weight.clone()
            else:
                u = torch.rand(self.chains, generator=self.random, dtype=torch.float64)
                moves = u.log() < log_weight - self.log_w
                self.x[moves], self.log_w[moves] = proposed[moves], log_weight[moves]
                if self.step >= self.burn_in:
                    self.moves, self.tries = self.moves + int(moves.sum()), self.tries + self.chains
            if self.step >= self.burn_in:
                states.append(self.x.clone())
            self.step += 1
        return torch.cat(states) if states else x[:0]

    @property
    def acceptance(self) -> float:
        """The share of proposals, after the burn-in, that were accepted."""
        return self.moves / max(1, self.tries)
