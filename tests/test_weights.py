"""Weights of examples: 2 is the row twice, in the loss, on two processes, in evaluation and in moments."""

import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from inprocess import flowtrain
from ranks import run_on_two_ranks
from test_data import one_line

from flowtrain import bijections as b
from flowtrain import data, nets
from flowtrain.data.batch import Batch
from flowtrain.data.tables.columns import moments
from flowtrain.engine.divergence import Finding
from flowtrain.engine.evaluate import evaluate
from flowtrain.engine.objectives import NatsPerRow
from flowtrain.engine.replay import Record
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

ROWS, TWICE, NEVER = 12, 3, 5
WEIGHTS = torch.ones(ROWS).index_fill(0, torch.tensor([TWICE]), 2.0)


def rows(context=False):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, generator=draw, dtype=torch.float64)
    return x, torch.randn(ROWS, 2, generator=draw, dtype=torch.float64) if context else None


def flow(context=False):
    torch.manual_seed(0)
    layers = {
        "mixing": b.LULinear,
        "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=partial(nets.MLP, hidden=8)),
    }
    return Flow((3,), partial(b.Chain, layers=layers), context_shape=(2,) if context else None).double()


def full_batch(weights=None, repeats=None, context=False, keep=slice(None)):
    """All rows as one batch, as a Loader yields them."""
    x, given = rows(context)
    if repeats is not None:
        x, given = (None if one is None else one.repeat_interleave(repeats, 0) for one in (x, given))
    split = data.ArraySplit(x[keep], context=None if given is None else given[keep], weights=weights)
    return next(data.Loader(split, len(split)).batches())


def gradient(batch, parts=1):
    """The loss of a batch and its gradient, as one vector."""
    one = flow(batch.context is not None)
    loss, _ = TrainingPass(one, NatsPerRow(), seed=0, parts=parts).backpropagate(batch, 0, 0, 1)
    return torch.cat([loss.view(1), *(parameter.grad.flatten() for parameter in one.parameters())])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# ---- the loss


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("parts", [1, 5])
def test_weight_2_is_the_row_twice(parts, context):
    twice = gradient(full_batch(repeats=WEIGHTS.long(), context=context))
    close(gradient(full_batch(WEIGHTS, context=context), parts), twice)
    assert (twice - gradient(full_batch(context=context))).abs().max() > 1e-3  # the row matters


def test_only_ratios_of_weights_matter():
    close(gradient(full_batch(1e-3 * WEIGHTS)), gradient(full_batch(WEIGHTS)))


def test_weights_of_one_change_no_bit():
    assert torch.equal(gradient(full_batch(torch.full((ROWS,), 3.0))), gradient(full_batch()))


def test_a_row_of_weight_0_has_no_influence():
    weights = torch.ones(ROWS).index_fill(0, torch.tensor([NEVER]), 0.0)
    others = [row for row in range(ROWS) if row != NEVER]
    close(gradient(full_batch(weights)), gradient(full_batch(keep=others)))


def test_small_batches_average_to_the_weighted_loss():
    x, weights = rows()[0], torch.rand(ROWS) + 0.1
    batches = data.Loader(data.ArraySplit(x, weights=weights), 3).batches()
    mean = sum(gradient(next(batches)) for _ in range(4)) / 4
    close(mean, gradient(full_batch(weights)))


def gradient_on_two_ranks(_folder):
    split = data.ArraySplit(rows()[0], weights=WEIGHTS)
    place = distributed.rank(), distributed.world()
    batch = next(data.Loader(split, ROWS, rank=place[0], world=place[1]).batches())
    one = flow()
    training_pass = TrainingPass(one, NatsPerRow(), seed=0, parts=2)
    training_pass.synchronize()
    training_pass.backpropagate(batch, 0, *place)
    return torch.cat([parameter.grad.flatten() for parameter in one.parameters()])


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    for found in run_on_two_ranks(gradient_on_two_ranks, tmp_path):
        close(found, gradient(full_batch(WEIGHTS))[1:])


def test_the_record_of_a_step_keeps_the_weights():
    batch, by = full_batch(WEIGHTS), TrainingPass(flow(), NatsPerRow(), seed=0)
    record, _ = Record.gather(Finding((0, 0), "loss", "the loss"), batch, [*range(ROWS)], 0, by)
    record = Record.from_state_dict(record.state_dict())
    one = flow()
    assert record.replay(one, NatsPerRow(), None) is None
    close(torch.cat([parameter.grad.flatten() for parameter in one.parameters()]), gradient(batch)[1:])


