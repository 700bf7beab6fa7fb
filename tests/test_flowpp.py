"""Flow++ and Jet: their couplings by the papers' formulas, their partitions and networks, and what they refuse."""

import math
from functools import partial

import pytest
import torch
from audit import event, randomize

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.flows.parts import smallest_patch

CHANNELS, HEIGHT, WIDTH = shape = 2, 3, 4
gated = partial(nets.GatedAttentionConvNet, hidden=4, blocks=2, heads=2)
vision = partial(nets.VisionTransformer, hidden=4, depth=2, heads=2)


def pixels(colour):
    """(row, i, conditioning column, transformed column) of each pixel i in a row of a packed part."""
    for row in range(HEIGHT):
        for i in range(WIDTH // 2):
            first = (row + colour) % 2
            yield row, i, 2 * i + first, 2 * i + 1 - first


@pytest.mark.parametrize("colour", [0, 1])
def test_flowpps_coupling_is_its_formula(colour):
    """y = exp(s)·logit(Σ πₖ σ((x − μₖ)/exp(λₖ))) + t for one colour of a checkerboard (eq. 12 to 14 of Ho et al.)."""
    components, bound = 3, 7.0
    univariate = partial(b.MixtureLogistic, components=components, bound=bound)
    partition = partial(b.PackedCheckerboard, colour=colour)
    layer = randomize(b.Coupling(shape, univariate, gated, partition), scale=0.2)
    x = event(layer, 5)
    given = torch.zeros(5, CHANNELS, HEIGHT, WIDTH // 2).double()
    for row, i, conditioning, _ in pixels(colour):
        given[:, :, row, i] = x[:, :, row, conditioning]
    h = layer.net(given).unflatten(1, (3 * components + 2, CHANNELS))
    expected, log_det = x.clone(), torch.zeros(5).double()
    spread = sum((2 * k / (components - 1) - 1) ** 2 for k in range(components)) / components
    start = 0.5 * math.log((math.pi**2 / 3 - spread) / (math.pi**2 / 3))
    for row, i, _, column in pixels(colour):
        theta = h[..., row, i]
        weight = theta[:, :components].softmax(1)
        mean = theta[:, components : 2 * components] + torch.linspace(-1, 1, components).double().view(1, -1, 1)
        scale = (bound * torch.tanh(theta[:, 2 * components : 3 * components] / bound) + start).exp()
        s, t = bound * torch.tanh(theta[:, -2] / bound), theta[:, -1]
        sigmoid = torch.sigmoid((x[:, None, :, row, column] - mean) / scale)
        cdf = (weight * sigmoid).sum(1)
        density = (weight * sigmoid * (1 - sigmoid) / scale).sum(1)
        expected[:, :, row, column] = s.exp() * (cdf.log() - (1 - cdf).log()) + t
        log_det += (s + density.log() - cdf.log() - (1 - cdf).log()).sum(1)
    torch.testing.assert_close(layer(x), (expected, log_det), atol=1e-9, rtol=1e-9)


def test_jets_coupling_is_its_formula():
    """y = (x₂ + t)·2σ(a), but for the floor of the scale, with t and a of the other half of the channels."""
    layer = randomize(b.Coupling(shape, partial(b.DoubleSigmoidAffine, floor=1e-12), vision), scale=0.2)
    x = event(layer, 5)
    t, a = layer.net(x[:, :1]).chunk(2, 1)
    z, log_det = layer(x)
    torch.testing.assert_close(z, torch.cat((x[:, :1], (x[:, 1:] + t) * 2 * torch.sigmoid(a)), 1))
    torch.testing.assert_close(log_det, (2 * torch.sigmoid(a)).log().sum((1, 2, 3)))


@pytest.mark.parametrize("colour", [0, 1])
def test_a_packed_checkerboard_has_the_colours_of_a_checkerboard(colour):
    packed, masked = b.PackedCheckerboard(shape, colour), b.Checkerboard(shape, colour)
    x = torch.randn(5, *shape)
    conditioning, transformed = packed.split(x)
    assert conditioning.shape[1:] == packed.conditioning_shape == (2, 3, 2)
    torch.testing.assert_close(packed.merge(conditioning, torch.zeros_like(transformed)), masked.split(x)[0])
    torch.testing.assert_close(packed.merge(conditioning, transformed), x)
    with pytest.raises(ValueError, match=r"even width\), not \[2, 4, 3\]"):
        b.PackedCheckerboard((2, 4, 3))
    with pytest.raises(ValueError, match="colour=2 must be 0 or 1"):
        b.PackedCheckerboard(shape, 2)


@pytest.mark.parametrize("net", [gated, vision])
def test_each_pixel_of_a_network_depends_on_all_pixels(net):
    net = randomize(net(shape, out=2, context_shape=(3,)), scale=0.3)
    x, context = torch.randn(1, *shape).double(), torch.randn(1, 3).double()
    to_x, to_context = torch.autograd.functional.jacobian(lambda x, c: net(x, c)[0], (x, context))
    assert (to_x.abs().sum((0, 3, 4)) > 0).all()  # (row, column, row, column)
    assert (to_context.abs() > 0).all()
    assert not net.train()(x, context).isnan().any()


@pytest.mark.parametrize("net", [gated, vision])
def test_networks_refuse_heads_that_do_not_divide_the_channels(net):
    with pytest.raises(ValueError, match="hidden=4 is not a multiple of heads=3"):
        net(shape, out=2, heads=3)
    with pytest.raises(ValueError, match="heads=0 must be at least 1"):
        net(shape, out=2, heads=0)


@pytest.mark.parametrize(
    "flow", [flows.flowpp((1, 8, 8), norm=None, mixing=None), flows.jet((1, 8, 8), mixing=None)], ids=["flowpp", "jet"]
)
def test_a_new_flow_is_near_the_identity(flow):
    x = torch.rand(5, 1, 8, 8) - 0.5
    z, log_det = flow.eval().bijection(x)
    squeezed = b.Squeeze((1, 8, 8))(x)[0].flatten(1)
    assert (z - squeezed).abs().max() < 0.12 and log_det.abs().max() < 64 * 0.25


@pytest.mark.parametrize("constructor", [flows.flowpp, flows.jet])
def test_the_density_depends_on_the_class_and_samples_have_it(constructor):
    flow = randomize(constructor((1, 4, 4), hidden=4, heads=2, context_shape=(3,)), scale=0.1)
    x, classes = torch.randn(1, 1, 4, 4).double().expand(3, -1, -1, -1), torch.eye(3).double()
    assert flow.log_prob(x, classes).unique().numel() == 3
    z = flow.bijection(x, classes)[0]
    torch.testing.assert_close(flow.bijection.inverse(z, classes)[0], x, atol=1e-8, rtol=1e-8)


def test_patches_of_jet():
    assert [smallest_patch((1, side, side), numbers=2) for side in (8, 28, 32, 64)] == [2, 2, 2, 4]
    assert flows.jet((3, 64, 64), hidden=4, steps=1).bijection.patches.out_shape == (48, 16, 16)
    assert flows.jet((3, 5, 7), hidden=4, steps=1).bijection.patches.out_shape == (3, 5, 7)
    kinds = [name.rstrip("0123456789") for name, _ in flows.jet((1, 8, 8)).bijection.named_children()]
    assert kinds[1:-1] == (["mixing", "channels"] * 4 + ["spatial"]) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(flows.jet, patch=3), "sides of 8×8 cannot be divided into blocks of 3×3"),
        (partial(flows.jet, patch=0), "sides of 8×8 cannot be divided into blocks of 0×0"),
        (partial(flows.jet, patch=1), "no two halves of channels"),
        (partial(flows.jet, steps=0), "steps=0 and spatial=5 must be at least 1"),
        (partial(flows.flowpp, couplings=[4, 2]), r"couplings=\[4, 2\] must be three numbers"),
        (partial(flows.flowpp, couplings=3), "couplings=3 must be three numbers"),
        (partial(flows.flowpp, couplings=[-1, 2, 3]), r"couplings=\[-1, 2, 3\] must be three numbers"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make((1, 8, 8))
