"""flowtrain check calibration=true: calibrated posteriors pass, others fail in the way that they are wrong."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import flowtrain
from torch import nn
from torch.distributions import Normal

from flowtrain.cli.exit_codes import WorkerError
from flowtrain.commands import posterior_calibration as calibration
from flowtrain.engine.calibration import LEVELS, band, c2st, curve, places, uniformity

N, DRAWS, NOISE = 1500, 200, 0.5


class Posterior(nn.Module):
    """Of θ ~ N(0, 1)², given x = θ + 0.5·N(0, 1): normal, of known mean and deviation; changed by a shift and a
    scale."""

    def __init__(self, shift=0.0, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        precision = 1 + NOISE**-2
        self.shrink, self.std, self.shift = NOISE**-2 / precision, scale * precision**-0.5, shift

    def of(self, context):
        return Normal(self.shrink * context + self.shift, self.std)

    def forward(self, x, context):
        return self.of(context).log_prob(x).sum(1)


def found(seed=0, **keys):
    torch.manual_seed(seed)
    truth = torch.randn(N, 2)
    x = truth + NOISE * torch.randn(N, 2)
    posterior = Posterior(**keys)
    draws = posterior.of(x).sample((DRAWS,)).transpose(0, 1)
    return places(posterior, truth, iter(draws.split(400)), x, seed)


def p_values(found):
    shares = {"a": found.ranks[:, 0], "b": found.ranks[:, 1], "coverage": found.credibility, "tarp": found.distance}
    return {name: uniformity(values).p_value for name, values in shares.items()}


def test_exact_posteriors_are_calibrated():
    p = np.array([[*p_values(found(seed)).values()] for seed in range(6)])
    assert p.min() > 0.001 and 0.2 < p.mean() < 0.8


@pytest.mark.parametrize("scale, sign", [(0.8, -1), (1.25, 1)], ids=["narrow", "wide"])
def test_posteriors_that_are_too_narrow_or_too_wide(scale, sign):
    wrong = found(scale=scale)
    p = p_values(wrong)
    assert p["coverage"] < 1e-6 and min(p["a"], p["b"]) < 0.001
    covered = curve(wrong.credibility)
    low, high = band(N)
    assert sign * (covered[90] - 0.9) > 0.02  # a 90 % region
    assert ((covered < low) if sign < 0 else (covered > high)).mean() > 0.5


def test_posteriors_that_are_shifted():
    p = p_values(found(shift=0.2))
    assert max(p["a"], p["b"]) < 1e-4 and p["tarp"] < 0.05


def test_a_posterior_that_ignores_the_data_has_even_ranks_and_tarp_does_not_see_it_either():
    """The prior is calibrated for the same parameters; what it lacks is sharpness, which C2ST and likelihoods see."""
    torch.manual_seed(0)
    truth = torch.randn(N, 2)
    prior = Posterior()
    prior.shrink, prior.std = 0.0, 1.0
    p = p_values(places(prior, truth, iter(torch.randn(N, DRAWS, 2).split(500)), torch.zeros(N, 2), 0))
    assert min(p.values()) > 0.001


def test_coverage_is_that_of_the_levels_and_bands_hold_nearly_all():
    torch.manual_seed(0)
    low, high = band(500)
    inside = [((c := curve(torch.rand(500))) >= low) & (c <= high) for _ in range(200)]
    assert 0.93 < np.mean(inside) < 0.99 and low[0] == high[0] == 0 and low[-1] == high[-1] == 1
    assert curve(torch.tensor([0.0, 0.5, 1.0]))[[0, 49, 50, 100]].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert len(LEVELS) == 101


def test_c2st_of_the_same_and_of_other_samples():
    random = np.random.default_rng(0)
    same, other = random.normal(size=(300, 1)), random.normal(size=(300, 1))
    assert abs(c2st(same, other) - 0.5) < 0.08
    assert c2st(same, other + 8) > 0.98


# ---- the command


def run(tmp_path, *more):
    words = "dataset=moons", "model=maf", "smoke=true", "report=false", "hydra.run.dir=run", *more
    assert flowtrain(tmp_path, "train", *words) == 0


def check(tmp_path, *words):
    try:
        flowtrain(tmp_path, "check", "ckpt=run", "calibration=true", "simulations=60", "draws=40", *words)
        failed = None
    except WorkerError as error:
        failed = str(error)
    folder = max(tmp_path.glob("run/check/*"))
    return failed, json.loads((folder / "check.json").read_text()), folder


def test_the_command_on_a_conditional_table(tmp_path, capsys, monkeypatch):
    """An untrained flow of y given x: its numbers, its picture, and C2ST for each of two observations."""
    monkeypatch.setattr(calibration, "c2st", lambda reference, samples: 0.5 + len(reference) - len(samples))
    random = np.random.default_rng(0)
    rows = random.normal(size=(800, 3))
    with open(tmp_path / "t.csv", "w") as file:
        csv.writer(file).writerows([["a", "b", "x"], *rows.tolist()])
    run(tmp_path, "dataset=table", "dataset.path=t.csv", "dataset.context=[x]", "trainer.ema=null")
    observed = np.concatenate([np.c_[random.normal(size=(60, 2)), np.full(60, x)] for x in (0.5, -1.0)])
    with open(tmp_path / "reference.csv", "w") as file:
        csv.writer(file).writerows([["a", "b", "x"], *observed.tolist()])
    capsys.readouterr()
    failed, report, folder = check(tmp_path, "reference=reference.csv")
    assert failed is None and report["passed"]  # standardized normal columns, and a flow that starts as a normal one
    assert [one["name"] for one in report["parameters"]] == ["a", "b"]
    assert report["posteriors"] == 60 and report["draws"] == 40
    assert all(sum(one["histogram"]) == 60 for one in report["parameters"])
    assert len(report["coverage"]["found"]) == len(report["levels"]) == len(report["band"]["low"]) == 101
    assert [one["samples"] for one in report["c2st"]] == [60, 60]
    assert [one["c2st"] for one in report["c2st"]] == [0.5, 0.5]
    assert (folder / "calibration.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "coverage: 50% regions" in out and "C2ST 2:" in out and "passed: 60 posteriors" in out


def test_the_command_says_what_fails(tmp_path):
    run(tmp_path, "preprocess=none", "max_steps=1")  # normal, where the data are two moons of deviation 1.7
    failed, report, _ = check(tmp_path, "simulations=2000", "json=true")
    assert "not calibrated" in failed and "p = " in failed
    assert not report["passed"]


@pytest.mark.parametrize(
    "words, line",
    [
        (("dataset=digits", "model=nice"), "ranks are those of real numbers"),
        (("dataset=moons",), "reference="),
    ],
)
def test_what_has_no_ranks_is_refused(tmp_path, words, line):
    run(tmp_path, *words)
    with pytest.raises(WorkerError, match=line) as caught:
        flowtrain(tmp_path, "check", "ckpt=run", "calibration=true", "reference=none.csv")
    assert caught.value.exit_code == 2


def test_a_new_flow_has_no_posteriors(tmp_path):
    with pytest.raises(WorkerError, match="needs a run"):
        flowtrain(tmp_path, "check", "model=maf", "dataset=moons", "calibration=true")


def script(name, monkeypatch):
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    spec = importlib.util.spec_from_file_location(f"{name}_of_scripts", scripts / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_table_of_the_benchmark_says_what_is_not_measured(monkeypatch):
    cell = {"c2st": {"1": 0.7, "2": 0.8}, "train_seconds": 12.4}
    steps = {"slcp": {"ours": 1.0, "nflows": 2.0, "zuko": 3.0}}
    rows = script("sbibm", monkeypatch).tables({"slcp 1000 zuko": cell}, steps).splitlines()
    assert len(rows) == 2 + 6 * 3 + 4 and rows[-1] == "| slcp | 1.0 ms | 2.0 ms | 3.0 ms |"
    (line,) = [line for line in rows if line.startswith("| slcp | 1,000 ")]
    assert line.split(" | ")[2:] == ["–", "–", "0.750 (2 of 10)", "0.975", "–", "–", "12 s |"]


def test_classifiers_of_many_pairs_at_once_find_what_one_finds(monkeypatch):
    rng = np.random.default_rng(0)
    reference, samples = rng.normal(size=(2, 3, 1000, 2))
    samples[1] *= 1.5
    samples[2] += 2.0
    found = script("c2st", monkeypatch).c2sts(reference, samples)
    assert np.allclose(found, [c2st(*pair) for pair in zip(reference, samples)], atol=0.03)
    assert found[0] < 0.54 < 0.57 < found[1] < 0.64 < 0.82 < found[2]


def test_samples_that_no_classifier_can_learn_from_are_refused(monkeypatch):
    many, rows = script("c2st", monkeypatch), np.random.default_rng(0).normal(size=(1, 10, 2))
    for other, line in ((np.full_like(rows, np.nan), "not finite"), (rows, "not finite"), (rows[:, :9], "multiple")):
        reference = np.ones_like(rows) if other is rows else rows[:, : other.shape[1]]
        with pytest.raises(ValueError, match=line):
            many.c2sts(reference, other)


def test_a_step_of_the_classifiers_is_one_of_adam(monkeypatch):
    many = script("c2st", monkeypatch)
    many.EPSILON = 1e-14  # scikit-learn adds it at another place than torch
    generator = torch.Generator().manual_seed(0)
    state = [one.double() for one in many._weights(4, 3, generator)]
    state[1].normal_(generator=generator), state[3].normal_(generator=generator)
    rows = torch.randn(4, 9, 3, generator=generator).double()
    labels = (torch.rand(4, 9, generator=generator) > 0.5).double()
    same = [one.clone().requires_grad_() for one in state]
    adam = torch.optim.Adam(same, many.RATE, betas=many.BETAS, eps=many.EPSILON)
    moments = [[torch.zeros_like(one) for one in state] for _ in range(2)]
    for step in (1, 2, 3):
        h = rows
        for i in (0, 2):
            h = (h @ same[i] + same[i + 1]).relu()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            (h @ same[4] + same[5])[..., 0], labels, reduction="none"
        ).mean(1) + sum(one.square().sum((1, 2)) for one in same[::2]) * many.DECAY / 2 / len(labels[0])
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
        assert torch.allclose(many._step(state, moments, step, rows, labels), losses.detach())
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(state, same))
