"""Training passes as one CUDA graph: when there is one, and that it changes nothing. The graphs are fakes."""

import json
import logging

import cuda_graphs
import pytest
import torch
from composed import configuration
from inprocess import flowtrain

from flowtrain.bijections import Autoregressive
from flowtrain.config.build import build_dataset, build_flow, build_objective
from flowtrain.config.compose import train_config
from flowtrain.data.batch import Batch
from flowtrain.engine.audit import perturb
from flowtrain.engine.divergence import examine
from flowtrain.engine.graphed_pass import GraphedPass
from flowtrain.engine.peak import peak_bytes
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint, native
from flowtrain.runtime import cuda_graph as runtime_graph
from flowtrain.training import cuda_graph

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="commands would compute on the GPU")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GLOW, MAF = ("model=glow", "dataset=digits"), ("model=maf", "dataset=moons", "norm=batchnorm")
FLOWS = [
    GLOW,
    MAF,
    ("model=realnvp", "dataset=digits", "norm=batchnorm"),
    ("model=nsf_coupling", "dataset=moons"),
    ("model=autoregressive", "dataset=digits"),
]


def flow_and_batches(words, count=5):
    """Two equal flows, their objective and some batches."""
    config = configuration(*words, "smoke=true")
    data = build_dataset(config)
    flows = []
    for _ in range(2):
        torch.manual_seed(0)
        flows.append(build_flow(config, data.spec, "cpu").train())
    train = data.split("train")
    rows = [train.take(torch.arange(8 * i, 8 * i + 8)) for i in range(count)]
    flows[0].initialize(*rows[0])
    flows[1].load_state_dict(flows[0].state_dict())
    weights = torch.linspace(0.5, 1.5, 8)
    return flows, build_objective(config, data.spec), [Batch(*each, weights * (1 + i)) for i, each in enumerate(rows)]


def take_steps(training_pass, batches, start=0):
    """Losses, gradients and buffers of some steps with plain gradient descent."""
    found, parameters = [], [*training_pass.flow.parameters()]
    for step, batch in enumerate(batches, start):
        for one in parameters:
            one.grad = None
        loss, reasons = training_pass.backpropagate(batch, step, 0, 1)
        assert reasons == []
        figures = [loss, *(one.grad for one in parameters), *training_pass.flow.buffers()]
        found.append([one if one is None else one.clone() for one in figures])
        with torch.no_grad():
            for one in parameters:
                if one.grad is not None:
                    one -= 1e-3 * one.grad
                    one.grad.mul_(0.1)  # as clipping does
    return found


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        for mine, true in zip(one, other, strict=True):
            assert (mine is None and true is None) or torch.equal(mine, true)


def graphed(flow, objective, required=True, autocast=None):
    return GraphedPass(flow, objective, 3, autocast, required=required)


@pytest.mark.parametrize("words", FLOWS, ids=" ".join)
def test_a_graph_computes_the_same_losses_gradients_and_moments(words, monkeypatch):
    """The fake draws new noise in each replay: it is that of the step only because the generator is seeded before."""
    graphs = cuda_graphs.install(monkeypatch)
    (plain, one), objective, batches = flow_and_batches(words)
    expected = take_steps(TrainingPass(plain, objective, 3), batches)
    training_pass = graphed(one, objective)
    assert_same(take_steps(training_pass, batches), expected)
    assert training_pass.is_graph and len(graphs) == 1 and graphs[0].replays == len(batches) - 1


def test_bfloat16_networks_are_recorded_with_their_autocast(monkeypatch):
    graphs = cuda_graphs.install(monkeypatch)
    (plain, one), objective, batches = flow_and_batches(GLOW, 3)
    expected = take_steps(TrainingPass(plain, objective, 3, autocast=torch.bfloat16), batches)
    assert_same(take_steps(graphed(one, objective, autocast=torch.bfloat16), batches), expected)
    assert graphs[0].replays == 2


def test_a_pass_that_begins_elsewhere_continues_alike(monkeypatch):
    """A resumed run records its graph at another step, and its weights are the same to the bit."""
    cuda_graphs.install(monkeypatch)
    (whole, parts), objective, batches = flow_and_batches(MAF)
    expected = take_steps(graphed(whole, objective), batches)
    found = take_steps(graphed(parts, objective), batches[:2])
    assert_same(found + take_steps(graphed(parts, objective), batches[2:], start=2), expected)


