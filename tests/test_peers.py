"""The same parameters give the same numbers in nflows and zuko."""

import pytest
import torch

from flowtrain import bijections as b

x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))


def test_lu_linear_against_nflows():
    lu = pytest.importorskip("nflows.transforms.lu")
    theirs = lu.LULinear(5, identity_init=False)
    ours = b.LULinear((5,), start="identity")
    with torch.no_grad():
        theirs.bias.zero_()
        ours.lu.copy_(torch.zeros(5, 5))
        ours.lu[theirs.lower_indices[0], theirs.lower_indices[1]] = theirs.lower_entries
        ours.lu[theirs.upper_indices[0], theirs.upper_indices[1]] = theirs.upper_entries
        ours.lu.diagonal().copy_(theirs.upper_diag.log())
    for mine, other in zip(ours(x), theirs(x)):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(ours.inverse(x), theirs.inverse(x)):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_affine_maps_against_zuko():
    transforms = pytest.importorskip("zuko.transforms")
    t, s = torch.randn(2, 50, 5, generator=torch.Generator().manual_seed(1))
    theirs = transforms.MonotonicAffineTransform(t * s.exp(), s, slope=1e-30)  # s/(1 + |s/log(slope)|): hardly bent
    scale = theirs.log_abs_det_jacobian(x, None)
    theta = torch.stack((t * s.exp() * (-scale).exp(), scale), -1)
    y, log_derivative = b.ExpAffine((5,))(x, theta)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(log_derivative, scale)
    torch.testing.assert_close(b.ExpAffine((5,)).inverse(y, theta)[0], theirs.inv(y), atol=1e-5, rtol=1e-4)


def test_squeeze_against_nflows():
    reshape = pytest.importorskip("nflows.transforms.reshape")
    image = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(b.Squeeze((3, 4, 6))(image)[0], reshape.SqueezeTransform()(image)[0])
