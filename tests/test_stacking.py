"""What follows from weights alone comes from one computation for all layers of one size, and nothing else changes."""

import copy
from functools import partial

import pytest
import torch

from flowtrain import bijections as b
from flowtrain import flows
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.commands.draws import draw_samples
from flowtrain.engine.compiling import compile_flow
from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.runtime import fusion, kept

SIZES, LAYERS = 2, 4  # of the matrices of the flow


@pytest.fixture
def flow():
    torch.manual_seed(0)
    center = partial(flows.parts.center, grey_levels=17)
    flow = flows.glow((1, 8, 8), levels=2, steps=2, hidden=4, mixing=b.DenseLinear, preprocess=center)
    flow.initialize(images())
    return flow


def images(count=4):
    return torch.randint(0, 17, (count, 1, 8, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """The sizes of all matrices whose log-determinants were computed, a call after the other."""
    calls, function = [], torch.linalg.slogdet
    monkeypatch.setattr(torch.linalg, "slogdet", lambda matrix: calls.append(tuple(matrix.shape)) or function(matrix))
    return calls


def gradient(flow, run=None):  # of ``flow``, which is run by ``run``
    torch.manual_seed(2)
    flow.zero_grad()
    loss = -(flow if run is None else run)(images()).mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in flow.parameters())]


def one_by_one(flow):
    flow = copy.deepcopy(flow)
    flow._stacks = False
    return flow


def assert_same(found, expected):  # a product of many matrices sums in another order than one of two
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_gradients_are_the_same(flow, calls, memory):
    flow.set_backpropagation(MEMORY_MODES[memory]())
    expected = gradient(one_by_one(flow))
    assert {len(size) for size in calls} == {2} and len(calls) >= LAYERS
    calls.clear()
    stacked = gradient(flow)
    assert_same(stacked, expected)
    assert all(size[0] == 2 for size in calls[:SIZES])
    if memory == "reversible":  # which finds the gradients of one layer after the other
        assert {len(size) for size in calls[SIZES:]} == {2}
    else:
        assert len(calls) == SIZES


def test_layer_by_layer_and_in_both_directions(flow, calls):
    with fusion.layer_by_layer():
        assert all(map(torch.equal, gradient(flow), gradient(one_by_one(flow))))
    calls.clear()
    z = flow.encode(images())
    assert torch.equal(flow.decode(z), images()) and len(calls) == 2 * SIZES
    layer = next(module for module in flow.modules() if isinstance(module, b.DenseLinear))
    x = torch.randn(3, *layer.shape)
    alone = layer(x)[1]  # by itself
    torch.testing.assert_close(alone, -layer.inverse(x)[1])


def test_second_derivatives(flow):
    def penalty(flow):
        torch.manual_seed(2)
        gradients = torch.autograd.grad(flow(images()).sum(), [*flow.parameters()], create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in gradients), [*flow.parameters()])

    flow = flow.double()
    torch.testing.assert_close(penalty(flow), penalty(one_by_one(flow)), atol=1e-9, rtol=1e-9)


def test_a_copy_has_log_determinants_of_its_own(flow):
    changed = copy.deepcopy(flow)
    with torch.no_grad():
        for layer in changed.modules():
            if isinstance(layer, b.DenseLinear):
                layer.matrix.mul_(2)
    before, after = gradient(flow), gradient(changed)
    assert not torch.equal(before[0], after[0])
    assert_same(after, gradient(one_by_one(changed)))


def test_compiled_as_a_whole_it_is_one_graph_and_by_regions_it_is_the_same(flow, monkeypatch):
    from torch._dynamo.backends import registry

    monkeypatch.setattr(registry, "get_default_backend", lambda: "eager")
    torch._dynamo.reset()
    expected = gradient(flow.train())
    explained = torch._dynamo.explain(flow)(images())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    whole = torch.compile(flow, fullgraph=True)
    torch.testing.assert_close(gradient(flow, whole), expected, atol=1e-5, rtol=1e-4)
    compile_flow(flow)
    torch.testing.assert_close(gradient(flow), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_evaluation_computes_once_what_follows_from_weights_alone(flow, calls, monkeypatch):
    with torch.no_grad(), evaluation_mode(torch.device("cpu")):
        first, second = flow(images()), flow(images(7))
    assert len(calls) == SIZES and len(first) == 4 and len(second) == 7
    inverted, invert = [], torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda matrix: inverted.append(matrix) or invert(matrix))
    samples = draw_samples(flow, 3 * 256, seed=0)  # in several batches
    assert len(inverted) == LAYERS and len(samples) == 3 * 256
    with torch.no_grad(), kept.keep():
        before = flow.eval()(images())
        next(flow.parameters()).add_(0.5)
        assert not torch.equal(before, flow(images()))
