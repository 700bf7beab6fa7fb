"""Flows of other libraries become runs with the same density."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from inprocess import flowtrain

import flowtrain as library
from flowtrain.errors import FlowtrainError

FLOWS = '''
import torch

def moved(flow):
    """Away from the start, where many layers are the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p) * (p.shape[1] ** -0.5 if p.dim() > 1 else 1))
    return flow.eval()

def seeded(make):
    def of_seed():
        torch.manual_seed(0)
        return make()
    return of_seed

@seeded
def nflows():
    from nflows import distributions as d, flows, transforms as t
    from nflows.nn.nets import ResidualNet
    net = lambda i, o: ResidualNet(i, o, 16, num_blocks=2)
    spline = dict(num_bins=6, tails="linear", tail_bound=3.0)
    return moved(flows.Flow(t.CompositeTransform([
        t.ActNorm(5),
        t.MaskedAffineAutoregressiveTransform(5, 16, num_blocks=2),
        t.ReversePermutation(5),
        t.MaskedAffineAutoregressiveTransform(5, 16, num_blocks=2, use_residual_blocks=False),
        t.RandomPermutation(5),
        t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(5, 16, num_blocks=2, **spline),
        t.LULinear(5),
        t.PiecewiseRationalQuadraticCouplingTransform([1, 0, 1, 0, 1], net, **spline),
        t.BatchNorm(5),
        t.PiecewiseRationalQuadraticCouplingTransform(
            [0, 1, 0, 1, 0], net, apply_unconditional_transform=True, **spline
        ),
        t.AffineCouplingTransform([1, 0, 1, 0, 1], net),
        t.AdditiveCouplingTransform([0, 1, 0, 1, 0], net),
    ]), d.StandardNormal([5])))

@seeded
def zuko_maf():
    import zuko
    return moved(zuko.flows.MAF(5, 3, transforms=3, randperm=True))

@seeded
def zuko_nsf():
    import zuko
    return moved(zuko.flows.NSF(4, transforms=2, hidden_features=(32, 32)))

@seeded
def zuko_coupling():
    import zuko
    return zuko.flows.NICE(4)

@seeded
def normflows():
    import normflows as nf
    layers = []
    for i in range(2):
        layers += [
            nf.flows.AutoregressiveRationalQuadraticSpline(4, 2, 16),
            nf.flows.LULinearPermute(4),
            nf.flows.CoupledRationalQuadraticSpline(4, 2, 16, reverse_mask=bool(i)),
            nf.flows.MaskedAffineAutoregressive(4, 16),
            nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 16, 16, 4])),
            nf.flows.Permute(4, mode="swap"),
            nf.flows.Permute(4),
            nf.flows.AffineConstFlow((4,)),
        ]
    return moved(nf.NormalizingFlow(nf.distributions.DiagGaussian(4), layers))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    (folder / "their_flows.py").write_text(FLOWS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def imported(folder, library_name, function, tmp_path):
    """Our flow, and theirs."""
    pytest.importorskip(library_name)
    import their_flows

    out = tmp_path / "run"
    words = f"from={library_name}", f"path=their_flows:{function}", f"output={out}"
    assert flowtrain(folder, "import", *words) == 0
    return library.load(out), getattr(their_flows, function)()


@pytest.mark.parametrize(
    "name, function, features, context",
    [
        ("nflows", "nflows", 5, None),
        ("zuko", "zuko_maf", 5, 3),
        ("zuko", "zuko_nsf", 4, None),
        ("normflows", "normflows", 4, None),
    ],
)
def test_the_density_is_the_originals(folder, tmp_path, name, function, features, context):
    ours, theirs = imported(folder, name, function, tmp_path)
    x = torch.randn(1000, features, dtype=torch.float64) * torch.tensor([1.0, 4.0]).double().repeat(500)[:, None]
    c = None if context is None else torch.randn(1000, context, dtype=torch.float64)
    theirs = theirs.double()
    with torch.no_grad():
        expected = theirs(c).log_prob(x) if name == "zuko" else theirs.log_prob(x)
    found = ours.double().log_prob(x, c)
    assert ((found - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-5


def test_an_imported_flow_is_a_run(folder, tmp_path):
    ours, theirs = imported(folder, "zuko", "zuko_nsf", tmp_path)
    run = tmp_path / "run"
    assert flowtrain(folder, "sample", f"ckpt={run}", "n=20", "plot=false", f"output={tmp_path}/samples.csv") == 0
    assert (
        flowtrain(folder, "score", f"ckpt={run}", f"input={tmp_path}/samples.csv", f"output={tmp_path}/scores.csv") == 0
    )
    scores = np.genfromtxt(tmp_path / "scores.csv", delimiter=",", names=True)["log_likelihood"]
    samples = np.genfromtxt(tmp_path / "samples.csv", delimiter=",", skip_header=1)
    with torch.no_grad():
        expected = theirs().log_prob(torch.as_tensor(samples, dtype=torch.float32))
    np.testing.assert_allclose(scores, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name, function", [("nflows", "nflows"), ("zuko", "zuko_nsf"), ("normflows", "normflows")])
def test_a_pickled_flow(folder, tmp_path, name, function):
    pytest.importorskip(name)
    code = f"import torch, their_flows; torch.save(their_flows.{function}(), {str(tmp_path / 'flow.pt')!r})"

    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    assert flowtrain(tmp_path, "import", f"from={name}", "path=flow.pt", "output=run") == 0


def test_a_pickled_function_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    pytest.importorskip("zuko")
    torch.save(Evil(), tmp_path / "flow.pt")
    with pytest.raises(FlowtrainError, match="flow.pt: it holds .*open"):
        flowtrain(tmp_path, "import", "from=zuko", "path=flow.pt")
    assert not (tmp_path / "made").exists()


def test_a_module_without_a_counterpart_is_named(folder, tmp_path):
    pytest.importorskip("zuko")
    with pytest.raises(
        FlowtrainError, match=r"transform.0 \(zuko.flows.coupling.GeneralCouplingTransform\) has no counter"
    ):
        flowtrain(folder, "import", "from=zuko", "path=their_flows:zuko_coupling", f"output={tmp_path}/run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, line",
    [
        ([], "from=LIBRARY and path="),
        (["from=zuko", "path=nothing.pt"], "there is no such file; or give module:function"),
        (["from=zuko", "path=no_such_module:flow"], "No module named 'no_such_module'"),
        (["from=zuko", "path=math:floor"], "path=math:floor"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, line):
    pytest.importorskip("zuko")
    with pytest.raises(FlowtrainError, match=line):
        flowtrain(tmp_path, "import", *words)
