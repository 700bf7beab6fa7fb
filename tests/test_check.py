"""flowtrain check: sound flows pass, and each kind of fault is found and laid at the right layer's door."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from inprocess import flowtrain
from layers import conv, glow_step, mlp

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections.ode import Continuous
from flowtrain.cli import exit_codes
from flowtrain.engine.audit import audit, perturb
from flowtrain.engine.jacobian import Piece, log_abs_det, log_det_errors, shrink
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
FAULTY = """
import torch
from flowtrain import bijections
from flowtrain.distributions import StandardNormal

class OnePercent(bijections.ActNorm):
    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z, 1.01 * log_det
    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return x, 1.01 * log_det

class OneWay(bijections.ActNorm):
    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return x, 1.01 * log_det

class NoWayBack(bijections.ActNorm):
    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return 1.0001 * x, log_det

class Overflows(bijections.ActNorm):
    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return torch.where(z.abs() > 100, torch.nan, z), log_det

class Heavy(StandardNormal):
    def log_prob(self, z, context=None):
        return super().log_prob(z) + 0.02
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands run, beside a module of faulty parts."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "faulty_parts.py").write_text(FAULTY)
    return folder


@pytest.fixture
def command(folder):
    return partial(flowtrain, folder)


@pytest.fixture(scope="module")
def run(folder) -> Path:
    assert flowtrain(folder, "train", "smoke=true", "dataset=digits", "logger=none") == 0
    return next(folder.glob("outputs/digits-glow/*"))


def newest(folder) -> dict:
    reports = [*folder.glob("outputs/check/*/check.json"), *folder.glob("outputs/*/*/check/*/check.json")]
    return json.loads(max(reports, key=lambda path: path.stat().st_mtime_ns).read_text())


def failures(report: dict) -> dict:
    return {check["name"]: check["layer"] for check in report["checks"] if not check["passed"]}


@pytest.mark.parametrize(
    "words",
    [
        ["model=glow", "dataset=digits"],
        ["model=glow", "norm=batchnorm", "dataset=synthetic", "dataset.shape=[3,8,8]"],
        ["model=glow", "dataset=digits", "dataset.context=label", "base=class_normal"],
        ["model=maf", "dataset=digits"],
        ["model=iaf", "dataset=moons"],
        ["model=realnvp_vector", "dataset=power"],
    ],
    ids=" ".join,
)
def test_new_flows_pass(command, folder, capsys, words):
    assert command("check", *words, "smoke=true") == 0
    report, out = newest(folder), capsys.readouterr().out
    assert report["passed"] and "passed: a new" in out
    names = [check["name"] for check in report["checks"]]
    assert ("mass of the density" in names) == ("dataset=moons" in words)
    for name in names:
        assert name in out
    levels = [check["layer"] for check in report["checks"] if check["name"] == "log-det of each layer, forward"]
    assert levels[0]  # rounding is someone's


@pytest.mark.parametrize(
    ("words", "faults", "layer"),
    [
        (
            ["norm._target_=faulty_parts.OnePercent"],
            {
                "log-det of each layer, forward",
                "log-det of the flow, forward",
                "log-det of each layer, inverse",
                "log-det of the flow, inverse",
            },
            ".norm",
        ),
        (
            ["norm._target_=faulty_parts.OneWay"],
            {
                "log-dets cancel in float64",
                "log-dets cancel in float32",
                "log-det of each layer, inverse",
                "log-det of the flow, inverse",
            },
            ".norm",
        ),
        (
            ["norm._target_=faulty_parts.NoWayBack"],
            {"round trip in float64, median", "round trip in float64, greatest"},
            ".norm",
        ),
        (
            ["norm._target_=faulty_parts.Overflows", "model=glow_vector", "dataset=moons"],
            {"numbers not finite from extreme data"},
            ".norm",
        ),
        (["base._target_=faulty_parts.Heavy", "model=maf", "dataset=moons"], {"mass of the density"}, None),
    ],
    ids=["log-det", "one log-det", "inverse", "overflow", "density"],
)
def test_a_fault_is_found(command, folder, words, faults, layer):
    words = words if any(word.startswith("model=") for word in words) else ["model=glow", "dataset=digits", *words]
    with pytest.raises(FlowtrainError, match="checks failed, first: ") as caught:
        command("check", *words, "allow=[faulty_parts]", "smoke=true")
    found = failures(newest(folder))
    assert faults <= found.keys()
    if len(faults) != 2 or layer is None:  # where there is no way back the inverse's log-det is wrong too
        assert faults == found.keys()
    for name in faults:
        assert found[name] is None if layer is None else found[name].endswith(layer)
    assert exit_codes.describe_error(caught.value)[1] == 1