def test_a_batch_is_divided_with_its_weights():
    parts = Batch(*rows(context=True), WEIGHTS).chunk(5)
    assert [len(part.x) for part in parts] == [3, 3, 3, 3]
    assert torch.equal(torch.cat([part.weights for part in parts]), WEIGHTS)
    assert [part.context is None for part in Batch(rows()[0]).chunk(2)] == [True, True]


# ---- evaluation


def evaluation(x, weights=None, draws=1):
    split = data.ArraySplit(x, weights=weights)
    return evaluate(flow(), data.evaluation_batches(split, 5), len(split), draws, weights=split.weights)


def test_the_mean_is_that_of_rows_as_often_as_they_weigh():
    x, weights = rows()[0], torch.arange(ROWS) % 4
    weighted, repeated = evaluation(x, weights, draws=2), evaluation(x.repeat_interleave(weights, 0), draws=2)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, abs=1e-6)
    assert weighted.bits_per_dim_iw == pytest.approx(repeated.bits_per_dim_iw, abs=1e-6)
    assert weighted.examples == 9  # of positive weight


def test_the_standard_error_is_that_of_a_ratio():
    x, weights = rows()[0], torch.rand(ROWS)
    with torch.no_grad():
        values = flow()(x).numpy()
    w = weights.numpy().astype(float)
    mean = np.average(values, weights=w)
    stderr = math.sqrt(ROWS / (ROWS - 1) * (w**2 * (values - mean) ** 2).sum()) / w.sum()
    assert evaluation(x, weights).log_likelihood_stderr == pytest.approx(stderr, rel=1e-6)
    alike = evaluation(x)
    assert alike.log_likelihood_stderr == pytest.approx(values.std(ddof=1) / math.sqrt(ROWS))
    assert evaluation(x, torch.ones(ROWS)) == alike


def test_the_standard_error_is_the_spread_of_weighted_means():
    draw, one = torch.Generator().manual_seed(0), Flow((1,), b.ActNorm)
    found = []
    for _ in range(400):
        x, weights = torch.randn(200, 1, generator=draw), torch.rand(200, generator=draw) ** 4
        found.append(evaluate(one, [(torch.arange(200), x, None)], 200, weights=weights))
    spread = np.std([each.log_likelihood for each in found])
    assert np.mean([each.log_likelihood_stderr for each in found]) == pytest.approx(spread, rel=0.1)


def test_a_row_of_weight_0_may_have_no_likelihood():
    x, weights = rows()[0], torch.ones(ROWS)
    x[NEVER], weights[NEVER] = math.nan, 0
    others = [row for row in range(ROWS) if row != NEVER]
    assert evaluation(x, weights).log_likelihood == pytest.approx(evaluation(x[others]).log_likelihood, abs=1e-6)
    x[TWICE] = math.nan
    with pytest.raises(FloatingPointError, match=rf"1 of 11 examples is not finite, first: \[{TWICE}\]"):
        evaluation(x, weights)


# ---- tables


@pytest.fixture
def frame():
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {"a": draw.normal(size=80), "b": draw.normal(3, 2, 80), "w": draw.integers(0, 3, 80), "c": draw.normal(size=80)}
    )


def write(frame, path):
    frame.to_csv(path, index=False)
    return str(path)


def test_moments_are_weighted():
    draw = np.random.default_rng(0)
    x = draw.normal(2, 5, (100, 3)).astype(np.float32)
    weights = draw.integers(0, 4, 100)
    for found, expected in zip(moments(x, weights.astype(float)), moments(np.repeat(x, weights, 0))):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    for found, expected in zip(moments(x, np.ones(100)), moments(x)):
        np.testing.assert_array_equal(found, expected)


