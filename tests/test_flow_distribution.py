"""A flow in Python: broadcasting, samples with gradients and log-densities, and torch.distributions."""

import copy
import inspect
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
import pytest
import torch
from layers import LAYERS
from torch.distributions import Normal, constraints, kl_divergence
from torch.func import functional_call

import flowtrain
from flowtrain import Flow, flows
from flowtrain import bijections as b
from flowtrain.distributions import Joint, Logistic, Mixture, StandardNormal

SMALL = {"hidden": 8}
VECTORS = {
    "maf": partial(flows.maf, steps=2, **SMALL),
    "iaf": partial(flows.iaf, steps=2, **SMALL),
    "nsf_autoregressive": partial(flows.nsf_autoregressive, steps=2, **SMALL),
    "nsf_coupling": partial(flows.nsf_coupling, pairs=1, **SMALL),
    "realnvp_vector": partial(flows.realnvp_vector, **SMALL),
    "glow_vector": partial(flows.glow_vector, steps=2, **SMALL),
}


def randomize(module, scale=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def make(name, context_shape=None):
    torch.manual_seed(0)
    return randomize(VECTORS[name]((3,), context_shape=context_shape)).double().eval()


# ---- batches


def test_events_and_contexts_broadcast():
    flow = make("maf", (2,))
    x, c = torch.randn(5, 1, 3).double(), torch.randn(4, 2).double()
    log_prob = flow.log_prob(x, c)
    assert log_prob.shape == (5, 4) and flow.bits_per_dim(x, c).shape == (5, 4)
    for i in range(5):
        for j in range(4):
            torch.testing.assert_close(flow.log_prob(x[i, 0], c[j]), log_prob[i, j])
    z = flow.encode(x, c)
    assert z.shape == (5, 4, 3)
    torch.testing.assert_close(flow.decode(z, c), x.expand(5, 4, 3))
    assert flow.log_prob(torch.zeros(0, 1, 3), c).shape == (0, 4)


def test_samples_of_each_context_have_its_density():
    flow, c = make("nsf_coupling", (2,)), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    x = flow.sample((3, 4), c)
    assert x.shape == (3, 4, 2, 3) and flow.sample((), c[0]).shape == (3,) and flow.sample(4, c[:1]).shape == (4, 1, 3)
    many = flow.sample(20_000, c, generator=torch.Generator().manual_seed(0))
    single = torch.stack([flow.sample(20_000, one, generator=torch.Generator().manual_seed(1)) for one in c], 1)
    torch.testing.assert_close(many.mean(0), single.mean(0), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda flow: flow.log_prob(torch.zeros(5, 3), torch.zeros(4, 2)), r"batch of \[5\] and context one of \[4\]"),
        (lambda flow: flow.log_prob(torch.zeros(5, 2), torch.zeros(5, 2)), r"events of shape \[2\]; .* takes \[3\]"),
        (lambda flow: flow.log_prob(torch.zeros(5, 3)), r"needs a context, of shape \[2\]"),
        (lambda flow: flow.sample(5), r"needs a context, of shape \[2\]"),
        (lambda flow: flow.sample(5, torch.zeros(3)), r"context has events of shape \[3\]; this flow takes \[2\]"),
        (lambda flow: flow.to_distribution(), "needs a context"),
        (lambda flow: flow.to_distribution(torch.zeros(3)), "context has events of shape"),
        (lambda flow: flow.rsample_and_log_prob(5), "needs a context"),
        (lambda flow: flow.log_prob(torch.full((5, 2, 3), math.nan), torch.zeros(2)), "row 0 of x"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(make("maf", (2,)))


def test_arrays_and_lists_are_as_good_as_tensors():
    flow = make("maf", (2,))
    x, c = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    frozen = x.numpy()[::-1]
    frozen.flags.writeable = False
    for method in (flow.log_prob, flow.encode, flow.decode):
        expected = method(x, c)
        torch.testing.assert_close(method(x.numpy(), c.tolist()), expected, rtol=0, atol=0)
        torch.testing.assert_close(method([*x], c.numpy()), expected, rtol=0, atol=0)
        torch.testing.assert_close(method(frozen, c.flip(0)), expected.flip(0), rtol=0, atol=0)
    assert flow.sample(4, [0.5, 1]).shape == (4, 3) and flow.to_distribution([[0, 1]]).batch_shape == (1,)
    for wrong in ([[1.0, 2.0], [3.0]], [["a", "b", "c"]], None, {1: 2}):
        for name, method in (("x", flow.log_prob), ("x", flow.encode), ("z", flow.decode)):
            with pytest.raises(
                ValueError, match=f"^{name} must be a tensor, an array or nested lists of numbers"
            ) as found:
                method(wrong, c)
            assert "\n" not in str(found.value)


# ---- samples with gradients


@pytest.mark.parametrize("name", VECTORS)
def test_samples_come_with_their_log_density(name):
    flow, c = make(name, (2,)), torch.randn(4, 2).double()
    x, log_prob = flow.rsample_and_log_prob((2, 5), c)
    assert x.shape == (2, 5, 4, 3) and log_prob.shape == (2, 5, 4)
    torch.testing.assert_close(log_prob, flow.log_prob(x, c), atol=1e-8, rtol=1e-8)
    same = flow.sample(7, c, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(flow.rsample_and_log_prob(7, c, generator=torch.Generator().manual_seed(3))[0], same)


@pytest.mark.parametrize("name", VECTORS)
def test_the_gradient_of_samples_is_that_of_finite_differences(name):
    """In the weights and in the context, of a function of the samples and of their log-densities."""
    flow, c = make(name, (2,)), torch.randn(4, 2).double().requires_grad_()

    def value():
        x, log_prob = flow.rsample_and_log_prob(6, c, generator=torch.Generator().manual_seed(1))
        return (x.sin().sum(-1) + log_prob * x[..., 0]).mean()

    tensors = [c, *flow.parameters()]
    gradients = torch.autograd.grad(value(), tensors)
    directions = [torch.randn_like(one) for one in tensors]
    slope, h, values = sum((g * d).sum() for g, d in zip(gradients, directions)), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for one, direction in zip(tensors, directions):
                one.add_(sign * h * direction)
            values.append(value())
            for one, direction in zip(tensors, directions):
                one.sub_(sign * h * direction)
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_every_invertible_layer_has_the_gradient_of_its_inverse(name):
    """By the implicit function theorem: what ``forward`` makes of the inverse has no gradient but that of z."""
    torch.manual_seed(0)
    layer = randomize(LAYERS[name](), 0.1).double().eval()
    if not layer.exact:
        pytest.skip("a surjection: rounded samples have no gradient")
    x = torch.rand(3, *layer.shape, dtype=torch.float64) * 0.8 + 0.1
    c = None if layer.context_shape is None else torch.randn(3, *layer.context_shape).double()
    with torch.no_grad():
        z = layer(x, c)[0]
    names, weights = zip(*[*layer.named_parameters()]) if [*layer.parameters()] else ((), ())

    backwards = b.Inverse.__new__(b.Inverse)  # a module whose call is the layer's inverse, for functional_call
    torch.nn.Module.__init__(backwards)
    backwards.bijection = layer

    z = z.requires_grad_()
    leaves = [weight.detach().requires_grad_() for weight in weights]
    x, log_det = functional_call(backwards, {f"bijection.{k}": v for k, v in zip(names, leaves)}, (z, c))
    again, other = functional_call(layer, dict(zip(names, leaves)), (x, c))
    pull = torch.randn_like(again)
    found = torch.autograd.grad((again * pull).sum() + (log_det + other).sum(), [z, *leaves], allow_unused=True)
    torch.testing.assert_close(found[0], pull, atol=1e-5, rtol=1e-5)
    for gradient in found[1:]:
        if gradient is not None:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_samples_without_a_gradient_are_refused():
    images = flows.autoregressive((1, 4, 4), grey_levels=5, hidden=8)
    with pytest.raises(ValueError, match="rounded"):
        images.rsample_and_log_prob(2)
    mixture = Flow((2,), partial(b.Elementwise, univariate=b.ExpAffine), Mixture)
    with pytest.raises(ValueError, match="samples of a Mixture base have no gradient"):
        mixture.rsample_and_log_prob(2)
    both = Joint((3,), [Logistic((2,)), StandardNormal((1,))])
    assert both.reparameterized and not Joint((3,), [Mixture((2,)), StandardNormal((1,))]).reparameterized
    assert not mixture.to_distribution().has_rsample and flows.maf((2,), hidden=8).to_distribution().has_rsample


def test_a_flow_is_fitted_to_an_unnormalized_density():
    torch.manual_seed(0)
    flow = flows.nsf_coupling((2,), pairs=1, hidden=16)
    target = Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(300):
        x, log_q = flow.rsample_and_log_prob(128)
        loss = (log_q - target.log_prob(x).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# ---- torch.distributions


def test_a_distribution_keeps_the_contract_of_torch():
    flow, c = make("maf", (2,)), torch.randn(4, 2).double()
    density = flow.to_distribution(c)
    assert density.batch_shape == (4,) and density.event_shape == (3,) and density.has_rsample
    x = density.sample((7,))
    assert x.shape == (7, 4, 3) and not x.requires_grad and density.rsample().requires_grad
    torch.testing.assert_close(density.log_prob(x), flow.log_prob(x, c))
    assert density.log_prob(torch.zeros(3)).shape == (4,)
    wider = density.expand((5, 4))
    assert wider.batch_shape == (5, 4) and wider.sample().shape == (5, 4, 3)
    torch.testing.assert_close(wider.log_prob(x[0]), density.log_prob(x[0]).expand(5, 4))
    alone = make("maf").to_distribution().expand((2,))
    assert alone.sample((6,)).shape == (6, 2, 3) and alone.log_prob(torch.zeros(3)).shape == (2,)
    assert constraints.independent(constraints.real, 1).check(x).all() and density.support.check(x).all()
    x, log_prob = density.rsample_and_log_prob((7,))
    torch.testing.assert_close(log_prob, density.log_prob(x))


@pytest.mark.parametrize("name", ["maf", "iaf", "realnvp_vector"])
def test_a_density_is_one_function_in_training_mode_too(name):
    flow = make(name).train()
    flow(2 + torch.randn(64, 3).double())  # moments that a batch of samples does not have
    before, density = copy.deepcopy(flow.state_dict()), flow.to_distribution()
    x, log_prob = density.rsample_and_log_prob((7,))
    torch.testing.assert_close(density.log_prob(x), log_prob)
    torch.testing.assert_close(density.log_prob(x[:2]), log_prob[:2])
    torch.testing.assert_close(flow.state_dict(), before, rtol=0, atol=0)
    density.log_prob(x.detach()).sum().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_a_distribution_validates():
    density = make("maf").to_distribution(validate_args=True)  # a package may have changed torch's default
    for wrong in (torch.zeros(2), torch.full((3,), math.nan), 1.0):
        with pytest.raises(ValueError):
            density.log_prob(wrong)
    with pytest.raises(NotImplementedError):
        kl_divergence(density, density)
    with pytest.raises(NotImplementedError):
        make("maf").to_distribution().mean  # noqa: B018
    independent = torch.distributions.Independent(make("maf", (2,)).to_distribution(torch.zeros(4, 2)), 1)
    assert independent.log_prob(torch.zeros(4, 3)).shape == ()


@pytest.mark.parametrize("name", flows.__all__)
def test_every_flow_is_pickled_and_copied(name):
    make, shape = getattr(flows, name), (1, 4, 4)
    options = {"hidden": 8, "grey_levels": 5}
    options = {key: value for key, value in options.items() if key in inspect.signature(make).parameters}
    if name in ("custom", "custom_image", "with_angles"):
        pytest.skip("made of parts that are given")
    flow = make(shape, **options).eval()
    x = torch.randint(0, 5, (2, *shape)).float()

    def log_prob(flow):
        torch.manual_seed(0)
        return flow.log_prob(x)

    for other in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        assert torch.equal(log_prob(other), log_prob(flow))
        other.train()(x).sum().backward()
        assert all(one.grad is None for one in flow.parameters())
        other.load_state_dict(flow.state_dict())


def test_a_distribution_is_pickled_copied_and_used_by_threads():
    flow, c = make("nsf_autoregressive", (2,)), torch.randn(4, 2).double()
    density = flow.to_distribution(c)
    x = density.sample((50,))
    expected = density.log_prob(x)
    for other in (pickle.loads(pickle.dumps(density)), copy.deepcopy(density)):
        assert torch.equal(other.log_prob(x), expected) and other.flow is not flow
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: density.log_prob(x), range(8)):
            torch.testing.assert_close(found, expected)
    assert copy.deepcopy(flow).float().log_prob(x[:, 0].float(), c[0].float()).dtype == torch.float32


def test_a_distribution_with_missing_values_has_any_batch():
    frame = pd.DataFrame({"a": [1.0, float("nan"), 2.0, 0.5] * 30, "b": [0.1, 0.2, float("nan"), 0.3] * 30})
    flow = flowtrain.fit(frame, missing="model", model="made", minutes=1.0, progress=False, options={"max_steps": 2})
    x = flow.sample((2, 5))
    density = flow.to_distribution(validate_args=True)
    assert density.log_prob(x).shape == (2, 5) and density.log_prob(x[0, 0]).shape == ()
