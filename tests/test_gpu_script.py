"""scripts/gpu: every part at a tiny size, what is measured once more and what is not, the page, and what it carries."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
WITHOUT_GPU = {"out of memory", "tests", "glow graph"}  # parts of which no row can be measured here


@pytest.fixture(autouse=True)
def import_from_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the runner sets it


@pytest.fixture
def parts(monkeypatch):
    """A function that makes these parts, name -> rows, all there are."""
    from on_gpu import runner
    from on_gpu.part import Part

    def make(**seconds):
        made = [Part(name, "", ROWS, {}, limit) for name, limit in seconds.items()]
        monkeypatch.setattr(runner, "PARTS", {part.name: part for part in made})
        monkeypatch.setattr(runner.distributed, "device", lambda: torch.device("cpu"))  # also where there is a GPU
        return made

    return make


def fail(place):
    raise ValueError("wrong")


def spoil(place):
    raise RuntimeError("CUDA error: an illegal memory access")


def need(place):
    from on_gpu.part import NotHere

    raise NotHere("needs a GPU")


ROWS = {
    "good": lambda place: {"value": 1, "passed": True},
    "wrong": lambda place: {"value": 2, "passed": False},
    "fails": fail,
    "spoils": spoil,
    "dies": lambda place: os._exit(7),
    "needs": need,
    "late": lambda place: time.sleep(60),
    "after": lambda place: {"value": 3},
}


def run(tmp_path, parts, found, seconds=100.0):
    from on_gpu import runner

    code = runner.run(parts, found, tmp_path / "gpu.json", seconds, at_once=2, tiny=True)
    return code, json.loads((tmp_path / "gpu.json").read_text())["parts"]


@pytest.mark.long
def test_every_part_is_rehearsed(tmp_path):
    """To be run after a change in scripts/on_gpu or scripts/gpu.py, and before a GPU is used."""
    from on_gpu.parts import PARTS

    path = tmp_path / "gpu.json"
    words = [sys.executable, "scripts/gpu.py", "--rehearse", "--results", str(path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["device"] == "cpu" and {*found["parts"]} == {*PARTS}
    for name, part in PARTS.items():
        rows = found["parts"][name]
        assert {*rows} == {*(part.rehearsed or part.rows)}
        reasons = {figures.get("not_here", "") for figures in rows.values()}
        assert reasons == {"needs a GPU"} if name in WITHOUT_GPU else "" in reasons, name
        assert all(text in ("", "needs a GPU") or "precision=" in text for text in reasons), reasons
        assert f"  {name}: " in done.stdout
    assert found["parts"]["glow"]["eager, float32, 64"]["images"] > 0
    assert found["parts"]["families"]["model=glow dataset=digits"]["reads"] == 1
    assert "flowtrain" in found["parts"]["steps"]["MAF, training step"]["ms"]


def test_a_row_takes_no_other_with_it(tmp_path, parts, capsys):
    code, found = run(tmp_path, parts(part=1.0), {})
    rows = found["part"]
    assert code == 1
    assert {*rows} == {*ROWS} - {"late", "after"}  # its time is up
    assert rows["fails"]["failed"] == "ValueError: wrong" and "illegal memory" in rows["spoils"]["failed"]
    assert "code 7" in rows["dies"]["failed"] and rows["needs"]["not_here"] == "needs a GPU"
    told = capsys.readouterr().out
    assert "part: 1 of 8 rows measured, 4 failed, others: needs a GPU (" in told and "part, dies: the process" in told


def test_what_is_known_is_not_measured_again(tmp_path, parts, monkeypatch):
    known = {"good": {"value": 0, "passed": True}, "wrong": {"passed": False}, "late": {"value": 0}, "dies": {"v": 0}}
    _, found = run(tmp_path, parts(part=30.0), {"parts": {"part": known, "other": {"row": {}}}})
    assert found["part"]["good"]["value"] == found["part"]["late"]["value"] == 0  # known
    assert found["part"]["wrong"]["value"] == 2  # had not passed
    assert found["part"]["after"]["value"] == 3  # was missing
    assert found["other"] == {"row": {}}


def test_a_part_without_time_is_left_out(tmp_path, parts, capsys):
    code, found = run(tmp_path, parts(part=30.0), {}, seconds=1.0)
    assert code == 0 and found == {"part": {}}
    assert "part: 0 of 8 rows measured" in capsys.readouterr().out


def test_figures_of_two_devices_are_not_mixed(tmp_path, parts):
    with pytest.raises(SystemExit, match="of another GPU, this is cpu: give another by --results"):
        run(tmp_path, parts(part=30.0), {"device": "another GPU"})


def test_results_of_another_gpu_have_a_file_of_their_own(tmp_path, monkeypatch):
    import gpu

    (tmp_path / "old.json").write_text('{"device": "another GPU"}')
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "old.json")
    monkeypatch.setattr(gpu.distributed, "gpus", lambda: 1)
    monkeypatch.setattr(gpu, "run", lambda parts, known, path, *_, **__: (known, path))
    monkeypatch.setattr(gpu.carried, "unpack", lambda folder: None)
    for words, known, name in (
        ([], {"device": "another GPU"}, "old.json"),
        (["--results", "new.json"], {}, "new.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["scripts/gpu", "check", *words])
        monkeypatch.delenv("OUT", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        found, path = gpu.main()
        assert found == known and path.name == name


def test_an_unknown_part_is_named():
    from on_gpu.parts import STAGES, named

    assert [part.name for part in named(["machine"], STAGES["measure"].parts)] == ["machine"]
    with pytest.raises(SystemExit, match="no part machines; there are machine, glow, "):
        named(["machines"], STAGES["measure"].parts)


def test_without_a_gpu_nothing_is_measured():
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "scripts/gpu.py", "check"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("scripts/gpu: there is no GPU here; --rehearse")


def test_the_tests_that_need_a_gpu_are_found(monkeypatch):
    from on_gpu import gpu_tests

    monkeypatch.chdir(ROOT)
    found = subprocess.run([*gpu_tests.command(), "--collect-only"], capture_output=True, text=True, check=True).stdout
    names = {line.partition("::")[2].partition("[")[0] for line in found.splitlines() if "::" in line}
    assert names >= {
        "test_a_step_on_a_gpu_waits_once",
        "test_a_seed_draws_the_same_on_every_device",
        "test_on_a_gpu_a_graph_computes_the_same",
        "test_on_a_gpu_an_inverse_is_one_launch_a_layer",
    }
    assert not any("gpu_script" in line or "devices" in line for line in found.splitlines())


def test_the_page_is_what_the_script_writes():
    from on_gpu import page

    results, text = ROOT / "results" / "gpu.json", (ROOT / "docs" / "gpu.md").read_text()
    for name, section in page.texts(json.loads(results.read_text()) if results.exists() else {}).items():
        assert f"<!-- {name}: written by scripts/gpu page" in text and f"-->\n{section}\n<!-- /{name} -->" in text


def test_a_row_says_what_was_measured_or_why_not(tmp_path):
    from on_gpu import page

    glow = {
        "eager, bfloat16, 512": {"images": 5000.4, "TFLOP/s": 120.3, "share": 0.1217, "ms": 102.4, "GiB": 60.12},
        "eager, bfloat16, 64": {"not_here": "a reason"},
        "eager, tf32, 512": {"failed": "ValueError: a | b\nc"},
    }
    found = {"date": "2026-01-01", "device": "A GPU", "torch": "2", "parts": {"glow": glow}}
    texts = page.texts(found)
    assert texts["measured"].startswith("2026-01-01: A GPU, torch 2; 1 of ")
    lines = texts["measure"].splitlines()
    assert "| eager, bfloat16, 512 | 5,000 | 102 | 120 | 12% | 60.1 | – |" in lines
    assert "| eager, bfloat16, 64 | not measured yet: a reason |  |  |  |  |  |" in lines
    assert "| eager, tf32, 512 | **fails**: ValueError: a \\| b c |  |  |  |  |  |" in lines
    assert "| eager, tf32, 64 | not measured yet |  |  |  |  |  |" in lines
    assert {"measured", "check", "measure"} == {*texts}
    assert "nothing below has been measured" in page.texts({"parts": {"glow": {}}})["measured"]  # there was no time


def test_the_fastest_of_a_row_is_bold():
    from on_gpu.beside_others import STEPS

    figures = {"ms": {"flowtrain": 1.0, "nflows": 2.5}, "without": {"zuko": "RuntimeError"}}
    cells = {name: column(figures) for name, column in STEPS.columns.items()}
    assert (cells["flowtrain"], cells["nflows"], cells["zuko"], cells["freia"]) == ("**1**", "2.5", "fails", "–")


def test_data_arrive_in_halves(tmp_path, monkeypatch):
    from on_gpu import carried

    monkeypatch.setattr(carried, "HOME", tmp_path / "home")
    packed = tmp_path / "packed"
    (packed / "cifar10").mkdir(parents=True)
    for number in range(5):
        (packed / "cifar10" / f"{number}.webp").write_bytes(bytes(100 + number))
    script = "import pathlib, sys; here = pathlib.Path(__file__).parent / 'cifar10'\n"
    script += "target = pathlib.Path(sys.argv[1]) / 'cifar-10-batches-py'; target.mkdir(parents=True)\n"
    script += "(target / 'batches.meta').write_text(str(len([*here.iterdir()])))"
    (packed / "restore.py").write_text(script)
    assert carried.cut(packed, tmp_path / "halves") == 0
    sizes = [sum(file.stat().st_size for file in (tmp_path / "halves" / half / "cifar10").iterdir()) for half in "ab"]
    assert max(sizes) < 0.65 * sum(sizes)
    assert carried.unpack(tmp_path / "nothing") is None
    for half, complete in (("a", False), ("b", True)):
        call = tmp_path / half
        call.mkdir()
        (tmp_path / "halves" / half).rename(call / half)
        assert (carried.unpack(call) is not None) == complete
    root = carried.restore(tmp_path / "home" / "packed")
    assert (root / "cifar-10-batches-py" / "batches.meta").read_text() == "5"
    assert carried.restore(tmp_path / "home" / "packed") == root  # once


def test_the_last_object_of_a_text():
    from on_gpu.cifar10 import last_object

    assert json.loads(last_object('{\n "a": 1\n}\n')) == {"a": 1}
    assert json.loads(last_object('a line {of text}\n{\n "a": {\n  "b": 2\n }\n}')) == {"a": {"b": 2}}
