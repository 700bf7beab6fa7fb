"""Networks that make a vector of a context: in Python, and from the command line with a table's context columns."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from composed import flow_of
from inprocess import flowtrain
from torch import nn

import flowtrain as library
from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.data.spec import ColumnContext, DataSpec, LabelContext
from flowtrain.data.tables.column import Column
from flowtrain.engine.audit import audit, perturb
from flowtrain.errors import UsageError
from flowtrain.export.programs import Program

VECTOR_MODELS = {
    "glow_vector": {"steps": 2, "hidden": 8},
    "iaf": {"steps": 2, "hidden": 8},
    "made": {"hidden": 8},
    "maf": {"steps": 2, "hidden": 8},
    "maf_mog": {"steps": 2, "hidden": 8},
    "nsf_autoregressive": {"steps": 2, "hidden": 8},
    "nsf_coupling": {"pairs": 1, "hidden": 8},
    "realnvp_vector": {"hidden": 8},
    "ffjord": {"hidden": 8, "depth": 1},
    "hybrid": {"hidden": 8},
    "residual": {"blocks": 2, "hidden": 8},
}


def points_flow(**knobs):
    """A flow of pairs of numbers given up to six points of the plane."""
    return flows.nsf_coupling(
        (2,), pairs=1, hidden=8, context_shape=(6, 2), embedding=partial(nets.DeepSet, features=4, hidden=8), **knobs
    )


def moved(flow, *inputs):
    """The flow with weights moved off their neutral start."""
    torch.manual_seed(0)
    perturb(flow, *inputs)
    return flow


@pytest.mark.parametrize("model", VECTOR_MODELS)
def test_every_weight_of_an_embedding_gets_a_gradient(model):
    torch.manual_seed(0)
    embedding = partial(nets.MLPEmbedding, features=4, hidden=8)
    flow = getattr(flows, model)((3,), context_shape=(5,), embedding=embedding, **VECTOR_MODELS[model])
    x, c = torch.randn(16, 3), torch.randn(16, 5)
    moved(flow, x, c)
    flow(x, c).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in flow.embedding.parameters())


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
@pytest.mark.parametrize("make", [flows.nsf_coupling, flows.maf, partial(flows.ffjord, depth=1)])
def test_its_gradient_is_the_same_in_every_memory_mode(make, memory):
    torch.manual_seed(0)
    norm = {"norm": b.ActNorm} if make is flows.maf else {}
    flow = make((3,), hidden=8, context_shape=(5,), embedding=partial(nets.MLPEmbedding, hidden=8), **norm).double()
    x, c = torch.randn(16, 3).double(), torch.randn(16, 5).double()
    moved(flow, x, c)
    found = []
    for mode in ("none", memory):
        flow.set_backpropagation(MEMORY_MODES[mode]())
        flow.zero_grad()
        torch.manual_seed(1)  # of the noise of an ODE's trace
        flow(x, c).mean().backward()
        found.append([parameter.grad.clone() for parameter in flow.embedding.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-9)


def test_the_gradient_of_an_embedding_by_finite_differences():
    torch.manual_seed(0)
    flow = points_flow().double()
    x, c = torch.randn(3, 2).double(), torch.randn(3, 6, 2).double()
    moved(flow, x, c)
    weight = flow.embedding.point[0].weight

    def log_prob(weight):
        return torch.func.functional_call(flow, {"embedding.point.0.weight": weight}, (x, c))

    assert torch.autograd.gradcheck(log_prob, weight.detach().requires_grad_())


def test_a_deep_set_sees_no_order():
    torch.manual_seed(0)
    net = nets.DeepSet((9, 3), features=5).double()
    points = torch.randn(4, 9, 3).double()
    torch.testing.assert_close(net(points[:, torch.randperm(9)]), net(points))
    assert (net(points) - net(points.flip(2))).abs().max() > 1e-3  # it does see which number is which


def test_a_deep_set_of_fewer_points():
    torch.manual_seed(0)
    net = nets.DeepSet((9, 3), features=5).double()
    few, junk = torch.randn(1, 4, 3).double(), torch.randn(1, 5, 3).double()
    end = torch.cat((few, torch.full_like(junk, torch.nan)), 1)
    start = torch.cat((torch.full_like(junk, torch.nan), few), 1)
    partly = torch.cat((few, torch.where(torch.arange(3) == 1, torch.nan, junk)), 1)  # no point has a NaN
    for other in (start, partly):
        torch.testing.assert_close(net(other), net(end))
    twice = torch.cat((few, few, few[:, :1] * torch.nan), 1)  # the same mean of more points
    assert (net(twice) - net(end)).abs().max() > 1e-4
    assert net(torch.full((2, 9, 3), torch.nan).double()).isfinite().all()  # no points at all
    net(end).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_sets_of_fewer_points_in_a_flow():
    flow = points_flow()
    c = torch.randn(5, 6, 2)
    c[:, 4:] = torch.nan
    assert flow.log_prob(torch.randn(5, 2), c).shape == (5,)
    assert flow.sample(3, context=c).shape == (3, 5, 2)
    c[2, 1, 0] = torch.inf
    with pytest.raises(ValueError, match="row 2 of context"):
        flow.log_prob(torch.randn(5, 2), c)


class Counted(nn.Module):
    """Notes the number of contexts of each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), []

    def forward(self, context):
        self.calls.append(len(context))
        return self.linear(context)


