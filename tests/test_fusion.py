"""Fused layers have the values, log-determinants and gradients of the same layers run one by one."""

from functools import partial

import pytest
import torch
from audit import assert_exact, context_for, event, randomize
from layers import conv, glow_step

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections.bijection import fuse
from flowtrain.bijections.channels import FusedChannelAffine
from flowtrain.bijections.native import vector_affine
from flowtrain.flow import Flow
from flowtrain.runtime import fusion

image = (4, 4, 6)
CHAINS = {  # layers, and how many remain after fusion
    "glow": (dict(norm=b.ActNorm, mixing=b.LULinear), 1),
    "glow_dense": (dict(norm=b.ActNorm, mixing=b.DenseLinear), 1),
    "spline": (dict(permutation=b.Shuffle, lu=partial(b.LULinear, start="identity"), actnorm=b.ActNorm), 1),
    "norms": (dict(a=b.ActNorm, b=b.ActNorm), 1),
    "permutations": (dict(a=b.Reverse, b=b.Shuffle), 1),
    "norm_permuted": (dict(a=b.ActNorm, b=b.DiagonalFirst), 1),
    "all": (dict(a=b.LULinear, b=b.ActNorm, c=b.Reverse, d=b.DenseLinear, e=b.ActNorm, f=b.ActNorm), 1),
    "interrupted": (dict(a=b.ActNorm, b=b.LULinear, c=b.BatchNorm, d=b.LULinear, e=b.ActNorm), 3),
    "between": (dict(a=b.Center, b=b.ActNorm, c=b.Reverse, d=b.Center), 3),
}


def gradients(layer, direction, x, context):
    """The outputs of ``direction``, and the gradients of a sum of all of them."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    z, log_det = direction(x, context)
    (z * torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z)).sum().add(log_det.square().sum()).backward()
    return [z, log_det, x.grad, *(parameter.grad for parameter in layer.parameters())]


def assert_same(layer, x, context=None):
    """Check that the fused layer equals the layers run one by one, in both directions."""
    for direction in (layer.__call__, layer.inverse):
        fused = gradients(layer, direction, x, context)
        with fusion.layer_by_layer():
            plain = gradients(layer, direction, x, context)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_maps_fuse_into_one_product(name, memory_format):
    layers, left = CHAINS[name]
    torch.manual_seed(0)
    chain = randomize(b.Chain(image, layers))
    links = fuse(chain)
    assert len(links) == left and any(isinstance(link, FusedChannelAffine) for link in links)
    with fusion.layer_by_layer():
        assert fuse(chain) == list(chain)
    x = event(chain).to(memory_format=memory_format)
    assert_same(chain, x)
    assert_exact(chain, x)


def test_layers_of_a_vector_have_no_product():
    """Short vectors pass through a C++ function, where there is one; tests/test_native.py."""
    chain = b.Chain((vector_affine.LONGEST + 1,), CHAINS["glow"][0])
    assert fuse(chain) == list(chain)


class DoubledActNorm(b.ActNorm):
    def forward(self, x, context=None):
        z, log_det = super().forward(x, context)
        return 2 * z, log_det


def test_a_subclass_that_overrides_forward_is_not_fused():
    chain = b.Chain(image, dict(mixing=b.LULinear, norm=DoubledActNorm, after=b.ActNorm, last=b.ActNorm))
    assert [type(link) for link in fuse(chain)] == [b.LULinear, DoubledActNorm, FusedChannelAffine]


@pytest.mark.parametrize("where", ["actnorm", "coupling.net.second"])
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_layer_with_a_hook_is_not_fused(where, hook):
    layers = {"actnorm": b.ActNorm, "mixing": b.LULinear, "coupling": partial(b.Coupling, univariate=b.SigmoidAffine)}
    layers["coupling"] = partial(layers["coupling"], net=partial(nets.ConvNet, hidden=6, norm=nets.ActNorm))
    chain = randomize(b.Chain(image, layers))
    calls = []
    getattr(chain.get_submodule(where), f"register_{hook}_hook")(lambda *_: calls.append(hook))
    z, log_det = chain(event(chain).requires_grad_())
    (z.sum() + log_det.sum()).backward()
    assert calls == [hook]


@pytest.mark.parametrize("context_shape", [None, (3,)])
@pytest.mark.parametrize("norm", [nets.ActNorm, nets.BatchNorm, None])
def test_norms_inside_a_network_fuse_into_its_convolutions(norm, context_shape):
    net = partial(nets.ConvNet, hidden=6, norm=norm)
    layer = randomize(b.Coupling(image, b.SigmoidAffine, net, context_shape=context_shape))
    assert_same(layer, event(layer), context_for(layer))


def test_a_whole_glow_equals_its_layers():
    level = partial(b.Chain, layers={"squeeze": b.Squeeze, "steps": glow_step})
    split_prior = partial(b.Conditional, univariate=b.ExpAffine, net=nets.ZeroConv)
    layer = randomize(b.MultiScale((3, 8, 8), levels=2, level=level, split_prior=split_prior))
    x = event(layer)
    fused = gradients(layer, layer.__call__, x, None)
    with fusion.layer_by_layer():
        plain = gradients(layer, layer.__call__, x, None)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    z = fused[0].detach()
    torch.testing.assert_close(layer.inverse(z)[0], x, rtol=1e-9, atol=1e-9)


def test_layers_are_initialized_as_without_fusion():
    """The fused layers standardize like the separate ones, and the norms of a network after them do too."""
    torch.manual_seed(0)
    layers = {
        "actnorm": b.ActNorm,
        "mixing": partial(b.LULinear, start="whitening"),
        "norm": b.ActNorm,
        "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=conv),
    }
    flow = Flow((4, 4, 4), partial(b.Chain, layers={**layers, "flatten": b.Flatten})).double()
    x = 3 + 2 * torch.randn(256, 4, 4, 4, dtype=torch.float64)
    x[:, 1] += x[:, 0]
    flow.initialize(x)
    inputs = []
    net = flow.bijection.coupling.net
    net.register_forward_hook(lambda _net, args, _out: inputs.append(args[0]))
    flow(x)
    std, mean = torch.std_mean(inputs[0], (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-9, rtol=0)
    inside = net.norm_first(net.first(inputs[0]))
    torch.testing.assert_close(inside.std((0, 2, 3), correction=0), torch.ones(6, dtype=torch.float64))
