"""flowtrain score: each row's own likelihood, in order, the same as eval's; and what it says to what it cannot read."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from composed import configuration
from inprocess import flowtrain
from PIL import Image

from flowtrain import load, train
from flowtrain.commands import ScoreConfig, score
from flowtrain.config.conversion import validate
from flowtrain.data import Columns, Digits, inputs
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import checkpoint

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {  # of conf/score.yaml
    "input": None,
    "output": None,
    "pvalue": False,
    "typicality": False,
    "calibration": None,
    "level": 0.01,
    "by_column": False,
    "outside": False,
    "draws": 1,
    "batch": "auto",
    "label": None,
    "weights": "auto",
    "on_bad": "stop",
    "json": False,
    "allow": [],
}


def train_run(folder, *words) -> Path:
    """A run in ``folder``."""
    (run_dir := folder / "run").mkdir()
    train.main(configuration(*words, "smoke=true", "logger=none"), str(run_dir))
    return run_dir


def run_score(run_dir, folder, **keys) -> tuple[list[list[str]], dict]:
    """The rows of scores.csv, the heading first, and the summary. Paths are those in ``folder``."""
    file = run_dir / "checkpoints/best.pt"
    keys |= {key: str(folder / keys[key]) for key in ("input", "output") if keys.get(key)}
    config = validate(ScoreConfig, {**checkpoint.read_config(file), **DEFAULTS, "ckpt": str(file), **keys})
    (out := folder / "score").mkdir(exist_ok=True)
    summary = score.main(config, str(out))
    assert json.loads((out / "score.json").read_text()) == summary
    return [] if "output" in keys else list(csv.reader(open(out / "scores.csv", newline=""))), summary


def likelihoods(run_dir, folder, **keys) -> np.ndarray:
    return np.array([row[1] for row in run_score(run_dir, folder, **keys)[0][1:]], dtype=float)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run_dir = train_run(folder, "dataset=digits", "model=glow")
    images = Digits().split("test").take(torch.arange(359))[0]
    np.save(folder / "test.npy", images.numpy())
    np.save(folder / "grey.npy", images[:20, 0].numpy())
    return folder, run_dir


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on 3×16×16 images and a folder of other sizes, one of them no image."""
    folder = tmp_path_factory.mktemp("images")
    run_dir = train_run(folder, "dataset=synthetic", "dataset.shape=[3,16,16]", "model=glow")
    draw = np.random.default_rng(0)
    (folder / "new/deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "deep/c.png"):
        Image.fromarray(draw.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / "new" / name)
    return folder, run_dir


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    draw, n = np.random.default_rng(0), 700
    frame = pd.DataFrame(
        {
            "other": draw.normal(size=n),
            "age": draw.integers(18, 90, n),
            "height": draw.normal(1.7, 0.1, n),
            "job": draw.choice(["a", "b"], n),
        }
    )
    frame.to_csv(folder / "rows.csv", index=False)
    frame[["job", "height", "age"]].to_parquet(folder / "rows.parquet")
    words = [f"dataset.path='{folder}/rows.csv'", "dataset.columns=[age,height]", "dataset.context=[job]"]
    return folder, train_run(folder, "dataset=table", *words, "model=maf"), frame


def test_the_mean_is_that_of_eval(digits):
    folder, run_dir = digits
    for words in (["eval"], ["score", "input=test.npy"]):
        assert flowtrain(folder, *words, "draws=2", "json=true", "ckpt=run") == 0
    evaluated = json.loads(next(run_dir.glob("eval/*/eval.json")).read_text())
    (made,) = run_dir.glob("score/*")
    summary, rows = json.loads((made / "score.json").read_text()), pd.read_csv(made / "scores.csv")
    assert list(rows) == ["row", "log_likelihood", "bits_per_dim"] and rows["row"].tolist() == list(range(1, 360))
    assert summary["rows"] == evaluated["examples"] == 359
    for key in ("log_likelihood", "log_likelihood_stderr", "bits_per_dim"):
        assert summary[key] == pytest.approx(evaluated[key], rel=1e-6)
    assert rows["log_likelihood"].mean() == pytest.approx(summary["log_likelihood"], rel=1e-9)
    np.testing.assert_allclose(rows["bits_per_dim"], -rows["log_likelihood"] / 64 / np.log(2))


def test_the_data_of_an_evaluation_may_have_moved(table, tmp_path):
    folder, run_dir, frame = table
    frame.to_csv(tmp_path / "moved.csv", index=False)
    assert flowtrain(tmp_path, "eval", f"ckpt='{run_dir}'", "dataset.path=moved.csv") == 0
    evaluated = json.loads(next(run_dir.glob("eval/*/eval.json")).read_text())
    assert evaluated["examples"] == 70 and "moved.csv" in evaluated["data"]


def test_batches_change_nothing_and_seeds_the_noise(digits):
    folder, run_dir = digits
    one, other, third = (
        likelihoods(run_dir, folder, input="test.npy", **keys) for keys in ({"batch": 100}, {"batch": 7}, {"seed": 3})
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert np.abs(one - third).min() > 1e-5


def test_values_that_are_no_images(digits, capsys):
    folder, run_dir = digits
    assert len(likelihoods(run_dir, folder, input="grey.npy")) == 20
    wrong = np.load(folder / "test.npy")[:4]
    wrong[2, 0, 0, 0] = 17
    np.save(folder / "wrong.npy", wrong)
    np.save(folder / "reals.npy", wrong / 17)
    with pytest.raises(
        FlowtrainError,
        match=r"wrong.npy: row 3 .* outside the whole numbers 0 … 16; on_bad=skip leaves it out",
    ):
        run_score(run_dir, folder, input="wrong.npy")
    with pytest.raises(
        UsageError, match=r"float64 \[4, 1, 8, 8\]: this model takes integers 0 … 16 of shape \[N, 1, 8, 8\]"
    ):
        run_score(run_dir, folder, input="reals.npy")
    rows, summary = run_score(run_dir, folder, input="wrong.npy", on_bad="skip")
    assert rows[3] == ["3", "", ""] and rows[4][1] and (summary["rows"], summary["skipped"]) == (4, 1)
    assert "skipped         1, first: row 3 " in capsys.readouterr().out
    (folder / "some").mkdir()
    Image.fromarray(wrong[0, 0]).save(folder / "some/digit.png")
    with pytest.raises(UsageError, match="17 grey levels: give an array .*of 0 … 16"):
        run_score(run_dir, folder, input="some")


def test_images_in_a_folder_an_archive_or_alone(images):
    folder, run_dir = images
    (folder / "new/b2.png").write_bytes(b"nothing")
    with pytest.raises(FlowtrainError, match="cannot read the image .*b2.png"):
        run_score(run_dir, folder, input="new")
    rows, summary = run_score(run_dir, folder, input="new", on_bad="skip")
    assert [row[0] for row in rows] == ["file", "a.png", "b.png", "b2.png", "deep/c.png"]
    assert rows[3][1:] == ["", ""] and summary["skipped"] == 1 and summary["first_skipped"].startswith("b2.png: ")
    (folder / "new/b2.png").unlink()

    crops = [np.asarray(Image.open(folder / "new" / name))[:, 4:20] for name in ("a.png", "b.png", "deep/c.png")]
    np.save(folder / "new.npy", np.stack(crops).transpose(0, 3, 1, 2))
    shutil.make_archive(folder / "zipped", "zip", folder / "new")
    shutil.make_archive(folder / "tarred", "tar", folder / "new")
    wanted = likelihoods(run_dir, folder, input="new.npy")
    for name in ("new", "zipped.zip", "tarred.tar"):
        assert (likelihoods(run_dir, folder, input=name) == wanted).all()
    assert likelihoods(run_dir, folder, input="new/a.png") == pytest.approx(wanted[:1], rel=1e-6)


def test_rows_of_a_table(table):
    folder, run_dir, frame = table
    rows, summary = run_score(run_dir, folder, input="rows.csv")
    assert rows[0] == ["row", "log_likelihood"] and "bits_per_dim" not in summary
    run_score(run_dir, folder, input="rows.parquet", output="scores.parquet", batch=50)
    parquet = pd.read_parquet(folder / "scores.parquet")
    values = np.array(rows[1:], dtype=float)
    assert parquet["row"].tolist() == list(range(1, 701)) == values[:, 0].tolist()
    np.testing.assert_allclose(parquet["log_likelihood"], values[:, 1], rtol=1e-5)

    columns = Columns.from_record(checkpoint.read(run_dir / "checkpoints/best.pt")["columns"])
    flow = load(str(run_dir))
    with torch.no_grad():  # other noise: the same rows are likely
        other = torch.stack([flow(*columns.encode(frame)) for _ in range(20)]).mean(0).numpy()
    assert np.corrcoef(other, values[:, 1])[0, 1] > 0.99
    assert abs(other.mean() - values[:, 1].mean()) < 0.05


def test_rows_of_real_numbers(tmp_path):
    """By name; by position where an array has none."""
    run_dir = train_run(tmp_path, "dataset=moons", "model=maf")
    rows = np.random.default_rng(0).normal(size=(300, 2))
    np.save(tmp_path / "rows.npy", rows)
    pd.DataFrame(rows, columns=["y", "x"]).to_csv(tmp_path / "swapped.csv", index=False)
    flow = load(str(run_dir))
    for name, expected in (("rows.npy", rows), ("swapped.csv", rows[:, ::-1])):
        with torch.no_grad():
            wanted = flow(torch.from_numpy(expected.astype(np.float32))).numpy()
        np.testing.assert_allclose(likelihoods(run_dir, tmp_path, input=name), wanted, rtol=1e-4, atol=1e-4)


def test_a_missing_value_stops_or_is_left_out(table):
    folder, run_dir, frame = table
    bad = frame.copy()
    bad.loc[300, "height"] = np.nan
    bad.loc[301, "job"] = "c"
    bad.loc[302, "height"] = 1e30
    bad.to_csv(folder / "bad.csv", index=False)
    with pytest.raises(FlowtrainError, match="bad.csv: column 'height', row 301 .*missing or not finite; on_bad=skip"):
        run_score(run_dir, folder, input="bad.csv", output="bad_scores.csv")
    assert not [*folder.glob("*bad_scores*"), *folder.glob(".bad_scores*")]
    skipping, summary = run_score(run_dir, folder, input="bad.csv", on_bad="skip")
    whole, _ = run_score(run_dir, folder, input="rows.csv")
    assert summary["skipped"] == 3 and [row[1] for row in skipping[301:304]] == [""] * 3
    found, wanted = (np.array(rows[1:301] + rows[304:], dtype=float) for rows in (skipping, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # the others keep their noise
    frame.assign(height=1e30).to_csv(folder / "far.csv", index=False)
    with pytest.raises(FlowtrainError, match=r"far.csv: row 1 \(the first is 1\): its log-likelihood is -inf"):
        run_score(run_dir, folder, input="far.csv")


@pytest.mark.parametrize(
    ("keys", "says", "code"),
    [
        ({}, "input=PATH is needed", 2),
        ({"input": "row.csv"}, "no such file or folder; did you mean", 2),
        ({"input": "four.npy"}, "four.npy has 4 columns; this model takes 3", 2),
        ({"input": "names.csv"}, "names.csv has no column 'age'; did you mean 'ages'?", 2),
        ({"input": "empty.csv"}, "empty.csv has no rows", 2),
        ({"input": "cut.parquet"}, "cut.parquet: Parquet", 1),
        ({"input": "rows.pdf"}, "this model takes rows: a table (csv,", 2),
        ({"input": "rows.csv", "output": "rows.csv"}, "is the input itself", 2),
        ({"input": "rows.csv", "output": "rows.txt"}, "must end in .csv or .parquet", 2),
        ({"input": "rows.csv", "output": "nowhere/rows.csv"}, "there is no folder", 2),
        ({"input": "rows.csv", "label": 3}, "this model is not class-conditional", 2),
    ],
)
def test_refusals(table, keys, says, code):
    folder, run_dir, frame = table
    np.save(folder / "four.npy", np.zeros((4, 4)))
    frame.rename(columns={"age": "ages"}).to_csv(folder / "names.csv", index=False)
    frame[:0].to_csv(folder / "empty.csv", index=False)
    (folder / "rows.pdf").touch()
    (folder / "cut.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:500])
    with pytest.raises(FlowtrainError) as caught:
        run_score(run_dir, folder, **keys)
    assert says in str(caught.value) and caught.value.exit_code == code


def test_refusals_of_the_command_line(table):
    folder, _, _ = table
    for word, says in (
        ("batch=0", "batch=0: must be"),
        ("model=nice", "is fixed by the checkpoint"),
        ("max_steps=3", "this command does not train"),
        ("trainer.clip=2", "this command does not train"),
    ):
        with pytest.raises(UsageError, match=says):
            flowtrain(folder, "score", "ckpt=run", "input=rows.csv", word)
    assert not (folder / "run/score").exists()


def test_a_class_is_given_by_its_label(tmp_path):
    run_dir = train_run(tmp_path, "dataset=digits", "model=glow", "dataset.context=label", "base=class_normal")
    np.save(tmp_path / "digits.npy", Digits().split("test").take(torch.arange(30))[0].numpy())
    one, other = (likelihoods(run_dir, tmp_path, input="digits.npy", label=label) for label in (0, 3))
    assert np.abs(one - other).max() > 1e-3
    for keys in ({}, {"label": 10}):
        with pytest.raises(UsageError, match="label=.*0 to 9"):
            run_score(run_dir, tmp_path, input="digits.npy", **keys)


@pytest.mark.parametrize("block", [100, 400])
def test_processes_share_each_block_of_a_table(tmp_path, monkeypatch, block):
    monkeypatch.setattr("flowtrain.data.tables.block.BLOCK", block)
    rows = np.random.default_rng(0).normal(size=(901, 3)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    source = inputs.TableRows(tmp_path / "rows.npy", inputs.unnamed_columns(3, None))
    for world in (1, 2, 3):
        turns = list(zip(*(source.groups(rank, world) for rank in range(world)), strict=True))
        groups = [group for turn in turns for group in turn]
        assert torch.equal(torch.cat([group.x for group in groups]), torch.from_numpy(rows))
        assert [name for group in groups for name in group.names] == list(range(1, 902))
        assert all(group.first == group.names[0] - 1 for group in groups if len(group.names))


def test_unreadable_rows_are_found_among_many(tmp_path):
    rows = np.random.default_rng(0).normal(size=(1000, 2))
    rows[[0, 500, 501, 999], [0, 1, 0, 1]] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    (group,) = inputs.TableRows(tmp_path / "rows.npy", inputs.unnamed_columns(2, None), on_bad="skip").groups()
    assert sorted(group.bad) == [0, 500, 501, 999] and "column 'x0', row 502 " in group.bad[501]
    good = np.isfinite(rows).all(1)
    assert np.array_equal(group.x.numpy()[good], rows[good].astype(np.float32)) and not group.x[~good].any()


def test_images_are_dealt_out_and_whole_groups_may_be_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "IMAGES", 2)
    for name in "abcdefg":
        (tmp_path / f"{name}.png").write_bytes(b"nothing")
    for name in "aefg":
        Image.fromarray(np.full((4, 4), ord(name), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    for world in (1, 2):
        groups = []
        for rank in range(world):
            source = inputs.ImageFiles(tmp_path, (1, 4, 4), on_bad="skip")
            groups += source.groups(rank, world)
        groups.sort(key=lambda group: group.first)
        names = [[name[0] for name in group.names] for group in groups]
        assert names == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]
        assert [sorted(group.bad) for group in groups] == [[1], [0, 1], [], []]
        assert [int(x[0, 0, 0]) for group in groups for x in group.x] == [97, 0, 0, 0, 101, 102, 103]


def process(cwd, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flowtrain", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_processes_share_the_work(digits):
    folder, run_dir = digits
    done = process(folder, "score", "ckpt=run", "input=test.npy", "output=two.csv", "devices=2")
    assert done.returncode == 0 and "nats, mean" in done.stdout, done.stderr
    two = pd.read_csv(folder / "two.csv")
    np.testing.assert_allclose(two["log_likelihood"], likelihoods(run_dir, folder, input="test.npy"), rtol=1e-5)
    done = process(folder, "score", "ckpt=run", "input=nowhere")
    assert (done.returncode, done.stderr) == (2, "flowtrain: input=nowhere: no such file or folder\n")


# ---- how unusual ---------------------------------------------------------------------------------------------------


def test_pvalues_compare_with_the_test_split(table, capsys):
    folder, run_dir, frame = table
    rows, summary = run_score(run_dir, folder, input="rows.csv", pvalue=True, typicality=True, level=0.1)
    assert rows[0] == ["row", "log_likelihood", "pvalue", "typicality", "pvalue_two_sided"]
    assert (summary["calibration"], summary["calibration_rows"]) == ("test", 70)
    log_prob, p, typical, both = np.array([row[1:] for row in rows[1:]], dtype=float).T
    order = np.argsort(log_prob)
    assert (np.diff(p[order]) >= 0).all() and set(np.round(p * 71, 6)) <= set(range(1, 72))
    np.testing.assert_allclose(typical, np.abs(-log_prob - summary["entropy"]), rtol=1e-9)
    assert (both >= np.minimum(1, 2 * p) - 1e-12)[p < 0.5].all() and both.max() <= 1
    assert summary["alarms"] == (p <= 0.1).sum()
    low, high = summary["false_alarm_rates"]
    assert 0.03 < low < 0.1 < high < 0.2 and abs(summary["auroc_log_likelihood"] - 0.5) < 0.1
    out = capsys.readouterr().out
    assert "70 rows of the test split, rows that training did not see" in out and "false alarms  " in out


def test_calibration_rows_of_the_validation_split_or_a_file(table, capsys):
    folder, run_dir, frame = table
    frame[100:400].to_csv(folder / "usual.csv", index=False)
    frame[400:600].to_csv(folder / "fresh.csv", index=False)
    _, summary = run_score(run_dir, folder, input="fresh.csv", pvalue=True, calibration="val")
    out = capsys.readouterr().out
    assert "the val split, rows that chose the weights: p-values are a little too small" in out
    assert summary["false_alarm_rates"] == [0.0, 0.0] and "p ≤ 0.01 takes at least 99 calibration rows" in out
    usual = str(folder / "usual.csv")
    rows, summary = run_score(run_dir, folder, input="fresh.csv", pvalue=True, calibration=usual)
    assert summary["calibration_rows"] == 300
    alone = np.sort(likelihoods(run_dir, folder, input="usual.csv"))
    log_prob, p = np.array([row[1:] for row in rows[1:]], dtype=float).T
    # the noise of calibration rows is another, so only about the same
    assert np.abs(p - (1 + np.searchsorted(alone, log_prob, side="right")) / 301).max() < 0.2


def test_noise_of_calibration_rows_is_as_frequent_but_another(digits, monkeypatch):
    from flowtrain.commands import scoring

    seen = []

    def watch(flow, index, x, context, draws, seed):
        seen.append((draws, seed))
        return log_likelihoods(flow, index, x, context, draws, seed)

    log_likelihoods = scoring.log_likelihoods
    monkeypatch.setattr(scoring, "log_likelihoods", watch)
    folder, run_dir = digits
    np.save(folder / "few.npy", np.load(folder / "test.npy")[:30])
    rows, summary = run_score(run_dir, folder, input="few.npy", pvalue=True, draws=2, seed=5)
    assert {draws for draws, _ in seen} == {2} and len({seed for _, seed in seen}) == 2
    assert summary["calibration_rows"] == 359
    assert "pvalue" in rows[0] and "bits_per_dim" in rows[0]


def test_classes_are_compared_with_their_own(tmp_path):
    run_dir = train_run(tmp_path, "dataset=digits", "model=glow", "dataset.context=label", "base=class_normal")
    np.save(tmp_path / "digits.npy", Digits().split("train").take(torch.arange(30))[0].numpy())
    rows, summary = run_score(run_dir, tmp_path, input="digits.npy", label=3, pvalue=True, level=0.1)
    threes = int((Digits(context="label").split("test").take(torch.arange(359))[1].argmax(1) == 3).sum())
    p = np.array([row[rows[0].index("pvalue")] for row in rows[1:]], dtype=float)
    np.testing.assert_allclose((p * (threes + 1)).round(), p * (threes + 1), atol=1e-6)
    assert summary["calibration_rows"] == threes and "calibration_rows_of_a_class" not in summary
    assert 0 < summary["false_alarm_rates"][0] < 0.1 < summary["false_alarm_rates"][1]


def test_columns_outside_the_trained_range(table):
    folder, run_dir, frame = table
    new = frame[:6].copy()
    new.loc[1, "age"] = 200
    new.loc[2, ["age", "height"]] = 5, 0.1
    new.loc[3, "height"] = np.nan
    new.to_csv(folder / "odd.csv", index=False)
    rows, summary = run_score(run_dir, folder, input="odd.csv", outside=True, on_bad="skip", level=0.1)
    assert [row[-1] for row in rows] == ["outside", "", "age", "age, height", "", "", ""]
    assert summary["rows_outside"] == 2 and summary["outside"] == {"age": 2, "height": 1}
    columns = Columns.from_record(checkpoint.read(run_dir / "checkpoints/best.pt")["columns"])
    assert columns.modelled[0].least == 18 and columns.modelled[0].greatest == 89 and columns.has_ranges


def test_log_p_by_column(tmp_path):
    """Of dates, gaps, categories and contexts; it sums to the same log-likelihood."""
    draw, n = np.random.default_rng(0), 600
    frame = pd.DataFrame(
        {
            "when": (pd.Timestamp("2024-01-01") + pd.to_timedelta(draw.integers(0, 90, n), unit="D")).strftime(
                "%Y-%m-%d"
            ),
            "job": draw.choice(["a", "b"], n),
            "pay": draw.normal(size=n).round(3),
            "given": draw.normal(size=n),
        }
    )
    frame.loc[draw.random(n) < 0.2, "pay"] = np.nan
    frame.to_csv(tmp_path / "rows.csv", index=False)
    words = [f"dataset.path='{tmp_path}/rows.csv'", "dataset.missing=model", "dataset.context=[given]", "model=made"]
    run_dir = train_run(tmp_path, "dataset=table", *words)
    rows, summary = run_score(run_dir, tmp_path, input="rows.csv", by_column=True, draws=2, outside=True)
    names = ["when", "job", "pay"]
    assert rows[0] == ["row", "log_likelihood", "outside", *(f"log_likelihood.{name}" for name in names)]
    assert summary["order_of_columns"] == [*names, "pay missing"]
    found = np.array([[*row[1:2], *row[3:]] for row in rows[1:]], dtype=float)
    np.testing.assert_allclose(found[:, 1:].sum(1), found[:, 0], rtol=1e-12)
    np.testing.assert_allclose(found[:, 0], likelihoods(run_dir, tmp_path, input="rows.csv", draws=2), rtol=1e-5)
    frame.assign(given=100.0).to_csv(tmp_path / "far.csv", index=False)
    rows, _ = run_score(run_dir, tmp_path, input="far.csv", outside=True)
    assert all(row[-1].endswith("given") for row in rows[1:])


def test_weighted_rows_are_not_counted_alike(tmp_path):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)), columns=["a", "b"]).assign(
        w=1 + np.arange(300) % 3
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame[:100].to_csv(tmp_path / "new.csv", index=False)
    words = [f"dataset.path='{tmp_path}/rows.csv'", "dataset.weights=w", "model=made"]
    run_dir = train_run(tmp_path, "dataset=table", *words)
    with pytest.raises(UsageError, match="calibration=test: the rows of this split count by dataset.weights"):
        run_score(run_dir, tmp_path, input="new.csv", pvalue=True)
    _, summary = run_score(run_dir, tmp_path, input="new.csv", pvalue=True, calibration=str(tmp_path / "rows.csv"))
    assert summary["calibration_rows"] == 300


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"calibration": "val"}, "calibration=val: is for pvalue=true or typicality=true"),
        ({"pvalue": True, "calibration": "train"}, "calibration=train: the flow was fitted to these rows"),
        ({"pvalue": True, "calibration": "testing"}, "calibration=testing: no such file or folder.*; test and val are"),
        ({"pvalue": True, "calibration": "INPUT"}, "is the input itself"),
    ],
)
def test_refusals_of_comparisons(table, keys, says):
    folder, run_dir, _ = table
    if keys.get("calibration") == "INPUT":
        keys = keys | {"calibration": str(folder / "rows.csv")}
    with pytest.raises(UsageError, match=says):
        run_score(run_dir, folder, input="rows.csv", **keys)


def test_flows_that_mix_columns_do_not_split(tmp_path):
    run_dir = train_run(tmp_path, "dataset=moons", "model=nsf_coupling")
    np.save(tmp_path / "rows.npy", np.zeros((3, 2)))
    with pytest.raises(UsageError, match="by_column=true: .* layer 'couplings.*mixes columns; model=made and made_mog"):
        run_score(run_dir, tmp_path, input="rows.npy", by_column=True)


def test_images_have_no_columns(digits):
    folder, run_dir = digits
    for key, says in (("by_column", "this model takes images"), ("outside", "is for the columns of a table")):
        with pytest.raises(UsageError, match=f"{key}=true: .*{says}"):
            run_score(run_dir, folder, input="grey.npy", **{key: True})


def test_a_checkpoint_without_ranges_says_so(table, tmp_path):
    folder, run_dir, _ = table
    shutil.copytree(run_dir, tmp_path / "run")
    state = checkpoint.read(tmp_path / "run/checkpoints/best.pt")
    for column in state["columns"]["modelled"]:
        del column["least"], column["greatest"]
    checkpoint.save(state, tmp_path / "run/checkpoints/best.pt")
    with pytest.raises(UsageError, match="of an earlier version, holds no ranges of its columns"):
        run_score(tmp_path / "run", folder, input="rows.csv", outside=True)