def test_a_context_is_embedded_once():
    net = Counted()
    flow = flows.maf((2,), steps=3, hidden=8, context_shape=(3,), embedding=net)
    assert flow.embedding is net and flow.context_shape == (3,) and flow.bijection.context_shape == (2,)
    x, c = torch.randn(4, 2), torch.randn(4, 3)
    for call, rows in (
        (lambda: flow(x, c), 4),
        (lambda: flow.log_prob(x, c), 4),
        (lambda: flow.encode(x, c), 4),
        (lambda: flow.decode(x, c), 4),
        (lambda: flow.sample(100, context=c[0]), 1),
        (lambda: flow.sample(100, context=c), 4),
        (lambda: flow.latents(100, context=c), 4),
        (lambda: flow.log_prob(x[:, None], c), 4),
        (lambda: flow.log_prob(x, c[0]), 1),
        (lambda: flow.log_prob(x, c[:1].expand(4, 3)), 1),
        (lambda: flow.encode(x, c[0].expand(4, 3)), 1),
        (lambda: flow.decode(x[:, None], c), 4),
        (lambda: flow.to_distribution(c[0]).expand((100,)).log_prob(x[0]), 1),
    ):
        net.calls.clear()
        call()
        assert net.calls == [rows]


def test_what_a_flow_does_is_what_it_does_with_the_embedded_context():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    flow = flows.maf((2,), hidden=8, context_shape=(3, 4), embedding=net)
    x, c = torch.randn(6, 2), torch.randn(6, 3, 4)
    moved(flow, x, c)
    flow.eval()
    plain = flows.maf((2,), hidden=8, context_shape=(4,)).eval()
    weights = {key: value for key, value in flow.state_dict().items() if not key.startswith("embedding.")}
    plain.load_state_dict(weights)
    z = flow.encode(x, c)
    torch.testing.assert_close(flow.log_prob(x, c), plain.log_prob(x, net(c)))
    torch.testing.assert_close(z, plain.encode(x, net(c)))
    torch.testing.assert_close(flow.decode(z, c), x, atol=1e-4, rtol=1e-4)
    samples = flow.sample(5, context=c, generator=torch.Generator().manual_seed(3))
    same = plain.sample(5, context=net(c), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(samples, same)


def test_a_base_that_follows_the_embedded_context():
    flow = flows.maf(
        (2,),
        hidden=8,
        base=library.distributions.ConditionalNormal,
        context_shape=(1, 8, 8),
        embedding=partial(nets.ConvEmbedding, features=3, hidden=4),
    )
    c = torch.randn(4, 1, 8, 8)
    assert flow.base.context_shape == (3,)
    assert flow.latents(5, context=c).shape == flow.sample(5, context=c).shape == (5, 4, 2)
    assert flow.base_samples(4, context=c).shape == (4, 2)


@pytest.mark.parametrize("shape", [(3, 16, 12), (1, 5, 5), (2, 100), (1, 1, 1)])
def test_convolutions_take_images_and_series(shape):
    net = nets.ConvEmbedding(shape, features=7, hidden=4)
    assert net(torch.randn(5, *shape)).shape == (5, 7)
    assert net(torch.randn(0, *shape)).shape == (0, 7)


def test_a_vector_is_read_as_a_set_or_a_series():
    torch.manual_seed(0)
    net = nets.DeepSet((6,), features=4, view=[3, 2])
    points = torch.randn(5, 3, 2)
    torch.testing.assert_close(net(points.flip(1).flatten(1)), net(points.flatten(1)))
    assert nets.ConvEmbedding((6,), features=4, view=[1, 6])(torch.randn(5, 6)).shape == (5, 4)


def test_a_module_without_out_shape_is_tried_and_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 4))
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    flow = library.Flow((2,), b.ActNorm, context_shape=(3, 4), embedding=net)
    assert flow.bijection.context_shape == (4,)
    assert [module.training for module in net] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(net.state_dict()), dict(before))


