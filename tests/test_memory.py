"""Training in less memory: the same gradients, fewer bytes, one line where it cannot be."""

import copy
import json
import math
import threading
from functools import partial

import pytest
import torch
from audit import context_for, event, randomize
from inprocess import flowtrain
from layers import LAYERS, conv, mlp
from ranks import run_on_two_ranks
from torch import nn

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.bijections import backpropagation
from flowtrain.bijections.backpropagation import ActivationCheckpointing, Backpropagation, ReversibleBackpropagation
from flowtrain.bijections.bijection import sum_event
from flowtrain.engine.compiling import compile_flow
from flowtrain.engine.peak import peak_bytes
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed, fusion, global_batch, modes

SMALL = (1, 8, 8)
LOGIT = partial(flows.parts.logit, grey_levels=17)
VARIATIONAL = partial(
    LOGIT,
    dequantize=partial(
        b.VariationalDequantize,
        noise=partial(flows.parts.noise_couplings, steps=2, hidden=8),
        net=partial(nets.Features, features=4),
    ),
)
FLOWS = {
    "glow": partial(flows.glow, SMALL, steps=3, hidden=16, preprocess=LOGIT),
    "glow_class": partial(flows.glow, SMALL, steps=2, hidden=16, preprocess=LOGIT, context_shape=(10,)),
    "glow_spline": partial(
        flows.glow, SMALL, steps=2, univariate=b.RationalQuadratic, mixing=flows.parts.permuted_lu, preprocess=LOGIT
    ),
    "glow_variational": partial(flows.glow, SMALL, steps=2, hidden=16, preprocess=VARIATIONAL),
    "glow_logit": partial(flows.glow, SMALL, steps=2, univariate=b.MixtureLogistic, preprocess=LOGIT),
    "realnvp": partial(flows.realnvp, SMALL, hidden=8, dropout=0.2, net_norm=False, norm=b.ActNorm, preprocess=LOGIT),
    "realnvp_vector": partial(flows.realnvp_vector, (2,), norm=b.ActNorm),
    "nsf_coupling": partial(flows.nsf_coupling, (2,), dropout=0.3),
    "nice": partial(flows.nice, SMALL, hidden=32, preprocess=LOGIT),
    "maf": partial(flows.maf, (2,), norm=b.ActNorm),
    "iaf": partial(flows.iaf, (2,), norm=b.ActNorm),
    "autoregressive": partial(flows.autoregressive, SMALL, grey_levels=17),
    "pixelcnn": partial(flows.pixelcnn, SMALL, grey_levels=17, hidden=8, depth=1),
    "hybrid": partial(flows.hybrid, (2,), pairs=2),
    "hybrid_image": partial(flows.hybrid_image, SMALL, steps=2, hidden=16, preprocess=LOGIT),
    "ffjord": partial(flows.ffjord, (2,)),
}
STEEP = {"glow_spline": 1e-3}  # random splines magnify a rounding a thousandfold
ROWS = 6
MODES = Backpropagation, ActivationCheckpointing, ReversibleBackpropagation


def perturbed_flow(name, dtype=torch.float32):
    """A flow away from its start weights, and a batch for it."""
    torch.manual_seed(1)
    flow = FLOWS[name]()
    shape = flow.shape
    x = torch.randint(0, 17, (ROWS, *shape)) if len(shape) == 3 else torch.randn(ROWS, *shape, dtype=dtype)
    context = flow.bijection.context_shape and torch.eye(*flow.bijection.context_shape, dtype=dtype)[:ROWS]
    flow.to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.initialize(x, context)
    return flow, x, context


def gradients(flow, x, context=None, autocast=None, first=3, total=None):
    """Of a training step's loss on the rows of a global batch from ``first`` on, by default its second part."""
    flow.train().zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with global_batch.rows(first, total or first + len(x)):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = flow(x, context).mean()
    loss.backward()
    missing = [name for name, parameter in flow.named_parameters() if parameter.grad is None]
    assert not missing
    return loss.detach(), [parameter.grad for parameter in flow.parameters()]


