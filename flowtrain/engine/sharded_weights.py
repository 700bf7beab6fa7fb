"""Weights of which each process keeps a share, by torch's FSDP2 (Zhao et al. 2023): for transformers that, with their
gradients and their optimizer, are larger than one device's memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flowtrain.engine.ema import EMA
from flowtrain.engine.weights import Weights, clip_factor
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process, in the host's memory
SCATTER = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # torch fills the dict that it is given


def blocks(flow: nn.Module) -> list[nn.Module]:
    """The parts of a flow whose weights can be gathered one after the other: those with ``gathers_alone``, which say
    that nothing reads their weights but their own ``forward``."""
    return [module for module in flow.modules() if getattr(module, "gathers_alone", False)]


def shard(flow: Flow, device: torch.device) -> Flow:
    """Leave each process its share of the weights; a call of the flow gathers those of each of its :func:`blocks` while
    that computes, and those of the rest for the whole of the call. Returns an outline of the flow before: the same
    layers, whose weights have no numbers."""
    distributed.init()
    without = {id(one): nn.Parameter(one.to("meta"), requires_grad=False) for one in flow.parameters()}
    outline = copy.deepcopy(flow, without)
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for module in [*blocks(flow), flow]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return outline


class ShardedWeights(Weights):
    """Each process updates, clips and averages its share. States are those of :class:`Weights`, on the first process.

    Args:
        outline: of the flow, as :func:`shard` returned it.
    """

    averages_gradients = True
    takes_condition = False

    def __init__(self, flow: Flow, optimizer: torch.optim.Optimizer, ema: EMA | None, outline: Flow):
        super().__init__(flow, optimizer, ema)
        self.outline = outline
        names = {parameter: name for name, parameter in flow.named_parameters()}
        self.names = [names[one] for group in optimizer.param_groups for one in group["params"]]
        if ema:
            ema.parameters = [*map(_own, ema.model.parameters())], [*map(_own, flow.parameters())]

    def clip(self, limit):
        own = [_own(one.grad) for one in self.parameters if one.grad is not None]
        norm = distributed.all_sum(torch.stack(torch._foreach_norm(own)).square().sum()).sqrt()
        if limit:
            torch._foreach_mul_(own, clip_factor(norm, limit))
        return norm

    def whole(self, flow):
        """A copy; on the other processes, the outline."""
        state = get_model_state_dict(flow, options=GATHER)
        whole = copy.deepcopy(self.outline)
        if distributed.is_main():
            device = self.parameters[0].device
            whole.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
        return whole.eval()

    def model_state(self):
        state = self.flow.state_dict()
        return {name: (one.full_tensor() if isinstance(one, DTensor) else one).cpu() for name, one in state.items()}

    def state_dict(self):
        packed = self.optimizer.state_dict()
        if self.optimizer.state:  # else torch would make one, by a step
            named = get_optimizer_state_dict(self.flow, self.optimizer, options=GATHER).get("state", {})
            packed["state"] = {number: named[name] for number, name in enumerate(self.names) if name in named}
        return {
            "model": get_model_state_dict(self.flow, options=GATHER),
            "ema": get_model_state_dict(self.ema.model, options=GATHER) if self.ema else None,
            "optimizer": packed,
        }

    def load_best(self, state):
        set_model_state_dict(self.flow, dict(state["ema"] or state["model"]), options=SCATTER)

    def load_state_dict(self, state):
        set_model_state_dict(self.flow, dict(state["model"]), options=SCATTER)
        if self.ema:
            set_model_state_dict(self.ema.model, dict(state["ema"] or state["model"]), options=SCATTER)
        packed = state["optimizer"]
        if distributed.broadcast_object(bool(packed["state"])):
            named = {self.names[number]: _with_own_steps(one) for number, one in packed["state"].items()}
            groups = [
                group | {"params": [self.names[number] for number in group["params"]]}
                for group in packed["param_groups"]
            ]
            found = {"state": named, "param_groups": groups}
            set_optimizer_state_dict(self.flow, self.optimizer, found, options=SCATTER)


def _with_own_steps(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state with a number of steps of its own, which the optimizer will count on; the rest it copies."""
    return {name: value if value.dim() else value.clone() for name, value in state.items()}


def _own(tensor: Tensor) -> Tensor:
    """This process's share."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor
