"""C++ functions give what torch's operations give, in every layout, and their absence changes nothing but the speed."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections import spline
from flowtrain.bijections.bijection import apply_in_turn, fuse
from flowtrain.bijections.channels import FusedVectorAffine
from flowtrain.bijections.native import coupling, elementwise_affine, rational_quadratic, vector_affine
from flowtrain.flows.parts import permuted_lu_actnorm
from flowtrain.nets import made, mlp
from flowtrain.runtime import dense, native

SOURCES = rational_quadratic.SOURCE, vector_affine.SOURCE, elementwise_affine.SOURCE, dense.SOURCE
needs_compiler = pytest.mark.skipif(not native.load(SOURCES[0]), reason="no C++ compiler")
ROWS, SIZE, PARAMS = 70, 5, 23  # more than a block of numbers, and no multiple of one
SETTINGS = b.RationalQuadratic((SIZE,))._settings()


def thetas(dtype):
    """θ (B, D, parameters) as conditioners return it, or (D, parameters) where all rows share it."""
    random = partial(torch.randn, dtype=dtype)
    return {
        "by element": random(ROWS, SIZE, PARAMS),
        "by parameter": random(ROWS, PARAMS, SIZE).movedim(1, -1),
        "shared": random(SIZE, PARAMS),
        "expanded": random(1, SIZE, PARAMS).expand(ROWS, -1, -1),
    }


def gradients(function, *inputs):
    """The results of ``function``, and the gradients of a random sum of them."""
    torch.manual_seed(1)
    results = function(*inputs)
    return *results, *torch.autograd.grad(results, inputs, [torch.randn_like(one) for one in results])


@needs_compiler
@pytest.mark.parametrize("kind", [b.RationalQuadratic, b.SoftClippedRationalQuadratic])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", list(thetas(torch.float32)))
def test_a_spline_by_cpp_is_the_spline_by_torch(layout, inverse, kind):
    torch.manual_seed(0)
    one = kind((SIZE,))
    by_cpp, by_torch = (one.inverse, one._inverse) if inverse else (one.forward, one._forward)
    x = (3 * torch.randn(ROWS, 2 * SIZE, dtype=torch.float64))[:, ::2].requires_grad_()  # some lie outside
    theta = (3 * thetas(torch.float64)[layout]).requires_grad_()
    assert by_cpp(x, theta)[0].grad_fn.name() == "_SplineBackward"
    found, expected = gradients(by_cpp, x, theta), gradients(by_torch, x, theta)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    x, theta = (one.detach().float().requires_grad_() for one in (x, theta))
    found = [one.double() for one in gradients(by_cpp, x, theta)[:2]]
    exact, rough = by_torch(x.double(), theta.double()), by_torch(x, theta)
    for one, true, other in zip(found, exact, rough):  # as near to the exact numbers as torch's operations come
        errors = [(numbers - true).abs().flatten() for numbers in (one, other)]
        by_cpp, by_torch = (error.quantile(0.95) for error in errors)  # single ones depend on how they are rounded
        assert by_cpp <= 2 * by_torch + 1e-6


@needs_compiler
@pytest.mark.parametrize("part", [slice(1, -1), slice(None, None, 2)])
def test_parameters_that_are_part_of_a_larger_tensor(part):
    spline = b.RationalQuadratic((SIZE,))
    x, more = torch.randn(ROWS, SIZE), torch.randn(ROWS, SIZE, 2 * PARAMS)
    theta = more[..., part][..., :PARAMS].requires_grad_()
    assert not theta.is_contiguous()
    for one, other in zip(gradients(spline, x.requires_grad_(), theta), gradients(spline._forward, x, theta)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_shapes_that_broadcast_or_do_not_fit():
    spline, x = b.RationalQuadratic((SIZE,)), torch.randn(ROWS, SIZE)
    theta = torch.randn(1, SIZE, PARAMS)
    assert all(torch.equal(*pair) for pair in zip(spline(x, theta), spline._forward(x, theta)))
    assert spline(x[:0], torch.randn(0, SIZE, PARAMS))[0].shape == (0, SIZE)
    with pytest.raises((RuntimeError, ValueError)):
        spline(x, torch.randn(ROWS, SIZE, PARAMS - 1))
    with pytest.raises((RuntimeError, ValueError)):
        spline(x, torch.randn(ROWS - 1, SIZE, PARAMS))


@needs_compiler
def test_a_spline_takes_what_is_not_finite_and_the_ends_of_its_interval():
    spline = b.RationalQuadratic((5,))
    x = torch.tensor([[float("nan"), float("inf"), -3.0, 3.0, -1e30]])
    theta = torch.randn(1, 5, PARAMS)
    y, log_slope = spline(x, theta)
    torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_slope, spline._forward(x, theta)[1], rtol=0, atol=1e-5)
    assert spline(torch.zeros(1, 5), torch.full_like(theta, float("nan")))[0].isnan().all()
    big = 1e4 * torch.randn(1, 5, PARAMS)
    assert all(one.isfinite().all() for one in spline(torch.randn(1, 5), big))


@needs_compiler
def test_images_with_channels_last():
    spline = b.RationalQuadratic((2, 3, 4))
    x = torch.randn(6, 2, 3, 4, dtype=torch.float64)
    h = torch.randn(6, 2 * PARAMS, 3, 4, dtype=torch.float64)
    theta = h.to(memory_format=torch.channels_last).unflatten(1, (PARAMS, 2)).movedim(1, -1)
    for one, other in zip(
        gradients(spline, x.requires_grad_(), theta.requires_grad_()), gradients(spline._forward, x, theta)
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@needs_compiler
@pytest.mark.parametrize("size", [1, 2, 7, vector_affine.LONGEST])
def test_affine_maps_of_vectors_by_cpp_are_the_layers_in_turn(size):
    torch.manual_seed(0)
    layers = permuted_lu_actnorm((size,)).double()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    (fused,) = fuse(layers)
    assert isinstance(fused, FusedVectorAffine)
    x = torch.randn(37, size, dtype=torch.float64).requires_grad_()
    numbers = [x, *layers.parameters()]

    def run(function):
        return gradients(lambda *_: function(x), *numbers)

    for one, other in zip(run(fused), run(lambda x: apply_in_turn(layers, x, None))):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(fused.inverse(fused(x)[0])[0], x)
    longer = permuted_lu_actnorm((vector_affine.LONGEST + 1,))
    assert len(fuse(longer)) == 3


SPLINES = partial(b.Elementwise, univariate=b.RationalQuadratic)
AFFINE = [b.ExpAffine, b.SigmoidAffine, b.DoubleSigmoidAffine, b.TanhAffine]


def affine_of(kind, inverse, places, dtype=torch.float64):
    """The maps of some numbers of vectors by C++ and by torch, as functions of x and θ."""
    one = kind((SIZE if places is None else len(places),)).to(dtype)
    for weight in one.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))

    def by_torch(x, theta):
        y, log = (one.inverse if inverse else one.forward)(x if places is None else x[:, places], theta)
        return y if places is None else x.index_copy(1, places, y), log.sum(1)

    return one, lambda x, theta: one.of_vectors(x, theta, places, inverse, by_torch), by_torch


@needs_compiler
@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("places", [None, torch.tensor([3, 0])])
@pytest.mark.parametrize("layout", ["by element", "by parameter", "expanded"])
def test_affine_maps_of_numbers_by_cpp_are_those_by_torch(layout, places, inverse, kind):
    torch.manual_seed(0)
    one, by_cpp, by_torch = affine_of(kind, inverse, places)
    x = torch.randn(ROWS, 2 * SIZE, dtype=torch.float64)[:, ::2].requires_grad_()
    theta = (2 * thetas(torch.float64)[layout][:, : None if places is None else len(places), 3:5]).detach()
    theta[3, 0, 1], theta[4, 0, 1] = 100.0, -100.0  # beyond the bounds of scales
    theta.requires_grad_()
    assert by_cpp(x, theta)[0].grad_fn.name() == "_AffineElementsBackward"
    weights = [*one.parameters()]
    expected = gradients(lambda *given: by_torch(*given[:2]), x, theta, *weights)
    for mine, other in zip(gradients(lambda *given: by_cpp(*given[:2]), x, theta, *weights), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
    slopes = []
    for function in (by_cpp, by_torch):  # and a second derivative
        y, log_det = function(x, theta)
        (slope,) = torch.autograd.grad(y.sin().sum() + log_det.cos().sum(), x, create_graph=True)
        slopes.append(torch.autograd.grad(slope.square().sum(), theta)[0])
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: b.Coupling((SIZE,), b.ExpAffine, nets.MLP),
        lambda: b.Autoregressive((SIZE,), b.ExpAffine, nets.MADE),
        lambda: b.Coupling((SIZE,), b.RationalQuadratic, nets.MLP, unconditional=SPLINES),
    ],
)
def test_hooks_of_a_map_are_called(layer):
    layer, seen = layer(), []
    layer.univariate.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(ROWS, SIZE))
    assert seen == [1]


@needs_compiler
@pytest.mark.parametrize("kind", AFFINE)
def test_affine_maps_in_float32_are_as_near_to_exact_as_torch_comes(kind):
    torch.manual_seed(0)
    one, by_cpp, by_torch = affine_of(kind, False, None, torch.float32)
    x, theta = torch.randn(2000, SIZE), 3 * torch.randn(2000, SIZE, 2)
    theta[:1000] /= 1e4  # numbers near 0, of which tanh is nearly the number itself
    found, rough = ([*map(torch.Tensor.double, function(x, theta))] for function in (by_cpp, by_torch))
    one.double()
    for mine, other, true in zip(found, rough, by_torch(x.double(), theta.double())):
        errors = [((numbers - true) / true.abs().clamp(min=1e-3)).abs().flatten() for numbers in (mine, other)]
        mine, other = (error.quantile(0.99) for error in errors)
        assert mine <= 2 * other + 2e-7


@needs_compiler
def test_affine_maps_take_what_is_not_finite_and_subclasses_have_their_own():
    one = b.ExpAffine((SIZE,))
    x, theta = torch.randn(3, SIZE), torch.randn(3, SIZE, 2)
    x[0, 0], x[1, 1], theta[2, 2, 1] = torch.inf, torch.nan, torch.nan
    found, expected = one.of_vectors(x, theta, None, False, None), one(x, theta)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    torch.testing.assert_close(found[1], expected[1].sum(1), equal_nan=True)

    class Own(b.ExpAffine):
        def scale(self, raw):
            return torch.ones_like(raw), torch.zeros_like(raw)

    assert Own((SIZE,)).of_vectors(x, theta, None, False, None) is None
    assert one.of_vectors(x, theta[:1], None, False, None) is None  # torch broadcasts


@needs_compiler
@pytest.mark.parametrize("size", [2, 5, 6])
@pytest.mark.parametrize(
    "partition", [b.Halves, partial(b.Halves, swap=True), b.Alternate, partial(b.Alternate, first=1)]
)
@pytest.mark.parametrize("kind, share", [(b.RationalQuadratic, [0]), (b.SoftClippedRationalQuadratic, [])])
def test_one_call_maps_both_parts_of_a_coupling(kind, share, partition, size, monkeypatch):
    torch.manual_seed(0)
    unconditional = partial(b.Elementwise, univariate=kind, share=share)
    layer = b.Coupling((size,), kind, partial(nets.MLP, hidden=8), partition, unconditional).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = (2 * torch.randn(ROWS, size, dtype=torch.float64)).requires_grad_()
    inputs = x, *layer.parameters()
    found, calls = gradients(lambda x, *_: layer(x), *inputs), []
    for module, name in ((spline, "coupling"), (rational_quadratic, "spline_of_parts")):  # first the network by itself
        monkeypatch.setattr(module, name, lambda *args: calls.append(args))
        for one, other in zip(found, gradients(lambda x, *_: layer(x), *inputs)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    assert len(calls) == 3
    assert [len(one) for one in layer(x[:0])] == [0, 0]
    torch.testing.assert_close(layer.inverse(found[0])[0], x)
    monkeypatch.undo()
    assert torch.autograd.gradgradcheck(lambda x: layer(x), (x[:2].detach().requires_grad_(),))


OPERATORS = {
    "spline": lambda x, theta: rational_quadratic.spline(x, theta, SETTINGS, True, None),
    "spline of parts": lambda x, theta: rational_quadratic.spline_of_parts(
        x, theta[:, :3], theta[0, 3:], torch.tensor([0, -1, 1, -2, 2]), SETTINGS, None
    ),
    "affine": lambda x, theta: elementwise_affine.affine(
        x, theta[..., :2], (elementwise_affine.EXPONENTIAL, 0.0, 0.0, 0.0), None, None, True, None
    ),
    "affine of parts": lambda x, theta: elementwise_affine.affine(
        x,
        theta[:, :2, :2],
        (elementwise_affine.TANH, 0.0, 0.0, 0.0),
        theta[0, 0, :2],
        torch.tensor([0, 3]),
        False,
        None,
    ),
    "network": lambda x, theta: [dense.dense(x, dense.kinds_of_mlp(1), weights(theta))],
    "coupling": lambda x, theta: coupling.coupling(
        x,
        theta[0, 3:],
        coupling.Plan(slice(0, 2), dense.kinds_of_mlp(1), torch.tensor([0, -1, 1, -2, 2]), SETTINGS),
        weights(theta, 2),
        None,
    ),
}


def weights(theta, inputs=SIZE):
    """Those of a network of ``inputs`` numbers, 16 units and PARAMS·3 outputs, made of θ."""
    numbers = theta.flatten()
    sizes = [(16, inputs), (16,), (3 * PARAMS, 16), (3 * PARAMS,)]
    return [numbers[: math.prod(size)].view(size) for size in sizes]


@needs_compiler
@pytest.mark.parametrize("name", OPERATORS)
def test_the_compiler_calls_cpp_as_operators(name, monkeypatch):
    """With the same numbers, and shapes and gradients that torch has checked."""
    function, calls = OPERATORS[name], []
    x = torch.randn(ROWS, SIZE, dtype=torch.float64).requires_grad_()
    theta = (0.3 * torch.randn(ROWS, SIZE, PARAMS, dtype=torch.float64)).requires_grad_()
    expected = gradients(function, x, theta)
    monkeypatch.setattr(native, "as_operator", lambda *_: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for module in (rational_quadratic, elementwise_affine, dense, coupling):
        operator = module._operator
        monkeypatch.setattr(module, "_operator", lambda *args, o=operator: (calls.append((o, args)), o(*args))[1])
    for one, other in zip(gradients(function, x, theta), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    monkeypatch.undo()
    ((operator, arguments),) = calls
    torch.library.opcheck(operator, arguments)


NETWORKS = {
    "MLP": partial(nets.MLP, (SIZE,), out=7, hidden=20, depth=3),
    "MLP of two layers": partial(nets.MLP, (SIZE,), out=33, hidden=16, depth=1),
    "ResidualMLP": partial(nets.ResidualMLP, (SIZE,), out=PARAMS),
    "ResidualMLP of one unit": partial(nets.ResidualMLP, (SIZE,), out=PARAMS, blocks=1, hidden=1),
    "with a context": partial(nets.ResidualMLP, (SIZE,), out=PARAMS, hidden=24, context_shape=(3,)),
    "MADE": partial(nets.MADE, (SIZE,), out=3, hidden=40),
    "ResidualMADE": partial(nets.ResidualMADE, (SIZE,), out=3, hidden=40),
}


def network(name, dtype=torch.float64):
    torch.manual_seed(0)
    net = NETWORKS[name]().to(dtype)
    for parameter in net.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, ROWS, 200])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_by_cpp_is_the_network_by_torch(name, rows, monkeypatch):
    net = network(name)
    x = torch.randn(rows, SIZE, dtype=torch.float64).requires_grad_()
    context = torch.randn(rows, 3, dtype=torch.float64) if name == "with a context" else None

    def run(*inputs):
        return (net(inputs[0], context),)

    inputs = x, *net.parameters()
    grad_fn = net(x, context).grad_fn
    while grad_fn.name() != "_DenseBackward":  # the views of its output, in MADE
        grad_fn = grad_fn.next_functions[0][0]
    found, in_single = gradients(run, *inputs), net.float()(x.float(), None if context is None else context.float())
    with torch.no_grad():
        assert torch.equal(net(x.float(), None if context is None else context.float()), in_single)
    net = network(name)
    for module in (made, mlp):
        monkeypatch.setattr(module, "dense", lambda *args: None)
    expected = gradients(run, *(x, *net.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(in_single.double(), expected[0], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_network_by_cpp_gives_what_is_asked_of_a_network():
    net, x = network("ResidualMLP"), torch.randn(3, SIZE, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(net, (x.clone().requires_grad_(),))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: net(row[None])[0]))(x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda x: net(x).sum(0), x).movedim(1, 0), jacobian)
    x[1, 0] = torch.nan
    assert net(x).isnan().all(1).tolist() == [False, True, False]
    calls = []
    handle = net.ones[1].register_forward_hook(lambda *_: calls.append(1))
    net(x)
    handle.remove()
    assert calls == [1]
    last, net.last = net.last, torch.nn.Sequential(net.last, torch.nn.Softplus())  # a layer of the user's
    assert (net(x)[0] > 0).all()
    net.last = last
    net.dropout.p = 0.5
    torch.manual_seed(0)
    dropped, whole = net(x), net.eval()(x)
    assert not torch.equal(dropped[0], whole[0])


@needs_compiler
def test_networks_share_the_work_among_threads():
    net, threads = network("ResidualMLP", torch.float32), torch.get_num_threads()
    x = torch.randn(1000, SIZE, requires_grad=True)
    try:
        found = {}
        for number in (1, 3):
            torch.set_num_threads(number)
            found[number] = gradients(lambda *inputs: (net(inputs[0]),), x, *net.parameters())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in list(zip(*found.values()))[:2])  # those of each row
    for pair in zip(*found.values()):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-3)


@needs_compiler
def test_without_openmp_the_parts_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tried = []

    def run(*command):
        tried.append(command)
        if "-fopenmp" in command:
            raise subprocess.CalledProcessError(1, command)
        subprocess.run(command, check=True)

    monkeypatch.setattr(native, "_run", run)
    assert native.load.__wrapped__(dense.SOURCE)
    assert [("-march=native" in command, "-fopenmp" in command) for command in tried[:2]] == [
        (True, True),
        (True, False),
    ]


@needs_compiler
def test_derivatives_that_cpp_lacks_come_from_torch():
    spline, theta = b.RationalQuadratic((2,), bins=3), torch.randn(3, 2, 8, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(spline, (x.clone().requires_grad_(), theta.clone().requires_grad_()))
    _, (tangent, _) = torch.func.jvp(lambda x: spline(x, theta), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, spline(x, theta)[1].exp())
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, theta: spline(x[None], theta[None])[0][0]))(x, theta)
    torch.testing.assert_close(jacobian.diagonal(dim1=1, dim2=2), tangent)
    layers = permuted_lu_actnorm((2,)).double()

    def run(x, *_):
        return fuse(layers)[0](x)

    assert torch.autograd.gradgradcheck(run, (x.clone().requires_grad_(), *layers.parameters()))


@needs_compiler
def test_threads_share_the_work():
    spline, x = b.RationalQuadratic((4,)), torch.randn(3001, 4).requires_grad_()
    theta, shared = torch.randn(3001, 4, PARAMS).requires_grad_(), torch.randn(4, PARAMS).requires_grad_()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(spline, x, theta), gradients(spline, x, shared)
        torch.set_num_threads(3)
        assert native.parts(x.numel(), PARAMS) == 3
        together = gradients(spline, x, theta), gradients(spline, x, shared)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(alone[0], together[0]))
    for pair in zip(alone[1], together[1]):  # a sum over rows, in another order
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "variables, why",
    [
        ({"FLOWTRAIN_NATIVE": "0"}, "none: FLOWTRAIN_NATIVE=0"),
        ({"CXX": "no-such-compiler"}, "none: no compiler (CXX, c++ or g++)"),
        ({"CXX": "false"}, "rational_quadratic.cpp cannot be built (Command '['false', '--version']'"),
    ],
)
def test_without_a_compiler_torch_computes_it(variables, why, tmp_path, monkeypatch, caplog):
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "find_compiler", native.find_compiler.__wrapped__)
    assert native.load.__wrapped__(SOURCES[0]) is None
    assert why in native.status() + caplog.text
    monkeypatch.setattr(native, "load", lambda source: None)
    spline, x, theta = b.RationalQuadratic((3,)), torch.randn(8, 3), torch.randn(8, 3, PARAMS)
    assert all(torch.equal(*pair) for pair in zip(spline(x, theta), spline._forward(x, theta)))
    assert len(fuse(permuted_lu_actnorm((3,)))) == 3


@needs_compiler
def test_processes_that_build_at_once_share_one_file(tmp_path):
    code = (
        "from flowtrain.runtime import native; from flowtrain.bijections.native import vector_affine as v;"
        " print(native.load(v.SOURCE))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert all(run.communicate()[0].startswith("<CDLL") for run in runs)
    (library,) = (tmp_path / "flowtrain" / "native").iterdir()
    assert library.suffix == ".so"


@needs_compiler
def test_a_home_that_cannot_be_written_has_a_folder_for_the_moment(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.load.__wrapped__(SOURCES[1])
