"""Base distributions: their densities against torch.distributions, and their draws against their densities."""

import math
from functools import partial

import pytest
import torch
from audit import randomize
from torch import distributions as reference

from flowtrain import bijections as b
from flowtrain.distributions import ConditionalNormal, Logistic, Mixture, NormalMixture, StandardNormal
from flowtrain.flow import Flow

BASES = {
    "normal": StandardNormal,
    "logistic": Logistic,
    "class_normal": partial(ConditionalNormal, context_shape=(3,)),
    "mixture": partial(Mixture, components=4),
}


def random_base(name, shape, scale=0.5):
    """The base with its parameters away from their start."""
    return randomize(BASES[name](shape), scale)


def seed(value=0):
    return torch.Generator().manual_seed(value)


def context_of(base, n, label=1):
    if base.context_shape is None:
        return None
    return torch.nn.functional.one_hot(torch.tensor(label), base.context_shape[0]).double().expand(n, -1)


def as_reference(base, context=None):
    """The same distribution of one event, by torch.distributions."""
    event = len(base.shape)
    if isinstance(base, Mixture):
        normals = reference.Independent(reference.Normal(base.mean, base.log_scale.exp()), event)
        return reference.MixtureSameFamily(reference.Categorical(logits=base.logits), normals)
    if isinstance(base, ConditionalNormal):
        mean, log_scale = base.affine(context).view(len(context), 2, *base.shape).unbind(1)
        return reference.Independent(reference.Normal(mean, log_scale.exp()), event)
    if isinstance(base, StandardNormal):
        zero = torch.zeros(base.shape, dtype=torch.float64)
        return reference.Independent(reference.Normal(zero, zero + 1), event)
    uniform = reference.Uniform(torch.zeros(base.shape, dtype=torch.float64), 1)
    logit = [reference.SigmoidTransform().inv]
    return reference.Independent(reference.TransformedDistribution(uniform, logit), event)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 2)], ids=str)
def test_log_prob_is_that_of_torch_distributions(name, shape):
    base = random_base(name, shape)
    z = 2 * torch.randn(7, *shape, dtype=torch.float64)
    context = torch.randn(7, 3, dtype=torch.float64) if base.context_shape else None
    log_prob = base.log_prob(z, context)
    assert log_prob.shape == (7,)
    torch.testing.assert_close(log_prob, as_reference(base, context).log_prob(z), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_densities_integrate_to_one(name):
    base, at = random_base(name, (2,)), torch.linspace(-40, 40, 1601, dtype=torch.float64)
    points = torch.cartesian_prod(at, at)
    context = context_of(base, len(points))
    density = base.log_prob(points, context).exp().view(len(at), -1)
    assert torch.trapezoid(torch.trapezoid(density, at), at).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_draws_have_the_moments_of_the_density(name):
    base, n = random_base(name, (2,)), 100_000
    context = context_of(base, n)
    z = base.sample(n, context=context, generator=seed()).double()
    assert z.shape == (n, 2)
    at = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    points = torch.cartesian_prod(at, at)
    weight = base.log_prob(points, context_of(base, len(points))).exp() * (at[1] - at[0]) ** 2
    for power in (1, 2):
        moment = (weight[:, None] * points**power).sum(0)
        error = (z**power).std(0) / math.sqrt(n)
        assert ((z**power).mean(0) - moment).abs().lt(4 * error).all(), power
    cross = (weight * points.prod(1)).sum()  # a mixture's coordinates are not independent
    assert abs(z.prod(1).mean() - cross) < 4 * z.prod(1).std() / math.sqrt(n)


@pytest.mark.parametrize("name", BASES)
def test_temperature_scales_how_far_draws_lie_from_their_means(name):
    base = random_base(name, (2, 3))
    context = context_of(base, 50)
    cold, half, warm = (base.sample(50, t, context, seed(3)) for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - cold, 0.5 * (warm - cold))
    assert (warm != half).all()
    if name == "mixture":
        means = base.mean
        assert (cold[:, None] == means).flatten(2).all(2).sum(1).eq(1).all()
    else:
        mean = base.moments(context)[0] if name == "class_normal" else torch.zeros_like(cold)
        torch.testing.assert_close(cold, mean, rtol=0, atol=0)
    again = base.sample(50, 1.0, context, seed(3))
    assert torch.equal(again, warm)
    assert not torch.equal(base.sample(50, 1.0, context, seed(4)), warm)


def test_a_class_has_its_own_normal():
    base = ConditionalNormal((2,), (3,))
    z = torch.randn(5, 2)
    torch.testing.assert_close(base.log_prob(z, torch.eye(3)[[0, 1, 2, 0, 1]]), StandardNormal((2,)).log_prob(z))
    base = randomize(base, 1.0)
    labels = torch.arange(3).repeat_interleave(40_000)
    z = base.sample(len(labels), context=torch.eye(3)[labels], generator=seed())
    weight, bias = base.affine.weight.detach(), base.affine.bias.detach()
    for label in range(3):
        mean, log_scale = (weight[:, label] + bias).view(2, 2)
        mine = z[labels == label]
        torch.testing.assert_close(mine.mean(0), mean, rtol=0, atol=0.03 * log_scale.exp().max().item())
        torch.testing.assert_close(mine.std(0).log(), log_scale, rtol=0, atol=0.02)


def test_a_mixture_starts_as_components_that_differ_with_the_moments_of_a_normal():
    base = Mixture((2,), components=4000)
    assert base.mean.std().item() == pytest.approx(0.8, abs=0.03)
    z = base.sample(100_000, generator=seed())
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=0.06)
    torch.testing.assert_close(z.std(0), torch.ones(2), rtol=0, atol=0.04)
    few = Mixture((2,), components=8).mean
    assert torch.cdist(few, few).add(torch.eye(8) * 9).min() > 0.01


