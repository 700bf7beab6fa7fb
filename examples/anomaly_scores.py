"""Find the odd rows of a table: a flow learns what is usual, p-values say how unusual each new row is, and the chain
rule names the column. A few seconds on one core: python examples/anomaly_scores.py"""

import torch

from flowtrain import Flow, flows
from flowtrain.scores.chain_rule import ChainRule
from flowtrain.scores.conformal import Conformal

COLUMNS = ["load", "temperature", "vibration"]


def machines(rows: int) -> torch.Tensor:
    """Readings of a machine: it is warmer under load, and shakes when it is warm."""
    load = torch.rand(rows)
    temperature = 20 + 60 * load + 2 * torch.randn(rows)
    vibration = (temperature / 40).exp() * (0.2 * torch.randn(rows)).exp()
    return torch.stack([load, temperature, vibration], 1)


def fit(rows: torch.Tensor, steps: int = 300) -> Flow:
    flow = flows.made((3,), hidden=64)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = -flow(rows[torch.randint(len(rows), (256,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow.eval()


torch.manual_seed(0)
train, calibration, new = machines(5000), machines(2000), machines(1000)
new[10] = torch.tensor([0.2, 75.0, 6.5])  # hot, though the load is low
new[20] = torch.tensor([0.5, 50.0, 15.0])  # shakes too much
new[30] = torch.tensor([1.4, 104.0, 13.5])  # more load than ever
mean, std = train.mean(0), train.std(0)
flow = fit((train - mean) / std)

with torch.no_grad():
    rule = ChainRule(flow)
    usual = Conformal(rule.terms((calibration - mean) / std).sum(1))  # rows that the flow was not fitted to
    terms = rule.terms((new - mean) / std)
p = usual.p_values(terms.sum(1))

low, high = usual.alarm_rates(0.002)
print(f"{len(usual):,} calibration rows: {100 * low:.2f} to {100 * high:.2f} % of usual rows have p ≤ 0.002")
outside = (new < train.amin(0)) | (new > train.amax(0))
for row in (p <= 0.002).nonzero().flatten().tolist():
    least = COLUMNS[int(terms[row].argmin())]
    beyond = [name for name, is_outside in zip(COLUMNS, outside[row]) if is_outside]
    values = ", ".join(f"{name} {value:.1f}" for name, value in zip(COLUMNS, new[row].tolist()))
    print(f"row {row}: {values}: p = {p[row]:.4f}; least likely: {least}; outside: {', '.join(beyond) or 'none'}")
