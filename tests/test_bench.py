"""flowtrain bench: each suite runs and records its measurements, and an inexact flow is an error."""

import gzip
import json
import random
import re
from dataclasses import asdict
from functools import partial

import pytest
import torch
from inprocess import flowtrain

from flowtrain.benchmarks import SUITES, ours, peers, report
from flowtrain.benchmarks.command_speed import Finished, Runner
from flowtrain.benchmarks.session import BARE, Beside, Load, Row, Session, ratios
from flowtrain.benchmarks.timing import MIN_ROUNDS, Spread, ratio, time_in_turns
from flowtrain.cli import exit_codes
from flowtrain.commands import BenchConfig
from flowtrain.config.conversion import key_names
from flowtrain.errors import FlowtrainError, UsageError

COMPILING = "for the first time", "with the code kept"
TINY = ("smoke=true", "threads=1", "rounds=3", "seconds=0.01", "compile=false", "plot=false")


@pytest.fixture
def bench(tmp_path, capsys):
    def run(*words):
        threads = torch.get_num_threads()
        try:
            assert flowtrain(tmp_path, "bench", *TINY, *words) == 0
        finally:
            torch.set_num_threads(threads)
        (file,) = tmp_path.glob("outputs/bench/*/bench.json")
        return json.loads(file.read_text()), capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "suite, targets",
    [
        ("train", 6),
        ("sample", 10),
        ("decode", 2),
        ("spline", 1),
        ("memory", 7),
        ("serve", 4),
        ("data", 3),
        ("epoch", 1),
        ("processes", 0),
    ],
)
def test_each_suite_records_its_rows_and_targets(bench, suite, targets):
    pytest.importorskip("nflows")
    found, printed = bench(f"suite={suite}", "peers=[nflows]")
    rows = found["rows"]
    assert {row["suite"] for row in rows} == {suite}
    assert all(row["value"] >= 0 and row["spread"] >= 0 for row in rows)
    assert sum(row["target"] is not None for row in rows) == targets
    for row in rows:
        assert row["reached"] == (None if row["target"] is None else row["value"] - row["spread"] <= row["target"])
    assert all(item["error"] <= item["tolerance"] for item in found["exactness"])
    assert found["exactness"] or suite in ("data", "processes")
    assert {"load", "threads", "cores", "torch", "peers", "date", "command", "seconds"} <= set(found)
    assert report.table(rows) in printed.out


def test_without_peers_large_calls_have_seconds(bench):
    found, _ = bench("suite=serve", "peers=[]")
    assert len(found["rows"]) == 4 and all(row["unit"] == "s" and row["theirs"] is None for row in found["rows"])
    assert found["rows"][0]["rate"].endswith(" rows/s") and found["rows"][1]["rate"].endswith(" samples/s")


def test_all_peers_have_the_same_size_and_are_exact(bench):
    for package in peers.PACKAGES.values():
        pytest.importorskip(package)
    found, _ = bench("suite=train")
    assert set(found["peers"]) == set(peers.PACKAGES)
    others = {"NSF coupling": ["zuko"], "Glow": ["normflows", "freia", BARE]}  # splines on all, other 1×1 convolutions
    for work, counts in found["parameters"].items():
        same = [counts[name] for name in counts if name not in others.get(work.partition(" training")[0], [])]
        assert len(set(same)) == 1 and len(same) > 1, work
    same = [item["what"] for item in found["exactness"] if "with our weights" in item["what"]]
    assert any("nflows" in what and "density" in what for what in same)


def test_the_start_suite_measures_seconds(bench, monkeypatch):
    monkeypatch.setattr("flowtrain.benchmarks.start_up._first_step", lambda: 5.0)  # which starts a process
    monkeypatch.setattr("flowtrain.benchmarks.start_up._import_torch", lambda: 3.0)
    found, _ = bench("suite=start")
    help_, torch_alone, first = found["rows"]
    assert help_["unit"] == "s" and 0 < help_["value"] < 60
    assert torch_alone["value"] == 3.0 and torch_alone["reached"] is None
    assert first["value"] == 5.0 and first["target"] == 5.5 and first["reached"]


