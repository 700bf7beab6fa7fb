"""Masked networks, autoregressive layers and vector couplings: that masks are right, that an inverse costs one pass,
and that other people's code with the same weights gives the same numbers."""

import copy
from functools import partial

import pytest
import torch
from audit import context_for, event, jacobian_log_det, randomize
from torch.utils.flop_counter import FlopCounterMode

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.bijections.univariate import Univariate
from flowtrain.nets import made

NETS = {
    "made": partial(nets.MADE, hidden=24),
    "made_tanh_one_layer": partial(nets.MADE, hidden=24, depth=1, activation="tanh"),
    "made_random": partial(nets.MADE, hidden=60, degrees="random"),
    "made_narrow": partial(nets.MADE, hidden=3, activation="tanh"),
    "residual_made": partial(nets.ResidualMADE, hidden=24),
    "residual_made_random": partial(nets.ResidualMADE, hidden=60, degrees="random", blocks=1),
    "transformer": partial(nets.CausalTransformer, hidden=8, heads=2, offsets=[1, 3]),
    "pixelcnn": lambda shape, **words: nets.PixelCNN(shape, image=IMAGES[shape], hidden=6, **words),
}
IMAGES = {(1,): (1, 1, 1), (2,): (2, 1, 1), (6,): (2, 3, 1), (70,): (2, 5, 7)}
EVERY = pytest.mark.parametrize("name", NETS)


def random_net(name, dimensions=6, out=3, context_shape=None):
    return randomize(NETS[name](shape=(dimensions,), out=out, context_shape=context_shape), scale=0.3)


def in_steps(net, x, context=None):
    """The rows that steps give: (B, D, out)."""
    cache, rows, newest, found = net.init_cache(x, context), [], x[:, :0], 0
    while found < x.shape[1]:
        rows.append(net.step(newest, cache))
        newest = x[:, found : found + rows[-1].shape[1]]
        found += newest.shape[1]
    return torch.cat(rows, 1)


def each_jacobian(function, x):
    """(*out, B, *in) of a function that treats examples apart."""
    return torch.autograd.functional.jacobian(lambda x: function(x).sum(0), x)


@EVERY
@pytest.mark.parametrize("context_shape", [None, (2,)])
def test_rows_see_the_elements_before_them_and_no_others(name, context_shape):
    net = random_net(name, context_shape=context_shape)
    x, context = torch.randn(20, 6).double(), None if context_shape is None else torch.randn(20, 2).double()
    jacobian = each_jacobian(lambda x: net(x, context), x).abs().sum((1, 2))  # over parameters and examples
    assert (jacobian.triu() == 0).all()
    if name != "made_narrow":  # three hidden units cannot tell all prefixes apart
        assert (jacobian.tril(-1) + torch.ones(6, 6).triu() > 0).all()
    else:
        assert (jacobian[-1, :-1] > 0).all()


@EVERY
def test_every_row_depends_on_the_context(name):
    net = random_net(name, context_shape=(2,))
    x, context = torch.randn(20, 6).double(), torch.randn(20, 2).double()
    assert (each_jacobian(lambda context: net(x, context), context).abs().sum((1, 2, 3)) > 0).all()


@EVERY
@pytest.mark.parametrize("context_shape", [None, (2,)])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 6, 70])
def test_steps_give_the_rows_of_the_whole_pass(name, context_shape, grad, dimensions):
    net = random_net(name, dimensions, context_shape=context_shape)
    x, context = torch.randn(4, dimensions).double(), None if context_shape is None else torch.randn(4, 2).double()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(in_steps(net, x, context), net(x, context))


WIDE = {
    "made": partial(nets.MADE, hidden=300),
    "made_narrow_and_wide": partial(nets.MADE, hidden=130, depth=3, activation="tanh"),
    "made_random": partial(nets.MADE, hidden=300, degrees="random"),
    "residual_made": partial(nets.ResidualMADE, hidden=256, blocks=1),
}


def without_blocks(net):
    """The same network, whose layers multiply by their whole masked weights."""
    net = copy.deepcopy(net)
    for linear in net.linears:
        linear.rows, linear.columns = [linear.out_features], [linear.in_features]
    return net