def worst(found, right, terms=None):
    """The greatest relative error of any tensor. It is relative to the tensor's norm, or to that of the ``terms`` of
    which it is the sum; or, where that is hardly more than rounding, to the norm of all tensors."""
    floor = 1e-3 * torch.stack([one.norm() for one in right]).norm() / len(right)
    scales = [one.norm() for one in right] if terms is None else terms
    return max(
        ((one - other).norm() / torch.maximum(scale, floor)).item()
        for one, other, scale in zip(found, right, scales, strict=True)
    )


def terms_of(flow, x, context):
    """The sum over rows of the norm of each row's part of the gradient, for each tensor."""
    each = [
        gradients(flow, x[i : i + 1], context if context is None else context[i : i + 1], None, 3 + i, 3 + len(x))[1]
        for i in range(len(x))
    ]
    return [torch.stack([one.norm() for one in of_rows]).sum() / len(x) for of_rows in zip(*each)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_those_of_keeping_all(name, dtype):
    flow, x, context = perturbed_flow(name, dtype)
    loss, right = gradients(flow, x, context)
    flow.set_backpropagation(ActivationCheckpointing())
    again, exact = gradients(flow, x, context)
    assert torch.equal(again, loss) and all(map(torch.equal, exact, right))
    flow.set_backpropagation(ReversibleBackpropagation(spacing=2))
    again, found = gradients(flow, x, context)
    torch.testing.assert_close(again, loss)
    flow.set_backpropagation(Backpropagation())
    assert all(map(torch.equal, gradients(flow, x, context)[1], right))
    # A gradient is a sum over rows, which rounds relative to its terms. They can cancel: the gradient of the log-scale
    # of an actnorm that was started from this very batch is 0. So the error is measured relative to the terms. In
    # float64, 1,000 roundings are more than any number passes through, in whatever order a CPU sums.
    bound = STEEP.get(name, 1e-5) if dtype == torch.float32 else 1000 * torch.finfo(dtype).eps
    assert worst(found, right, terms_of(flow, x, context)) <= bound


class Unaware(b.Bijection):
    """A bijection that knows nothing of reversible backpropagation: it has a kink, and its inverse is a little off."""

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.log_slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, context=None):
        log_derivative = torch.where(x > 0.2, self.log_slope, -self.log_slope)
        return (x - 0.2) * log_derivative.exp() + 0.2, sum_event(log_derivative)

    def inverse(self, z, context=None):
        log_derivative = torch.where(z > 0.2, -self.log_slope, self.log_slope)
        return 1.001 * ((z - 0.2) * log_derivative.exp() + 0.2), sum_event(log_derivative)


class UnawareCoupling(b.Coupling):
    """A subclass that changes ``forward`` and nothing else."""

    def forward(self, x, context=None):
        z, log_det = super().forward(x, context)
        return 2 * z, log_det + z[0].numel() * math.log(2)


class UnawareChain(b.Chain):
    """The same."""

    def forward(self, x, context=None):
        z, log_det = super().forward(x, context)
        return 2 * z, log_det + z[0].numel() * math.log(2)


UNAWARE = {
    "unaware": partial(Unaware, (5,)),
    "unaware_coupling": partial(UnawareCoupling, (5,), b.SigmoidAffine, mlp),
    "unaware_chain": partial(UnawareChain, (5,), {"coupling": partial(b.Coupling, univariate=b.ExpAffine, net=mlp)}),
}


@pytest.mark.parametrize("name", [*LAYERS, *UNAWARE])
def test_every_layer_has_exact_gradients_in_every_mode(name):
    """Followed by two couplings, so that there is a chain to divide; its inputs lie on the knots of piecewise maps."""
    layer = {**LAYERS, **UNAWARE}[name]()

    def coupling(shape, context_shape=None):
        if len(shape) == 1:
            return b.Coupling(shape, b.ExpAffine, mlp)
        if len(shape) == 2:  # tokens
            return b.Chain(shape, {"flatten": b.Flatten, "coupling": coupling})
        return b.Coupling(shape, b.ExpAffine, conv, b.Checkerboard)

    layers = {"layer": lambda **_: layer, "one": coupling, "two": coupling}
    flow = Flow(layer.shape, partial(b.Chain, layers=layers), context_shape=layer.context_shape)
    flow = randomize(flow, scale=0.3).train()
    x = (5 * event(layer, 16)).round() / 5
    x[x == 0] = 0.4  # an inverse misses 0 by more than its lower bytes tell
    x.requires_grad_()
    context = context_for(layer, 16)
    sources = [x, *flow.parameters()] if context is None else [x, context.requires_grad_(), *flow.parameters()]

    def gradients(mode):
        flow.set_backpropagation(mode)
        torch.manual_seed(0)
        found = torch.autograd.grad(flow(x, context).sum(), sources, allow_unused=True)
        return [one for one in found if one is not None]

    right = gradients(Backpropagation())
    assert all(map(torch.equal, gradients(ActivationCheckpointing()), right))
    if global_batch.has_moments(flow):
        with pytest.raises(ValueError, match="memory=reversible: batch normalization"):
            flow.set_backpropagation(ReversibleBackpropagation())
        return
    found = gradients(ReversibleBackpropagation())
    assert worst(found, right) <= 1e-10
    divided = layer.shape != (1,)  # on one number the couplings have no networks
    assert (flow.backpropagation.error is not None) == divided  # some of it was recomputed by inverses
    flow.statistics()


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


def bytes_of(count, mode, batch=16, **kwargs):
    flow = steps(count, **kwargs)
    flow.set_backpropagation(mode)
    x = torch.randn(batch, *flow.shape)
    return peak_bytes(lambda: gradients(flow, x))


def test_memory_hardly_grows_with_depth():
    """Bytes of tensors, so the same on every machine."""
    shallow, deep = ({mode: bytes_of(count, mode()) for mode in MODES} for count in (4, 32))
    growth = {mode: deep[mode] / shallow[mode] for mode in deep}
    assert growth[Backpropagation] > 6
    assert growth[ActivationCheckpointing] < 2
    assert growth[ReversibleBackpropagation] < 1.5
    assert deep[ReversibleBackpropagation] < deep[ActivationCheckpointing] < deep[Backpropagation] / 6


@pytest.mark.long
def test_thirty_two_steps_of_glow():
    """Of 12 channels of 16×16, for 64 examples."""
    size = {"hidden": 128, "shape": (12, 16, 16), "batch": 64}
    assert bytes_of(32, ReversibleBackpropagation(), **size) <= 1.3 * bytes_of(4, ReversibleBackpropagation(), **size)
    flow, x = steps(32, 128, (12, 16, 16)), torch.randn(64, 12, 16, 16)
    flow.initialize(x)
    _, right = gradients(flow, x)
    flow.set_backpropagation(ReversibleBackpropagation())
    assert worst(gradients(flow, x)[1], right) <= 1e-5


def test_nothing_is_held_once_the_gradient_is_there():
    flow, x = steps(8), torch.randn(16, 4, 8, 8)
    flow.set_backpropagation(ReversibleBackpropagation())
    loss = flow(x).mean()
    part = next(node for node in _nodes(loss.grad_fn) if "_InvertedSegment" in node.name())
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
    for mode in (ActivationCheckpointing(), ReversibleBackpropagation()):
        flow.set_backpropagation(mode)
        counts.clear()
        gradients(flow, x)
        assert len(counts) == 2 * 6


@pytest.mark.parametrize("mode", [ActivationCheckpointing, ReversibleBackpropagation])
def test_a_step_reads_nothing_from_the_device(mode):
    flow, x = steps(6), torch.randn(4, 4, 8, 8)
    flow.set_backpropagation(mode())
    flow.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flow(x).mean().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution_backward" in names
    assert not names & {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}


def test_evaluation_is_untouched():
    flow, x, context = perturbed_flow("glow")
    flow.eval()
    values = []
    for mode in (Backpropagation(), ActivationCheckpointing(), ReversibleBackpropagation()):
        flow.set_backpropagation(mode)
        torch.manual_seed(0)
        with torch.no_grad():
            values.append(flow(x, context))
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert flow.statistics() == {}