def test_other_batches_and_work_layer_by_layer_go_without(monkeypatch):
    graphs = cuda_graphs.install(monkeypatch)
    (plain, one), objective, batches = flow_and_batches(GLOW)
    batches[3] = batches[3].chunk(2)[0]
    training_pass, other = graphed(one, objective), TrainingPass(plain, objective, 3)
    assert_same(take_steps(training_pass, batches), take_steps(other, batches))
    assert graphs[0].replays == 3
    seen = []
    for name, layer in one.bijection.named_children():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert examine(one, lambda: training_pass.backpropagate(batches[0], 0, 0, 1)[0]) is None
    assert seen and graphs[0].replays == 3


def test_a_batch_that_is_not_finite_is_not_recorded(monkeypatch):
    graphs = cuda_graphs.install(monkeypatch)
    (plain, one), objective, batches = flow_and_batches(("model=nsf_coupling", "dataset=moons"))
    batches[1] = batches[1]._replace(x=torch.full_like(batches[1].x, torch.nan))
    training_pass = graphed(one, objective)
    for step, batch in enumerate(batches):
        loss, _ = training_pass.backpropagate(batch, step, 0, 1)
        expected, _ = TrainingPass(plain, objective, 3).backpropagate(batch, step, 0, 1)
        assert torch.equal(loss, expected) or step == 1 and loss.isnan()
        for each in (one, plain):
            each.zero_grad()
    assert len(graphs) == 1 and graphs[0].replays == 3


def wrong_graph(monkeypatch, objective):
    monkeypatch.setattr(cuda_graphs.Graph, "adds", 1e-2)


def read_of_the_host(monkeypatch, objective):
    inner = objective.loss
    monkeypatch.setattr(objective, "loss", lambda *args: inner(*args) * max(1.0, inner(*args).isnan().sum().item()))


def a_fixed_seed(monkeypatch, objective):
    inner = objective.loss

    def loss(*args):
        torch.manual_seed(0)
        return inner(*args)

    monkeypatch.setattr(objective, "loss", loss)


def a_number_of_the_batch(monkeypatch, objective):
    """The mean of the batch, known on the host while it is recorded."""
    inner = objective.loss
    monkeypatch.setattr(objective, "loss", lambda flow, batch: inner(flow, batch) * sum(batch[0].numpy()[0].tolist()))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (wrong_graph, "differs by"),
        (read_of_the_host, "CUDA error: operation not permitted when stream is capturing"),
        (a_fixed_seed, "a generator is seeded while a stream is capturing"),
        (a_number_of_the_batch, "differs by"),
    ],
)
def test_what_cannot_be_a_graph_trains_without_and_alike(spoil, says, monkeypatch, caplog):
    graphs = cuda_graphs.install(monkeypatch)
    (plain, one), objective, batches = flow_and_batches(("model=maf", "dataset=moons", "norm=batchnorm"))
    spoil(monkeypatch, objective)
    expected = take_steps(TrainingPass(plain, objective, 3), batches)
    training_pass = graphed(one, objective, required=False)
    with caplog.at_level(logging.WARNING, "flowtrain"):
        assert_same(take_steps(training_pass, batches), expected)
    (line,) = caplog.messages
    assert says in line and "\n" not in line and line.startswith("cuda_graph=auto: trains without")
    assert not training_pass.is_graph and len(graphs) == 1
    with pytest.raises(
        FlowtrainError, match=r"^trainer\.cuda_graph=true: does not work here \(.*\); use false$"
    ) as error:
        take_steps(graphed(one, objective), batches)
    assert says in str(error.value)


def test_a_graph_leaves_memory_for_validations(monkeypatch, caplog):
    cuda_graphs.install(monkeypatch, free=2**20)
    (_, one), objective, batches = flow_and_batches(MAF, 3)
    training_pass = graphed(one, objective, required=False)
    take_steps(training_pass, batches)
    assert not training_pass.is_graph and "0.0 GiB would be left for validations" in caplog.text


