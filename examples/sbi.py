"""Simulation-based inference: a flow learns the posterior of a simulator's parameters for every observation at once,
and is checked against the exact one. A few seconds on one core: python examples/sbi.py"""

import torch
from torch.distributions import MultivariateNormal

from flowtrain import Flow, flows
from flowtrain.engine.calibration import places, uniformity

NOISE = 0.5


def simulate(theta: torch.Tensor) -> torch.Tensor:
    """Two readings of the sum of two parameters and one of their difference, each with noise."""
    total, difference = theta.sum(-1), theta[..., 0] - theta[..., 1]
    return torch.stack([total, total, difference], -1) + NOISE * torch.randn(*theta.shape[:-1], 3)


def fit(theta: torch.Tensor, x: torch.Tensor, steps: int = 300) -> Flow:
    flow = flows.nsf_autoregressive((2,), context_shape=(3,), steps=2, hidden=32, blocks=1)
    flow.initialize(theta, x)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(theta), (256,))
        loss = -flow(theta[rows], x[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


torch.manual_seed(0)
theta = torch.randn(20_000, 2)  # the prior: a standard normal
x = simulate(theta)
flow = fit(theta, x)

observed = torch.tensor([1.5, 0.9, -0.4])
samples = flow.sample(4000, observed)
precision = torch.eye(2) + torch.tensor([[3.0, 1.0], [1.0, 3.0]]) / NOISE**2  # of the exact posterior
exact = MultivariateNormal(
    precision.inverse() @ torch.stack([observed.sum(), observed[0] + observed[1] - observed[2]]) / NOISE**2,
    precision_matrix=precision,
)
for name, found, true in (("mean", samples.mean(0), exact.mean), ("deviation", samples.std(0), exact.stddev)):
    print(f"{name}: {found[0]:.2f} {found[1]:.2f}, exact {true[0]:.2f} {true[1]:.2f}")

truth = torch.randn(500, 2)  # is it right for other observations too? simulation-based calibration
seen = simulate(truth)
draws = flow.sample(200, seen).transpose(0, 1)
found = places(flow, truth, iter([draws]), seen, seed=1)
for name, shares in (("θ₁", found.ranks[:, 0]), ("θ₂", found.ranks[:, 1]), ("coverage", found.credibility)):
    print(f"{name}: p = {uniformity(shares).p_value:.3f} that the posteriors are as wide as they should be")