@pytest.fixture
def by_torch(monkeypatch):
    """Networks by torch's operations, which can be counted."""
    monkeypatch.setattr(made, "dense", lambda *_: None)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(("dimensions", "out", "context_shape"), [(2, 70, None), (5, 60, (2,)), (300, 1, None)])
def test_blocks_of_a_masked_product_are_the_whole_product(name, dimensions, out, context_shape, by_torch):
    net = randomize(WIDE[name](shape=(dimensions,), out=out, context_shape=context_shape))
    whole = without_blocks(net)
    assert max(len(linear.rows) for linear in net.linears) > 1
    x, context = torch.randn(7, dimensions).double(), None if context_shape is None else torch.randn(7, 2).double()
    weight = torch.randn(7, dimensions, out).double()

    def results(net):
        x.requires_grad_()
        y = net(x, context)
        (first,) = torch.autograd.grad((y.sin() * weight).sum(), x, create_graph=True)
        return [y, *torch.autograd.grad((y * weight).sum() + first.square().sum(), [x, *net.parameters()])]

    for blocks, reference in zip(results(net), results(whole), strict=True):
        torch.testing.assert_close(blocks, reference, atol=1e-12 * reference.abs().max().item(), rtol=1e-12)


def test_blocks_save_multiplications(by_torch):
    net = randomize(nets.MADE((40,), 20, hidden=256))
    x = torch.randn(16, 40).double()

    def multiplications(net):
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        return counter.get_total_flops()

    assert multiplications(net) < 0.75 * multiplications(without_blocks(net))


def test_blocks_under_autocast():
    net = randomize(nets.MADE((40,), 2, hidden=256)).float()
    x = torch.randn(8, 40)

    def results(net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))]

    for blocks, reference in zip(results(net), results(without_blocks(net)), strict=True):
        assert blocks.dtype == reference.dtype
        torch.testing.assert_close(blocks, reference, atol=2e-2 * reference.abs().max().item(), rtol=2e-2)


def test_blocks_under_transformations():
    net = randomize(nets.MADE((40,), 2, hidden=256))
    x = torch.randn(8, 40).double()
    torch.testing.assert_close(torch.vmap(lambda x: net(x[None])[0])(x), net(x))
    expected = each_jacobian(without_blocks(net), x)
    for jacobian in torch.func.jacrev, torch.func.jacfwd:
        torch.testing.assert_close(jacobian(lambda x: net(x).sum(0))(x), expected)


def test_blocks_forward_of_weights():
    net = randomize(nets.MADE((40,), 2, hidden=256))
    x, weights = torch.randn(8, 40).double(), dict(net.named_parameters())
    along = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def tangent(net):
        return torch.func.jvp(lambda weights: torch.func.functional_call(net, weights, (x,)), (weights,), (along,))[1]

    torch.testing.assert_close(tangent(net), tangent(without_blocks(net)))


@pytest.mark.parametrize(
    "make",
    [
        partial(b.Autoregressive, (40,), b.ExpAffine, partial(nets.MADE, hidden=128)),
        partial(b.Autoregressive, (40,), b.RationalQuadratic, partial(nets.ResidualMADE, hidden=128), order="random"),
        partial(
            b.Coupling,
            (40,),
            b.RationalQuadratic,
            partial(nets.ResidualMLP, hidden=8),
            b.Alternate,
            partial(b.Elementwise, univariate=b.RationalQuadratic),
        ),
        partial(b.LULinear, (40,)),
    ],
    ids=["maf", "nsf_autoregressive", "nsf_coupling", "lu"],
)
def test_a_layer_is_one_graph_with_the_same_numbers(make):
    """What torch.compile is given, without the compiler itself: that would take most of a minute a layer."""
    layer = randomize(make())
    x = event(layer, 5).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")

    def results(layer):
        z, log_det = layer(x)
        loss = (z.sin().sum(1) + log_det).square().sum()
        return [z, log_det, *torch.autograd.grad(loss, [x, *parameters])]

    parameters = list(layer.parameters())
    for graph, reference in zip(results(compiled), results(layer), strict=True):
        torch.testing.assert_close(graph, reference)


@EVERY
def test_a_new_network_gives_zeros(name):
    net = NETS[name](shape=(6,), out=3)
    assert (net(torch.randn(4, 6)) == 0).all()