def test_too_little_memory_is_said_as_ever(monkeypatch):
    cuda_graphs.install(monkeypatch)
    (_, one), objective, batches = flow_and_batches(MAF, 2)
    monkeypatch.setattr(cuda_graphs.Graph, "replay", raises(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        take_steps(graphed(one, objective), batches)


def raises(error):
    def replay(self):
        raise error

    return replay


# ---- the key


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("model=maf dataset=moons", None),
        ("model=glow dataset=digits precision=bfloat16 compile=true", None),
        ("model=maf dataset=moons trainer.accumulate=2", "it needs trainer.accumulate=1"),
        ("model=glow dataset=digits memory=checkpoint", "it needs memory=none"),
        ("model=ffjord dataset=moons", "a solver of ODEs reads values on the host"),
        ("model=residual dataset=moons", "the number of terms of a log-determinant is drawn on the host"),
        ("model=iaf dataset=moons", "this flow trains through one element after another"),
    ],
)
def test_a_gpu_tries_a_graph_where_nothing_is_in_the_way(words, why, monkeypatch):
    config = train_config(*words.split(), "smoke=true")
    flow, gpu = build_flow(config, build_dataset(config).spec, "meta"), torch.device("cuda")
    assert cuda_graph.obstacle(config, flow, gpu) == why
    assert cuda_graph.obstacle(config, flow, torch.device("cpu")) == "it needs a GPU"
    monkeypatch.setattr(cuda_graph, "autocast_dtype", lambda precision, device: None)
    chosen = cuda_graph.training_pass_of(config, flow, None, gpu)
    assert isinstance(chosen, GraphedPass) is (why is None) and chosen.parts == config.trainer.accumulate
    monkeypatch.setattr(cuda_graph.distributed, "world", lambda: 2)
    assert cuda_graph.obstacle(config, flow, gpu) == "it needs a single device"


def test_before_torch_2_13_only_true_tries(monkeypatch):
    monkeypatch.setattr(cuda_graph, "SURVIVES_FAILURE", False)
    config = train_config("model=maf", "dataset=moons")
    flow, gpu = build_flow(config, build_dataset(config).spec, "meta"), torch.device("cuda")
    assert "torch 2.13" in cuda_graph.obstacle(config, flow, gpu)
    config = train_config("model=maf", "dataset=moons", "trainer.cuda_graph=true")
    assert cuda_graph.obstacle(config, flow, gpu) is None


@no_gpu
def test_a_cpu_refuses_it_in_one_line_and_auto_trains_without(tmp_path):
    words = ("train", "model=maf", "dataset=moons", "smoke=true", "report=false")
    assert flowtrain(tmp_path, *words, "hydra.run.dir=run") == 0
    for name in ("summary.json", "environment.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["cuda_graph"] is False
    with pytest.raises(FlowtrainError, match=r"^trainer\.cuda_graph=true: it needs a GPU; use auto or false$") as error:
        flowtrain(tmp_path, *words, "trainer.cuda_graph=true")
    assert error.value.exit_code == 2


@no_gpu
@pytest.mark.slow
def test_a_run_with_a_graph_is_the_run_without(tmp_path, monkeypatch):
    """Averaging, clipping, validation, samples, statistics of layers, and a run that is resumed; to the bit."""
    words = ["train", "model=maf", "dataset=moons", "norm=batchnorm", "model.steps=2", "batch_size=16"]
    words += ["trainer.val_every=3", "trainer.val_examples=16", "trainer.layer_statistics=true", "trainer.log_every=2"]
    words += ["trainer.sample_every=null", "scheduler=constant", "deterministic=true", "report=false", "logger=none"]
    monkeypatch.setattr(native, "in_memory", lambda *tensors: False)  # by torch's operations, as on a GPU
    assert flowtrain(tmp_path, *words, "max_steps=8", "hydra.run.dir=plain") == 0
    graphs = cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, "obstacle", lambda *_: None)
    assert flowtrain(tmp_path, *words, "max_steps=4", "hydra.run.dir=parts") == 0
    assert flowtrain(tmp_path, "train", "resume=parts", "max_steps=8", "deterministic=true") == 0
    assert [graph.replays for graph in graphs] == [3, 3]
    found, expected = (checkpoint.read(tmp_path / name / "checkpoints/last.pt") for name in ("parts", "plain"))
    for key in ("model", "ema"):
        assert all(torch.equal(found[key][one], value) for one, value in expected[key].items())
    assert figures(tmp_path / "parts")[-1] == figures(tmp_path / "plain")[-1]
    assert json.loads((tmp_path / "parts/summary.json").read_text())["cuda_graph"] is True


