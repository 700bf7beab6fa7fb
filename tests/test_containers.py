"""A new container works everywhere: Pair and Backwards of layers.py declare only that they are containers."""

from functools import partial

import torch
from layers import Backwards, Pair, autoregressive, vector_step

from flowtrain import bijections as b
from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.bijections.backpropagation import ActivationCheckpointing
from flowtrain.engine.audit import audit, perturb
from flowtrain.engine.compiling import regions
from flowtrain.engine.divergence import examine
from flowtrain.flow import Flow


class Wrong(b.ActNorm):
    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z, 1.01 * log_det


class Overflow(b.ActNorm):
    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z / torch.zeros_like(z), log_det


def flow_of_pair(first=vector_step, second=vector_step):
    torch.manual_seed(0)
    return Flow((5,), partial(Pair, first=first, second=partial(Backwards, layer=second)))


def test_layers_are_compiled_unless_they_are_inverted():
    flow = flow_of_pair()
    assert list(regions(flow.bijection)) == list(flow.bijection.first)


def test_chains_are_checkpointed_unless_they_are_inverted():
    flow = flow_of_pair()
    assert ActivationCheckpointing().chains(flow.bijection) == [flow.bijection.first]


def test_the_audit_names_the_wrong_layer():
    flow, x = flow_of_pair(), torch.randn(32, 5)
    perturb(flow, x)
    assert all(check.passed for check in audit(flow, x[:4]))
    flow = flow_of_pair(second=partial(b.Chain, layers={"norm": b.ActNorm, "wrong": Wrong}))
    perturb(flow, x)
    failures = {check.name: check.layer for check in audit(flow, x[:4]) if not check.passed}
    assert failures["log-det of each layer, forward"] == "second.layer.wrong"


def test_the_first_layer_with_a_number_that_is_not_finite_is_named():
    flow, x = flow_of_pair(first=partial(b.Chain, layers={"norm": b.ActNorm, "overflow": Overflow})), torch.ones(4, 5)

    def step():
        flow.zero_grad()
        loss = -flow(x).mean()
        loss.backward()
        return loss.detach()

    assert examine(flow.train(), step).layer == "first.overflow"


def test_an_inverted_autoregressive_layer_is_sequential():
    pair = partial(Pair, first=autoregressive, second=partial(Backwards, layer=autoregressive))
    flow = Flow((5,), pair)
    assert sequential_layers(flow.bijection) == [flow.bijection.second.layer]
    twice = Backwards((5,), layer=partial(b.Inverse, bijection=autoregressive))
    assert not sequential_layers(twice)