def test_random_degrees_travel_with_the_state():
    torch.manual_seed(1)
    one = nets.MADE((6,), 3, degrees="random")
    torch.manual_seed(2)
    other = nets.MADE((6,), 3, degrees="random")
    assert not torch.equal(one.degrees, other.degrees)
    randomize(one)
    other.double().load_state_dict(one.state_dict())
    x = torch.randn(4, 6).double()
    torch.testing.assert_close(one(x), other(x), rtol=0, atol=0)
    torch.testing.assert_close(in_steps(other, x), one(x))


@pytest.mark.parametrize("order", ["sequential", "reversed", "random"])
def test_the_jacobian_is_triangular_in_the_order(order):
    layer = randomize(b.Autoregressive((6,), b.ExpAffine, NETS["made"], order=order), scale=0.3)
    ranks = {"sequential": torch.arange(6), "reversed": torch.arange(6).flip(0)}.get(order)
    ranks = layer.order if ranks is None else ranks
    if order != "sequential":
        assert torch.equal(ranks, layer.order)
    x = event(layer, 5)
    for function in (layer, layer.inverse):
        jacobian = each_jacobian(lambda x, function=function: function(x)[0], x).movedim(1, 0)
        ordered = jacobian[:, ranks][:, :, ranks]
        assert (ordered.triu(1) == 0).all() and (ordered.abs().sum(0).tril() + torch.ones(6, 6).triu(1) > 0).all()
        torch.testing.assert_close(ordered.diagonal(0, 1, 2).log().sum(1), function(x)[1])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: b.Autoregressive((6,), b.ExpAffine, NETS["made"], order="backwards"), "order='backwards' must be"),
        (lambda: b.Autoregressive((2, 3), b.ExpAffine, NETS["made"]), "flatten first"),
        (lambda: b.Autoregressive((6,), b.TanhAffine, NETS["made"]), "weights of its own"),
        (lambda: nets.MADE((6,), 2, degrees="even"), "degrees='even' must be"),
        (lambda: nets.MADE((6,), 2, activation="elu"), "activation='elu' must be"),
        (lambda: nets.MADE((6,), 2, depth=0), "depth=0 must be"),
        (lambda: nets.ResidualMADE((6,), 2, hidden=0), "hidden=0 must be"),
        (lambda: nets.ResidualMADE((6, 2), 2), "flatten first"),
        (lambda: nets.ResidualMLP((6, 2), 2), "flatten first"),
        (lambda: nets.MADE((6,), 2, context_shape=(2, 3)), "context vector"),
        (
            lambda: b.Coupling((1, 4, 4), b.ExpAffine, nets.ConvNet, b.Checkerboard, unconditional=b.ActNorm),
            "unconditional: Checkerboard",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["made", "made_tanh_one_layer", "residual_made"])
def test_sampling_costs_one_pass(name, by_torch):
    """In multiplications, and in networks run: half of a dense pass, whatever D."""
    for dimensions in (8, 32):
        layer = b.Autoregressive((dimensions,), b.ExpAffine, partial(NETS[name].func, hidden=256))
        x = torch.randn(16, dimensions)
        with torch.no_grad(), FlopCounterMode(display=False) as dense:
            without_blocks(layer.net)(x)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as by_degrees:
                layer.inverse(x)
            assert 0.4 < by_degrees.get_total_flops() / dense.get_total_flops() < 0.7


@EVERY
@pytest.mark.parametrize("order", ["sequential", "random"])
def test_iaf_trains_with_the_gradients_of_a_dense_reference(name, order):
    """Through the inverse by degrees as through D passes of the whole network, to weights, input and context."""
    iaf = b.Inverse((6,), partial(b.Autoregressive, univariate=b.ExpAffine, net=NETS[name], order=order), (2,))
    randomize(iaf)
    layer = iaf.bijection
    z, context = event(iaf, 4).requires_grad_(), context_for(iaf, 4).requires_grad_()
    order = torch.arange(6) if order == "sequential" else layer.order

    def dense(z, context):
        target, x = z[:, order], torch.zeros_like(z)
        for _ in range(6):
            x, log_derivative = layer.univariate.inverse(target, layer.net(x, context))
        return x[:, order.argsort()], log_derivative.sum(1)

    def gradients(function):
        x, log_det = function(z, context)
        loss = (x.square() * torch.arange(1, 7)).sum() + log_det.sin().sum()
        return [loss, *torch.autograd.grad(loss, [z, context, *iaf.parameters()])]

    for mine, reference in zip(gradients(iaf), gradients(dense)):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hidden", [3, 30, 150])
