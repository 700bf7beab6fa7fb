"""What training changes."""

from __future__ import annotations

import torch

from flowtrain.engine.ema import EMA
from flowtrain.flow import Flow


class Weights:
    """A flow's weights, the optimizer that updates them and, where there is one, their average."""

    def __init__(self, flow: Flow, optimizer: torch.optim.Optimizer, ema: EMA | None):
        self.flow, self.optimizer, self.ema = flow, optimizer, ema
        self.highest_rates = [group["lr"] for group in optimizer.param_groups]

    def update(self, step: int, rate_factor: float) -> None:
        """Step along the gradient, at the optimizer's rates times ``rate_factor``."""
        for group, highest in zip(self.optimizer.param_groups, self.highest_rates):
            group["lr"] = highest * rate_factor
        self.optimizer.step()
        if self.ema:
            self.ema.update(step)

    @property
    def average(self) -> Flow:
        """The flow that is validated and previewed."""
        return self.ema.model if self.ema else self.flow

    def state_dict(self) -> dict:
        return {
            "model": self.flow.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.flow.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