def test_a_lazy_module_is_sized_by_the_context():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))
    flow = flows.maf((2,), hidden=8, context_shape=(5,), embedding=net)
    assert flow.log_prob(torch.zeros(3, 2), torch.zeros(3, 5)).shape == (3,)


@pytest.mark.parametrize(
    ("context_shape", "embedding", "message"),
    [
        (None, nets.MLPEmbedding, "no context to embed"),
        ((3, 4), nets.MLPEmbedding, "mlp takes a context vector, not"),
        ((3,), nets.ConvEmbedding, "conv takes contexts of shape .* not a vector; view="),
        ((3,), nets.DeepSet, "deep_set takes contexts of shape .* not a vector; view="),
        ((3, 4, 4), nets.DeepSet, r"deep_set takes .* not \[3, 4, 4\]$"),
        ((6,), partial(nets.DeepSet, view=[4, 2]), r"view=\[4, 2\]: must be .* of 6 numbers"),
        ((6,), partial(nets.DeepSet, view=6), r"view=\[6\]: must be"),
        ((3,), partial(nets.MLPEmbedding, hidden=0), "hidden=0 must be at least 1"),
        ((3,), nn.Linear(4, 2), "Linear does not take a context of shape"),
        ((3,), nn.Flatten(0), "not a row"),
        ((3,), lambda context_shape: 7, "the factory returned int"),
    ],
)
def test_unsuited_embeddings_are_refused_in_one_line(context_shape, embedding, message):
    with pytest.raises(ValueError, match=message) as caught:
        flows.maf((2,), context_shape=context_shape, embedding=embedding)
    assert "\n" not in str(caught.value)


def test_a_missing_context_is_named():
    with pytest.raises(ValueError, match="needs a context"):
        points_flow().sample(3)
    with pytest.raises(ValueError, match=r"context has events of shape \[5, 2\]; this flow takes \[6, 2\]"):
        points_flow().sample(3, context=torch.zeros(5, 2))


def test_the_audit_embeds_contexts():
    flow = points_flow()
    x, c = torch.randn(6, 2), torch.randn(6, 6, 2)
    moved(flow, x, c)
    found = list(audit(flow, x, c))
    assert all(check.passed for check in found), [check for check in found if not check.passed]


def test_exported_programs_embed_contexts():
    flow = points_flow(base=library.distributions.ConditionalNormal)
    x, c = torch.randn(6, 2), torch.randn(6, 6, 2)
    moved(flow, x, c).eval()
    z = flow.encode(x, c)
    torch.testing.assert_close(Program(flow, "log_prob")(x, c), flow.log_prob(x, c))
    torch.testing.assert_close(Program(flow, "encode")(x, c), z)
    noise = torch.randn(6, 2)
    latents = flow.base.from_noise([noise], 1.0, flow.embed(c))
    torch.testing.assert_close(Program(flow, "sample")(noise, c), flow.decode(latents, c))
    assert Program(flow, "sample").inputs["context"].shape == (6, 2)


def test_it_is_copied_pickled_and_saved(tmp_path):
    flow = moved(points_flow(), torch.randn(6, 2), torch.randn(6, 6, 2)).eval()
    x, c = torch.randn(6, 2), torch.randn(6, 6, 2)
    torch.save(flow, tmp_path / "flow.pt")
    other = points_flow().eval()
    other.load_state_dict(flow.state_dict())
    for same in (copy.deepcopy(flow), torch.load(tmp_path / "flow.pt", weights_only=False), other):
        torch.testing.assert_close(same.log_prob(x, c), flow.log_prob(x, c), rtol=0, atol=0)