def test_the_inverse_follows_every_change_of_the_weights(grad, hidden):
    """In place, by new data, by load_state_dict and by to(): nothing computed from weights outlives a call."""
    layer = randomize(b.Autoregressive((40,), b.ExpAffine, partial(nets.MADE, hidden=hidden)), scale=0.3)
    other = randomize(b.Autoregressive((40,), b.ExpAffine, partial(nets.MADE, hidden=hidden)), scale=0.3, seed=5)
    x = torch.randn(9, 40).double()

    def assert_inverts(tolerance=1e-10):
        z, log_det = layer(x)
        back, inverse_log_det = layer.inverse(z)
        torch.testing.assert_close(back, x, atol=tolerance, rtol=0)
        torch.testing.assert_close(inverse_log_det, -log_det, atol=tolerance, rtol=0)

    with torch.set_grad_enabled(grad):
        assert_inverts()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.1)
        assert_inverts()
        for parameter in layer.parameters():
            parameter.data = 0.9 * parameter.data
        assert_inverts()
        layer.load_state_dict(other.state_dict())
        assert_inverts()
        torch.testing.assert_close(layer.inverse(x), other.inverse(x), atol=0, rtol=0)
        x = x.float()
        layer.float()
        assert_inverts(1e-3)


def test_a_narrow_network_takes_as_many_steps_as_it_has_degrees():
    layer = b.Autoregressive((50,), b.ExpAffine, partial(nets.MADE, hidden=5))
    calls = []
    step = layer.net.step
    layer.net.step = lambda *args: calls.append(step(*args)) or calls[-1]
    layer.inverse(torch.randn(2, 50))
    assert [theta.shape[1] for theta in calls] == layer.net.degrees.diff(
        prepend=torch.zeros(1, dtype=int), append=torch.tensor([50])
    ).tolist()


def test_dropout_reaches_the_inverse_while_training():
    layer = b.Autoregressive((6,), b.ExpAffine, partial(nets.MADE, hidden=24, dropout=0.5))
    layer = randomize(layer).train()
    z = event(layer, 4)
    assert not torch.equal(layer.inverse(z)[0], layer.inverse(z)[0])
    assert torch.equal(layer.eval().inverse(z)[0], layer.inverse(z)[0])


def test_sequential_layers_are_those_that_run_backwards():
    layer = partial(b.Autoregressive, univariate=b.ExpAffine, net=NETS["made"])
    inverse = partial(b.Inverse, bijection=layer)
    flow = b.Chain((6,), {"a": layer, "b": inverse, "c": partial(b.Inverse, bijection=inverse)})
    assert sequential_layers(flow) == [flow.b.bijection]
    inside = b.Inverse((6,), partial(b.Chain, layers={"a": layer, "b": layer}))
    assert sequential_layers(inside) == [*inside.bijection]
    assert not sequential_layers(b.Chain((6,), {"a": layer}))


# -- vector couplings


def test_the_conditioner_reads_the_conditioning_half_before_that_is_mapped():
    net = partial(nets.ResidualMLP, hidden=8)
    layer = b.Coupling((5,), b.ExpAffine, net, b.Alternate, unconditional=b.ActNorm)
    randomize(layer)
    x = event(layer, 4)
    z, _ = layer(x)
    conditioning, transformed = layer.partition.split(x)
    z_conditioning, z_transformed = layer.partition.split(z)
    torch.testing.assert_close(z_conditioning, layer.unconditional(conditioning)[0])
    theta = layer.net(conditioning).unflatten(1, (2, -1)).movedim(1, -1)
    torch.testing.assert_close(z_transformed, layer.univariate(transformed, theta)[0])


