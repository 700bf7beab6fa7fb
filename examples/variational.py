"""Variational inference: a flow learns a density that is known up to a constant, and says how well it did.

    python examples/variational.py

The target has two modes. The flow learns by the reverse Kullback-Leibler divergence, with the path gradient (Roeder et
al. 2017). Its samples' importance weights then estimate the target's normalization and mend what the flow got wrong.
"""

import torch

from flowtrain import flows
from flowtrain.engine import importance
from flowtrain.engine.objectives import ReverseKL
from flowtrain.targets import DoubleWell

torch.manual_seed(1)
target = DoubleWell()
flow = flows.nsf_coupling((2,), pairs=1, hidden=32)
flow.initialize(target.scale * torch.randn(512, 2))  # starts at the target's scale

steps, batch = 400, (torch.zeros(256, 2), None)  # of a batch, only the number of examples matters
objective = ReverseKL(target, path_gradient=True, anneal=0.5)
optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for step in range(steps):
    objective.begin_step(step / steps)
    loss = objective.loss(flow, batch).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
    optimizer.step()
    schedule.step()

with torch.no_grad():
    x, log_q = flow.eval().rsample_and_log_prob(20_000)
    log_w = (target.log_prob(x) - log_q).double()
log_z, share = importance.log_z(log_w), importance.effective_share(log_w)
print(f"log Z: {log_z.value:.3f} ± {log_z.stderr:.3f}, exact {target.log_z:.3f}")
print(f"effective sample size: {100 * share.value:.1f} %")
print(f"modes found: {len(target.mode_of(x).unique())} of {target.modes}")

weights = log_w.softmax(0)
left = (weights * (x[:, 0] < 0)).sum()
print(f"left of 0: {left:.3f}, exact {target.mode_weights()[0]:.3f}")
