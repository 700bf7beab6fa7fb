"""torch.compile of a flow as a whole and by regions: one graph, the same numbers, compiled once."""

import threading
from functools import partial

import pytest
import torch

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.engine.compiling import compile_flow, regions, signature
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import fusion, global_batch, modes

BATCH = 8


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Graphs are made as always and then run as they are, since a C++ compiler takes long."""
    from torch._dynamo.backends import registry

    torch._dynamo.reset()
    monkeypatch.setattr(registry, "get_default_backend", lambda: "eager")
    yield
    torch._dynamo.reset()


LOGIT = partial(flows.parts.logit, grey_levels=17)


def digits_flow(constructor, **knobs):
    torch.manual_seed(0)
    flow = constructor((1, 8, 8), preprocess=LOGIT, **knobs)
    x = torch.randint(0, 17, (BATCH, 1, 8, 8))
    flow.initialize(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return flow.train(), x


def gradient(flow, x, context=None):
    torch.manual_seed(3)
    flow.zero_grad()
    loss = -flow(x, context).mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in flow.named_parameters()}


@pytest.mark.parametrize(
    "make",
    [
        partial(flows.glow, steps=3, levels=1),
        partial(flows.maf, steps=3),
        partial(flows.realnvp),
        partial(flows.nsf_coupling),
    ],
    ids=lambda make: make.func.__name__,
)
def test_compiled_training_is_the_same_and_compiles_once(make):
    flow, x = digits_flow(make, hidden=16)
    names, eager = list(flow.state_dict()), gradient(flow, x)
    compilation = compile_flow(flow, whole=False)
    first = gradient(flow, x)
    compilation.settle()
    assert 0 < compilation.shapes <= compilation.graphs <= 3 * compilation.shapes
    assert compilation.graphs < compilation.regions + 2
    assert compilation.seconds > 0
    again = gradient(flow, x)
    assert compilation.recompiles == 0
    assert list(flow.state_dict()) == names
    for result in (first, again):
        torch.testing.assert_close(result, eager, atol=1e-5, rtol=1e-4)


def test_a_deeper_flow_compiles_no_more():
    graphs = []
    for steps in (2, 5):
        torch._dynamo.reset()
        flow, x = digits_flow(flows.realnvp_vector, hidden=16, pairs=steps)
        compilation = compile_flow(flow, whole=False)
        gradient(flow, x)
        compilation.settle()
        assert (compilation.regions, compilation.shapes) == (steps, 1)
        graphs.append(compilation.graphs)
    assert graphs[0] == graphs[1]


def test_a_recompilation_is_counted_and_told(caplog):
    flow, x = digits_flow(flows.nice, hidden=16)
    compilation = compile_flow(flow, whole=False)
    with caplog.at_level("INFO", logger="flowtrain"):
        gradient(flow, x)
        compilation.after_step(1)
        gradient(flow, x)
        compilation.after_step(2)
        assert "compiled: 2 layers (1 different)" in caplog.text and "again" not in caplog.text
        gradient(flow, x[:3])  # another size
        compilation.after_step(3)
        assert compilation.recompiles > 0
        assert "step 3: compiled again" in caplog.text


def test_evaluation_compiles_nothing():
    flow, x = digits_flow(flows.nice, hidden=16)
    compilation = compile_flow(flow, whole=False)
    gradient(flow, x)
    compilation.settle()
    with compilation.pause(), torch.no_grad():
        flow.eval()(x[:5])
    gradient(flow.train(), x)
    assert compilation.recompiles == 0


def test_what_solves_or_goes_element_by_element_stays_as_it_is():
    found = list(regions(flows.hybrid((64,)).bijection))
    assert found and not any(isinstance(part, b.Continuous) for region in found for part in region.modules())
    for make in (flows.ffjord, flows.iaf, flows.residual):
        with pytest.raises(UsageError, match="compile=true: nothing in this flow can be compiled"):
            compile_flow(make((64,)))


def test_signatures_tell_programs_apart_and_not_weights():
    def coupling(hidden=8, swap=False):
        net = partial(nets.MLP, hidden=hidden)
        partition = partial(b.Halves, swap=swap)
        return b.Coupling((6,), univariate=b.SigmoidAffine, net=net, partition=partition)

    assert signature(coupling()) == signature(coupling())
    assert len({signature(one) for one in (coupling(), coupling(hidden=9), coupling(swap=True))}) == 3


def test_weight_normalization_does_not_keep_couplings_apart():
    flow, _ = digits_flow(flows.realnvp, blocks=1)
    compilation = compile_flow(flow, whole=False)
    assert compilation.regions == 10 and compilation.shapes == 4


def test_a_machine_that_cannot_compile_is_told_in_one_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nat all")

    from torch._dynamo.backends import registry

    monkeypatch.setattr(registry, "get_default_backend", lambda: broken)
    flow, _ = digits_flow(flows.nice, hidden=8)
    with pytest.raises(
        UsageError, match="compile=true: torch.compile does not work here .*no compiler.*; use compile="
    ):
        compile_flow(flow, whole=False)


def test_context_and_autocast_reach_a_compiled_step():
    layers = {
        "steps": partial(
            b.Chain,
            repeat=2,
            layers={
                "actnorm": b.ActNorm,
                "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=partial(nets.MLP, hidden=16)),
            },
        ),
    }
    flow = Flow((6,), partial(b.Chain, layers=layers), context_shape=(3,))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, context = torch.randn(BATCH, 6), torch.randn(BATCH, 3)
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradient(flow, x, context)
        compilation = compile_flow(flow, whole=False)
        assert compilation.regions == 2
        result = gradient(flow, x, context)
    assert compilation.graphs
    torch.testing.assert_close(result, eager, atol=1e-2, rtol=1e-2)
    other = gradient(flow, x, context + 1)
    assert not torch.allclose(other[0], result[0], atol=1e-3)


@pytest.mark.parametrize("slices", [1, 4])
def test_dropout_is_the_same_compiled_and_slices_share_a_program(slices):
    flow, x = digits_flow(flows.realnvp_vector, hidden=16, pairs=2, dropout=0.5)

    def step():
        flow.zero_grad()
        for i, part in enumerate(x.chunk(slices)):
            torch.manual_seed(5)
            with global_batch.rows(i * len(part), len(x)):
                flow(part).mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])

    eager = step()
    assert not torch.allclose(eager, step_without_dropout(flow, x), atol=1e-3)
    compilation = compile_flow(flow, whole=False)
    torch.testing.assert_close(step(), eager, atol=1e-5, rtol=1e-4)
    compilation.settle()
    assert compilation.graphs <= 3 * compilation.shapes
    torch.testing.assert_close(step(), eager, atol=1e-5, rtol=1e-4)
    assert compilation.recompiles == 0


def step_without_dropout(flow, x):
    _, gradients = gradient(flow.eval(), x)
    flow.train()
    return -torch.cat([one.flatten() for one in gradients.values()])


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="before, compiled code has the modes of the process")
def test_a_compiled_layer_follows_the_modes_of_its_thread():
    """Repeated work updates no moments, also compiled. Modes that the layer does not read compile nothing anew."""
    torch.manual_seed(0)
    layer, x = b.BatchNorm((3, 4, 4)).train(), torch.randn(8, 3, 4, 4)
    layer.compile(fullgraph=True, dynamic=False)
    graphs, before = [], layer.running.mean.clone()
    handle = torch._dynamo.callback.callback_handler.register_start_callback(graphs.append)
    try:
        with modes.using(repeating=True):
            layer(x)
            assert torch.equal(layer.running.mean, before)
            thread = threading.Thread(target=layer, args=(x,))
            thread.start()
            thread.join()
            assert not torch.equal(layer.running.mean, before)
        assert len(graphs) == 2
        with global_batch.rows(0, 8), global_batch.bin_centres():
            layer(x)
        assert len(graphs) == 2
    finally:
        torch._dynamo.callback.callback_handler.remove_start_callback(handle)


def test_a_fused_region_is_compiled_apart_from_one_whose_layers_are_called_one_by_one():
    chain = b.Chain((4, 2, 2), {"norm": b.ActNorm, "mixing": b.LULinear})
    with torch.no_grad():
        chain.norm.log_scale.normal_()
    x = torch.randn(3, 4, 2, 2)
    expected = chain(x)
    chain.compile(fullgraph=True, dynamic=False)
    with fusion.layer_by_layer():
        torch.testing.assert_close(chain(x), expected)
    torch.testing.assert_close(chain(x), expected)
