"""Training in less memory: the same gradients, fewer bytes, one line where it cannot be."""

import copy
import json
from functools import partial

import pytest
import torch
from composed import flow_of
from inprocess import flowtrain
from ranks import together
from torch import nn

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections import memory
from flowtrain.bijections.memory import Checkpoint, Memory, Reversible
from flowtrain.engine.compiling import compile_flow
from flowtrain.engine.peak import peak_bytes
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed, globalbatch

DIGITS, PLANE = "dataset=digits", "dataset=moons"
FLOWS = {
    "glow": ("model=glow", DIGITS, "model.steps=3", "model.hidden=16"),
    "glow_class": ("model=glow", DIGITS, "dataset.context=label", "model.steps=2", "model.hidden=16"),
    "glow_spline": ("model=glow", "univariate=rational_quadratic", "mixing=permuted_lu", DIGITS, "model.steps=2"),
    "glow_logit": ("model=glow", "preprocess=logit", "univariate=mixture_logistic", DIGITS, "model.steps=2"),
    "realnvp": ("model=realnvp", "norm=actnorm", "model.net.norm=null", DIGITS, "model.hidden=8", "model.dropout=0.2"),
    "realnvp_vector": ("model=realnvp_vector", "norm=actnorm", PLANE),
    "nsf_coupling": ("model=nsf_coupling", PLANE, "model.dropout=0.3"),
    "nice": ("model=nice", DIGITS, "model.hidden=32"),
    "maf": ("model=maf", "norm=actnorm", PLANE),
    "iaf": ("model=iaf", "norm=actnorm", PLANE),
    "autoregressive": ("model=autoregressive", DIGITS),
    "hybrid": ("model=hybrid", PLANE, "model.pairs=2"),
    "hybrid_image": ("model=hybrid_image", DIGITS, "model.steps=2", "model.hidden=16"),
    "ffjord": ("model=ffjord", PLANE),
}
STEEP = {"glow_spline": 1e-3, "glow_logit": 1e-3}  # random splines and mixtures magnify a rounding a thousandfold
ROWS = 6


def built(name, dtype=torch.float32):
    """A flow with weights that are not those of its start, and a batch for it."""
    flow = flow_of(*FLOWS[name])
    torch.manual_seed(1)
    shape = flow.shape
    x = torch.randint(0, 17, (ROWS, *shape)) if len(shape) == 3 else torch.randn(ROWS, *shape, dtype=dtype)
    context = flow.bijection.context_shape and torch.eye(*flow.bijection.context_shape, dtype=dtype)[:ROWS]
    flow.to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.initialize(x, context)
    return flow, x, context


def gradients(flow, x, context=None, autocast=None):
    """Of a training step's loss on the second part of a global batch."""
    flow.train().zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with globalbatch.rows(3, 3 + len(x)), torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = flow(x, context).mean()
    loss.backward()
    missing = [name for name, parameter in flow.named_parameters() if parameter.grad is None]
    assert not missing
    return loss.detach(), [parameter.grad for parameter in flow.parameters()]