def test_a_column_of_weights_is_not_modelled(tmp_path, frame):
    path = write(frame, tmp_path / "t.csv")
    table = data.Table(path=path, weights="w", context=["c"])
    assert table.spec.shape == (2,) and data.Table(path=path, weights="w", columns=["a", "w"]).spec.shape == (1,)
    plain = data.Table(path=path, columns=["a", "b"], context=["c"])
    chosen = np.random.default_rng(0).permutation(80)
    for name, places in {"test": chosen[:8], "val": chosen[8:16], "train": chosen[16:]}.items():
        split, other = table.split(name), plain.split(name)
        weights = frame["w"].to_numpy()[np.sort(places)]
        np.testing.assert_allclose(split.weights, weights / weights.mean(), rtol=1e-6)
        assert torch.equal(split.data, other.data) and other.weights is None
        assert split.digest() != other.digest() and "weighted by w" in split.description
    train = frame.iloc[np.sort(chosen[16:])]
    repeated = train.loc[train.index.repeat(train["w"])]
    for column in (*table.split("train").columns.modelled, *table.split("train").columns.context):
        assert column.mean == pytest.approx(repeated[column.name].mean(), rel=1e-5)
        assert column.std == pytest.approx(repeated[column.name].std(ddof=0), rel=1e-5)


def test_the_weights_of_an_array(tmp_path, frame):
    np.save(tmp_path / "t.npy", frame.to_numpy())
    table = data.Table(path=str(tmp_path / "t.npy"), weights=2)
    assert table.split("train").columns.names == ["c0", "c1", "c3"] and table.split("train").weights.mean() == 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1, "'-1"),
        (math.nan, "its value is missing"),
        (math.inf, "'inf'"),
        ("much", "'much'"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path, frame, value, says):
    weights = frame["w"].astype(object)
    weights[6] = value
    path = write(frame.assign(w=weights), tmp_path / "t.csv")
    one_line(lambda: data.Table(path=path, weights="w").split("train"), "dataset.weights: column 'w', row 7", says)


def test_weights_that_cannot_be_are_refused(tmp_path, frame):
    path = write(frame, tmp_path / "t.csv")
    one_line(lambda: data.Table(path=path, weights="v").spec, "dataset.weights", "no column 'v'")
    one_line(lambda: data.Table(path=path, weights=["w"]), "dataset.weights", "the name of a column")
    one_line(lambda: data.Table(path=path, weights="w", context=["w"]).spec, "dataset.weights: 'w' is in", "context")
    path = write(frame.assign(w=0), tmp_path / "zero.csv")
    one_line(lambda: data.Table(path=path, weights="w").split("train"), "dataset.weights: column 'w' is 0 in all")
    for weights in ([1, -1], [0, 0], [1, math.nan], [1, math.inf]):
        with pytest.raises(ValueError, match="weights must be finite"):
            data.ArraySplit(torch.zeros(2, 1), weights=torch.tensor(weights))


def test_train_eval_and_score(tmp_path, frame):
    path = write(frame.assign(one=1.0), tmp_path / "t.csv")
    run = ["train", "model=maf", "dataset=table", f"dataset.path={path}", "dataset.columns=[a,b]", "smoke=true"]
    run += ["logger=none"]
    figures, reports = {}, {}
    for name in ("w", "one", "null"):
        assert flowtrain(tmp_path, *run, f"dataset.weights={name}", f"hydra.run.dir=run-{name}") == 0
        summary = json.loads((tmp_path / f"run-{name}/summary.json").read_text())
        figures[name] = summary["log_likelihood"], summary["log_likelihood_stderr"]
        place = [f"ckpt=run-{name}", f"dataset.path={path}", f"hydra.run.dir=eval-{name}"]
        assert flowtrain(tmp_path, "eval", "split=test", *place) == 0
        reports[name] = json.loads((tmp_path / f"eval-{name}/eval.json").read_text())
    assert figures["one"] == figures["null"] != figures["w"]
    assert reports["w"]["weights_column"] == "w" and "weights_column" not in reports["null"]
    assert reports["null"]["examples"] == 8 > reports["w"]["examples"]
    assert flowtrain(tmp_path, "score", "ckpt=run-w", f"input={path}", "hydra.run.dir=score") == 0
    scores = pd.read_csv(tmp_path / "score/scores.csv")["log_likelihood"]
    test = np.sort(np.random.default_rng(0).permutation(80)[:8])
    mean = np.average(scores[test], weights=frame["w"][test])
    assert reports["w"]["log_likelihood"] == pytest.approx(mean, abs=1e-5)
    assert json.loads((tmp_path / "score/score.json").read_text())["log_likelihood"] == pytest.approx(scores.mean())
