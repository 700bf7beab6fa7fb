"""What a run keeps: where its data lie, its directory, and a batch size that fits its data."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from inprocess import flowtrain
from PIL import Image
from test_image_sets import write_tar

from flowtrain.config import places
from flowtrain.data.spec import DataSpec
from flowtrain.engine.auto import choose_batch_size, choose_learning_rate
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import checkpoint

TRAIN = ("train", "model=maf", "smoke=true", "logger=none", "trainer.sample_every=null", "report=false")
TABLE = (*TRAIN, "dataset=table")


def write_table(path: Path, rows: int = 60, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).normal(size=(rows, 2))
    path.write_text("a,b\n" + "".join(f"{a:.6f},{b:.6f}\n" for a, b in values))
    return path


def refusal(folder: Path, *words: str, code: int = 2) -> str:
    """The one line that refuses a command."""
    with pytest.raises(FlowtrainError) as caught:
        flowtrain(folder, *words)
    assert caught.value.exit_code == code and "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with rows.csv, and run, which was trained on it."""
    folder = tmp_path_factory.mktemp("home")
    write_table(folder / "rows.csv")
    assert flowtrain(folder, *TABLE, "dataset.path=rows.csv", "hydra.run.dir=run") == 0
    return folder


@pytest.fixture
def run(home, tmp_path) -> Path:
    """A copy home/run of the run, as if it had been trained there, and a folder beside home to work in."""
    (tmp_path / "else").mkdir()
    shutil.copytree(home, tmp_path / "home")
    record = tmp_path / "home/run/data.json"
    record.write_text(record.read_text().replace(str(home), str(tmp_path / "home")))
    return tmp_path / "home/run"


def evaluated(run: Path) -> str:
    """The description of the data of a run's newest evaluation."""
    return json.loads(max(run.glob("eval/*/eval.json"), key=os.path.getmtime).read_text())["data"]


# ---- where the data lie --------------------------------------------------------------------------------------------


def test_commands_find_the_data_of_a_run(run, tmp_path, capfd):
    here, rows = tmp_path / "else", tmp_path / "home/rows.csv"
    last = (run / "train.log").read_text().splitlines()[-1]
    assert "next: flowtrain eval ckpt=" in last and "dataset." not in last  # nothing more to type
    for words in (["eval"], ["sample", "n=8"]):
        assert flowtrain(here, *words, "ckpt=../home/run") == 0
        assert f"data: {rows}, as {run}/data.json says\n" in capfd.readouterr().err
    assert str(rows) in evaluated(run)
    (sampled,) = run.glob("sample/*")
    assert (sampled / "density.png").is_file()  # beside the data
    assert flowtrain(here, "score", "ckpt=../home/run", "input=../home/rows.csv") == 0
    assert flowtrain(here, "check", "ckpt=../home/run") == 0
    assert "data:" not in capfd.readouterr().err  # they open none


def test_a_run_that_has_moved_finds_its_data(run, tmp_path):
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert flowtrain(tmp_path, "eval", "ckpt=moved") == 0
    assert str(tmp_path / "home/rows.csv") in evaluated(moved)


def test_the_command_line_wins(run, tmp_path, capfd):
    write_table(tmp_path / "other.csv", 100)
    capfd.readouterr()
    assert flowtrain(tmp_path, "eval", "ckpt=home/run", "dataset.path=other.csv") == 0
    assert "10 rows of other.csv" in evaluated(run)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data: ")]
    assert lines == [f"data: {tmp_path}/other.csv"]
    assert "needs dataset.path=FILE" in refusal(tmp_path, "eval", "ckpt=home/run", "dataset.root=.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text + "1,2\n", "bytes, not "),
        (lambda text: text.replace("1", "2"), "it begins otherwise"),
        (lambda text: text, None),
    ],
)
def test_data_that_have_changed_are_named(run, tmp_path, capfd, change, says):
    rows = tmp_path / "home/rows.csv"
    rows.write_text(change(rows.read_text()))
    assert flowtrain(tmp_path, "eval", "ckpt=home/run") == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "has changed since training" in line]
    assert len(lines) == (0 if says is None else 1) and all(str(rows) in line and says in line for line in lines)


