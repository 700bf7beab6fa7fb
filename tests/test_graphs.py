"""Every family without an ODE or residual layers is one graph without a break: training as the Trainer runs it,
log_prob, the sampler, and samples with gradients."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from flowtrain import flows
from flowtrain.data.batch import Batch
from flowtrain.engine.compiling import compile_flow
from flowtrain.engine.objectives import NatsPerRow
from flowtrain.engine.training_pass import TrainingPass

VECTOR, IMAGE, BATCH = (3,), (1, 4, 4), 7
PIXELS = {"preprocess": partial(flows.parts.logit, grey_levels=17)}
FAMILIES = {
    "nice": (flows.nice, VECTOR, {}),
    "realnvp": (flows.realnvp, IMAGE, PIXELS | {"blocks": 1, "levels": 1}),
    "realnvp_vector": (flows.realnvp_vector, VECTOR, {"pairs": 1}),
    "glow": (flows.glow, IMAGE, PIXELS | {"steps": 1, "levels": 2}),
    "glow_vector": (flows.glow_vector, VECTOR, {"steps": 1}),
    "made": (flows.made, VECTOR, {}),
    "maf": (flows.maf, VECTOR, {"steps": 2}),
    "maf_mog": (flows.maf_mog, VECTOR, {"steps": 1}),
    "iaf": (flows.iaf, VECTOR, {"steps": 1}),
    "autoregressive": (flows.autoregressive, (1, 2, 2), {"grey_levels": 17, "depth": 1, "heads": 2, "dropout": 0.0}),
    "pixelcnn": (flows.pixelcnn, (1, 2, 2), {"grey_levels": 17, "depth": 1}),
    "tarflow": (flows.tarflow, IMAGE, PIXELS | {"patch": 2, "depths": [1, 1], "heads": 2}),
    "flowpp": (flows.flowpp, IMAGE, PIXELS | {"couplings": [1, 1, 1], "blocks": 1, "heads": 2, "dropout": 0.0}),
    "jet": (flows.jet, IMAGE, PIXELS | {"steps": 2, "spatial": 2, "heads": 2}),
    "nsf_coupling": (flows.nsf_coupling, VECTOR, {"pairs": 1}),
    "nsf_autoregressive": (flows.nsf_autoregressive, VECTOR, {"steps": 1}),
    "nsf_image": (flows.nsf_image, IMAGE, PIXELS | {"steps": 1, "levels": 1}),
}
SOLVED = {"cnf", "cnf_image", "ffjord", "ffjord_image", "hybrid", "hybrid_image", "residual", "residual_image"}
TYPED = {"custom"}  # composed in YAML


def make(name, **changes):
    constructor, shape, knobs = FAMILIES[name]
    knobs = knobs | changes
    flow = constructor(shape, hidden=4, **knobs)
    integers = knobs.get("preprocess") is not None or "grey_levels" in knobs
    x = torch.randint(0, 17, (BATCH, *shape)) if integers else torch.randn(BATCH, *shape)
    flow.initialize(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return flow, x


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, forward and backward, each run as it is."""
    from torch._dynamo.backends import registry

    found = {"forward": 0, "backward": 0}

    def note(direction):
        def compile(graph, _inputs):
            found[direction] += 1
            return graph.forward

        return compile

    backend = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
    torch._dynamo.reset()
    monkeypatch.setattr(registry, "get_default_backend", lambda: backend)
    yield found
    torch._dynamo.reset()


def counted(function):
    """``function`` compiled without a break for batches of any size, and a list of its graphs."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=True), graphs


def test_every_family_is_counted():
    assert {*FAMILIES} | SOLVED | TYPED == {*flows.__all__}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_is_one_graph_with_the_same_gradient(name, graphs):
    flow, x = make(name)
    training_pass = TrainingPass(flow.train(), NatsPerRow(), seed=1)

    def step():
        flow.zero_grad()
        loss, _ = training_pass.backpropagate(Batch(x), 0, 0, 1)
        return loss, [parameter.grad for parameter in flow.parameters()]

    eager = step()
    if name == "iaf":  # by itself, an element after the other: what compile_flow leaves out
        flow.compile(fullgraph=True, dynamic=False)
    else:
        compile_flow(flow)
        graphs.update(forward=0, backward=0)  # of the toy function that is tried first
    for _ in range(2):
        torch.testing.assert_close(step(), eager, atol=1e-5, rtol=1e-4)
    assert graphs == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_log_prob_is_one_graph_for_batches_of_any_size(name):
    flow, x = make(name)
    compiled, graphs = counted(flow.eval().log_prob)
    with torch.no_grad():
        for size in (BATCH, 5):
            torch.manual_seed(size)
            expected, part = flow.log_prob(x[:size]), x[:size].clone()
            torch.manual_seed(size)
            torch.testing.assert_close(compiled(part), expected, atol=1e-5, rtol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_is_one_graph_for_any_number_of_samples(name):
    flow, _ = make(name)
    compiled, graphs = counted(flow.eval().sample)
    for size in (BATCH, 5):
        torch.manual_seed(size)
        expected = flow.sample(size)
        torch.manual_seed(size)
        torch.testing.assert_close(compiled(size), expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1


DIFFERENTIABLE = [name for name in FAMILIES if name not in ("autoregressive", "pixelcnn")]  # whose samples are rounded


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "maf_mog" else name for name in DIFFERENTIABLE]
)
def test_samples_with_gradients_are_one_graph_with_their_density(name):
    flow, _ = make(name, preprocess=None)
    flow.eval()
    compiled, graphs = counted(flow.rsample_and_log_prob)

    def results(draw, size):
        torch.manual_seed(size)
        flow.zero_grad()
        x, log_prob = draw(size)
        (x.sin().sum() + log_prob.sum()).backward()
        return x, log_prob, [parameter.grad for parameter in flow.parameters()]

    for size in (BATCH, 5):
        expected = results(flow.rsample_and_log_prob, size)
        torch.testing.assert_close(results(compiled, size), expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1