def test_a_wrong_log_det_ends_the_process_with_one_line(folder):
    words = ["check", "model=glow", "norm._target_=faulty_parts.OnePercent", "allow=[faulty_parts]", "smoke=true"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "flowtrain", *words, "json=true"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "flowtrain: 4 of 17 checks failed, first: log-det of each layer, forward (scales." in done.stderr
    assert not json.loads(done.stdout)["passed"]


def test_a_run(command, folder, run, capsys):
    capsys.readouterr()
    assert command("check", "json=true", "examples=4", "jacobian=48") == 0
    out, err = capsys.readouterr()
    report = newest(folder)
    assert json.loads(out) == report and f"ckpt={run.relative_to(folder)}/checkpoints/best.pt" in err
    assert report["passed"] and report["examples"] == 4 and "ema weights of" in report["flow"]
    assert len(list(run.glob("check/*/check.json"))) == 1

    state = checkpoint.read(run / "checkpoints/best.pt")
    key = next(name for name in state["ema"] if name.endswith("scales.level0.steps.norm.started"))
    state["ema"][key].fill_(False)
    checkpoint.save(state, folder / "idle.pt")
    with pytest.raises(FlowtrainError, match="still to be started from data .scales.level0.steps.norm. is 1"):
        command("check", "ckpt=idle.pt")

    state["ema"][key].fill_(True)
    state["ema"][key.replace("started", "bias")].fill_(float("nan"))
    checkpoint.save(state, folder / "nan.pt")
    with pytest.raises(FlowtrainError, match="weights that are not finite"):
        command("check", "ckpt=nan.pt", "json=true")
    report = newest(folder)
    assert failures(report)["weights that are not finite"] == "scales.level0.steps.norm"
    assert failures(report)["numbers not finite in samples"] == "scales.level0.steps.norm"
    assert all(check["value"] is None or check["value"] >= 0 for check in report["checks"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=glwo"], "did you mean 'glow'?"),
        (["model=glow", "jacobian=0"], "jacobian=0: must be a whole number of at least 1"),
        (["experiment=glow_cifar10", "exampels=3"], "did you mean 'examples'?"),
        (["ckpt=nowhere"], "ckpt=nowhere: no such file"),
        (["model=glow", "model.steps=0"], "repeat=0 must be at least 1"),
    ],
)
def test_refusals(command, words, says):
    with pytest.raises(FlowtrainError, match=says.replace("?", r"\?")) as caught:
        command("check", *words)
    assert exit_codes.describe_error(caught.value)[1] == 2


def test_a_checkpoint_fixes_its_model(command, run):
    for word in ("model=nice", "univariate=affine", "model.steps=2"):
        with pytest.raises(UsageError, match="is fixed by the checkpoint"):
            command("check", f"ckpt={run}", word)


def test_completion_and_help(tmp_path):
    def say(*words, **env):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        command = [sys.executable, "-m", "flowtrain", *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert "model=glow" in say("-sc", "query=bash", COMP_LINE="flowtrain check model=gl")
    (tmp_path / "outputs").mkdir()
    assert say("-sc", "query=bash", COMP_LINE="flowtrain check ckpt=out").split() == ["ckpt=outputs/"]
    for name in ("check", "score"):
        out = say(name, "--help")
        own = {"check": "examples jacobian tolerance", "score": "input output draws label batch on_bad"}[name].split()
        for key in ("ckpt", *own, "weights", "seed", "json", "devices", "allow"):
            assert re.search(rf"\b{key}\b", out), key
    assert "dataset:" in say("check", "--help")


# ---- the measurements themselves -----------------------------------------------------------------------------------


def test_jacobians_are_right_whatever_the_chunks():
    matrix = torch.randn(7, 7, dtype=torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    for at_once in (1, 21, 2**16):
        found = log_abs_det(lambda x, _: (torch.tanh(x @ matrix.T), None), x, at_once=at_once)
        expected = torch.linalg.slogdet((1 - torch.tanh(x @ matrix.T).square())[:, :, None] * matrix)[1]
        torch.testing.assert_close(found, expected)


class ForgetsPixels(b.LULinear):
    def log_abs_det(self):
        return super().log_abs_det() / self.pixels


class ForgetsSplitPriors(b.MultiScale):
    def forward(self, x, context=None):
        z, log_det = super().forward(x, context)
        first, leaving = self._modules[self.names[0]](x, context)[0], self.split_shapes[0]
        return z, log_det - self.split_prior_level0(first[:, -leaving[0] :], first[:, : -leaving[0]])[1]


def piece(layer, batch=2):
    layer = layer.double().eval().requires_grad_(False)
    x = torch.randn(batch, *layer.shape, dtype=torch.float64)
    context = None if layer.context_shape is None else torch.randn(batch, *layer.context_shape, dtype=torch.float64)
    return Piece("it", layer, x, context)


def test_a_layer_is_audited_on_a_small_event():
    for layer in (
        b.LULinear((12, 64, 64)),
        b.Coupling((12, 64, 64), b.SigmoidAffine, conv),
        b.Coupling((2, 64, 64), b.TanhAffine, conv, b.Checkerboard),
        b.Conditional((2, 64, 64), b.ExpAffine, nets.ZeroConv, context_shape=(3, 64, 64)),
        b.MultiScale((1, 64, 64), 2, partial(b.Chain, layers={"squeeze": b.Squeeze, "step": glow_step})),
    ):
        whole = piece(layer)
        small = shrink(whole, 4096)
        assert small.layer.shape == (layer.shape[0], 4, 4) and small.x.shape[1:] == small.layer.shape
        for name, tensor in small.layer.state_dict().items():
            assert torch.equal(tensor, layer.state_dict()[name])
        assert max(errors.max() for errors in log_det_errors(small)) < 1e-12
    assert shrink(piece(b.Elementwise((1, 64, 64), b.ExpAffine)), 4096).layer.shape == (1, 64, 64)
    assert shrink(piece(b.Elementwise((1, 64, 64), b.ExpAffine)), 4095) is None
    forgetful = piece(ForgetsPixels((12, 64, 64), start="identity"))
    forgetful.layer.lu.diagonal().fill_(0.1)
    assert log_det_errors(shrink(forgetful, 4096))[0].min() > 0.05


@pytest.mark.parametrize(("scales", "wrong"), [(b.MultiScale, False), (ForgetsSplitPriors, True)])
def test_what_is_too_large_is_audited_in_pieces(scales, wrong):
    layers = {
        "dequantize": partial(b.Dequantize, grey_levels=256),
        "center": b.Center,
        "scales": partial(
            scales,
            levels=2,
            level=partial(b.Chain, layers={"squeeze": b.Squeeze, "step": glow_step}),
            split_prior=partial(b.Conditional, univariate=b.ExpAffine, net=nets.ZeroConv),
        ),
    }
    flow = Flow((3, 32, 32), partial(b.Chain, layers=layers))
    x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    perturb(flow, x)
    checks = {check.name: check for check in audit(flow, x[:2], grey_levels=256, limit=500)}
    assert {name for name, check in checks.items() if not check.passed} == (
        {f"log-dets cancel in {kind}" for kind in ("float32", "float64")} | {"log-det of the flow, forward"}
        if wrong
        else set()
    )
    worst = checks["log-det of the flow, forward"]
    assert worst.layer == "scales" or worst.value == 0  # no rounding at all: the first layer is as bad as any


class Off(Continuous):
    def forward(self, x, context=None):
        z, log_det = super().forward(x, context)
        return z, 1.01 * log_det

    def inverse(self, z, context=None):
        x, log_det = super().inverse(z, context)
        return x, 1.01 * log_det


@pytest.mark.parametrize("kind", [Continuous, Off])
def test_an_ode_is_as_exact_as_its_solver(kind):
    ode = partial(kind, net=partial(nets.ODENet, hidden=8, depth=1))
    layers = {"ode": ode, "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=mlp)}
    flow = Flow((3,), partial(b.Chain, layers=layers))
    x = torch.randn(32, 3)
    perturb(flow, x, noise=1.0)
    checks = {check.name: check for check in audit(flow, x[:4])}
    right = {name for name, check in checks.items() if check.passed}
    assert checks["log-det of the flow, forward"].tolerance == pytest.approx(1e-5)
    assert checks.keys() - right == (
        {f"log-det of {what}, {way}" for what in ("each layer", "the flow") for way in ("forward", "inverse")}
        if kind is Off
        else set()
    )
    if kind is Off:
        assert checks["log-det of each layer, forward"].layer == "ode"


class Steep(torch.nn.Module):
    def __init__(self, shape, context_shape):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.01))

    def forward(self, time, x, context=None):
        return self.rate * x.square()


def test_large_numbers_that_an_ode_refuses_are_not_lost():
    flow = Flow((3,), partial(b.Chain, layers={"ode": partial(Continuous, net=Steep, max_steps=100)}))
    checks = {check.name: check for check in audit(flow, torch.zeros(4, 3))}
    assert all(check.passed for check in checks.values())
    refused = [check.note for check in checks.values() if check.note.startswith("refused: an ODE")]
    assert len(refused) == 2
