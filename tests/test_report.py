"""report.html: its parts, what it says of runs, and how it looks in headless Chromium."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import SIZES, open_browser
from inprocess import flowtrain
from PIL import Image

from flowtrain import bijections
from flowtrain.commands.collecting import collect, source
from flowtrain.commands.collecting.rows import decode_context
from flowtrain.config.compose import train_config
from flowtrain.config.preset import preset_of
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.columns import Columns
from flowtrain.report.material import Images, Material, Neighbours, SplitLikelihoods
from flowtrain.report.page import Page, Picture, Series
from flowtrain.report.render import render
from flowtrain.report.run import Configuration, RunRecord, read_run
from flowtrain.report.sections.images import _memorizing, count_burst

SMALL = ["smoke=true", "logger=none"]
TABLE = "age,income,sort,joined,wind,member\n" + "".join(
    f"{20 + i % 50},{'' if i % 9 == 0 else 1000 + 37.5 * (i % 80)},{'red green blue'.split()[i % 3]},"
    f"20{10 + i % 9}-0{1 + i % 9}-1{i % 9},{(i * 37) % 360},{'true' if i % 4 else 'false'}\n"
    for i in range(400)
)


def charts(html: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html)]


def run_in(folder: Path) -> Path:
    (run,) = folder.glob("outputs/*/*/checkpoints")
    return run.parent


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of Glow on digits, evaluated on its test split; its report is made again after that."""
    folder = tmp_path_factory.mktemp("digits")
    assert flowtrain(folder, "train", *SMALL, "max_steps=3", "optimizer.lr=1e-3") == 0
    run = run_in(folder)
    first = (run / "report.html").read_text()
    assert flowtrain(folder, "eval") == 0
    assert flowtrain(folder, "report", "n=8", "examples=100", "temperatures=[0.5,1.0]") == 0
    return run, first


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    (folder / "people.csv").write_text(TABLE)
    words = ["dataset.path=people.csv", "dataset.missing=model", "dataset.context=[member]"]
    words += ["dataset.types={wind: degrees}"]
    assert flowtrain(folder, "train", "model=nsf_coupling", "dataset=table", *words, *SMALL) == 0
    return run_in(folder)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as found:
        yield found


# ---- the parts of a page -------------------------------------------------------------------------------------------


def test_texts_and_numbers_cannot_break_out_of_a_page():
    page = Page("<b>title</b>", "</title><script>alert(1)</script>")
    section = page.section("A & B")
    section.text("<img src=x>")
    section.table(["<i>"], [["</table>"]])
    section.lines("</script><script>", [Series("<s>", [0, 1], [1.0, float("nan")])], x="x", y="y")
    page.section("without blocks")
    html = page.html()
    assert "<img src=x>" not in html and "<b>" not in html and "alert(1)</script>" not in html
    assert html.count("</script>") == 2 and "without blocks" not in html
    assert charts(html)[0]["series"][0] == {"name": "<s>", "x": [0, 1], "y": [1, None]}


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7), (5, 7, 3), (3, 5, 7)])
def test_pictures_take_every_layout(shape):
    picture = Picture(torch.zeros(shape, dtype=torch.uint8), "black")
    assert picture.shape == (5, 7) and picture.shown_width == 7 * 91
    assert picture.uri.startswith("data:image/png;base64,")


def test_a_page_loads_nothing():
    page = Page("t")
    page.section("s").text("x")
    html = page.html()
    assert "default-src 'none'" in html and not re.search(r"""(src|href)=["'](?!data:|#)""", html)


# ---- what it says of a run -----------------------------------------------------------------------------------------


def material(**keys) -> Material:
    return Material("digits", 64, True, 17, False, **keys)


def split(name, nats, stderr=0.5) -> SplitLikelihoods:
    return SplitLikelihoods(name, nats, stderr, 100, 100, np.full(100, nats), np.arange(100))


def page_of(found: Material, record=None) -> str:
    record = record or RunRecord(None, Path("x.pt"))
    return render(record, found, Configuration({"dataset": {"name": "digits"}, "model": {}})).html()