def test_data_that_are_gone_are_named(run, tmp_path):
    (tmp_path / "home/rows.csv").unlink()
    says = refusal(tmp_path, "eval", "ckpt=home/run")
    assert str(tmp_path / "home/rows.csv") in says and f"{run}/data.json" in says and "dataset.path=" in says


def test_a_lone_checkpoint_asks_for_its_data(run, tmp_path):
    shutil.copy(run / "checkpoints/best.pt", tmp_path / "lone.pt")
    assert "dataset.path=FILE" in refusal(tmp_path, "eval", "ckpt=lone.pt")


def test_a_checkpoint_never_holds_the_absolute_path(run, tmp_path, capfd):
    """Nor does it after ``resume=PATH`` from elsewhere; and ``resume=true`` still finds the run."""
    assert flowtrain(tmp_path / "else", "train", "resume=../home/run", "max_steps=5") == 0
    assert f"data: {tmp_path / 'home/rows.csv'}, as " in capfd.readouterr().out
    for file in (run / "checkpoints").glob("*.pt"):
        assert checkpoint.read_config(file)["dataset"]["path"] == "rows.csv"
        assert str(tmp_path / "home/rows.csv").encode() not in file.read_bytes()

    words = (*TABLE, "dataset.path=rows.csv", "max_steps=3")
    assert flowtrain(tmp_path / "home", *words) == 0
    (second,) = (tmp_path / "home/outputs/table-maf").iterdir()
    assert flowtrain(tmp_path / "else", "train", f"resume='{second}'", "max_steps=5") == 0
    capfd.readouterr()
    assert flowtrain(tmp_path / "home", *words, "resume=true") == 0
    assert f"{second} has finished already" in capfd.readouterr().out


def test_each_job_of_a_sweep_remembers_its_own(tmp_path):
    for name in ("one", "two"):
        write_table(tmp_path / f"{name}.csv")
    words = ("--multirun", "dataset.path=one.csv,two.csv", "hydra.sweep.dir=sweep")
    assert flowtrain(tmp_path, *TABLE, *words) == 0
    found = [json.loads((tmp_path / f"sweep/{n}_table-maf/data.json").read_text())["path"] for n in (0, 1)]
    assert found == [str(tmp_path / "one.csv"), str(tmp_path / "two.csv")]


