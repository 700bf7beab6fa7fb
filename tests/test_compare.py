"""flowtrain compare: paired differences against a direct computation, runs without one, the page in Chromium."""

import csv
import json
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from browser import SIZES, open_browser
from inprocess import flowtrain

import flowtrain as package
from flowtrain.cli.names import name_paths
from flowtrain.commands import COMMANDS
from flowtrain.commands.compare import _short_names, find_runs
from flowtrain.config.recorded import differing
from flowtrain.data import Digits
from flowtrain.engine.evaluate import log_likelihoods
from flowtrain.errors import UsageError
from flowtrain.report.compare_page import compare_page
from flowtrain.report.compare_text import plus_minus, terminal_text
from flowtrain.report.comparison import ComparedRun, Evaluation, compare
from flowtrain.runtime import checkpoint

TINY = ("smoke=true", "logger=none", "report=false")


def train(folder, name, *words):
    assert flowtrain(folder, "train", *TINY, f"hydra.run.dir=outputs/{name}", *words) == 0


def run_compare(folder, *words):
    """The rows of compare.csv by the names of the runs, and the folder of the comparison."""
    before = {*folder.glob("outputs/compare/*")}
    assert flowtrain(folder, "compare", *words) == 0
    (made,) = {*folder.glob("outputs/compare/*")} - before
    with (made / "compare.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}, made


def perturb(folder, source, name, by=0.05):
    """A copy of a run whose weights differ in one bias."""
    shutil.copytree(folder / f"outputs/{source}", folder / f"outputs/{name}")
    file = folder / f"outputs/{name}/checkpoints/best.pt"
    state = checkpoint.read(file)
    state.pop("format", None)
    bias = [key for key in state["model"] if key.endswith("bias")][-1]
    for weights in filter(None, (state["model"], state["ema"])):
        weights[bias] += by
    checkpoint.save(state, file)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Runs glow, same (a copy), other (a copy with another bias) and realnvp, and a sweep of maf on moons."""
    folder = tmp_path_factory.mktemp("digits")
    train(folder, "glow", "dataset=digits", "model=glow")
    train(folder, "realnvp", "dataset=digits", "model=realnvp", "seed=2")
    shutil.copytree(folder / "outputs/glow", folder / "outputs/same")
    perturb(folder, "glow", "other")
    return folder


def direct(folder, name, draws, seed):
    """The log-likelihood of each test example of digits by the flow itself."""
    flow, test = package.load(str(folder / f"outputs/{name}")), Digits().split("test")
    index = torch.arange(len(test))
    with torch.no_grad():
        return log_likelihoods(flow, index, test.take(index)[0], None, draws, seed)[0].numpy()


def test_differences_are_those_of_a_direct_computation(digits, capsys):
    rows, made = run_compare(digits, *(f"outputs/{name}" for name in ("glow", "same", "other", "realnvp")), "draws=2")
    told = capsys.readouterr().out
    assert told.count("evaluating") == 4 and f"{made}/compare.csv" in told and f"{made}/compare.html" in told
    each = {name: direct(digits, name, 2, 1) for name in rows}
    bits = {name: -values / (64 * math.log(2)) for name, values in each.items()}
    best = min(bits, key=lambda name: bits[name].mean())
    assert [*rows] == sorted(bits, key=lambda name: bits[name].mean())
    for name, row in rows.items():
        difference = bits[name] - bits[best]
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        assert row["unit"] == "bits/dim" and row["examples"] == "359" and row["reference"] in ("glow", "same", best)
        assert float(row["figure"]) == pytest.approx(bits[name].mean(), abs=1e-6)
        assert float(row["stderr"]) == pytest.approx(bits[name].std(ddof=1) / math.sqrt(359), abs=1e-6)
        assert float(row["difference"]) == pytest.approx(difference.mean(), abs=1e-6)
        assert float(row["difference_stderr"]) == pytest.approx(error, abs=1e-6)
    assert rows["glow"]["reading"].startswith("worse by") and rows["glow"]["reading"].endswith("bits/dim")
    summary = json.loads((digits / "outputs/glow/summary.json").read_text())
    assert float(rows["glow"]["validation"]) == summary["bits_per_dim"]
    assert int(rows["glow"]["parameters"]) == summary["parameters"]

    first, _ = run_compare(digits, "outputs/glow", "outputs/same", "outputs/other", "baseline=first", "draws=2")
    assert "evaluating" not in capsys.readouterr().out
    assert float(first["same"]["difference"]) == float(first["same"]["difference_stderr"]) == 0
    assert first["same"]["reading"] == "the same on every example" and first["glow"]["reading"] == "the reference"
    shift = bits["other"] - bits["glow"]
    assert float(first["other"]["difference"]) == pytest.approx(shift.mean(), abs=1e-7)
    assert first["other"]["difference"] != "0.0" and float(first["other"]["difference_stderr"]) < float(
        first["other"]["stderr"]
    )


def test_all_runs_get_the_same_noise(digits, capsys):
    """Two evaluations of eval have the seeds of their runs; one is repeated with the seed of the other."""
    for name in ("glow", "realnvp"):
        shutil.copytree(digits / f"outputs/{name}", digits / f"noise/{name}", ignore=shutil.ignore_patterns("eval"))
    for name, seed in (("glow", 1), ("realnvp", 2)):
        assert flowtrain(digits, "eval", f"ckpt=noise/{name}", "split=val", f"seed={seed}") == 0
    capsys.readouterr()
    rows, _ = run_compare(digits, "noise/glow", "noise/realnvp", "split=val")
    assert capsys.readouterr().out.count("evaluating") == 1
    seeds = {
        name: {json.loads(path.read_text())["seed"] for path in digits.glob(f"noise/{name}/eval/*/eval.json")}
        for name in ("glow", "realnvp")
    }
    assert seeds in ({"glow": {1}, "realnvp": {1, 2}}, {"glow": {1, 2}, "realnvp": {2}})
    assert {row["examples"] for row in rows.values()} == {"179"}
    rows, _ = run_compare(digits, "noise/glow", "noise/realnvp", "split=val", "seed=7", "examples=50")
    assert capsys.readouterr().out.count("evaluating") == 2 and {row["examples"] for row in rows.values()} == {"50"}
    rows, _ = run_compare(digits, "noise/glow", "noise/realnvp", "split=val", "seed=7", "examples=40")
    assert "evaluating" not in capsys.readouterr().out
    perturb(digits, "../noise/glow", "changed")  # its evaluations are of other weights
    run_compare(digits, "outputs/changed", "noise/glow", "split=val", "seed=7", "examples=40")
    assert "evaluating changed on val" in capsys.readouterr().out


def test_other_data_have_no_paired_difference(digits, capsys):
    train(digits, "moons", "dataset=moons", "model=maf")
    train(digits, "shuffled", "dataset=digits", "model=glow", "dataset.split_seed=1")
    names = ("glow", "same", "moons", "shuffled")
    rows, made = run_compare(digits, *(f"outputs/{name}" for name in names))
    told = " ".join(capsys.readouterr().out.split())
    assert {name for name, row in rows.items() if row["reference"]} == {"glow", "same"}
    assert rows["moons"]["unit"] == "nats" and rows["moons"]["difference"] == ""
    assert "moons: other data than glow (dataset=moons, not digits)" in told
    assert "shuffled: other data than glow (dataset.split_seed=1, not 0)" in told
    assert "so no paired difference with it" in (made / "compare.html").read_text()


def test_a_table_that_changed_is_other_data(tmp_path, capsys):
    """Also of the same length, at the same path; and weighted rows count by their weights."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(300, 3)), columns=["a", "b", "w"])
    frame["w"] = np.abs(frame["w"])
    frame.to_csv(tmp_path / "rows.csv", index=False)
    words = ("dataset=table", f"dataset.path={tmp_path}/rows.csv", "dataset.weights=w", "model=maf")
    train(tmp_path, "one", *words)
    perturb(tmp_path, "one", "two")
    rows, _ = run_compare(tmp_path, "outputs/one", "outputs/two")
    folders = {name: next((tmp_path / f"outputs/{name}/eval").iterdir()) for name in rows}
    each = {name: np.load(folder / "log_likelihoods.npy") for name, folder in folders.items()}
    weights = np.load(folders["one"] / "example_weights.npy").astype(float)
    reference = rows["one"]["reference"]
    (other,) = {*rows} - {reference}
    difference = each[other] - each[reference]
    n, total = len(weights), weights.sum()
    mean = (weights * difference).sum() / total
    error = math.sqrt(n / (n - 1) * (weights**2 * (difference - mean) ** 2).sum()) / total
    assert rows[other]["unit"] == "nats" and float(rows[other]["difference"]) == pytest.approx(mean)
    assert float(rows[other]["difference_stderr"]) == pytest.approx(error)
    report = json.loads((folders[other] / "eval.json").read_text())
    assert float(rows[other]["figure"]) == pytest.approx(report["log_likelihood"], abs=1e-9)
    assert float(rows[other]["stderr"]) == pytest.approx(report["log_likelihood_stderr"], abs=1e-9)

    frame["a"] += 1
    frame.to_csv(tmp_path / "rows.csv", index=False)
    train(tmp_path, "three", *words)
    capsys.readouterr()
    rows, _ = run_compare(tmp_path, "outputs/one", "outputs/two", "outputs/three")
    assert "three: other data than one (the examples differ)" in " ".join(capsys.readouterr().out.split())
    assert rows["three"]["difference"] == "" and rows["three"]["figure"]


def test_runs_that_lack_something_are_shown(digits, tmp_path, capsys):
    for name in ("whole", "bare", "broken", "stopped"):
        shutil.copytree(digits / "outputs/glow", tmp_path / f"outputs/{name}", ignore=shutil.ignore_patterns("eval"))
    shutil.rmtree(tmp_path / "outputs/bare/checkpoints")
    (tmp_path / "outputs/broken/summary.json").write_text('{"bits_per_dim": 2.0')
    for file in (tmp_path / "outputs/broken/checkpoints").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:-200])
    (tmp_path / "outputs/stopped/summary.json").unlink()
    status = json.loads((tmp_path / "outputs/stopped/status.json").read_text())
    (tmp_path / "outputs/stopped/status.json").write_text(json.dumps(status | {"state": "interrupted"}))
    shutil.copy(digits / "outputs/glow/checkpoints/best.pt", tmp_path / "lone.pt")
    for number, text in enumerate(("[]", "{", '{"split": "test", "seed": "x"}')):
        odd = tmp_path / f"outputs/whole/eval/{number}"
        odd.mkdir(parents=True)
        (odd / "eval.json").write_text(text)
        np.save(odd / "log_likelihoods.npy", np.zeros((2, 2)))
    paths = [f"outputs/{name}" for name in ("whole", "bare", "broken", "stopped")]
    rows, made = run_compare(tmp_path, *paths, "lone.pt")
    told = capsys.readouterr().out
    assert [*rows][3:] == ["bare", "broken"] and {*rows} == {"whole", "stopped", "lone.pt", "bare", "broken"}
    assert rows["lone.pt"]["reading"] in ("the same on every example", "the reference")
    assert "bare: no checkpoint, so nothing to evaluate" in told and "without a figure on test" in told
    assert "broken: summary.json cannot be read" in told and "not finished (interrupted), step 3" in told
    assert rows["bare"]["validation"] and not rows["bare"]["figure"] and not rows["broken"]["validation"]
    assert all(line in (made / "compare.html").read_text() for line in ("no checkpoint, so nothing", "not finished"))
    assert not [*tmp_path.glob("outputs/broken/eval/*")]