def figures(run):
    """What a run logged, but for times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("system/")} for line in lines]


# ---- samplers


@pytest.fixture
def sampler(monkeypatch):
    """A function that builds the flow of some words, with random weights, for which tensors are on a GPU, and the list
    of graphs to come."""
    graphs = cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)

    def build(*words):
        (flow, _), _, batches = flow_and_batches(words, 1)
        perturb(flow, *batches[0][:2])
        return flow.eval(), graphs

    return build


def latents(flow, seed, rows=6):
    return flow.latents(rows, generator=torch.Generator().manual_seed(seed))


def without_graphs(flow, z):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_graph, "SURVIVES_FAILURE", False)
        return flow.decode(z)


@pytest.mark.parametrize(
    "words",
    ["model=maf dataset=moons", "model=nsf_autoregressive dataset=moons", "model=autoregressive dataset=digits"],
)
def test_an_inverse_that_comes_again_is_one_launch_a_layer(sampler, words):
    flow, graphs = sampler(*words.split())
    layers = [layer for layer in flow.modules() if isinstance(layer, Autoregressive)]
    for seed in range(4):
        z = latents(flow, seed)
        assert torch.equal(flow.decode(z), without_graphs(flow, z))
    assert [graph.replays for graph in graphs] == [3] * len(layers)  # the first of them beside a pass without
    with torch.no_grad():
        for one in flow.parameters():
            one.mul_(1.1)
    z = latents(flow, 4)
    assert torch.equal(flow.decode(z), without_graphs(flow, z)) and graphs[-1].replays == 4


def test_a_graph_is_of_one_form(sampler):
    flow, graphs = sampler("model=maf", "dataset=moons")
    layers = sum(isinstance(layer, Autoregressive) for layer in flow.modules())
    for rows, expected in [(6, 0), (6, 1), (4, 1), (4, 2), (6, 2), (6, 3)]:
        z = latents(flow, rows, rows)
        assert torch.equal(flow.decode(z), without_graphs(flow, z))
        assert len(graphs) == layers * expected
    flow.double()
    z = latents(flow, 0)
    for expected in (3, 4):
        assert torch.equal(flow.decode(z), without_graphs(flow, z)) and len(graphs) == layers * expected
    for buffer in flow.buffers():
        buffer.add_(0)  # as loading weights does, which may change what is computed
    assert torch.equal(flow.decode(z), without_graphs(flow, z)) and graphs[-1].replays == 1


def test_gradients_training_and_a_count_of_bytes_go_without(sampler):
    flow, graphs = sampler("model=maf", "dataset=moons")
    z = latents(flow, 0)
    for _ in range(3):
        flow.bijection.inverse(z)  # with gradients
        assert peak_bytes(lambda: flow.decode(z)) > 0
        torch.set_autocast_enabled("cuda", True)
        flow.decode(z)
        torch.set_autocast_enabled("cuda", False)
        flow.train()
        flow.decode(z)
        flow.eval()
    assert graphs == []


def test_an_inverse_whose_graph_is_wrong_runs_without(sampler, monkeypatch, caplog):
    flow, graphs = sampler("model=maf", "dataset=moons")
    monkeypatch.setattr(cuda_graphs.Graph, "adds", 1e-2)
    with caplog.at_level(logging.INFO, "flowtrain"):
        for seed in range(4):
            z = latents(flow, seed)
            assert torch.equal(flow.decode(z), without_graphs(flow, z))
    layers = sum(isinstance(layer, Autoregressive) for layer in flow.modules())
    assert len(graphs) == len(caplog.messages) == layers
    assert all("an inverse runs without a CUDA graph: its result differs by" in line for line in caplog.messages)


# ---- real ones


@gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("words", FLOWS, ids=" ".join)
def test_on_a_gpu_a_graph_computes_the_same(words, autocast):
    (plain, one), objective, batches = flow_and_batches(words)
    batches = [batch.to("cuda") for batch in batches]
    expected = take_steps(TrainingPass(plain.cuda(), objective, 3, autocast=autocast), batches)
    training_pass = graphed(one.cuda(), objective, autocast=autocast)
    for mine, true in zip(take_steps(training_pass, batches), expected, strict=True):
        assert runtime_graph.difference(true, mine) < (1e-3 if autocast is None else 1e-2)
    assert training_pass.is_graph


@gpu
@pytest.mark.parametrize("words", ["model=maf dataset=moons", "model=nsf_autoregressive dataset=moons"])
def test_on_a_gpu_an_inverse_is_one_launch_a_layer(words):
    (flow, _), _, _ = flow_and_batches(words.split(), 1)
    flow.cuda().eval()
    for seed in range(4):
        z = latents(flow, seed)
        assert torch.allclose(flow.decode(z), without_graphs(flow, z), atol=1e-5)
    layers = [layer for layer in flow.modules() if isinstance(layer, Autoregressive)]
    assert layers and all(runtime_graph._known[layer].graph is not None for layer in layers)