@pytest.mark.parametrize("shared", [False, True])
def test_a_mixture_with_covariances_is_that_of_torch_distributions(shared, monkeypatch):
    base = randomize(NormalMixture((3,), components=4, shared=shared), 0.5)
    factor = base.factor.expand(4, 3, 3)
    normals = reference.MultivariateNormal(base.mean, precision_matrix=factor @ factor.mT)
    expected = reference.MixtureSameFamily(reference.Categorical(logits=base.logits), normals)
    z = 2 * torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(z), expected.log_prob(z))
    drawn = base.sample(200_000, generator=seed())
    torch.testing.assert_close(drawn.mean(0), expected.mean, rtol=0, atol=0.05 * drawn.std().item())
    torch.testing.assert_close(drawn.var(0), expected.variance, rtol=0.05, atol=0)
    monkeypatch.setattr("flowtrain.distributions._MOST", 25)  # in parts
    torch.testing.assert_close(base.log_prob(z), expected.log_prob(z))


def test_components_are_drawn_by_their_weights():
    base = Mixture((1,), components=3)
    with torch.no_grad():
        base.logits.copy_(torch.tensor([0.2, 0.5, 0.3]).log() + 7)
        base.mean.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    drawn = base.sample(100_000, temperature=0.0, generator=seed()).flatten().long()
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.006)


@pytest.mark.parametrize("name", ["class_normal", "mixture"])
def test_gradients_reach_every_parameter_and_are_right(name):
    base = random_base(name, (2,))
    z = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    context = torch.randn(4, 3, dtype=torch.float64) if base.context_shape else None
    names, parameters = zip(*base.named_parameters())

    def log_prob(z, *values):
        return torch.func.functional_call(base, dict(zip(names, values)), (z, context))

    base.forward = base.log_prob
    assert torch.autograd.gradcheck(log_prob, (z, *parameters))
    for gradient in torch.autograd.grad(log_prob(z, *parameters).sum(), parameters):
        assert gradient.ne(0).all()


@pytest.mark.parametrize("name", ["class_normal", "mixture"])
def test_state_goes_round(name):
    base, other = random_base(name, (2, 2)).float(), BASES[name]((2, 2))
    other.load_state_dict(base.state_dict())
    context = context_of(base, 6).float() if base.context_shape else None
    z = base.sample(6, context=context, generator=seed())
    assert torch.equal(other.sample(6, context=context, generator=seed()), z)
    assert torch.equal(other.log_prob(z, context), base.log_prob(z, context))


@pytest.mark.parametrize("name", BASES)
def test_log_prob_keeps_its_precision_under_autocast(name):
    base = random_base(name, (300,)).float()
    z = torch.randn(4, 300)
    context = torch.randn(4, 3) if base.context_shape else None
    expected = base.log_prob(z, context)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = base.log_prob(z, context)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_far_away_is_finite(name):
    base = random_base(name, (2,)).float()
    z = torch.tensor([[1e4, -1e4]])
    context = context_of(base, 1)
    assert base.log_prob(z, context).isfinite().all()


# ---- in a flow -----------------------------------------------------------------------------------------------------


