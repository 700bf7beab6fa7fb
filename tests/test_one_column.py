"""Flows of one number: every model of vectors is a density there, with and without a context."""

import pytest
import torch
from audit import randomize
from composed import ONLY_IMAGES, flow_of, options

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections.ode import exact_trace
from flowtrain.data.spec import ColumnContext, DataSpec

MODELS = sorted({*options("model")} - {*ONLY_IMAGES})


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_a_density_of_one_number(model, context):
    spec = DataSpec("table", (1,), context=context and ColumnContext(("c",), (context,)))
    flow = flow_of(f"model={model}", "dataset=table", "preprocess=none", "smoke=true", spec=spec)
    given = None if context is None else torch.randn(256, context)
    flow.initialize(torch.randn(256, 1), given)
    flow = randomize(flow, 0.05)
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64)[:, None]
    with exact_trace(), torch.no_grad():
        log_prob = flow.log_prob(x, None if given is None else given[:1].double().expand(4001, -1))
    assert torch.trapezoid(log_prob.exp(), x[:, 0]).item() == pytest.approx(1, abs=2e-3)
    samples = flow.sample(256, context=None if given is None else given[0].double())
    assert samples.shape == (256, 1) and samples.std() > 0


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_flow_of_one_number_gets_a_gradient(model):
    flow = flow_of(f"model={model}", "dataset=table", "preprocess=none", "smoke=true", spec=DataSpec("table", (1,)))
    flow.initialize(torch.randn(64, 1))
    (-flow.train()(torch.randn(64, 1)).mean()).backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_a_context_reaches_a_coupling_of_one_number():
    coupling = randomize(b.Coupling((1,), b.ExpAffine, nets.MLP, context_shape=(2,)))
    x = torch.zeros(2, 1, dtype=torch.float64)
    z, _ = coupling(x, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert z[0] != z[1]