def test_names_and_copies_stay():
    flow, x, context = perturbed_flow("glow")
    names = list(flow.state_dict())
    _, right = gradients(flow, x, context)
    flow.set_backpropagation(ReversibleBackpropagation())
    assert list(flow.state_dict()) == names
    twin = copy.deepcopy(flow)
    found = [chain.backpropagation for chain in twin.modules() if isinstance(chain, b.Chain)]
    given = [one for one in found if isinstance(one, ReversibleBackpropagation)]
    assert given and all(one is twin.backpropagation is not flow.backpropagation for one in given)
    assert worst(gradients(twin, x, context)[1], right) <= 1e-5


# ---- the backward pass in another thread ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["nsf_coupling", "hybrid", "ffjord"])
def test_the_gradient_may_be_computed_in_another_thread(name, mode):
    """As on a GPU: a thread without the modes of the forward pass, such as the rows that dropout is drawn for."""
    flow, x, context = perturbed_flow(name)
    flow.train().set_backpropagation(mode())
    losses = []
    for _ in range(2):
        torch.manual_seed(2)
        with global_batch.rows(3, 3 + len(x)), fusion.layer_by_layer():
            losses.append(flow(x, context).mean())
    here, there = ([torch.zeros_like(parameter) for parameter in flow.parameters()] for _ in losses)
    with global_batch.rows(3, 3 + len(x)), fusion.layer_by_layer():
        here[:] = torch.autograd.grad(losses[0], list(flow.parameters()))

    def backward():
        torch.set_num_threads(1)  # as in the thread of the tests: sums are then taken in the same order
        assert modes.current() == modes.Modes()
        there[:] = torch.autograd.grad(losses[1], list(flow.parameters()))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert all(map(torch.equal, here, there))


# ---- with what training does beside --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [ActivationCheckpointing, ReversibleBackpropagation])
def test_under_autocast(mode):
    flow, x, context = perturbed_flow("glow")
    _, full = gradients(flow, x, context)
    _, right = gradients(flow, x, context, torch.bfloat16)
    assert worst(right, full) > 1e-3  # the networks do run in bfloat16
    flow.set_backpropagation(mode())
    assert worst(gradients(flow, x, context, torch.bfloat16)[1], right) <= 1e-5