def test_a_sweep_is_its_jobs(digits, capsys):
    for job, (hidden, univariate) in enumerate(((4, "affine"), (8, "affine"), (8, "rational_quadratic"))):
        words = ("dataset=moons", "model=maf", f"model.hidden={hidden}", f"univariate={univariate}")
        train(digits, f"sweep/{job}_moons-maf", *words)
    rows, made = run_compare(digits, "outputs/sweep")
    assert sorted(rows) == ["0_moons-maf", "1_moons-maf", "2_moons-maf"]
    assert sorted(row["model.hidden"] for row in rows.values()) == ["4", "8", "8"]
    page = (made / "compare.html").read_text()
    assert "nats by model.hidden" in page and "nats by univariate" in page
    head = next(line for line in capsys.readouterr().out.splitlines() if "on the same examples" in line)
    assert head.split()[:2] == ["run", "figure"]


def test_of_a_job_that_ran_once_more_the_last_run_counts(tmp_path):
    for name in ("0_moons-maf", "0_moons-maf_2", "1_moons-maf", "10_moons-maf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text("{}")
    assert len(find_runs([str(tmp_path)])) == 4
    rows = "".join(f"{path},finished\n" for path in ("moved/0_moons-maf_2", "moved/1_moons-maf"))
    (tmp_path / "results.csv").write_text("run_dir,status\n" + rows)  # which does not name 10 yet: it is running
    assert [path.name for path in find_runs([str(tmp_path)])] == ["0_moons-maf_2", "1_moons-maf", "10_moons-maf"]


def test_the_page_in_chromium(digits):
    rows, made = run_compare(digits, "outputs/glow", "outputs/other", "outputs/realnvp")
    with open_browser() as browser:
        for (width, height), scheme in product(SIZES.values(), ("light", "dark")):
            browser.open(made / "compare.html", width, height, scheme)
            assert browser.problems() == []
            cells = "[...document.querySelectorAll('#figures tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
            table = browser.run(f"return {cells}")
            assert [cells[0].split(maxsplit=1)[1] for cells in table] == [*rows]
            for cells, row in zip(table, rows.values()):
                assert cells[1] == plus_minus(float(row["figure"]), float(row["stderr"]))
                assert cells[2] == row["reading"].removesuffix(" bits/dim")
            charts = browser.texts("figure.chart > figcaption")
            assert "test, bits/dim" in charts and any(text.startswith("Difference from") for text in charts)
            assert len(browser.texts("figure.chart svg")) == len(charts) >= 4
            pictures = browser.run("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
            assert len(pictures) == 3 and all(pictures)


def test_many_runs_stay_readable():
    random = np.random.default_rng(0)
    report = {"data_sha256": "x", "dimensions": 8, "bits_per_dim": 0, "data": "rows: 100", "seed": 1, "draws": 1}
    runs = [
        ComparedRun(
            f"{number}_run-with-a-rather-long-name-{number}",
            Path(f"/{number}"),
            keys={"model": "maf", **{f"key{i}": str(number * i) for i in range(30)}},
            overrides={"lr": str(10.0 ** -(number % 5)), "model": random.choice(["maf", "nice"])},
            evaluation=Evaluation(report, -20 + random.normal(size=100) + number),
        )
        for number in range(25)
    ]
    found = compare(runs, differing([run.keys for run in runs]))
    assert [row.run.name[:3] for row in found.rows[:2]] == ["24_", "23_"] and len(found.keys) == 29
    for width in (80, 120):
        lines = terminal_text(found, "test", width).splitlines()
        assert (
            max(map(len, lines)) <= width and sum("worse by" in line or "no difference" in line for line in lines) > 20
        )
    page = compare_page(found, "test")
    assert page.count("<tr>") >= 2 * 26 and "24_run-with-a-rather-long-name-24" in page


def test_words_of_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["outputs/x", "split=val", "a=b", "~/c", "~weights", "+new=1"]
    kept = name_paths(COMMANDS["compare"], words)
    assert kept == ["split=val", "~weights", "+new=1", 'runs=["outputs/x","a=b","~/c"]']
    assert name_paths(COMMANDS["eval"], words) == words and name_paths(COMMANDS["compare"], ["split=val"]) == [
        "split=val"
    ]
    for given, says in (
        (["compare", "x", "runs=[y]"], "as words, not both"),
        (["compare"], "no runs are named; two or more are compared, or a sweep: flowtrain compare outputs/a outputs/b"),
        (["compare", "nowhere", "elsewhere"], "runs=nowhere: no such file or directory"),
        (["compare", "a=b"], "neither a run nor a folder with runs"),
        (["compare", "x", "y", "splits=val"], "did you mean 'split'"),
    ):
        if len(given) == 1 or given[1] in ("nowhere", "a=b"):  # the command itself refuses
            with pytest.raises(UsageError, match=says):
                find_runs(given[1:])
        else:
            with pytest.raises(UsageError, match=says):
                flowtrain(tmp_path, *given)
    assert not (tmp_path / "outputs").exists()


def test_names_are_short_and_different():
    a, b = "2026-11-29_13-21-33", "2026-11-29_13-25-10"
    paths = [
        f"/o/digits-glow/{a}",
        f"/o/digits-glow/{b}",
        f"/o/digits-nice/{a}",
        f"/o/sweeps/{a}/0_x",
        f"/l/{a}/last.pt",
    ]
    assert _short_names([*map(Path, paths)]) == [
        "digits-glow 13-21-33", "digits-glow 13-25-10", "digits-nice", "0_x", "last.pt"
    ]  # fmt: skip
    assert _short_names([Path(f"/o/digits-glow/{a}"), Path("/p/digits-glow/2026-11-30_13-21-33")]) == [
        f"digits-glow {a}", "digits-glow 2026-11-30_13-21-33"
    ]  # fmt: skip
    assert _short_names([Path("/a/run"), Path("/b/run")]) == ["/a/run", "/b/run"]
