"""What training changes."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.engine.ema import EMA
from flowtrain.flow import Flow
from flowtrain.runtime.checkpoint import load_weights


class Weights:
    """A flow's weights, the optimizer that updates them and, where there is one, their average.

    Attributes:
        asynchronous: whether the host may run ahead of the device.
    """

    averages_gradients = False  # whether a backward pass does, over the processes

    def __init__(self, flow: Flow, optimizer: torch.optim.Optimizer, ema: EMA | None):
        self.flow, self.optimizer, self.ema = flow, optimizer, ema
        self.asynchronous = any(parameter.is_cuda for parameter in flow.parameters())
        self.parameters = [*flow.parameters()]  # to find them takes as long as to launch a step of the optimizer
        self.highest_rates = [group["lr"] for group in optimizer.param_groups]

    @property
    def takes_condition(self) -> bool:
        """Whether :meth:`step` takes a condition: torch's fused optimizers do, but not in a first step, which creates
        their state. On a CPU, which has nothing to wait for, they take longer with one."""
        fused = self.asynchronous and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return fused and len(self.optimizer.state) > 0

    def set_rates(self, factor: float) -> None:
        """Set the optimizer's rates to ``factor`` times the highest ones."""
        for group, highest in zip(self.optimizer.param_groups, self.highest_rates):
            group["lr"] = highest * factor

    def clip(self, limit: float | None) -> Tensor:
        """The norm of the gradient of all parameters, which is then scaled down to ``limit``."""
        found = [one.grad for one in self.parameters if one.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
        if limit:
            torch._foreach_mul_(found, clip_factor(norm, limit))
        return norm

    def step(self, condition: Tensor | None = None) -> None:
        """Step along the gradient; not where ``condition``, which stays on its device, is false."""
        if condition is None:
            self.optimizer.step()
            return
        self.optimizer.found_inf = (~condition).float()  # as torch's GradScaler says it
        self.optimizer.step()
        del self.optimizer.found_inf

    def update_average(self, step: int) -> None:
        if self.ema:
            self.ema.update(step)

    def release(self) -> None:
        """To be called after the last step."""

    @property
    def average(self) -> Flow:
        """The flow that is validated and previewed."""
        return self.ema.model if self.ema else self.flow

    def whole(self, flow: Flow) -> Flow:
        """The flow, or its average, with all of its weights on the first process. Called on every process."""
        return flow

    def model_state(self) -> dict:
        """The flow's state, whole on every process. Called on every process."""
        return self.flow.state_dict()

    def state_dict(self) -> dict:
        return {
            "model": self.flow.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_best(self, state: dict) -> None:
        """Give the flow the weights of a checkpoint that were validated."""
        load_weights(self.flow, state)

    def load_state_dict(self, state: dict) -> None:
        self.flow.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What scales a gradient of ``norm`` down to ``limit``; 1 where it is shorter."""
    return (limit / (norm + 1e-6)).clamp_(max=1.0)
