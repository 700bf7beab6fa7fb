"""Every layer of tests/layers.py against the contract of Bijection."""

import copy
from collections.abc import Iterator

import pytest
import torch
from audit import assert_exact, context_for, event, randomize
from layers import LAYERS, UNIVARIATE
from torch import nn

from flowtrain import bijections as b

EVERY = pytest.mark.parametrize("name", LAYERS)


def make(name, scale=0.1):
    torch.manual_seed(0)
    return randomize(LAYERS[name](), scale)


@EVERY
def test_exact_against_the_autograd_jacobian(name):
    assert_exact(make(name))


@EVERY
def test_round_trip_in_float32(name):
    layer = make(name).float()
    x, context = event(layer, 16, dtype=torch.float32), context_for(layer, 16, dtype=torch.float32)
    z, log_det = layer(x, context)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(layer.inverse(z, context)[0], x, atol=1e-4, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(name, batch):
    layer = make(name)
    x, context = event(layer, batch), context_for(layer, batch)
    z, log_det = layer(x, context)
    assert z.shape == (batch, *layer.out_shape) and log_det.shape == (batch,)
    back, log_det = layer.inverse(z, context)
    assert back.shape == x.shape and log_det.shape == (batch,)


@EVERY
def test_examples_do_not_see_each_other_nor_strides(name):
    layer = make(name)
    x, context = event(layer, 6), context_for(layer, 6)
    z, log_det = layer(x, context)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)[::2]
    z2, log_det2 = layer(strided, None if context is None else context[::2])
    torch.testing.assert_close(z2, z[::2])
    torch.testing.assert_close(log_det2, log_det[::2])


@EVERY
def test_every_parameter_gets_a_gradient(name):
    layer = make(name).requires_grad_()
    layer.train()
    if not list(layer.parameters()):
        pytest.skip("no parameters")
    z, log_det = layer(event(layer, 8), context_for(layer, 8))
    (z.square().sum() + log_det.sum()).backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        if "additive" not in name:
            assert parameter.grad.abs().sum() > 0, key


class SameOutput(nn.Module):
    """A network whose second run, as a whole or in steps, returns what the first one did."""

    def __init__(self, net):
        super().__init__()
        self.net, self.outputs = net, []

    def forward(self, *inputs):
        if not self.outputs:
            self.outputs.append(self.net(*inputs))
        return torch.cat(self.outputs, 1)

    def init_cache(self, x, context):
        return iter(torch.cat(self.outputs, 1).split(1, 1)) if self.outputs else self.net.init_cache(x, context)

    def step(self, x, cache):
        if isinstance(cache, Iterator):
            return next(cache)
        self.outputs.append(self.net.step(x, cache))
        return self.outputs[-1]


@EVERY
def test_log_det_stays_float32_under_autocast(name):
    layer = make(name).float()
    # The input that the inverse gives a network differs from the original in its last bits. Rounded to bfloat16, that
    # may change the output by 2⁻⁸ of its size, on one CPU and not on another. With the same output in both directions
    # what is left is the layer's own arithmetic, which must be as exact as without autocast.
    for part in layer.modules():
        if isinstance(part, b.Coupling | b.Conditional | b.Autoregressive):
            part.net = SameOutput(part.net)
    x, context = event(layer, 4, dtype=torch.float32), context_for(layer, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = layer(x, context)
        back, inverse_log_det = layer.inverse(z, context)
    assert z.dtype == log_det.dtype == back.dtype == inverse_log_det.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_det, -inverse_log_det, atol=1e-3, rtol=1e-4)


@EVERY
def test_state_dict_round_trip_keeps_the_map(name):
    layer = make(name)
    torch.manual_seed(7)  # other random starts, permutations among them
    other = LAYERS[name]().double().eval()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x, context = event(layer), context_for(layer)
    torch.testing.assert_close(other(x, context), layer(x, context), rtol=0, atol=0)


@EVERY
def test_nothing_is_lost_at_large_values(name):
    layer = make(name, scale=0.05)
    x, context = 1e4 * event(layer), context_for(layer)
    z, log_det = layer(x, context)
    assert z.isfinite().all() and log_det.isfinite().all()
    # to the scale of the input: shifts that grow with it cancel, and scales of e^±10 magnify what rounding leaves
    torch.testing.assert_close(layer.inverse(z, context)[0], x, rtol=0, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize("name", UNIVARIATE)
def test_parameters_that_all_examples_share(name):
    """θ without a batch is θ repeated, in both directions and for gradients."""
    torch.manual_seed(0)
    map = UNIVARIATE[name](shape=(3, 2)).double()
    x = torch.randn(7, 3, 2).double()
    theta = (0.5 * torch.randn(3, 2, map.params).double()).requires_grad_()
    for run in (map, map.inverse):
        results = []
        for given in (theta, theta.expand(7, -1, -1, -1)):
            y, log_derivative = run(x, given)
            assert y.shape == log_derivative.shape == x.shape
            gradient = torch.autograd.grad((y.sin() + log_derivative.cos()).sum(), theta)
            results.append((y, log_derivative, *gradient))
        torch.testing.assert_close(*results)


def test_the_table_is_complete():
    """Each public bijection is in the table.

    Not the base, nor those that start from integers, gaps, bounds, circles or noise.
    """
    elsewhere = {
        b.AddNoise,
        b.Bijection,
        b.BoundColumns,
        b.CircleToLine,
        b.Dequantize,
        b.DequantizeColumns,
        b.FillMissing,
        b.VariationalDequantize,
    }
    elsewhere |= {b.Logit, b.Turns, b.Support, b.Box, b.Positive, b.Simplex}
    found = {type(module) for make in LAYERS.values() for module in make().modules()}
    public = {kind for kind in vars(b).values() if isinstance(kind, type) and issubclass(kind, b.Bijection)}
    assert public - elsewhere <= found


class Wrong(b.ActNorm):
    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z, 1.01 * log_det


def test_the_audit_catches_a_log_det_that_is_one_percent_off():
    layer = randomize(Wrong((3,)))
    with pytest.raises(AssertionError):
        assert_exact(layer)