def test_overfitting_is_told_by_standard_errors():
    far = {"train": split("train", -80.0), "val": split("val", -90.0)}
    near = {"train": split("train", -80.0), "val": split("val", -80.5)}
    assert "it overfits" in page_of(material(likelihoods=far))
    assert "no overfitting shows" in page_of(material(likelihoods=near))


def test_the_published_figure_stands_beside_ours_or_why_not():
    published = {"value": 3.35, "unit": "bits_per_dim", "source": "a paper", "ours": 3.5, "not_comparable": None}
    assert "ours in this unit: 3.5" in page_of(material(published=published))
    html = page_of(material(published={**published, "ours": None, "not_comparable": "other data"}))
    assert "not comparable: other data" in html


def test_what_was_left_out_is_said():
    found = material(likelihoods={"val": split("val", -80.0)})
    found.leave_out("likelihoods", "The test split cannot be opened.")
    assert "The test split cannot be opened." in page_of(found)


def test_curves_of_a_resumed_run_with_a_bad_step(tmp_path):
    steps = [1, 2, 3, 2, 3, 4]  # resumed after step 1
    lines = [{"step": step, "train/bits_per_dim": 4.0 - step + i, "train/lr": 0.1} for i, step in enumerate(steps)]
    lines[-1]["train/bits_per_dim"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "trai')
    record = read_run(tmp_path, tmp_path / "checkpoints" / "best.pt")
    html = page_of(material(), record)
    chart = next(one for one in charts(html) if one["title"] == "Likelihood")
    assert chart["series"][0]["x"] == [1, 2, 3, 4] and chart["series"][0]["y"] == [3, 5, 5, None]
    assert "Not finite, which leaves gaps: 1 of 4 values." in html


def test_interpolations_that_burst_are_explained():
    rows = np.random.default_rng(0).integers(50, 200, (2, 5, 8, 8, 3), dtype=np.uint8)
    rows[0] = np.where(rows[0] > 100, 255, 0)  # black and white from end to end, as a digit is
    assert count_burst(rows) == 0
    rows[1, 1:3] = np.where(rows[1, 1:3] > 100, 255, 0)
    assert count_burst(rows) == 2
    html = page_of(material(images=Images(real=rows[:, 0], interpolations=rows)))
    assert "In 2 of the 6 images between, most numbers are at an end of their range" in html


def test_copies_of_training_images_are_noticed():
    real = np.random.default_rng(0).uniform(1, 2, 200)
    assert "may repeat training images" in _memorizing(Neighbours([], np.full(30, 0.01), real, 10, 10))
    assert "no sign of memorizing" in _memorizing(Neighbours([], real[:30], real, 10, 10))
    assert "nothing is memorized" in _memorizing(Neighbours([], 3 * real[:30], real, 10, 10))


def test_contexts_are_read_back_as_the_file_has_them():
    given = (
        Column("age", "real", mean=40.0, std=10.0, offset=100.0),
        Column("sort", "categorical", categories=("blue", "red"), missing=True),
        Column("wind", "angle", low=0.0, high=360.0),
        Column("day", "time", offset=1.5e9, mean=86400.0, std=3600.0, written="%Y-%m-%d %H:%M"),
    )
    columns = Columns((), given)
    frame = {"age": [133.5, 150], "sort": ["red", None], "wind": [10.0, 355.0], "day": ["2017-07-14 12:30"] * 2}
    rows = decode_context(given, columns.encode_context(frame))
    assert rows == [["133.5", "red", "10", "2017-07-14 12:30"], ["150", "–", "355", "2017-07-14 12:30"]]


def test_the_preset_leaves_the_other_words_out():
    words = ["model=maf", "dataset=moons", "max_steps=7", "univariate=additive", "+x=1"]
    preset = preset_of(train_config("model=maf", "dataset=moons", "max_steps=7"), words, None)
    assert preset.command == "flowtrain train model=maf dataset=moons" and preset.config["max_steps"] == 1500
    lone = preset_of(train_config("model=maf", "dataset=moons"), None, None)
    assert lone.config["model"]["_target_"] == preset.config["model"]["_target_"] and "not known" in lone.note
    assert "cannot be composed" in preset_of(train_config(), ["model=nothing"], None).note


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_report_and_says_so(digits, table):
    run, html = digits
    assert "report: " in (run / "train.log").read_text()
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    wanted = ["Figures", "Learning", "Samples", "Interpolations", "Likelihood of each example"]
    wanted += ["Most and least likely examples", "Nearest training images", "Configuration", "Environment", "Files"]
    assert titles == wanted
    assert "optimizer.lr" in html and "flowtrain train smoke=true" in html and "max_steps" not in _differences(html)
    assert all("alt=" in image and 'alt=""' not in image for image in re.findall("<img[^>]*>", html))

    html = (table / "report.html").read_text()
    found = {chart["title"]: chart for chart in charts(html)}
    assert {"age", "income", "sort", "joined", "wind"} < found.keys()
    assert found["sort"]["kind"] == "bars" and sorted(found["sort"]["names"]) == ["blue", "green", "red"]
    assert sum(found["sort"]["series"][0]["y"]) == pytest.approx(1)
    assert found["joined"]["x"]["scale"] == "time" and found["joined"]["edges"][0] > 1.2e9
    assert found["wind"]["edges"][0] == 0 and found["wind"]["edges"][-1] == 360
    assert "Missing: 11 % of the data" in html and "Each sample has the member of a real row" in html
    pairs = next(chart for chart in found.values() if chart["kind"] == "pairs")
    assert [table["name"] for table in pairs["tables"]] == ["data", "samples"]


def test_arrays_have_pages_of_their_own(tmp_path):
    """Fields beside fields, spectra as curves, one column as a curve of its density."""
    draw = np.random.default_rng(0)
    shapes = {"fields": (60, 1, 4, 4), "spectra": (60, 12), "line": (60, 1)}
    for name, shape in shapes.items():
        np.save(tmp_path / f"{name}.npy", draw.normal(size=shape).astype("f4"))
    wanted = {"fields": "Nearest training images", "spectra": "8 of the samples", "line": "the density of the model as"}
    for name, text in wanted.items():
        folder = tmp_path / name
        folder.mkdir()
        data = "table" if name == "line" else "arrays"
        words = [f"dataset={data}", f"dataset.path={tmp_path / name}.npy", "max_steps=1", *SMALL]
        assert flowtrain(folder, "train", "model=nice", *words) == 0
        html = (run_in(folder) / "report.html").read_text()
        assert text in html and "dataset.found" not in html.partition("All keys")[0]


def _differences(html: str) -> list[str]:
    part = html.partition("Differences from")[2].partition("</table>")[0]
    return re.findall(r'<th scope="row">(.*?)</th>', part)


def test_report_false_leaves_it_out(tmp_path):
    assert flowtrain(tmp_path, "train", "model=maf", "dataset=moons", "report=false", *SMALL) == 0
    run = run_in(tmp_path)
    assert (run / "summary.json").is_file() and not (run / "report.html").exists()


def test_a_report_that_fails_costs_one_line(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(collect.likelihoods, "gather", fail)
    assert flowtrain(tmp_path, "train", "model=maf", "dataset=moons", *SMALL) == 0
    run = run_in(tmp_path)
    assert (run / "summary.json").is_file() and not (run / "report.html").exists()
    assert "no report: out of luck; the run itself is complete" in (run / "train.log").read_text()
    monkeypatch.undo()
    assert flowtrain(tmp_path, "report") == 0 and (run / "report.html").is_file()
    assert not (run / "report").exists()


def test_without_time_the_page_says_what_is_missing(digits, tmp_path):
    run, _ = digits
    before = (run / "report.html").read_text()
    assert flowtrain(tmp_path, "report", f"ckpt={run}", "seconds=0.0001") == 0
    html = (run / "report.html").read_text()
    (run / "report.html").write_text(before)
    assert "Only 1 of 32 at temperature 1, for lack of time." in html


def test_evaluations_of_other_weights_or_data_are_not_taken(tmp_path):
    assert flowtrain(tmp_path, "train", "model=maf", "dataset=moons", "report=false", *SMALL) == 0
    run = run_in(tmp_path)
    assert flowtrain(tmp_path, "eval", "weights=raw") == 0
    (raw,) = run.glob("eval/*/eval.json")
    assert flowtrain(tmp_path, "report", "seconds=1") == 0
    name = f"eval/{raw.parent.name}/"  # a run of the same second has the same last part
    html = (run / "report.html").read_text()
    assert name not in html and "the validation figure is that of summary.json" in html
    assert flowtrain(tmp_path, "report", "seconds=1", "weights=raw") == 0
    html = (run / "report.html").read_text()
    assert name in html and "figure is that of summary.json" not in html
    raw.write_text(json.dumps({**json.loads(raw.read_text()), "data": "other"}))
    assert flowtrain(tmp_path, "report", "seconds=1", "weights=raw") == 0
    assert name not in (run / "report.html").read_text()


def test_a_lone_checkpoint_is_reported_beside_the_output(digits, tmp_path):
    (tmp_path / "lone.pt").write_bytes((digits[0] / "checkpoints/best.pt").read_bytes())
    assert flowtrain(tmp_path, "report", "ckpt=lone.pt", "seconds=1") == 0
    (page,) = tmp_path.glob("outputs/report/*/report.html")
    assert "lone checkpoint" in page.read_text()


@pytest.mark.slow
def test_two_processes_write_one_report(tmp_path):
    words = ["train", "devices=2", "model=maf", "dataset=moons", *SMALL]
    subprocess.run([sys.executable, "-m", "flowtrain", *words], cwd=tmp_path, check=True, timeout=300)
    run = run_in(tmp_path)
    assert "report: " in (run / "train.log").read_text()
    assert len(charts((run / "report.html").read_text())) > 5


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["digits", "table"])
def test_the_page_in_a_browser(which, request, browser, tmp_path):
    """Figures as the files have them, values under the mouse, nothing loaded, no scrolling sideways."""
    run = request.getfixturevalue(which)
    run = run[0] if which == "digits" else run
    summary = json.loads((run / "summary.json").read_text())
    key = "bits_per_dim" if which == "digits" else "log_likelihood"
    wanted = {"validation": (summary[key], summary[f"{key}_stderr"])}
    for path in run.glob("eval/*/eval.json"):
        evaluation = json.loads(path.read_text())
        wanted["test"] = evaluation[key], evaluation[f"{key}_stderr"]
    for size, (width, height) in SIZES.items():
        for scheme in ("light", "dark"):
            browser.open(run / "report.html", width, height, scheme)
            shown = dict(zip(browser.texts(".figures dt"), browser.texts(".figures .value")))
            for name, (value, error) in wanted.items():
                assert shown[name] == f"{value:,.4f} ± {error:,.4f}".replace("-", "−")
            assert browser.hover(".chart.lines").startswith("step ")
            assert re.search(r"(train|real): [\d.]+", browser.hover(".chart.histogram"))
            assert browser.problems() == []
            shade = browser.run("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 200) == (scheme == "dark")
            browser.screenshot(tmp_path / f"{size}-{scheme}.png")
            with Image.open(tmp_path / f"{size}-{scheme}.png") as image:
                assert image.width == width * (2 if size == "phone" else 1) and image.height > 4 * height


def test_the_arrow_keys_show_values(digits, browser):
    browser.open(digits[0] / "report.html")
    press = "const svg = document.querySelector('.chart.lines svg'); svg.focus(); for (const key of arguments[0])"
    browser.run(press + " svg.dispatchEvent(new KeyboardEvent('keydown', {key}))", ["ArrowRight", "ArrowRight"])
    assert browser.texts(".chart.lines .tip")[0].startswith("step 2")


def test_as_many_samples_are_drawn_as_there_is_time_for(monkeypatch):
    monkeypatch.setattr(source, "draw_samples", lambda flow, n, *_: torch.zeros(n, 2))
    flow = SimpleNamespace(bijection=bijections.Flatten((2,)), dimensions=2)
    config = SimpleNamespace(seed=1)
    of_unknown_speed = source.Source(flow, config, None, None, source.Amounts(), None, example_seconds=1.0)
    assert len(of_unknown_speed.draw(1000, seconds=60.0)) == 1000