def test_linear_layers_of_tables_stay_accurate():
    """At D = 63, trained to whiten data of condition 10³: float32 against float64, and the way back."""
    torch.manual_seed(0)
    layer = b.LULinear((63,), start="identity")
    mix = torch.linalg.qr(torch.randn(63, 63))[0] * torch.logspace(0, -3, 63)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(300):
        z, log_det = layer(torch.randn(256, 63) @ mix.T)
        loss = (0.5 * z.square().sum(1) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.linalg.cond(layer.weight()) > 100
        x = torch.randn(256, 63) @ mix.T
        z, log_det = layer(x)
        torch.testing.assert_close(layer.inverse(z)[0], x, atol=2e-6 * x.abs().max().item(), rtol=0)
        exact, exact_log_det = layer.double()(x.double())
        torch.testing.assert_close(z.double(), exact, atol=1e-5 * exact.abs().max().item(), rtol=0)
        torch.testing.assert_close(log_det.double(), exact_log_det, atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(x[:1].double())[1], jacobian_log_det(layer, x[:1].double(), None))


# -- the same weights in other people's code


class SoftplusAffine(Univariate):
    """nflows' affine map: softplus scale, then shift."""

    params = 2

    def forward(self, x, theta):
        scale = torch.nn.functional.softplus(theta[..., 0]) + 1e-3
        return x * scale + theta[..., 1], scale.log()

    def inverse(self, y, theta):
        scale = torch.nn.functional.softplus(theta[..., 0]) + 1e-3
        return (y - theta[..., 1]) / scale, -scale.log()


class BentAffine(Univariate):
    """zuko's affine map: log-scale bent below log 1000, after the shift."""

    params = 2

    def forward(self, x, theta):
        s = theta[..., 1] / (1 + (theta[..., 1] / torch.log(torch.tensor(1e-3))).abs())
        return x * s.exp() + theta[..., 0], s

    def inverse(self, y, theta):
        s = theta[..., 1] / (1 + (theta[..., 1] / torch.log(torch.tensor(1e-3))).abs())
        return (y - theta[..., 0]) * (-s).exp(), -s


@torch.no_grad()
def copy_linear(mine, theirs, rows=slice(None), columns=slice(None)):
    mine.weight.copy_(theirs.weight[rows][:, columns])
    mine.bias.copy_(theirs.bias[rows])


def copy_masked(mine, linears, degrees, elements):
    """Weights of a masked network whose hidden units are not sorted by degree."""
    order = degrees.argsort(stable=True)
    assert torch.equal(degrees[order], mine.degrees)
    for i, (ours, theirs) in enumerate(zip(mine.linears, linears, strict=True)):
        rows = order if i < len(linears) - 1 else slice(None)
        copy_linear(ours, theirs, rows, order if i else slice(elements))


def assert_same(mine, theirs, x):
    """Both directions and their log-determinants, in float64."""
    z, log_det = mine(x)
    for one, other in zip((z, log_det, *mine.inverse(z)), (*theirs(x), *theirs.inverse(z)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
def test_maf_against_nflows(residual):
    """Three layers, a reversal after each."""
    transforms = pytest.importorskip("nflows.transforms")
    layers = []
    for _ in range(3):
        made = transforms.MaskedAffineAutoregressiveTransform(
            6, 20, num_blocks=2 if residual else 1, use_residual_blocks=residual
        )
        layers += [made, transforms.ReversePermutation(6)]
    theirs = transforms.CompositeTransform(layers).double()
    net = partial(nets.ResidualMADE if residual else nets.MADE, hidden=20)
    ours = b.Chain(
        (6,), {"a": partial(b.Autoregressive, univariate=SoftplusAffine, net=net), "b": b.Reverse}, repeat=3
    ).double()
    for mine, other in zip(ours, layers[::2]):
        net = other.autoregressive_net
        blocks = [linear for block in net.blocks for linear in (block.linear_layers if residual else [block.linear])]
        copy_masked(mine.a.net, [net.initial_layer, *blocks, net.final_layer], net.initial_layer.degrees, 6)
    assert_same(ours, theirs, torch.randn(50, 6).double())


@pytest.mark.parametrize("contexts", [0, 3])
def test_maf_against_zuko(contexts):
    flows = pytest.importorskip("zuko.flows.autoregressive")
    theirs = flows.MaskedAutoregressiveTransform(5, contexts, hidden_features=(20, 20))
    linears = [layer for layer in theirs.hyper if hasattr(layer, "weight")]
    net = partial(nets.MADE, hidden=20)
    ours = b.Autoregressive((5,), BentAffine, net, context_shape=(contexts,) if contexts else None)
    degrees = torch.arange(20) % 5 if contexts else torch.arange(20) % 4 + 1
    copy_masked(ours.net, linears, degrees, 5)
    x, context = torch.randn(50, 5), None
    if contexts:  # the last inputs of their first layer
        ours.net.context.weight.data.copy_(linears[0].weight[degrees.argsort(stable=True), 5:])
        context = torch.randn(50, contexts)
    transform = theirs(context)
    z, log_det = ours(x, context)
    torch.testing.assert_close(z, transform(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(x, z), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.inverse(z, context)[0], transform.inv(z), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def to_our_spline(spline, theta, divide=1.0):
    """nflows' spline parameters in the last axis as ours: slopes without our shift, logits ``divide``-d as they do."""
    logits, slopes = theta.split([2 * spline.bins, spline.bins - 1], -1)
    return torch.cat((logits / divide, slopes - spline.shift), -1)


def test_nsf_autoregressive_against_nflows():
    transforms = pytest.importorskip("nflows.transforms")
    theirs = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        6, 20, num_bins=8, tails="linear", tail_bound=3.0
    ).double()
    ours = b.Autoregressive((6,), b.RationalQuadratic, partial(nets.ResidualMADE, hidden=20)).double()
    net = theirs.autoregressive_net
    blocks = [linear for block in net.blocks for linear in block.linear_layers]
    with torch.no_grad():  # large weights: bins far from equal
        for linear in [*blocks, net.final_layer]:
            linear.weight.normal_(std=0.5)
    copy_masked(ours.net, [net.initial_layer, *blocks, net.final_layer], net.initial_layer.degrees, 6)
    bias = ours.net.linears[-1].bias.data
    bias.copy_(to_our_spline(ours.univariate, bias.view(6, -1)).flatten())
    assert_same(ours, theirs, 2 * torch.randn(200, 6).double())


@pytest.mark.parametrize("first", [0, 1])
def test_nsf_coupling_against_nflows(first):
    """With a residual network and an unconditional spline of the conditioning half."""
    transforms = pytest.importorskip("nflows.transforms")
    resnet = pytest.importorskip("nflows.nn.nets.resnet")
    mask = (torch.arange(7) % 2 == first).int()
    theirs = transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask,
        lambda n, m: resnet.ResidualNet(n, m, hidden_features=16, num_blocks=2),
        num_bins=8,
        tails="linear",
        tail_bound=3.0,
        apply_unconditional_transform=True,
    ).double()
    unconditional = partial(b.Elementwise, univariate=b.RationalQuadratic)
    ours = b.Coupling(
        (7,),
        b.RationalQuadratic,
        partial(nets.ResidualMLP, hidden=16),
        partial(b.Alternate, first=first),
        unconditional,
    ).double()
    net, spline = theirs.transform_net, ours.univariate
    with torch.no_grad():
        net.final_layer.weight.normal_()
    copy_linear(ours.net.first, net.initial_layer)
    for i, block in enumerate(net.blocks):
        copy_linear(ours.net.ones[i], block.linear_layers[0])
        copy_linear(ours.net.others[i], block.linear_layers[1])
    with torch.no_grad():
        weight = net.final_layer.weight.unflatten(0, (-1, spline.params)).clone()
        weight[:, : 2 * spline.bins] /= 4  # √hidden
        bias = to_our_spline(spline, net.final_layer.bias.view(-1, spline.params), 4)
        ours.net.last.weight.copy_(weight.transpose(0, 1).flatten(0, 1))
        ours.net.last.bias.copy_(bias.T.flatten())
        own = theirs.unconditional_transform
        own = torch.cat((own.unnormalized_widths, own.unnormalized_heights, own.unnormalized_derivatives), -1)
        ours.unconditional.theta.copy_(to_our_spline(spline, own))
    assert_same(ours, theirs, 2 * torch.randn(200, 7).double())


@pytest.mark.parametrize("make", [flows.maf, flows.iaf])
def test_iaf_is_the_inverse_of_mafs_layers(make):
    """The same weights: the parameters of both have the same names but for Inverse's."""
    flow = make((5,), hidden=8, steps=2)
    names = [name.replace("autoregressive.bijection.", "autoregressive.") for name, _ in flow.named_parameters()]
    assert names == [name for name, _ in flows.maf((5,), hidden=8, steps=2).named_parameters()]
    assert len(sequential_layers(flow.bijection)) == (0 if make is flows.maf else 2)