def test_moments_of_a_batch_are_remembered_once():
    torch.manual_seed(0)
    net = partial(nets.ConvNet, hidden=8, norm=nets.BatchNorm)
    layers = {"norm": b.BatchNorm, "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=net)}
    flow = Flow((4, 4, 4), partial(b.Chain, layers=layers, repeat=3))
    twin = copy.deepcopy(flow)
    twin.set_backpropagation(ActivationCheckpointing())
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
    for mode in (Backpropagation(), ActivationCheckpointing(), ReversibleBackpropagation(spacing=2)):
        flow.set_backpropagation(mode)
        embedding.grad = None
        flow.zero_grad(set_to_none=True)
        flow(x, embedding).mean().backward()
        assert chain[1].mixing.lu.grad is None
        results.append([p.grad for p in [*flow.parameters(), embedding] if p.grad is not None])
    for found in results[1:]:
        assert worst(found, results[0]) <= 1e-5


def _gradients(_folder):
    rank, found = distributed.rank(), {}
    for mode in (ActivationCheckpointing(), ReversibleBackpropagation()):
        flow, whole = steps(6), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        flow.initialize(whole)
        flow.set_backpropagation(mode)
        wrapped = nn.parallel.DistributedDataParallel(
            flow, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
        for _ in range(2):
            flow.zero_grad(set_to_none=True)
            wrapped(whole[4 * rank : 4 * rank + 4]).mean().backward()
        found[type(mode).__name__] = [parameter.grad.clone() for parameter in flow.parameters()], flow.statistics()
    return found


def test_two_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    first, second = run_on_two_ranks(_gradients, tmp_path)
    flow, whole = steps(6), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    flow.initialize(whole)
    flow(whole).mean().backward()
    right = [parameter.grad for parameter in flow.parameters()]
    for mode in ("ActivationCheckpointing", "ReversibleBackpropagation"):
        (gradient, error), (other, other_error) = first[mode], second[mode]
        assert all(map(torch.equal, gradient, other)) and error == other_error
        assert worst(gradient, right) <= 1e-5
    assert 0 < error["memory/reconstruction_error"] < 1e-5


@pytest.mark.long
def test_compiled_steps_are_repeated_compiled():
    flow, x = steps(4, hidden=8), torch.randn(4, 4, 8, 8)
    compiled = compile_flow(flow)
    _, right = gradients(flow, x)
    flow.set_backpropagation(ActivationCheckpointing())
    compiled.settle()
    _, found = gradients(flow, x)
    assert all(map(torch.equal, found, right)) and compiled.recompiles == 0
    assert compiled.regions == 4


# ---- what can go wrong ---------------------------------------------------------------------------------------------


class Blunt(b.ActNorm):
    """Its inverse is a little off."""

    reversible = True

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
    flow.set_backpropagation(ReversibleBackpropagation(bound=1e-4))
    gradients(flow, torch.randn(5, 4))
    with pytest.raises(FloatingPointError, match=r"memory=reversible.* error of 0\.00\d*, above its bound of 0\.0001"):
        flow.statistics()
    assert flow.statistics() == {}  # of no step since


def test_a_step_that_is_not_finite_is_not_the_inverses_fault():
    flow, x = steps(4), torch.randn(4, 4, 8, 8)
    flow.set_backpropagation(ReversibleBackpropagation())
    gradients(flow, x)
    x[0, 0, 0, 0] = torch.nan
    gradients(flow, x)
    assert 0 < flow.statistics()["memory/reconstruction_error"] < 1e-5


def test_lower_bits_find_the_number_they_are_of():
    torch.manual_seed(0)
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        x = torch.randn(10_000, dtype=dtype)
        bits = backpropagation._lower_bits(x)
        assert bits.element_size() == 2
        near = x * (1 + error * torch.randn_like(x))
        assert not torch.equal(near, x)
        assert torch.equal(backpropagation._nearest(near, bits), x)


def test_no_second_gradient():
    flow, x = steps(4), torch.randn(4, 4, 8, 8, requires_grad=True)
    flow.set_backpropagation(ReversibleBackpropagation())
    (gradient,) = torch.autograd.grad(flow(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_batch_normalization_is_not_run_backwards():
    flow = flows.realnvp(SMALL, preprocess=LOGIT)
    with pytest.raises(ValueError, match="memory=reversible: batch normalization .* memory=checkpoint"):
        flow.set_backpropagation(ReversibleBackpropagation())


# ---- the command ---------------------------------------------------------------------------------------------------


def losses(folder, *words):
    folder.mkdir()
    small = [
        "model=glow",
        "dataset=digits",
        "model.steps=3",
        "model.hidden=16",
        "devices=1",
        "max_steps=20",
        "hydra.run.dir=run",
    ]
    quiet = ["logger=none", "trainer.log_every=5", "trainer.accumulate=2"]
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
        (["memory=less"], "memory=less: must be none, checkpoint or reversible"),
    ],
)
def test_what_is_refused(words, said, tmp_path):
    with pytest.raises(FlowtrainError, match=said) as caught:
        flowtrain(tmp_path, "train", "dataset=digits", "devices=1", "max_steps=3", "hydra.run.dir=run", *words)
    assert caught.value.exit_code == 2


def test_a_flow_in_which_nothing_is_saved_says_so(tmp_path):
    words = ("model=made", "dataset=moons", "devices=1", "max_steps=1", "logger=none")
    for mode, said in (("checkpoint", True), ("none", False)):
        assert flowtrain(tmp_path, "train", f"memory={mode}", *words, f"hydra.run.dir={mode}") == 0
        assert ("so that all is kept" in (tmp_path / mode / "train.log").read_text()) == said