def test_the_commands_suite_compares_with_the_library(bench, monkeypatch):
    monkeypatch.setattr(Runner, "train", lambda *_: None)
    monkeypatch.setattr(Runner, "library", lambda _: {"sample": 1.0, "log_prob": 2.0})
    few = {"n=2", "input=few.npy", "examples=2"}
    monkeypatch.setattr(Runner, "run", lambda _, command, *words: Finished(3.0 if few & {*words} else 4.1, 1000))
    monkeypatch.setattr(Runner, "step_times", lambda *_: {"flowtrain train": [1.05] * 3, "bare loop": [1.0] * 3})
    found, _ = bench("suite=commands")
    assert [row["theirs"] for row in found["rows"][:3]] == ["flow.sample", "flow.log_prob", "flow.log_prob"]
    assert [row["value"] for row in found["rows"]] == pytest.approx([1.1, 0.55, 0.55, 3.0, 1.0, *[1.05] * 3])
    assert all(row["reached"] for row in found["rows"] if row["target"] is not None)


@pytest.mark.slow
def test_the_commands_suite_runs_the_commands(bench):
    found, _ = bench("suite=commands")
    assert len(found["rows"]) == 8 and all(row["value"] > 0 for row in found["rows"][3:])


def test_a_peer_that_is_not_installed_is_reported_and_left_out(bench, monkeypatch):
    real = peers.importlib.util.find_spec
    absent = ("nflows", "FrEIA")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    found, printed = bench("suite=spline", "peers=[nflows,freia]")
    assert found["absent"] == ["nflows", "freia"] and found["peers"] == {}
    assert "left out: nflows, freia (pip install 'flowtrain[bench]')" in printed.err
    assert not found["rows"]


@pytest.mark.long
@pytest.mark.parametrize("suite, targets", [("train", 14), ("spline", 2)])
def test_compiled_flows_have_rows_and_checks(bench, suite, targets):
    pytest.importorskip("nflows")
    found, _ = bench(f"suite={suite}", "peers=[nflows]", "compile=true")
    assert sum(row["target"] is not None for row in found["rows"]) == targets
    assert any("compiled" in item["what"] for item in found["exactness"])
    first, again = ([row["value"] for row in found["rows"] if row["ours"] == name] for name in COMPILING)
    assert len(first) == len(again) and sum(again) < sum(first) if suite == "train" else not first


@pytest.mark.parametrize("word", ["suite=splines", "peers=[nflow]", "rounds=0", "seconds=0", "threads=0", "ckpt=run"])
def test_an_invalid_value_is_a_usage_error(tmp_path, word):
    with pytest.raises(UsageError, match=word.partition("=")[0]):
        flowtrain(tmp_path, "bench", word)
    assert not list(tmp_path.iterdir())


def test_help_and_completion_name_each_key(tmp_path, capsys, monkeypatch):
    assert flowtrain(tmp_path, "bench", "--help") == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"  {key}[ .]", text) for key in key_names(BenchConfig))
    assert all(f"suite={suite}" in text for suite in (*SUITES, "all"))
    monkeypatch.setenv("COMP_LINE", "flowtrain bench su")
    flowtrain(tmp_path, "-sc", "query=bash")
    assert capsys.readouterr().out.split() == ["suite="]


def test_an_inexact_flow_is_an_error_and_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(self, x):
        z, log_det = self.flow.bijection(x)
        return z, 1.001 * log_det

    monkeypatch.setattr(ours.AsPeer, "encode", wrong)
    with pytest.raises(FlowtrainError, match="log-determinant is off by") as failure:
        flowtrain(tmp_path, "bench", *TINY, "suite=train", "peers=[]")
    assert failure.value.exit_code == 1 and exit_codes.describe_error(failure.value)[1] == 1
    assert not list(tmp_path.rglob("bench.json"))


