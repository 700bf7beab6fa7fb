"""A step of Glow as one function: its gradients, whatever asks for them, are those of its layers one by one."""

from functools import partial

import pytest
import torch
from audit import randomize

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections.bijection import fuse
from flowtrain.bijections.step import FusedStep
from flowtrain.runtime import fusion

SHAPE = (4, 4, 6)


def build(norm=nets.ActNorm, dropout=0.0, partition=b.Halves, **options):
    """Build a chain of two steps, away from its neutral start, in float64."""
    torch.manual_seed(0)
    net = partial(nets.ConvNet, hidden=6, norm=norm, dropout=dropout)
    coupling = partial(b.Coupling, univariate=b.SigmoidAffine, net=net, partition=partition)
    layers = {"norm": b.ActNorm, "mixing": b.LULinear, "coupling": coupling}
    return randomize(b.Chain(SHAPE, layers, repeat=2, **options)).train()


def batch():
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def loss(chain, x):
    torch.manual_seed(2)  # of dropout
    z, log_det = chain(x)
    return (z * torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view_as(z)).sum() + log_det.square().sum()


def gradients(chain, x, **options):
    return torch.autograd.grad(loss(chain, x), [x, *chain.parameters()], **options)


@pytest.mark.parametrize("partition", [b.Halves, partial(b.Halves, swap=True), b.Alternate])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm", [nets.ActNorm, None])
def test_first_and_second_derivatives(norm, dropout, partition):
    def penalty():
        return torch.autograd.grad(sum(one.square().sum() for one in gradients(chain, x, create_graph=True)), inputs)

    chain, x = build(norm, dropout, partition), batch()
    inputs = [x, *chain.parameters()]
    assert all(isinstance(link, FusedStep) for step in chain for link in fuse(step))
    assert "_StepBackward" in names(loss(chain, x).grad_fn)
    found, second = gradients(chain, x), penalty()
    with fusion.layer_by_layer():
        torch.testing.assert_close(found, gradients(chain, x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(second, penalty(), rtol=1e-8, atol=1e-8)


def names(node):
    """The names of the functions that autograd would run from ``node`` on."""
    found, left = set(), [node]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return {one.name() for one in found}


def test_the_gradient_of_one_output_and_of_some_inputs():
    chain, x = build(), batch()
    for pick in (lambda z, log_det: z.sum(), lambda z, log_det: log_det.sum()):
        chain.requires_grad_(False)
        found = torch.autograd.grad(pick(*chain(x)), x)
        with fusion.layer_by_layer():
            torch.testing.assert_close(found, torch.autograd.grad(pick(*chain(x)), x))
        chain.requires_grad_(True)
        wanted = [parameter for name, parameter in chain.named_parameters() if "coupling" in name]
        found = torch.autograd.grad(pick(*chain(x.detach())), wanted, allow_unused=True, materialize_grads=True)
        with fusion.layer_by_layer():
            expected = torch.autograd.grad(pick(*chain(x.detach())), wanted, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, expected)


def test_functorch_and_batched_gradients_see_plain_operations():
    chain, x = build(), batch()

    def encode(x):
        return chain(x)[0]

    tangent = torch.randn_like(x)
    jacobian = torch.func.jacrev(encode)(x.detach()).flatten(0, 3).flatten(1)
    z, along = torch.func.jvp(encode, (x.detach(),), (tangent,))
    torch.testing.assert_close(z, encode(x))
    torch.testing.assert_close(along.flatten(), jacobian @ tangent.flatten())
    eye = torch.eye(x.numel(), dtype=x.dtype)
    (batched,) = torch.autograd.grad(encode(x).flatten(), x, eye, is_grads_batched=True)
    torch.testing.assert_close(batched.flatten(1), jacobian)


def test_a_change_in_place_of_its_output_is_an_error_and_not_a_wrong_gradient():
    chain, x = build(), batch()
    with pytest.raises(RuntimeError, match="modified inplace"):
        chain(x)[0].mul_(2)