def flow_on(name):
    base = BASES[name].func if isinstance(BASES[name], partial) else BASES[name]
    context_shape = (3,) if name == "class_normal" else None
    return Flow((2,), partial(b.Elementwise, univariate=b.ExpAffine), base, context_shape)


@pytest.mark.parametrize("name", BASES)
def test_a_flow_draws_from_its_base_as_it_is_now(name):
    torch.manual_seed(0)
    flow = flow_on(name)
    context = torch.eye(3)[1] if flow.base.context_shape else None
    z = flow.latents(40, temperature=0.7, context=context, generator=seed())
    assert z.shape == (40, 2) and z.dtype == torch.float32 and not z.requires_grad
    x = flow.decode(z, None if context is None else context.expand(40, 3))
    assert torch.equal(flow.sample(40, temperature=0.7, context=context, generator=seed()), x)
    flow = randomize(flow)
    moved = flow.latents(40, temperature=0.7, context=context, generator=seed())
    assert moved.dtype == torch.float64 and (moved != moved.float()).all()  # drawn with all its digits
    assert flow.bfloat16().latents(40, temperature=0.7, context=context, generator=seed()).dtype == torch.float32


def test_a_flow_draws_for_each_of_many_contexts():
    flow = randomize(flow_on("class_normal"))
    contexts = torch.eye(3, dtype=torch.float64)
    z, x = (draw(5, context=contexts, generator=seed()) for draw in (flow.latents, flow.sample))
    assert z.shape == x.shape == (5, 3, 2)
    for place, context in enumerate(contexts):
        torch.testing.assert_close(x[:, place], flow.decode(z[:, place], context.expand(5, 3)))
    means = flow.latents(1, temperature=0.0, context=contexts)[0]
    torch.testing.assert_close(means, flow.base.moments(contexts)[0].detach())
    assert flow.sample(4, contexts[:1]).shape == (4, 1, 2) and flow.sample(4, contexts[0]).shape == (4, 2)
    assert flow.sample(0, contexts).shape == (0, 3, 2) and flow.sample(4, contexts[:0]).shape == (4, 0, 2)
    for draw in (flow.latents, flow.sample):
        for wrong in (torch.zeros(4), torch.zeros(3, 4), torch.zeros(5, 3, 2), torch.zeros(())):
            with pytest.raises(ValueError, match=r"context has events of shape \[.*\]; this flow takes \[3\]"):
                draw(5, context=wrong)
    with pytest.raises(ValueError, match="takes no context"):
        flow_on("normal").sample(5, context=contexts)


def test_a_flow_learns_its_base():
    """Two clusters, which no elementwise map makes of one normal: the mixture must find them."""
    x = torch.randn(500, 1) * 0.1 + torch.tensor([-1.0, 1.0]).repeat(250)[:, None]
    torch.manual_seed(1)
    flow = Flow((1,), partial(b.Elementwise, univariate=b.ExpAffine), partial(Mixture, components=2))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -flow(x).mean()
        loss.backward()
        optimizer.step()
    entropy = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert loss.item() == pytest.approx(entropy, abs=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BASES)
def test_a_seed_draws_the_same_on_every_device(name):
    flow = randomize(flow_on(name)).float()
    context = torch.eye(3) if flow.base.context_shape else None
    here = flow.latents(40, temperature=0.7, context=context, generator=seed())
    there = flow.cuda().latents(
        40, temperature=0.7, context=None if context is None else context.cuda(), generator=seed()
    )
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ConditionalNormal((2,)), "context_shape=null: a conditional normal needs a context"),
        (lambda: ConditionalNormal((2,), (3, 4, 4)), r"context_shape=\[3, 4, 4\]: .* takes a context vector"),
        (lambda: Flow((2,), b.Flatten, ConditionalNormal), "base: context_shape=null"),
        (lambda: ConditionalNormal((2,), (3,)).log_prob(torch.zeros(1, 2)), r"needs a context \(B, 3\)"),
        (lambda: ConditionalNormal((2,), (3,)).sample(4, context=torch.eye(3)), "need a context of 4 rows, not 3"),
        (lambda: Mixture((2,), components=0), "components=0 must be at least 1"),
        (lambda: NormalMixture((2,), components=0), "components=0 must be at least 1"),
        (lambda: NormalMixture((2, 3)), r"takes vectors, not shape \[2, 3\]"),
        (lambda: Mixture((2,), spread=1.0), r"spread=1.0 must lie in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