def test_a_root_is_remembered_unless_it_is_gone(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("FLOWTRAIN_DATA", raising=False)
    folder = tmp_path / "here/data/celeba_hq"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    words = ("dataset=celebahq", "dataset.image_size=8", "model=nice", "smoke=true", "logger=none")
    assert flowtrain(tmp_path / "here", "train", *words, "hydra.run.dir=run") == 0  # the default root
    capfd.readouterr()
    assert flowtrain(tmp_path, "eval", "ckpt=here/run") == 0
    assert f"data: under {tmp_path}/here/data, as {tmp_path}/here/run/data.json says\n" in capfd.readouterr().err
    shutil.move(tmp_path / "here/data", tmp_path / "new")
    monkeypatch.setenv("FLOWTRAIN_DATA", str(tmp_path / "new"))
    assert flowtrain(tmp_path, "eval", "ckpt=here/run") == 0
    assert f"data: under {tmp_path}/new, since {tmp_path}/here/data" in capfd.readouterr().err


def test_a_record_is_data(run, tmp_path):
    """A directory from a stranger: its record runs nothing, reads no variable, and is refused where it is damaged."""
    record, known = run / "data.json", json.loads((run / "data.json").read_text())
    for damaged in ("", "[]", "{}", '{"root": 1}', "[" * 100_000):
        record.write_text(damaged)
        assert f"{record}: cannot be read" in refusal(tmp_path, "eval", "ckpt=home/run", code=1)
    for path in ("rows.csv", "/a\0b", 3, ["/"], "/${oc.env:HOME}/rows.csv"):
        record.write_text(json.dumps(known | {"path": path}))
        assert f"{record}: cannot be read" in refusal(tmp_path, "eval", "ckpt=home/run", code=1)
    record.unlink()
    record.symlink_to(tmp_path / "home/rows.csv")
    assert "is a link" in refusal(tmp_path, "eval", "ckpt=home/run", code=1)


def test_several_tars_are_remembered_and_compared(tmp_path, capfd):
    for shard in range(2):
        write_tar(tmp_path / f"s-{shard}.tar", range(10 * shard, 10 * shard + 10))
    data = ("dataset=image_folder", "dataset.image_size=8", 'dataset.path="s-{0..1}.tar"')
    assert flowtrain(tmp_path, *TRAIN, *data, "hydra.run.dir=run") == 0
    for changed in (False, True):
        capfd.readouterr()
        assert flowtrain(tmp_path, "eval", "ckpt=run") == 0
        output = capfd.readouterr().err
        assert f"data: {tmp_path}/s-{{0..1}}.tar, as {tmp_path}/run/data.json says\n" in output
        assert ("s-{0..1}.tar has changed since training" in output) == changed
        write_tar(tmp_path / "s-1.tar", range(10, 30))


def test_a_folder_has_changed_with_the_names_in_it(tmp_path, capfd):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    words = ("dataset=image_folder", "dataset.path=images", "dataset.image_size=8", "model=nice", "smoke=true")
    assert flowtrain(tmp_path, "train", *words, "logger=none", "hydra.run.dir=run") == 0
    (folder / "9.png").rename(folder / "a.png")
    capfd.readouterr()
    assert flowtrain(tmp_path, "eval", "ckpt=run") == 0
    assert f"{folder} has changed since training: it begins otherwise" in capfd.readouterr().err


# ---- a directory that holds a run ----------------------------------------------------------------------------------

TOY = (*TRAIN, "dataset=moons")


def test_a_run_is_not_replaced(tmp_path, capfd):
    words = (*TOY, "hydra.run.dir=run")
    (tmp_path / "run").mkdir()  # empty: nothing to lose
    assert flowtrain(tmp_path, *words) == 0
    run, before = tmp_path / "run", contents(tmp_path / "run")
    for again in (
        (*words, "seed=2"),
        (*TOY, "hydra.run.dir=${hydra:job.name}/../run"),
        ("eval", "ckpt=run", "hydra.run.dir=run"),
    ):
        says = refusal(tmp_path, *again)
        assert "run: holds a run" in says and "choose another directory" in says and "resume='" in says
    assert contents(run) == before
    assert flowtrain(tmp_path, *TOY, "hydra.run.dir=other") == 0
    before = contents(tmp_path / "other")
    says = refusal(tmp_path, "train", "resume=run", "max_steps=5", "hydra.run.dir=other")
    assert "hydra.run.dir=other: holds a run" in says and contents(tmp_path / "other") == before

    assert flowtrain(tmp_path, *words, "resume=true") == 0
    assert f"{run} has finished already" in capfd.readouterr().out
    assert flowtrain(tmp_path, "train", "resume=run", "hydra.run.dir=run", "max_steps=5") == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 5


def test_a_sweep_is_not_mixed_with_another_nor_its_jobs(tmp_path, capfd):
    words = (*TOY, "--multirun", "seed=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=same")
    assert flowtrain(tmp_path, *words) == 1
    assert "same: holds a run, which this one would replace" in capfd.readouterr().err  # the second job
    run, before = tmp_path / "sweep/same", contents(tmp_path / "sweep")
    state = json.loads((run / "status.json").read_text())
    assert state["state"] == "finished" and state["error"] is None
    assert checkpoint.read_config(run / "checkpoints/best.pt")["seed"] == 1
    says = refusal(tmp_path, *words, "max_steps=4", "model.depth=1")
    assert "hydra.sweep.dir=sweep: holds a sweep of another command" in says
    assert contents(tmp_path / "sweep") == before


# ---- a batch size that fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "rows", "processes", "accumulate", "chosen"),
    [
        ("auto", 50_000, 1, 1, 256),
        ("auto", 1_999, 1, 1, 64),
        ("auto", 64, 1, 1, 64),
        ("auto", 8, 1, 1, 8),
        ("auto", 8, 2, 3, 6),
        ("auto", 1, 1, 1, 1),
        ("auto", 1000, 3, 1, 63),
        ("auto", 1000, 4, 25, 100),  # more processes × parts than 64
        (7, 8, 1, 1, 7),
    ],
)
def test_the_batch_size_fits_the_train_split(given, rows, processes, accumulate, chosen):
    assert choose_batch_size(given, rows, DataSpec("table", (2,)), processes, accumulate) == chosen


