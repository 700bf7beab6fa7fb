"""``dry_run=true``: the model, the data and the cost of a run, every error that training would meet, and no trace."""

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from composed import configuration, flow_of
from inprocess import flowtrain

from flowtrain import bijections as b
from flowtrain import train
from flowtrain.cli import jobs
from flowtrain.engine.budget import Budget
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.training import dry_run, setup
from flowtrain.training.forecast import Prices, forecast
from flowtrain.training.tree import model_tree

GLOW = ["train", "model=glow", "model.levels=2", "model.steps=3", "model.hidden=8", "dataset=digits", "batch_size=32"]
MOONS = ["train", "model=maf", "model.hidden=8", "model.steps=2", "dataset=moons", "dataset.rows=500", "batch_size=16"]
DRY = "dry_run=true"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(dry_run, "STEPS", 0.1)
    monkeypatch.setattr(dry_run, "EACH", 0.02)
    monkeypatch.setattr(dry_run, "OTHERS", 60.0)  # whatever else the machine does


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(folder, *words) -> str:
    """The one line of a command that fails, and no trace of it."""
    before = {*folder.rglob("*")}
    try:
        flowtrain(folder, *words)
        text = str(jobs.failures.pop(0)) if jobs.failures else ""
    except FlowtrainError as error:
        text = str(error)
    assert text and "\n" not in text and {*folder.rglob("*")} == before
    return text


def test_a_dry_run_says_all_and_leaves_nothing(tmp_path, capfd):
    assert flowtrain(tmp_path, *GLOW, "max_steps=100", DRY) == 0
    out = capfd.readouterr().out
    assert not [*tmp_path.iterdir()]
    assert "1259 train, 179 validation examples" in out
    assert re.search(r"^    dequantize +Dequantize +1×8×8$", out, re.M)
    assert re.search(r"^        0 … 2 +3 × Chain +4×4×4 +3 × [\d,]+$", out, re.M)
    assert re.search(r"^in all +([\d,]+)$", out, re.M)[1] in re.search(r"model: ([\d,]+) parameters", out)[0]
    assert re.search(r"^a step: [\d.]+ m?s, [\d,]+ examples/s \(the median of \d+, \d thread", out, re.M)
    assert re.search(r"^peak memory: [\d.]+ [KM]iB of tensors .*; the process so far [\d.]+ [MG]iB$", out, re.M)
    assert re.search(r"^a validation: .*; an image: .*; a checkpoint: .* KiB, of which a run keeps three$", out, re.M)
    assert re.search(r"^until step 100: about .*: 100 steps .*, 1 validation .*, 1 image .*, 1 checkpoint, ", out, re.M)
    table = dict(re.findall(r"^(as it is|memory=\w+|precision=\w+|batch_size=\d+) +(.+)$", out, re.M))
    assert [*table] == [
        "as it is",
        "memory=checkpoint",
        "memory=reversible",
        "precision=bfloat16",
        "batch_size=16",
        "batch_size=64",
    ]
    figures = r"[\d.]+ m?s +[\d,]+ +[\d.]+ [KM]iB"
    assert re.fullmatch(figures, table["as it is"]) and re.fullmatch(figures, table["batch_size=16"])


def test_a_run_that_draws_no_image_names_none(tmp_path, capfd):
    (tmp_path / "rows.csv").write_text("a,b,c\n" + "".join(f"{i % 50},{i * i % 17},{i % 5}\n" for i in range(200)))
    words = ["train", "model=maf", "dataset=table", "dataset.path=rows.csv", "max_steps=100", DRY]
    assert flowtrain(tmp_path, *words) == 0
    out = capfd.readouterr().out
    assert re.search(r"^until step 100: ", out, re.M) and not re.search(r"an image:|\d image", out)


def test_memory_modes_and_batches_are_measured_not_guessed(tmp_path, capfd):
    words = [*GLOW, "model.hidden=64", "model.steps=6", "max_steps=100", DRY]
    assert flowtrain(tmp_path, *words) == 0
    found = re.findall(r"^(as it is|memory=\w+|batch_size=\d+) .* ([\d.]+) MiB$", capfd.readouterr().out, re.M)
    peak = {name: float(number) for name, number in found}
    assert peak["memory=checkpoint"] < 0.7 * peak["as it is"] and peak["memory=reversible"] < 0.7 * peak["as it is"]
    assert peak["batch_size=16"] < 0.8 * peak["as it is"] < peak["as it is"] < 0.7 * peak["batch_size=64"]


