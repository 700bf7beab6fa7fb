"""PixelCNN: what a pixel sees, what a step costs, and that probabilities sum to one."""

from functools import partial
from itertools import product

import pytest
import torch
from audit import assert_exact, randomize
from torch.utils.flop_counter import FlopCounterMode

from flowtrain import bijections as b
from flowtrain import flows, nets


def random_net(image, context_shape=None, **keys):
    channels, height, width = image
    net = nets.PixelCNN((channels * height * width,), 3, image, hidden=6, depth=2, context_shape=context_shape, **keys)
    return randomize(net, scale=0.3)


def in_steps(net, x, context=None):
    """The rows of all elements, one step after the other: (B, D, out)."""
    cache = net.init_cache(x, context)
    return torch.cat([net.step(x[:, max(i - 1, 0) : i], cache) for i in range(x.shape[1])], 1)


@pytest.mark.parametrize("image", [(1, 5, 8), (3, 4, 5), (2, 1, 6), (2, 6, 1)])
def test_each_element_sees_all_before_it_and_no_others(image):
    """Without a blind spot: the pixels above and far to the right too."""
    net = random_net(image, levels=3)
    x = torch.randn(4, image[0] * image[1] * image[2]).double()
    sees = torch.autograd.functional.jacobian(lambda x: net(x).sum((0, 2)), x).abs().sum(1) > 0
    assert torch.equal(sees, torch.ones_like(sees).tril(-1))


@pytest.mark.parametrize("image", [(1, 7, 6), (3, 4, 5), (2, 1, 1)])
@pytest.mark.parametrize("context_shape", [None, (2,)])
@pytest.mark.parametrize("levels", [1, 3])
def test_steps_give_the_rows_of_the_whole_pass(image, context_shape, levels):
    net = random_net(image, context_shape, levels=levels, knots=2)
    x = torch.randn(4, image[0] * image[1] * image[2]).double()
    context = None if context_shape is None else torch.randn(4, *context_shape).double()
    torch.testing.assert_close(in_steps(net, x, context), net(x, context))


def test_all_steps_together_cost_hardly_more_than_the_whole_pass():
    net = random_net((1, 16, 16), levels=3)
    x = torch.randn(2, 256).double()

    def multiplications(run):
        with FlopCounterMode(display=False) as counter:
            run(net, x)
        return counter.get_total_flops()

    assert multiplications(in_steps) < 1.1 * multiplications(lambda net, x: net(x))


@pytest.mark.parametrize("keys", [{}, {"components": 2}, {"components": 2, "atoms": [0, 2]}])
@pytest.mark.parametrize("noise", [0.1, 0.8])
def test_probabilities_of_all_images_sum_to_one(monkeypatch, keys, noise):
    """Of two pixels with two channels, whatever the noise: it moves a number inside its bin, where the density is the
    same."""
    monkeypatch.setattr(
        "flowtrain.runtime.global_batch.uniform", lambda shape, **kind: torch.full(shape, noise, **kind)
    )
    flow = randomize(flows.pixelcnn((2, 1, 2), grey_levels=3, hidden=4, **keys), scale=0.5)
    images = torch.tensor(list(product(range(3), repeat=4))).view(-1, 2, 1, 2)
    log_p = flow.log_prob(images)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0).double())
    assert log_p.std() > 0.1


def test_noise_within_a_bin_changes_no_probability():
    flow = randomize(flows.pixelcnn((2, 3, 4), grey_levels=5, hidden=6), scale=0.3)
    images = torch.randint(5, (4, 2, 3, 4))
    torch.testing.assert_close(flow.log_prob(images), flow.log_prob(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("components", [None, 3])
def test_a_flow_is_exact_and_samples_what_it_scores(components):
    flow = randomize(
        flows.pixelcnn((2, 3, 4), grey_levels=17, hidden=6, depth=1, components=components, context_shape=(2,)), 0.2
    )
    layers = flow.bijection.layers()
    assert_exact(layers["autoregressive"], torch.rand(3, 24).double())
    context = torch.eye(2).double()[[0, 1, 1]]
    images = flow.sample(3, context)
    assert torch.equal(flow.decode(flow.encode(images, context), context), images)
    assert (flow.log_prob(images, context) != flow.log_prob(images, context.flip(1))).all()


@pytest.mark.parametrize("atoms", [[], [0, 7]])
def test_probabilities_of_a_mixture_of_logistic_distributions(atoms):
    """The masses of the bins, from the distribution function, against the map's derivative in float64."""
    torch.manual_seed(0)
    map = b.DiscretizedLogistic((1,), bins=16, components=2, floor=1e-9, atoms=atoms).double()
    theta = torch.randn(map.params).double()
    shift, logits, raw, log_scale = theta.split([1, len(atoms) + 2, 2, 2])
    weights = logits.softmax(0)
    mean, scale = torch.tensor([0.25, 0.75]) + shift + raw / 4, log_scale.exp() / 4
    edges = torch.arange(1, 16).double() / 16
    inner = torch.special.expit((edges[:, None] - mean) / scale)
    masses = torch.cat((inner[:1], inner.diff(dim=0), 1 - inner[-1:])) @ weights[len(atoms) :]
    masses[atoms] += weights[: len(atoms)]
    x = (torch.arange(16).double() + 0.3)[:, None] / 16
    y, log_derivative = map(x, theta[None])
    torch.testing.assert_close(log_derivative[:, 0].exp() / 16, masses, atol=1e-7, rtol=0)
    torch.testing.assert_close(map.inverse(y, theta[None])[0], x)


def test_parameters_between_knots_are_interpolated():
    net = nets.PixelCNN((4,), 5, (1, 2, 2), hidden=4, knots=3)
    torch.nn.init.normal_(net.knots.weight)
    theta = net(torch.rand(2, 4))
    torch.testing.assert_close(theta[..., 1::2], (theta[..., :-1:2] + theta[..., 2::2]) / 2)
    assert (theta[..., 0] != theta[..., 2]).all()


@pytest.mark.parametrize("change", [{"bins": 1}, {"components": 0}, {"floor": 0.2}, {"atoms": [8]}])
def test_what_a_mixture_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        b.DiscretizedLogistic((1,), **({"bins": 8} | change))


def test_what_a_network_refuses():
    build = partial(nets.PixelCNN, out=2, hidden=4)
    for shape, image in (((5,), (1, 2, 2)), ((4,), (2, 2))):
        with pytest.raises(ValueError, match="must be"):
            build(shape, image=image)
    with pytest.raises(ValueError, match="real numbers"):
        flows.pixelcnn((1, 4, 4), grey_levels=None)


@pytest.mark.parametrize("map", [partial(b.PiecewiseLinear, bins=256), partial(b.DiscretizedLogistic, bins=256)])
def test_the_last_bin_ends_at_one(map):
    """In float32 too, where sums of probabilities are rounded: the logit of more is not a number."""
    torch.manual_seed(0)
    map = map((1,))
    theta = 3 * torch.randn(4000, 1, map.params)
    x = torch.full((4000, 1), 1 - torch.finfo(torch.float32).eps)
    assert b.Logit((1,), alpha=0.0)(map(x, theta)[0])[0].isfinite().all()