def test_the_learning_rate_follows_the_rows_of_a_table():
    table, image = DataSpec("table", (2,)), DataSpec("digits", (1, 8, 8), 17)
    rates = [choose_learning_rate("auto", *data) for data in ((1_999, table), (2_000, table), (1_000, image))]
    assert rates == [1e-3, 3e-3, 3e-3]
    assert choose_learning_rate(0.1, 10, table) == 0.1
    with pytest.raises(UsageError, match="optimizer.lr=high: must be a number or auto"):
        choose_learning_rate("high", 10, table)


def test_a_batch_size_that_was_typed_is_not_changed():
    spec = DataSpec("table", (2,))
    with pytest.raises(UsageError, match=r"batch_size=9 is larger .* \(8\); the largest that fits is batch_size=6"):
        choose_batch_size(9, 8, spec, 3, 1)
    with pytest.raises(UsageError, match=r"5 examples: too few for processes × trainer.accumulate = 2 × 3"):
        choose_batch_size("auto", 5, spec, 2, 3)


def test_ten_rows_are_enough(tmp_path, capfd):
    write_table(tmp_path / "ten.csv", 10)
    words = ("train", "model=maf", "dataset=table", "dataset.path=ten.csv", "max_steps=2", "logger=none")
    assert flowtrain(tmp_path, *words, "hydra.run.dir=run") == 0
    out = capfd.readouterr().out
    assert "batch_size=auto: 8 instead of 64: the train split has 8 examples\n" in out and "nan" not in out
    file = tmp_path / "run/checkpoints/last.pt"
    assert checkpoint.read_config(file)["batch_size"] == "auto" and checkpoint.read(file)["loader"]["batch_size"] == 8
    assert json.loads((tmp_path / "run/summary.json").read_text())["log_likelihood_stderr"] is None
    assert flowtrain(tmp_path, "eval", "ckpt=run", "json=true") == 0
    report = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)  # no NaN
    assert report["examples"] == 1 and report["log_likelihood_stderr"] is None
    assert flowtrain(tmp_path, "eval", "ckpt=run") == 0
    assert f"nats per row   {report['log_likelihood']:.4f}\n".split() == capfd.readouterr().out.split("\n")[0].split()
    says = refusal(tmp_path, *words, "batch_size=9")
    assert "batch_size=9 is larger than the train split (8); the largest that fits is batch_size=8" in says


def test_a_resumed_run_keeps_its_batch_size(tmp_path, capfd):
    write_table(tmp_path / "rows.csv", 50)
    words = ("train", "model=maf", "dataset=table", "dataset.path=rows.csv", "logger=none")
    assert flowtrain(tmp_path, *words, "max_steps=2", "trainer.accumulate=3") == 0  # 40 rows: batches of 39
    assert flowtrain(tmp_path, *words, "max_steps=4", "trainer.accumulate=3", "resume=true") == 0
    assert "resumed at step 2" in capfd.readouterr().out
    (run,) = (tmp_path / "outputs/table-maf").iterdir()
    assert flowtrain(tmp_path, "train", f"resume='{run}'", "max_steps=6", "trainer.accumulate=13") == 0
    assert checkpoint.read(run / "checkpoints/last.pt")["loader"]["batch_size"] == 39


def test_too_few_rows_are_named(tmp_path):
    for rows, says in ((2, "2 examples are too few"), (1, "1 example is too few")):
        write_table(tmp_path / "few.csv", rows)
        assert says in refusal(tmp_path, *TABLE, "dataset.path=few.csv")
    assert not (tmp_path / "outputs").exists()


def test_one_image_is_too_few_and_three_are_enough(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    words = ("train", "model=realnvp", "dataset=image_folder", "dataset.path=images", "dataset.image_size=8")
    for i in range(3):
        Image.new("RGB", (8, 8), (90 * i, 50, 20)).save(folder / f"{i}.png")
        if i == 0:
            says = "1 example is too few for a train, validation and test split: at least 3 are needed"
            assert says in refusal(tmp_path, *words)
    small = ("model.levels=2", "model.hidden=8", "model.blocks=1", "max_steps=2", "logger=none")
    assert flowtrain(tmp_path, *words, *small) == 0


def test_places_say_how_to_go_on(tmp_path):
    (tmp_path / places.NAME).write_text("{")
    with pytest.raises(FlowtrainError, match="remove it, and say dataset.path=PATH"):
        places.read(tmp_path)
    assert places.read(None) is None and places.read(tmp_path / "nowhere") is None
