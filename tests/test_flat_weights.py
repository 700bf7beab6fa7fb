"""Weights in one tensor are updated as weights apart, and their states are the same."""

import copy
from functools import partial

import pytest
import torch

from flowtrain import flows
from flowtrain.engine.ema import EMA
from flowtrain.engine.flat_weights import FlatWeights
from flowtrain.engine.weights import Weights

MAKERS = {
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "plain sgd": torch.optim.SGD,
}


def weights(kind, make, average=True):
    torch.manual_seed(0)
    flow = flows.maf((3,), depth=2, hidden=8).double()
    matrices = [one for one in flow.parameters() if one.dim() > 1]
    others = [one for one in flow.parameters() if one.dim() < 2]
    optimizer = make([{"params": matrices, "weight_decay": 0.1}, {"params": others}], lr=1e-2, fused=True)
    assert FlatWeights.fit(flow, optimizer)
    return kind(flow, optimizer, EMA(flow, 0.9) if average else None)


def train(one, first, last, limit=1.0):
    norms = []
    for step in range(first, last):
        x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for parameter in one.parameters:
            parameter.grad = None
        (-one.flow(x).mean()).backward()
        norms.append(one.clip(limit).item())
        one.set_rates(0.5**step)
        one.step()
        one.update_average(step)
    return norms


def assert_same(state, other):
    assert state["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    torch.testing.assert_close(state["optimizer"]["state"], other["optimizer"]["state"], rtol=1e-9, atol=1e-12)
    for name in ("model", "ema"):
        torch.testing.assert_close(state[name], other[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_steps_are_those_of_weights_apart(make, limit):
    apart, flat = weights(Weights, make), weights(FlatWeights, make)
    assert train(flat, 0, 4, limit) == pytest.approx(train(apart, 0, 4, limit), rel=1e-9)
    assert_same(flat.state_dict(), apart.state_dict())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("kinds", [(Weights, FlatWeights), (FlatWeights, Weights), (FlatWeights, FlatWeights)])
def test_states_are_exchanged(kinds, make):
    first, second = (weights(kind, make) for kind in kinds)
    train(first, 0, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, 3, 5)
    train(second, 3, 5)
    assert_same(second.state_dict(), first.state_dict())


def test_a_state_before_the_first_step_is_empty():
    apart, flat = weights(Weights, torch.optim.Adam), weights(FlatWeights, torch.optim.Adam)
    assert flat.state_dict()["optimizer"] == apart.state_dict()["optimizer"]
    flat.load_state_dict(apart.state_dict())
    assert_same(flat.state_dict(), apart.state_dict())


def test_a_state_of_other_groups_is_refused():
    flat = weights(FlatWeights, torch.optim.Adam)
    state = flat.state_dict()
    del state["optimizer"]["param_groups"][1]
    with pytest.raises(ValueError):
        flat.load_state_dict(state)


def test_a_parameter_without_a_gradient_stays_where_it_is():
    flat = weights(FlatWeights, torch.optim.Adam, average=False)
    flat.flow.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    flat = FlatWeights(flat.flow, torch.optim.AdamW(flat.flow.parameters(), weight_decay=0.5, fused=True), None)
    train(flat, 0, 2)
    assert flat.flow.unused.tolist() == [1, 1]


def test_released_weights_have_memory_of_their_own():
    flat = weights(FlatWeights, torch.optim.Adam)
    train(flat, 0, 2)
    before = flat.state_dict()
    shared = {one.untyped_storage().data_ptr() for one in flat.parameters}
    assert len(shared) == 1
    flat.release()
    for flow in (flat.flow, flat.ema.model):
        assert len({one.untyped_storage().data_ptr() for one in flow.parameters()}) == len([*flow.parameters()])
    assert_same(flat.state_dict(), before)
    own = before["model"].values()
    assert len({one.untyped_storage().data_ptr() for one in own if one.numel()}) == len([o for o in own if o.numel()])


def test_weights_stay_apart_where_one_tensor_does_not_serve(monkeypatch):
    flow = flows.maf((3,), depth=1, hidden=8)
    fit = lambda make, **options: FlatWeights.fit(flow, make(flow.parameters(), lr=1e-2, **options))
    assert fit(torch.optim.Adam, fused=True)
    assert not fit(torch.optim.Adam)  # the user's own choice of how it computes
    assert not fit(torch.optim.Adamax)
    assert not FlatWeights.fit(flow, torch.optim.Adam([*flow.parameters()][1:], fused=True))
    next(flow.parameters()).requires_grad_(False)
    assert not fit(torch.optim.Adam, fused=True)
    next(flow.parameters()).requires_grad_(True)
    monkeypatch.setattr("flowtrain.engine.flat_weights.MOST", 10)
    assert not fit(torch.optim.Adam, fused=True)
