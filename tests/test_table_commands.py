"""Commands on the tables that people have: trained, evaluated, sampled and scored as typed."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from inprocess import flowtrain

from flowtrain.cli.exit_codes import WorkerError

N = 90
random = np.random.default_rng(0)
ROWS = np.stack([random.normal(size=N), random.exponential(size=N)], 1)
SMALL = ("max_steps=3", "smoke=true", "report=false", "hydra.run.dir=run")


def blanks(folder):
    np.savetxt(folder / "t.dat", ROWS, fmt="%.5f")


def comments(folder):
    lines = [
        "# station 7",
        "# in metres",
        "depth\twidth",
        *("\t".join(f"{value:.4f}" for value in row) for row in ROWS),
    ]
    (folder / "t.tsv").write_text("\n".join(lines) + "\n")


def decimal_commas(folder):
    rows = pd.DataFrame(ROWS, columns=["Höhe", "Breite"]).to_csv(sep=";", decimal=",", index=False)
    (folder / "t.csv.gz").write_bytes(gzip.compress(rows.encode()))


def times_and_nulls(folder):
    frame = pd.DataFrame(
        {
            "when": pd.date_range("2024-01-01", periods=N, freq="37min"),
            "x": ROWS[:, 0],
            "n": pd.array(random.integers(0, 5, N), dtype="Int64"),
            "colour": random.choice(["red", "green"], N),
        }
    )
    for step, name in ((7, "when"), (5, "x"), (4, "n")):
        frame.loc[::step, name] = None
    frame.to_parquet(folder / "t.parquet")


def structured(folder):
    np.save(folder / "t.npy", np.array([tuple(row) for row in ROWS], dtype=[("px", "f4"), ("py", "f8")]))


FILES = {
    "t.dat": (blanks, ["c0", "c1"]),
    "t.tsv": (comments, ["depth", "width"]),
    "t.csv.gz": (decimal_commas, ["Höhe", "Breite"]),
    "t.parquet": (times_and_nulls, ["when", "x", "n", "colour"]),
    "t.npy": (structured, ["px", "py"]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_command_on_a_table_as_typed(tmp_path, name):
    write, columns = FILES[name]
    write(tmp_path)
    gaps = ("dataset.missing=model",) if name == "t.parquet" else ()
    train = ("train", "model=nsf_coupling", "dataset=table", f"dataset.path={name}")
    assert flowtrain(tmp_path, *train, *gaps, *SMALL) == 0
    assert flowtrain(tmp_path, "eval", "ckpt=run") == 0
    (report,) = tmp_path.glob("run/eval/*/eval.json")
    report = json.loads(report.read_text())
    assert report["examples"] == 9 and report.get("lower_bound", False) == bool(gaps)
    assert flowtrain(tmp_path, "sample", "ckpt=run", "n=40", "output=samples.csv", "plot=false") == 0
    samples = pd.read_csv(tmp_path / "samples.csv")
    assert list(samples) == columns and len(samples) == 40
    if gaps:
        assert samples[["when", "x", "n"]].isna().any().all() and samples["colour"].notna().all()
        assert pd.to_datetime(samples["when"].dropna()).dt.year.between(2023, 2025).all()
    assert flowtrain(tmp_path, "score", "ckpt=run", f"input={name}", "output=scores.csv") == 0
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert len(scores) == N and np.isfinite(scores["log_likelihood"]).all()


def refusal(*command) -> str:
    """The line with which a command is refused."""
    with pytest.raises(WorkerError) as error:
        flowtrain(*command)
    assert error.value.exit_code in (1, 2) and "\n" not in str(error.value)
    return str(error.value)


def test_a_table_with_gaps_names_the_ways_out(tmp_path):
    times_and_nulls(tmp_path)
    line = refusal(tmp_path, "train", "model=maf", "dataset=table", "dataset.path=t.parquet", *SMALL)
    assert "'when' 13 (first in row 1)" in line and "dataset.missing=drop" in line and "dataset.missing=model" in line
    assert not (tmp_path / "run").exists()


def test_other_files_of_a_model_are_scored_or_refused_in_one_line(tmp_path):
    frame = pd.DataFrame({"x": ROWS[:, 0], "colour": random.choice(["red", "green"], N), "when": "2024-01-0"})
    frame["when"] += (1 + random.integers(0, 9, N)).astype(str)
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert flowtrain(tmp_path, "train", "model=maf", "dataset=table", "dataset.path=t.csv", *SMALL) == 0
    cases = {
        "reordered": (frame[["when", "colour", "x"]].assign(more=1), None),
        "unseen": (frame.assign(colour="blue"), "column 'colour', row 1: 'blue' is not one of green, red"),
        "missing": (frame.drop(columns="x"), "has no column 'x'"),
        "gap": (frame.assign(x=[None, *frame["x"][1:]]), "column 'x', row 1"),
        "no time": (frame.assign(when="soon"), "column 'when', row 1: 'soon' is no time"),
    }
    for name, (other, line) in cases.items():
        other.to_csv(tmp_path / "other.csv", index=False)
        for command in (("score", "input=other.csv", "output=s.csv"), ("eval", "dataset.path=other.csv")):
            if line is None:
                assert flowtrain(tmp_path, *command, "ckpt=run") == 0, name
            else:
                assert line in refusal(tmp_path, *command, "ckpt=run"), name