def test_what_cannot_be_says_why(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert flowtrain(tmp_path, *MOONS, "batch_size=300", "trainer.accumulate=4", "max_steps=20", DRY) == 0
    out = capfd.readouterr().out
    assert re.search(r"^memory=reversible +refused: .*", out, re.M)  # batch normalization
    assert re.search(r"^precision=bfloat16 +refused: .*has no bfloat16 arithmetic", out, re.M)
    assert re.search(r"^batch_size=150 +refused: .*is not a multiple of processes × trainer.accumulate", out, re.M)
    assert re.search(r"^batch_size=600 +refused: .*is larger than the train split", out, re.M)


def test_a_slow_step_is_extrapolated_from_small_batches(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(dry_run, "SLOW", 0.0)
    monkeypatch.setattr(dry_run, "FLAT", 0.0)
    monkeypatch.setattr(dry_run, "HEAVY", 1e9)
    config = configuration(*GLOW[1:], DRY, "batch_size=128", "logger=none", "max_steps=10")
    monkeypatch.setattr(dry_run, "_log_lines", lambda lines: print(*lines, sep="\n"))
    figures = train.main(config, str(tmp_path))
    out = capfd.readouterr().out
    assert "(extrapolated from batches of 4 and 16, " in out
    assert "memory=checkpoint   not measured: there is no time for" in out
    monkeypatch.setattr(dry_run, "HEAVY", 0.0)
    single = train.main(config, str(tmp_path))
    assert "(extrapolated from batches of 1 and 4, " in capfd.readouterr().out
    monkeypatch.setattr(dry_run, "HEAVY", 1e9)
    monkeypatch.setattr(dry_run, "FLAT", 1e9)  # no batch takes longer than a smaller one: no line tells anything
    measured = train.main(config, str(tmp_path))
    assert "(the median of" in capfd.readouterr().out
    # of one example, the peak falls late in the backward pass, where gradients of weights count more than activations
    assert single["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.2)
    assert figures["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.1)


def test_the_forecast_is_what_a_run_then_takes(tmp_path):
    words = [*GLOW[1:], "logger=none", "max_steps=150", "trainer.val_every=50", "trainer.save_every=50"]
    config = replace(configuration(*words), threads=torch.get_num_threads())
    ratios = []
    for turn in range(3):  # other tests run beside these, and may slow one of the two down
        for folder in (f"dry{turn}", f"real{turn}"):
            (tmp_path / folder).mkdir()
        expected = train.main(replace(config, dry_run=True), str(tmp_path / f"dry{turn}"))
        real = train.main(config, str(tmp_path / f"real{turn}"))
        assert expected["steps"] == real["steps"] == 150
        ratios.append(expected["seconds"] / real["seconds"])
        if 1 / 3 < ratios[-1] < 3:
            return
    raise AssertionError(f"predicted seconds to real ones: {ratios}")


def fake_trainer(steps, minutes=None, val_every=100, sample_every=None, save_every=1000, save_minutes=1e6):
    keys = SimpleNamespace(
        val_every=val_every, sample_every=sample_every, save_every=save_every, save_minutes=save_minutes
    )
    return SimpleNamespace(budget=Budget(steps, minutes), config=SimpleNamespace(trainer=keys))


PRICES = Prices(step=0.1, validation=2.0, preview=3.0, checkpoint=0.5, conclusion=4.0)


def test_the_forecast_counts_everything():
    found = forecast(fake_trainer(1000), 0, 0.0, PRICES)
    assert (found.steps, found.validations, found.previews, found.checkpoints) == (1000, 10, 1, 2)
    assert found.seconds == pytest.approx(1000 * 0.1 + 10 * 2.5 + 3.0 + 2 * 0.5 + 4.0)
    left = forecast(fake_trainer(1000, val_every=300), 650, 60.0, PRICES)  # a resumed run
    assert (left.steps, left.validations, left.checkpoints) == (350, 2, 2)
    limited = forecast(fake_trainer(None, minutes=1), 0, 0.0, PRICES)
    assert limited.steps * 0.1 + limited.steps // 100 * 2.5 == pytest.approx(60, abs=3)
    assert forecast(fake_trainer(100, minutes=1), 0, 0.0, PRICES).steps == 100
    often = forecast(fake_trainer(6000, save_every=10**6, save_minutes=1.0), 0, 0.0, PRICES)
    assert often.checkpoints == 12 + 1  # 600 s of steps and 150 s of validations


def test_a_flow_of_800_layers_stays_readable():
    flow = flow_of("model=realnvp_vector", "model.pairs=400", "dataset=moons", device="meta")
    lines = model_tree(flow)
    assert sum(isinstance(layer, b.Coupling) for layer in flow.modules()) == 800 and len(lines) < 25
    assert re.search(r" … .* 400 × .* 400 × [\d,]+$", "\n".join(lines), re.M)


def test_the_tree_counts_every_parameter():
    for words in (["model=hybrid", "dataset=moons"], ["model=realnvp", "dataset=digits"]):
        flow = flow_of(*words, device="meta")
        total = sum(parameter.numel() for parameter in flow.parameters())
        assert model_tree(flow)[-1].split()[-1] == f"{total:,}"


# ---- errors that training would meet later -------------------------------------------------------------------------


def test_errors_of_later_steps_come_at_once(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(
        "from flowtrain.engine.loggers import NullLogger\n"
        "class Late:\n"
        "    def __call__(self, progress, step):\n"
        "        return 1 / (step - 100 if step > 50 else 1)\n"
        "class Broken(NullLogger):\n"
        "    def open(self, run):\n"
        "        from flowtrain.errors import UsageError\n"
        "        raise UsageError('logger: needs more packages')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    words = [*MOONS, "max_steps=200", DRY, "allow=[late]", "logger=none"]
    assert "scheduler: fails at step 100: ZeroDivisionError" in failure(
        tmp_path, *words, "scheduler=constant", "scheduler._target_=late.Late"
    )
    assert "logger: needs more packages" in failure(tmp_path, *words, "+logger.mine={_target_: late.Broken}")

    def evaluate(*_args, **_keys):
        raise FlowtrainError("the likelihood of 3 of 16 examples is not finite")

    monkeypatch.setattr(setup, "evaluate_split", evaluate)
    assert "the likelihood of 3 of 16" in failure(tmp_path, *MOONS, DRY, "logger=none")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["batch_size=5000"], "batch_size=5000 is larger than the train split"),
        (["optimizer.lr=fast"], "optimizer.lr=fast: must be a number or auto"),
        (['trainer.decay="("'], "trainer.decay=(: no regular expression"),
        (["trainer.val_every=0"], "trainer.val_every=0: must be"),
        (["init=nothing"], "init=nothing: no such file"),
        (["memory=reversible"], "memory=reversible"),
        (["launcher=submitit", "--multirun", "seed=1,2"], "leave launcher=submitit out"),
        (["--multirun", "dry_run=true,false"], "all dry runs, or none is"),
    ],
)
def test_what_training_refuses_a_dry_run_refuses(tmp_path, words, says):
    dry = [] if any("dry_run" in word for word in words) else [DRY]
    assert says in failure(tmp_path, *MOONS, *dry, *words)


def test_a_place_without_room_for_a_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "outputs").write_text("a file")
    assert "outputs: no run directory can be made there" in failure(tmp_path, *MOONS, DRY)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "the checkpoints need" in failure(
        tmp_path, *MOONS, DRY, "logger=none", "hydra.run.dir=elsewhere", "max_steps=9"
    )


# ---- runs that exist, sweeps, processes ----------------------------------------------------------------------------


def test_a_resumed_run_is_forecast_from_where_it_is(tmp_path, capfd):
    small = [*MOONS, "logger=none", "trainer.sample_every=null"]
    assert flowtrain(tmp_path, *small, "max_steps=5", "hydra.run.dir=run") == 0
    before = contents(tmp_path)
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=30", DRY) == 0
    assert "until step 30: about" in (out := capfd.readouterr().out) and ": 25 steps " in out
    assert flowtrain(tmp_path, "train", "resume=run", DRY) == 0
    assert "run has finished already" in capfd.readouterr().out
    assert flowtrain(tmp_path, "rerun", "run", "max_steps=40", DRY) == 0
    assert ": 40 steps " in capfd.readouterr().out
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_dry_run(tmp_path, capfd):
    assert flowtrain(tmp_path, *MOONS, DRY, "--multirun", "model.hidden=8,16", "max_steps=50") == 0
    out = capfd.readouterr().out
    assert out.count("until step 50: about") == 2 and out.count("what would change") == 2
    assert len(re.findall(r"^[01] .* dry run ", out, re.M)) == 2 and "results.csv" not in out
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "flowtrain", *MOONS, DRY, "devices=2", "max_steps=50"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "device: cpu × 2" in done.stdout and "MiB of tensors on each device" in done.stdout.replace("KiB", "MiB")
    assert done.stdout.count("what would change") == 1 and re.search(r"^batch_size=8 .*iB$", done.stdout, re.M)
    assert not [*tmp_path.iterdir()]


def test_old_checkpoints_do_not_know_dry_runs(tmp_path):
    from flowtrain.config.restore import checkpoint_config
    from flowtrain.runtime import checkpoint

    small = [*MOONS, "logger=none", "trainer.sample_every=null", "max_steps=1", "hydra.run.dir=run"]
    assert flowtrain(tmp_path, *small) == 0
    file = tmp_path / "run/checkpoints/last.pt"
    state = checkpoint.read(file)
    del state["config"]["dry_run"], state["threads"]["turns"]
    checkpoint.save(state, file)
    assert checkpoint_config(file).dry_run is False
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=2") == 0


def test_it_is_a_key_of_training_alone(tmp_path):
    with pytest.raises(UsageError, match="no key 'dry_run'|does not train|no run"):
        flowtrain(tmp_path, "eval", DRY)