def worst(found, right):
    """The greatest relative error of any tensor; of one whose gradient is nothing but rounding, to all of them."""
    floor = 1e-3 * torch.stack([one.norm() for one in right]).norm() / len(right)
    return max(((one - other).norm() / torch.maximum(other.norm(), floor)).item() for one, other in zip(found, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_those_of_keeping_all(name, dtype):
    flow, x, context = built(name, dtype)
    loss, right = gradients(flow, x, context)
    flow.keep(Checkpoint())
    again, exact = gradients(flow, x, context)
    assert torch.equal(again, loss) and all(map(torch.equal, exact, right))
    flow.keep(Reversible(spacing=2))
    again, found = gradients(flow, x, context)
    torch.testing.assert_close(again, loss)
    assert worst(found, right) <= (1e-12 if dtype == torch.float64 else STEEP.get(name, 1e-5))
    flow.keep(Memory())
    assert all(map(torch.equal, gradients(flow, x, context)[1], right))


def steps(count, hidden=32, shape=(4, 8, 8), net=nets.ConvNet):
    """Glow's steps at one level."""
    torch.manual_seed(0)
    coupling = partial(b.Coupling, univariate=b.SigmoidAffine, net=partial(net, hidden=hidden))
    step = {"actnorm": b.ActNorm, "mixing": b.LULinear, "coupling": coupling}
    flow = Flow(shape, partial(b.Chain, layers=step, repeat=count))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow


def bytes_of(count, kept, batch=16, **kwargs):
    flow = steps(count, **kwargs)
    flow.keep(kept)
    x = torch.randn(batch, *flow.shape)
    return peak_bytes(lambda: gradients(flow, x))


def test_memory_hardly_grows_with_depth():
    """Bytes of tensors, so the same on every machine."""
    shallow, deep = ({kind: bytes_of(count, kind()) for kind in (Memory, Checkpoint, Reversible)} for count in (4, 32))
    growth = {kind: deep[kind] / shallow[kind] for kind in deep}
    assert growth[Memory] > 6
    assert growth[Checkpoint] < 2
    assert growth[Reversible] < 1.5
    assert deep[Reversible] < deep[Checkpoint] < deep[Memory] / 6


@pytest.mark.long
def test_thirty_two_steps_of_glow():
    """Of 12 channels of 16×16, for 64 examples."""
    size = {"hidden": 128, "shape": (12, 16, 16), "batch": 64}
    assert bytes_of(32, Reversible(), **size) <= 1.3 * bytes_of(4, Reversible(), **size)
    flow, x = steps(32, 128, (12, 16, 16)), torch.randn(64, 12, 16, 16)
    flow.initialize(x)
    _, right = gradients(flow, x)
    flow.keep(Reversible())
    assert worst(gradients(flow, x)[1], right) <= 1e-5


def test_nothing_is_held_once_the_gradient_is_there():
    flow, x = steps(8), torch.randn(16, 4, 8, 8)
    flow.keep(Reversible())
    loss = flow(x).mean()
    part = next(node for node in _nodes(loss.grad_fn) if "_Reversed" in node.name())
    loss.backward()
    with pytest.raises(RuntimeError, match="freed"):
        assert part.saved_tensors


def _nodes(node):
    """A node of an autograd graph and what it depends on."""
    if node is not None:
        yield node
        for following, _ in node.next_functions:
            yield from _nodes(following)


def test_a_coupling_needs_one_evaluation_of_its_network_for_its_inverse_and_gradient():
    flow, x = steps(6), torch.randn(4, 4, 8, 8)
    counts = []
    for step in flow.bijection:
        step.coupling.net.register_forward_pre_hook(lambda *_: counts.append(1))
    for kept in (Checkpoint(), Reversible()):
        flow.keep(kept)
        counts.clear()
        gradients(flow, x)
        assert len(counts) == 2 * 6


@pytest.mark.parametrize("kept", [Checkpoint, Reversible])
def test_a_step_reads_nothing_from_the_device(kept):
    flow, x = steps(6), torch.randn(4, 4, 8, 8)
    flow.keep(kept())
    flow.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flow(x).mean().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution_backward" in names
    assert not names & {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}


def test_evaluation_is_untouched():
    flow, x, context = built("glow")
    flow.eval()
    values = []
    for kept in (Memory(), Checkpoint(), Reversible()):
        flow.keep(kept)
        torch.manual_seed(0)
        with torch.no_grad():
            values.append(flow(x, context))
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert flow.statistics() == {}


def test_names_and_copies_stay():
    flow, x, context = built("glow")
    names = list(flow.state_dict())
    _, right = gradients(flow, x, context)
    flow.keep(Reversible())
    assert list(flow.state_dict()) == names
    twin = copy.deepcopy(flow)
    memories = [chain.memory for chain in twin.modules() if isinstance(chain, b.Chain)]
    given = [one for one in memories if isinstance(one, Reversible)]
    assert given and all(one is twin.memory is not flow.memory for one in given)
    assert worst(gradients(twin, x, context)[1], right) <= 1e-5


# ---- with what training does beside --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [Checkpoint, Reversible])
def test_under_autocast(kept):
    flow, x, context = built("glow")
    _, full = gradients(flow, x, context)
    _, right = gradients(flow, x, context, torch.bfloat16)
    assert worst(right, full) > 1e-3  # the networks do run in bfloat16
    flow.keep(kept())
    assert worst(gradients(flow, x, context, torch.bfloat16)[1], right) <= 1e-5


def test_moments_of_a_batch_are_remembered_once():
    torch.manual_seed(0)
    net = partial(nets.ConvNet, hidden=8, norm=nets.BatchNorm)
    layers = {"norm": b.BatchNorm, "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=net)}
    flow = Flow((4, 4, 4), partial(b.Chain, layers=layers, repeat=3))
    twin = copy.deepcopy(flow)
    twin.keep(Checkpoint())
    x = torch.randn(8, 4, 4, 4)
    for one in (flow, twin):
        gradients(one, x)
    assert all(map(torch.equal, flow.buffers(), twin.buffers()))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(flow.parameters(), twin.parameters()))


def test_shared_weights_frozen_weights_and_a_context_that_learns():
    torch.manual_seed(0)
    net = partial(nets.MLP, hidden=8)
    step = {"mixing": b.LULinear, "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=net)}
    flow = Flow((4,), partial(b.Chain, layers=step, repeat=4), context_shape=(3,))
    for step in flow.bijection:
        nn.init.normal_(step.coupling.net.last.weight)
    chain = list(flow.bijection)
    chain[3].coupling.net.first = chain[0].coupling.net.first
    chain[1].mixing.requires_grad_(False)
    x, embedding = torch.randn(5, 4), torch.randn(5, 3, requires_grad=True)
    results = []
    for kept in (Memory(), Checkpoint(), Reversible(spacing=2)):
        flow.keep(kept)
        embedding.grad = None
        flow.zero_grad(set_to_none=True)
        flow(x, embedding).mean().backward()
        assert chain[1].mixing.lu.grad is None
        results.append([p.grad for p in [*flow.parameters(), embedding] if p.grad is not None])
    for found in results[1:]:
        assert worst(found, results[0]) <= 1e-5


def _gradients(_folder):
    rank, found = distributed.rank(), {}
    for kept in (Checkpoint(), Reversible()):
        flow, whole = steps(6), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        flow.initialize(whole)
        flow.keep(kept)
        wrapped = nn.parallel.DistributedDataParallel(
            flow, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
        for _ in range(2):
            flow.zero_grad(set_to_none=True)
            wrapped(whole[4 * rank : 4 * rank + 4]).mean().backward()
        found[type(kept).__name__] = [parameter.grad.clone() for parameter in flow.parameters()], flow.statistics()
    return found


def test_two_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    first, second = together(_gradients, tmp_path)
    flow, whole = steps(6), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    flow.initialize(whole)
    flow(whole).mean().backward()
    right = [parameter.grad for parameter in flow.parameters()]
    for kept in ("Checkpoint", "Reversible"):
        (gradient, error), (other, other_error) = first[kept], second[kept]
        assert all(map(torch.equal, gradient, other)) and error == other_error
        assert worst(gradient, right) <= 1e-5
    assert 0 < error["memory/reconstruction_error"] < 1e-5


@pytest.mark.long
def test_compiled_steps_are_repeated_compiled():
    flow, x = steps(4, hidden=8), torch.randn(4, 4, 8, 8)
    compiled = compile_flow(flow)
    _, right = gradients(flow, x)
    flow.keep(Checkpoint())
    compiled.settle()
    _, found = gradients(flow, x)
    assert all(map(torch.equal, found, right)) and compiled.recompiles == 0
    assert compiled.regions == 4


# ---- what can go wrong ---------------------------------------------------------------------------------------------


class Blunt(b.ActNorm):
    """Its inverse is a little off."""

    def inverse(self, z, context=None):
        x, log_det = super().inverse(z, context)
        return x * 1.001, log_det


def test_an_inverse_that_is_off_stops_training():
    flow = Flow(
        (4,),
        partial(
            b.Chain,
            layers={
                "blunt": Blunt,
                "coupling": partial(b.Coupling, univariate=b.Additive, net=partial(nets.MLP, hidden=8)),
            },
            repeat=2,
        ),
    )
    flow.keep(Reversible(bound=1e-4))
    gradients(flow, torch.randn(5, 4))
    with pytest.raises(FloatingPointError, match=r"memory=reversible.* error of 0\.00\d*, above its bound of 0\.0001"):
        flow.statistics()
    assert flow.statistics() == {}  # of no step since


def test_a_step_that_is_not_finite_is_not_the_inverses_fault():
    flow, x = steps(4), torch.randn(4, 4, 8, 8)
    flow.keep(Reversible())
    gradients(flow, x)
    x[0, 0, 0, 0] = torch.nan
    gradients(flow, x)
    assert 0 < flow.statistics()["memory/reconstruction_error"] < 1e-5


def test_lower_bits_find_the_number_they_are_of():
    torch.manual_seed(0)
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        x = torch.randn(10_000, dtype=dtype)
        bits = memory._lower_bits(x)
        assert bits.element_size() == 2
        near = x * (1 + error * torch.randn_like(x))
        assert not torch.equal(near, x)
        assert torch.equal(memory._nearest(near, bits), x)


def test_no_second_gradient():
    flow, x = steps(4), torch.randn(4, 4, 8, 8, requires_grad=True)
    flow.keep(Reversible())
    (gradient,) = torch.autograd.grad(flow(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_batch_normalization_is_not_run_backwards():
    flow = flow_of("model=realnvp", DIGITS)
    with pytest.raises(ValueError, match="memory=reversible: batch normalization .* memory=checkpoint"):
        flow.keep(Reversible())


# ---- the command ---------------------------------------------------------------------------------------------------


def losses(folder, *words):
    folder.mkdir()
    small = ["model=glow", DIGITS, "model.steps=3", "model.hidden=16", "devices=1", "max_steps=20", "hydra.run.dir=run"]
    quiet = ["trainer.tensorboard=false", "trainer.log_every=5", "trainer.accumulate=2"]
    assert flowtrain(folder, "train", *small, *quiet, *words) == 0
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [
        [line[key] for line in lines if key in line]
        for key in ("train/bits_per_dim", "val/bits_per_dim", "memory/reconstruction_error")
    ]


def test_a_run_in_less_memory_is_the_same_run(tmp_path):
    train, val, _ = losses(tmp_path / "none")
    assert losses(tmp_path / "checkpoint", "memory=checkpoint") == [train, val, []]
    near, near_val, errors = losses(tmp_path / "reversible", "memory=reversible")
    assert near == pytest.approx(train, rel=1e-5) and near_val == pytest.approx(val, rel=1e-5)
    assert len(errors) == 4 and all(0 < error < 1e-5 for error in errors)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=realnvp", "memory=reversible"], "memory=reversible: batch normalization"),
        (["memory=reversible", "compile=true"], "compile=true: .* memory=checkpoint"),
        (["memory=less"], "memory=less: must be none or checkpoint or reversible"),
    ],
)
def test_what_is_refused(words, said, tmp_path):
    with pytest.raises(FlowtrainError, match=said) as caught:
        flowtrain(tmp_path, "train", DIGITS, "devices=1", "max_steps=3", "hydra.run.dir=run", *words)
    assert caught.value.exit_code == 2


def test_a_flow_in_which_nothing_is_saved_says_so(tmp_path):
    words = ("model=made", "dataset=moons", "devices=1", "max_steps=1", "trainer.tensorboard=false")
    for mode, said in (("checkpoint", True), ("none", False)):
        assert flowtrain(tmp_path, "train", f"memory={mode}", *words, f"hydra.run.dir={mode}") == 0
        assert ("so that all is kept" in (tmp_path / mode / "train.log").read_text()) == said