def test_another_density_with_our_weights_is_an_error():
    session = Session(0, 1, 1.0, False, True, torch.device("cpu"), {})
    one, other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    session.check_same("the same", one, one, torch.randn(4, 3))
    with pytest.raises(FlowtrainError, match="another is off by"):
        session.check_same("another", one, other, torch.randn(4, 3))


def test_each_round_times_all_variants_in_random_order():
    calls = []
    variants = {name: partial(calls.append, name) for name in "abc"}
    times = time_in_turns(variants, 5, 60.0, random.Random(0), lambda: None, slice=1e-9)
    assert [len(times[name]) for name in "abc"] == [5, 5, 5]
    rounds = [tuple(calls[i : i + 3]) for i in range(len(calls) - 15, len(calls), 3)]
    assert all(sorted(one) == list("abc") for one in rounds) and len(set(rounds)) > 1
    assert len(time_in_turns(variants, 50, 0.0, random.Random(0), lambda: None, slice=1e-9)["a"]) == MIN_ROUNDS


def test_a_ratio_is_taken_within_each_round():
    times = {"a": [1.0, 20.0, 3.0, 4.0, 5.0], "b": [2.0, 40.0, 2.0, 4.0, 10.0]}
    assert ratio(times, "a", "b") == Spread(0.5, 0.25)
    row = partial(Row, "train", "work", "a", "b")
    assert row(1.04, 0.05, 1.0).reached and not row(1.06, 0.05, 1.0).reached and row(1.0, 0.0, None).reached is None


def test_the_plot_is_a_png_and_markdown_has_the_rows(bench, tmp_path):
    pytest.importorskip("matplotlib")
    found, _ = bench("suite=spline", "peers=[nflows]", "plot=true")
    (image,) = tmp_path.glob("outputs/bench/*/bench.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    other = {**found, "processor": "another", "rows": [{**row, "value": 7.0} for row in found["rows"]]}
    text = report.markdown([found, other])
    assert "nflows 0." in text and f"| {found['processor']} | another |" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {found['rows'][0]['work']} | flowtrain | n"))
    assert "| 7 ± " in line and line.count("reach 0.2: ") == 2


def test_a_verdict_compares_with_the_best_peer():
    times = {"flowtrain": [1.0, 1.1, 0.9], "nflows": [2.0, 2.2, 1.8], "zuko": [4.0, 4.0, 4.0], BARE: [1.0, 1.0, 1.0]}
    rows = [*ratios("train", "work", times, BARE, {"flowtrain": 1.0}, Load(500, "rows"))]
    mine, nflows, _ = rows
    assert mine.beside == Beside("nflows", 0.5, 0.0) and mine.rate == "500 rows/s" and nflows.beside is None
    rows = [{**asdict(row), "reached": row.reached} for row in rows]
    assert report.verdicts(rows) == [("work", "flowtrain", "500 rows/s", "2 × faster than nflows")]
    assert "not behind the best peer, median less spread: 1 of 1" in report.summary(rows)
    for beside, words in [
        (Beside("zuko", 1.25, 0.1), "1.25 × slower than zuko"),
        (Beside("zuko", 1.05, 0.1), "as fast as zuko"),
        (Beside("freia", 0.9, 0.0, "memory"), "0.9 × the memory of freia"),
    ]:
        assert report.verdicts([{**rows[0], "beside": asdict(beside)}])[0][3] == words


def test_a_profile_records_operations_of_training_steps(tmp_path, capsys):
    words = (
        "train",
        "batch_size=8",
        "model.steps=1",
        "model.hidden=8",
        "trainer.val_examples=16",
        "logger=none",
        "trainer.profile=true",
    )
    assert flowtrain(tmp_path, *words, "max_steps=12") == 0
    (run,) = tmp_path.glob("outputs/digits-glow/*")
    events = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::convolution_backward" for event in events)
    log = (run / "train.log").read_text()
    assert "profile of 5 steps" in log and len([line for line in log.splitlines() if " ×  " in line]) == 10
    capsys.readouterr()
    assert flowtrain(tmp_path, *words, "max_steps=3", "seed=2") == 0
    assert "nothing was recorded" in "".join(path.read_text() for path in tmp_path.rglob("train.log"))
