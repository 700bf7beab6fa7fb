"""scripts/scaling measures tiny sizes and writes its page; its fits and predictions give known values."""

import json
import shutil
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import pytest
import torch
from ranks import run_on_two_ranks
from torch.profiler import ProfilerActivity, profile

from flowtrain import bijections as b
from flowtrain.benchmarks.timing import time_in_turns
from flowtrain.engine.training_pass import synchronize_gradients
from flowtrain.flow import Flow

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def import_from_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.mark.slow
def test_tiny_sizes_are_measured_and_written_into_the_page(tmp_path):
    shutil.copy(ROOT / "docs" / "scaling.md", tmp_path)
    script = [sys.executable, str(ROOT / "scripts" / "scaling.py"), "--smoke", str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert {one["axis"] for one in found["growth"]} == {"D", "width", "depth", "batch"}
    assert all(value > 0 for one in found["growth"] for value in one["measured"])
    batch = next(o for o in found["growth"] if (o["axis"], o["work"], o["unit"]) == ("batch", "density", "B"))
    assert 0.5 < batch["exponent"]["median"] <= 1
    assert {one["model"] for one in found["families"]} >= {"maf", "iaf", "nsf_coupling", "ffjord"}
    assert "glow" not in {one["model"] for one in found["families"]}  # for images only
    for flow in found["parallel"]["flows"]:
        assert flow["gradient_bytes"] > 0
        assert all(step["all_reduce"] for step in flow["profile"])
    page = (tmp_path / "scaling.md").read_text()
    assert "`iaf`" in page and page.count("\n<!-- /") == page.count("\n<!-- ") / 2 == 9
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_page_without_a_section_is_an_error(tmp_path):
    import scaling_page

    machine = {"date": "", "torch": "", "cores": 1, "load": [0, 0], "cpu_seconds": 0}
    (tmp_path / "scaling.md").write_text("# no sections\n")
    with pytest.raises(ValueError, match="has 0 sections run"):
        scaling_page.write({"machine": machine}, tmp_path)


def test_times_come_from_the_given_clock():
    ticks = count()
    times = time_in_turns({"a": lambda: None}, 3, 0.0, Random(0), lambda: None, 1e-9, lambda: float(next(ticks)))
    assert times == {"a": [1.0, 1.0, 1.0]}


def test_the_exponent_of_a_power_is_fitted():
    from scaling import fit_exponent

    assert fit_exponent([2, 4, 8], [3 * n**1.5 for n in (2, 4, 8)]) == pytest.approx(1.5)
    assert fit_exponent([10, 100], [7, 7]) == pytest.approx(0)


def test_overlap_is_the_share_of_all_reduces_during_backward():
    from scaling_page import overlap

    assert overlap({"backward": [2, 10], "all_reduce": [[6, 8], [9, 11], [12, 16]]}) == pytest.approx(3 / 8)


def test_predictions_for_a_ring_and_a_tree():
    from scaling_parallel import BACKWARD, BUCKET, LINKS, SPEED, predict, ring, tree

    assert ring(8e9, 2, 1e9, 0) == pytest.approx(8)  # two processes send and receive half of it, twice
    assert ring(0, 5, 1e9, 1e-3) == pytest.approx(8e-3)
    preset = {"preset": "p", "batch": 64, "gradient_bytes": BUCKET, "flops": 1e12, "small": 0, "kernels": 0}
    assert tree(8, 1e-3) == pytest.approx(6e-3)
    alone, *_ = predict(preset)
    assert alone["gpus"] == 8 and alone["batch"] == 8 and alone["exposed"] == pytest.approx(alone["all_reduce"])
    larger, *_ = predict(preset | {"gradient_bytes": 2 * BUCKET})  # the rest is hidden behind backward
    assert ring(BUCKET, 8, *LINKS[8]) < BACKWARD * larger["compute"] == pytest.approx(BACKWARD * 8e12 / SPEED)
    assert larger["exposed"] == pytest.approx(alone["exposed"]) and larger["all_reduce"] > alone["all_reduce"]


def count_reductions(_folder):
    """The number of all-reduces in a training step of a flow with two batch norms."""
    flow = Flow([3], partial(b.Chain, layers={"one": b.BatchNorm, "scale": b.ActNorm, "other": b.BatchNorm}))
    wrapped, x = synchronize_gradients(flow, static_graph=True), torch.randn(8, 3)
    wrapped(x).mean().backward()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        wrapped(x).mean().backward()
    return sum(event.count for event in record.key_averages() if event.key == "c10d::allreduce_")


def test_a_batch_norm_waits_for_four_reductions(tmp_path):
    first = 2  # the data have no gradient, so the first norm sends no moments back
    assert run_on_two_ranks(count_reductions, tmp_path) == [1 + 4 + 4 - first] * 2  # and one for the gradients