def test_autocast_gives_the_layers_float32():
    flow = points_flow()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow.embed(torch.randn(3, 6, 2)).dtype == torch.float32
    assert flow.double().log_prob(torch.randn(3, 2), torch.randn(3, 6, 2)).dtype == torch.float64


# ---- from a configuration


def test_class_labels_with_an_embedding():
    spec = DataSpec("digits", (1, 8, 8), 17, LabelContext(10))
    flow = flow_of("model=glow", "dataset=digits", "embedding=mlp", "smoke=true", spec=spec)
    assert flow.context_shape == (10,) and flow.bijection.context_shape == (32,)
    x, c = torch.randint(0, 17, (4, 1, 8, 8)), torch.eye(10)[[1, 2, 3, 4]]
    assert flow.log_prob(x, c).shape == (4,)


def test_angles_and_a_model_of_ones_own_layers():
    columns = (Column("x", "real"), Column("phi", "angle"), Column("y", "real"))
    spec = DataSpec("table", (3,), None, ColumnContext(("c",), (1,)), columns)
    flow = flow_of("model=maf", "dataset=moons", "preprocess=none", "+angles=circular", "embedding=mlp", spec=spec)
    assert flow.log_prob(torch.zeros(4, 3), torch.zeros(4, 1)).shape == (4,)
    assert flow.bijection.context_shape == (32,)
    plain = DataSpec("moons", (2,), None, ColumnContext(("c",), (1,)))
    assert flow_of("model=custom", "dataset=moons", "embedding=mlp", spec=plain).bijection.context_shape == (32,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embedding=mlp"], "embedding: there is no context to embed; set dataset.context"),
        (["embedding=mpl"], "did you mean 'mlp'"),
    ],
)
def test_the_command_line_refuses(words, message, tmp_path):
    with pytest.raises((UsageError, WorkerError), match=message):
        flowtrain(tmp_path, "train", "model=maf", "dataset=moons", *words)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with a table of a number that is the mean of six others, with noise."""
    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    c = random.normal(size=(600, 6))
    frame = pd.DataFrame(c, columns=[f"c{i}" for i in range(6)])
    frame["a"] = c.mean(1) + 0.1 * random.normal(size=len(c))
    frame["b"] = random.normal(size=len(c))
    frame.to_csv(folder / "t.csv", index=False)
    return folder


TABLE = (
    "dataset=table",
    "dataset.path=t.csv",
    "dataset.columns=[a,b]",
    "dataset.context=[c0,c1,c2,c3,c4,c5]",
    "model=realnvp_vector",
    "model.hidden=8",
    "report=false",
)


def test_a_run_with_context_columns(table):
    """Train, resume, sample and score; a set sees no order of its points."""
    words = (*TABLE, "embedding=deep_set", "embedding.view=[3,2]", "embedding.hidden=8", "trainer.ema=0.5")
    assert flowtrain(table, "train", *words, "max_steps=4", "hydra.run.dir=run") == 0
    assert flowtrain(table, "train", "resume=run", "max_steps=6") == 0
    assert flowtrain(table, "sample", "ckpt=run", "context=t.csv", "n=2", "hydra.run.dir=samples") == 0
    assert len(pd.read_csv(table / "samples/samples.csv")) == 1200
    assert flowtrain(table, "score", "ckpt=run", "input=t.csv", "hydra.run.dir=scores") == 0

    flow = library.load(table / "run")
    assert any(name.startswith("embedding.") for name in flow.state_dict())
    frame = pd.read_csv(table / "t.csv")
    c = torch.tensor(frame[[f"c{i}" for i in range(6)]].to_numpy(), dtype=torch.float32)
    x = torch.zeros(len(c), 2)
    torch.testing.assert_close(flow.log_prob(x, c.view(-1, 3, 2).flip(1).flatten(1)), flow.log_prob(x, c))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embedding=conv"], "^embedding: conv takes contexts of shape"),
        (["embedding=deep_set", "embedding.view=[4,2]"], r"^embedding: view=\[4, 2\]: must be"),
        (["embedding=mlp", "embedding.hidden=0"], "^embedding: hidden=0"),
    ],
)
def test_what_is_refused_of_a_table(words, message):
    spec = DataSpec("moons", (2,), None, ColumnContext(("c",), (6,)))
    with pytest.raises(UsageError, match=message) as caught:
        flow_of("model=maf", "dataset=moons", *words, spec=spec)
    assert "\n" not in str(caught.value)
