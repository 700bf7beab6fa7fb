"""Weights in one tensor: of a small flow's many small ones, a CPU takes longer to call functions than to compute."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from flowtrain.engine.ema import EMA
from flowtrain.engine.optimizers import UNSHIELDED
from flowtrain.engine.weights import Weights, clip_factor
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

ELEMENTWISE = *UNSHIELDED, *UNSHIELDED.values()
MOST = 1 << 20  # numbers, beyond which functions take no time beside what they compute


class FlatWeights(Weights):
    """Updates all weights, and averages them, as parts of one tensor, of which each parameter is a view.

    A parameter without a gradient keeps its value. States are those of :class:`Weights`.
    """

    def __init__(self, flow: Flow, optimizer: torch.optim.Optimizer, ema: EMA | None):
        super().__init__(flow, optimizer, ema)
        names = {parameter: name for name, parameter in flow.named_parameters()}
        self.groups = [group["params"] for group in optimizer.param_groups]
        self.parameters = [one for group in self.groups for one in group]
        self.flat, self.averages = _join(self.parameters), []
        if ema:
            averages = dict(ema.model.named_parameters())
            self.averages = [averages[names[one]] for one in self.parameters]
            ema.parameters = [_join(self.averages)], [self.flat]
        self.sizes = [sum(one.numel() for one in group) for group in self.groups]
        self.parts = [nn.Parameter(part) for part in self.flat.split(self.sizes)]  # one for each group
        for group, part in zip(optimizer.param_groups, self.parts):
            group["params"] = [part]
        self.left_out: list[nn.Parameter] = []  # those without a gradient

    @staticmethod
    def fit(flow: Flow, optimizer: torch.optim.Optimizer) -> bool:
        """Whether these weights may be one tensor: few numbers of one dtype in the memory of one process, and an
        optimizer that treats each number alike."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        return (
            type(optimizer) in ELEMENTWISE
            and all(group["fused"] for group in optimizer.param_groups)
            and {*parameters} == {*flow.parameters()}
            and all(one.requires_grad for one in parameters)
            and distributed.world() == 1
            and sum(one.numel() for one in parameters) <= MOST
            and {(one.device.type, one.dtype, one.is_contiguous()) for one in parameters}
            in ({("cpu", dtype, True)} for dtype in (torch.float32, torch.float64))
        )

    def clip(self, limit):
        self.left_out = [one for one in self.parameters if one.grad is None]
        found = [torch.zeros_like(one) if one.grad is None else one.grad for one in self.parameters]
        gradient = _flatten_dense_tensors(found)
        norm = torch.linalg.vector_norm(gradient)
        if limit:
            gradient.mul_(clip_factor(norm, limit))
        for part, of_part in zip(self.parts, gradient.split(self.sizes)):
            part.grad = of_part
        return norm

    @torch.no_grad()
    def step(self, condition=None):
        before = [one.clone() for one in self.left_out]
        super().step(condition)
        for one, value in zip(self.left_out, before):
            one.copy_(value)

    def release(self):
        """Give each parameter memory of its own."""
        for one in [*self.parameters, *self.averages]:
            one.data = one.data.clone()

    # ---- states, as of an optimizer of the parameters

    def state_dict(self):
        state = super().state_dict()
        for name in ("model", "ema"):
            if state[name] is not None:
                state[name] = {key: value.clone() for key, value in state[name].items()}
        packed, each = state["optimizer"], []
        for number, (options, group) in enumerate(zip(packed["param_groups"], self.groups)):
            options["params"] = [*range(len(each), len(each) + len(group))]
            each += _split_state(packed["state"].get(number, {}), group)
        packed["state"] = {number: one for number, one in enumerate(each) if one}
        return state

    def load_state_dict(self, state):
        packed, joined, groups = state["optimizer"], {}, []
        for number, (options, group) in enumerate(zip(packed["param_groups"], self.groups, strict=True)):
            joined[number] = _join_states([packed["state"].get(one, {}) for one in options["params"]], group)
            groups.append(options | {"params": [number]})
        super().load_state_dict(state | {"optimizer": {"state": joined, "param_groups": groups}})


def _join(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of all numbers, of which each parameter is a view from now on."""
    flat = torch.cat([one.data.reshape(-1) for one in parameters])
    for one, part in zip(parameters, flat.split([one.numel() for one in parameters])):
        one.data = part.view(one.shape)
    return flat


def _split_state(state: dict, parameters: list[nn.Parameter]) -> list[dict]:
    """An optimizer's state of a part of the flat tensor as one for each of ``parameters``."""
    sizes, found = [one.numel() for one in parameters], [{} for _ in parameters]
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            values = [part.view(one.shape).clone() for part, one in zip(value.split(sizes), parameters)]
        else:  # the number of steps
            values = [copy.deepcopy(value) for _ in parameters]
        for one, of_one in zip(found, values):
            one[name] = of_one
    return found


def _join_states(states: list[dict], parameters: list[nn.Parameter]) -> dict:
    """The inverse of :func:`_split_state`; what a parameter lacks is 0."""
    found = {}
    for name in dict.fromkeys(name for one in states for name in one):
        values = [one.get(name) for one in states]
        if name == "step":
            found[name] = copy.deepcopy(max(one for one in values if one is not None))
        elif any(one is not None for one in values):
            pairs = zip(values, parameters, strict=True)
            found[name] = torch.cat([(torch.zeros_like(to) if one is None else one).reshape(-1) for one, to in pairs])
    return found
