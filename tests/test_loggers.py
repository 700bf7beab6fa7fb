"""Where the records of a run go: one reader for each destination, and resumed and failing runs."""

import csv
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from composed import configuration
from inprocess import flowtrain
from PIL import Image

from flowtrain.cli.completion import prepare
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.cli.help import help_text
from flowtrain.commands.previews import Preview
from flowtrain.config import earlier
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.engine.budget import Budget
from flowtrain.engine.loggers import CsvTable, Mlflow, RunRecord, Wandb
from flowtrain.errors import UsageError
from flowtrain.runtime import checkpoint
from flowtrain.runtime.files import WriteError

ROOT = Path(__file__).resolve().parent.parent
TINY = ("train", "smoke=true", "model=nice", "dataset=digits", "hydra.run.dir=run")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No account, and no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def record(folder, step=0, **settings) -> RunRecord:
    return RunRecord(folder, step, 0, Budget(10, None), "bits_per_dim", "bits/dim", settings, "images")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- csv -----------------------------------------------------------------------------------------------------------


def table(folder) -> list[dict]:
    with open(folder / "scalars.csv", newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def test_a_table_has_a_row_for_each_step_and_gains_columns(tmp_path):
    log = CsvTable()
    log.open(record(tmp_path))
    log.scalars(1, {"a": 1.5, "b": float("nan")})
    log.scalars(2, {"a": 2.5})
    log.scalars(2, {"val": 7})
    log.scalars(3, {"val": -1e-30, "a": float("inf")})
    log.close()
    lines = (tmp_path / "scalars.csv").read_text().splitlines()
    assert lines == ["step,a,b,val", "1,1.5,nan,", "2,2.5,,7.0", "3,inf,,-1e-30"]


@pytest.mark.parametrize("tail", ["", "9,1.0", "9,1.0,2.0\n"])
def test_a_resumed_table_is_cut_at_its_step(tmp_path, tail):
    log = CsvTable()
    log.open(record(tmp_path))
    for step in range(1, 6):
        log.scalars(step, {"a": 1000.0 + step, "b": 2.0})
    log.close()
    with open(tmp_path / "scalars.csv", "a") as file:
        file.write(tail)
    log.open(record(tmp_path, step=3))
    log.scalars(3, {"a": 3.0})  # once more, and shorter
    log.scalars(4, {"a": 4.0, "c": 1.0})
    log.close()
    expected = [{"step": n, "a": 1000.0 + n, "b": 2.0} for n in (1, 2)]
    assert table(tmp_path) == [*expected, {"step": 3, "a": 3.0, "b": 2.0}, {"step": 4, "a": 4.0, "c": 1.0}]


def test_a_run_writes_the_same_figures_to_the_table(tmp_path):
    assert flowtrain(tmp_path, *TINY, "logger=[csv,tensorboard]", "max_steps=2") == 0
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=4") == 0
    steps: dict[int, dict] = {}
    for row in metrics(tmp_path / "run"):
        steps.setdefault(row["step"], {}).update(row)
    assert table(tmp_path / "run") == [*steps.values()] and [*steps] == [1, 2, 3, 4]
    assert {"train/bits_per_dim", "val/bits_per_dim", "system/images_per_second"} <= {*steps[2]}


# ---- Weights & Biases ----------------------------------------------------------------------------------------------


def wandb_records(file: Path):
    """The records of an offline run: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def items(record) -> dict:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record}


def test_an_offline_run_of_wandb_is_resumed(tmp_path, capfd):
    words = ("logger=wandb", "seed=3")
    (tmp_path / "elsewhere").mkdir()
    assert flowtrain(tmp_path / "elsewhere", *TINY, *words) == 0  # wandb's process keeps this working directory
    capfd.readouterr()
    assert flowtrain(tmp_path, *TINY, *words) == 0
    assert "no account on this machine" in capfd.readouterr().out
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=5", "logger.wandb.mode=offline") == 0
    first, second = sorted(tmp_path.glob("outputs/wandb/offline-run-*"))
    identity = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    for folder in (first, second):  # within one second wandb adds a number
        assert re.fullmatch(rf"offline-run-\d+_\d+-{identity}(-1)?", folder.name)
    rows, config, summary, name = {}, {}, {}, set()
    for folder in (first, second):
        for entry in wandb_records(folder / f"run-{identity}.wandb"):
            if entry.HasField("run"):
                config |= items(entry.run.config.update)
                name.add(entry.run.display_name)
            if entry.HasField("summary"):
                summary |= items(entry.summary.update)
            if entry.HasField("history"):
                row = items(entry.history.item)
                rows[row.get("_step", entry.history.step.num)] = row
    expected = {row["step"]: row["train/bits_per_dim"] for row in metrics(tmp_path / "run") if "train/lr" in row}
    assert {step: row["train/bits_per_dim"] for step, row in rows.items()} == expected and len(expected) == 5
    assert config["seed"] == 3 and config["model"] == "nice" and config["dataset.name"] == "digits"
    final = json.loads((tmp_path / "run/summary.json").read_text())["bits_per_dim"]
    assert summary["bits_per_dim"] == pytest.approx(final) and name == {"run"}
    assert any(first.glob("files/media/images/samples_3_*.png"))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_symlink()]


def test_a_server_that_wandb_cannot_reach_ends_a_run_in_one_line(tmp_path, monkeypatch):
    import wandb

    def gone(**_):
        raise wandb.errors.CommError("no server\nfor you")

    logger = Wandb()
    logger.init = gone
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriteError, match="^logger=wandb: no server for you$"):
        logger.open(record(tmp_path))


@pytest.mark.parametrize("where", ["WANDB_API_KEY", "netrc"])
def test_an_account_is_found_without_asking(tmp_path, monkeypatch, where):
    from flowtrain.engine.loggers import wandb_run

    assert not wandb_run._has_account()
    if where == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    else:
        monkeypatch.setenv(where, "0123456789")
    assert wandb_run._has_account()


# ---- MLflow --------------------------------------------------------------------------------------------------------


def test_a_run_of_mlflow_is_resumed(tmp_path):
    from mlflow import MlflowClient

    assert flowtrain(tmp_path, *TINY, "logger=mlflow", "logger.mlflow.experiment=mine") == 0
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=5") == 0
    client = MlflowClient((tmp_path / "outputs/mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["seed"] == "1" and run.data.params["model"] == "nice"
    final = json.loads((tmp_path / "run/summary.json").read_text())["bits_per_dim"]
    assert run.data.metrics["bits_per_dim"] == pytest.approx(final)
    history = client.get_metric_history(run.info.run_id, "train/bits_per_dim")
    rows = [row for row in metrics(tmp_path / "run") if "train/lr" in row]
    assert [(one.step, one.value) for one in history] == [(row["step"], row["train/bits_per_dim"]) for row in rows]
    assert len(rows) == 5
    artifact = client.list_artifacts(run.info.run_id, "samples")[0].path
    shown = Image.open(client.download_artifacts(run.info.run_id, artifact, str(tmp_path)))
    assert shown.size == Image.open(min((tmp_path / "run/samples").iterdir())).size


def test_steps_that_mlflow_has_are_not_recorded_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for start in (0, 2):  # a crash between step 4 and the next checkpoint
        log = Mlflow()
        log.open(record(tmp_path, step=start, odd="x", **{"dataset.types.CO(GT)": "angle"}))
        for step in range(start + 1, 5 + start):
            log.scalars(step, {"train/loss": float(step)})
        log.image(step, "samples", torch.zeros(3, 2, 2, dtype=torch.uint8))
        log.close()
    run = log.client.get_run(log.id)
    assert [one.step for one in log.client.get_metric_history(log.id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert run.data.params["dataset.types.CO_GT_"] == "angle"


def test_a_tracking_server_that_is_gone_ends_a_run_in_one_line(tmp_path):
    with pytest.raises(WorkerError, match="^logger=mlflow: .*; nothing was saved yet$") as caught:
        flowtrain(tmp_path, *TINY, "logger=mlflow", "logger.mlflow.tracking_uri=http://127.0.0.1:9")
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_a_strangers_checkpoint_sends_its_records_nowhere_else(tmp_path):
    assert flowtrain(tmp_path, *TINY, "logger=mlflow", "logger.mlflow.tracking_uri=store") == 0
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=4") == 0
    assert checkpoint.read_config(tmp_path / "run/checkpoints/last.pt")["logger"]["mlflow"]["tracking_uri"] is None


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WorkerError, match=rf"pip install 'flowtrain\[{name}\]'") as caught:
        flowtrain(tmp_path, *TINY, f"logger={name}")
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_loggers_leave_no_thread_behind_that_keeps_python_alive(tmp_path):
    before = {*threading.enumerate()}
    assert flowtrain(tmp_path, *TINY, "logger=[csv,wandb,mlflow]", "max_steps=1") == 0
    assert [thread for thread in {*threading.enumerate()} - before if not thread.daemon] == []


def test_a_checkpoint_of_an_earlier_version_opens(tmp_path):
    assert flowtrain(tmp_path, *TINY, "max_steps=2") == 0
    file = tmp_path / "run/checkpoints/last.pt"
    state = checkpoint.read(file)
    config = state["config"]
    names = {"metrics": "JsonLines", "images": "ImageFiles", "tensorboard": "TensorBoard", "progress": "progress"}
    config["logger"] = {name: {"_target_": f"flowtrain.engine.loggers.{target}"} for name, target in names.items()}
    del config["trainer"]["layer_statistics"], config["trainer"]["cuda_graph"], config["trainer"]["strategy"]
    del config["dequantize"]
    config["trainer"]["tensorboard"] = False
    assert earlier.update(config)["logger"] == {} and "tensorboard" not in earlier.update(config)["trainer"]
    assert earlier.update(config)["trainer"]["cuda_graph"] is False  # as it was trained
    state.pop("format", None)
    checkpoint.save(state, file)
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=3") == 0
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/lr" in row] == [1, 2, 3]


def test_several_loggers_in_help_and_completion(monkeypatch, capsys):
    text = help_text("train", ["logger=[csv,wandb]"])
    assert "logger.wandb.project" in text and "* csv" in text and "* wandb" in text and "* tensorboard" not in text
    monkeypatch.setenv("COMP_LINE", "flowtrain train logger=[csv,w")
    assert prepare(["-sc", "query=bash"]) is None
    assert capsys.readouterr().out.split() == ["logger=[csv,wandb"]


@pytest.mark.parametrize(
    "word, says",
    [
        ("logger=default", "logger=default: is now logger=tensorboard"),
        ("logger=files", "logger=files: is now logger=none"),
        ("logger=[csv,nope]", "there are csv, mlflow, none, tensorboard, wandb"),
        ("trainer.tensorboard=false", "trainer.tensorboard: logger=none leaves out"),
        ("~logger.images", "logger.images: is part of every run"),
        ("logger.wandb.mode=on", "no key 'logger.wandb"),
    ],
)
def test_a_wrong_logger_is_refused(tmp_path, word, says):
    with pytest.raises(UsageError) as caught:
        flowtrain(tmp_path, *TINY, word)
    assert says in str(caught.value)


def test_a_grid_shows_the_same_latents_at_every_preview():
    config = configuration("model=glow", "dataset=digits", "smoke=true", "trainer.sample_n=9")
    data = build_dataset(config)
    flow, preview = build_flow(config, data.spec, "cpu"), Preview(data.split("val"), data.spec, config)
    decoded = []
    flow.decode = lambda z, *given, **keys: decoded.append(z.clone()) or type(flow).decode(flow, z, *given, **keys)
    first = preview(flow)
    torch.randn(7)  # whatever training draws
    assert torch.equal(preview(flow), first)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    assert not torch.equal(preview(flow), first)
    assert torch.equal(torch.cat(decoded[: len(decoded) // 3]), torch.cat(decoded[-(len(decoded) // 3) :]))


def test_the_final_figure_lies_beside_the_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert flowtrain(tmp_path, *TINY, "seed=4") == 0
    events = EventAccumulator(str(tmp_path / "run/tb")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"seed" in content and b"optimizer.lr" in content and b"nice" in content
    final = json.loads((tmp_path / "run/summary.json").read_text())["bits_per_dim"]
    assert events.Scalars("bits_per_dim")[-1].value == pytest.approx(final)
    assert {"train/bits_per_dim", "val/bits_per_dim", "system/images_per_second"} <= {*events.Tags()["scalars"]}


@pytest.mark.slow
def test_a_signal_ends_a_run_with_remote_loggers_and_leaves_no_process(tmp_path):
    words = ("train", "model=nice", "logger=[csv,wandb,mlflow]", "max_steps=1000000", "hydra.run.dir=run")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowtrain", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/scalars.csv").exists() or len(table(tmp_path / "run")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 143
    time.sleep(1)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [one for one in commands if b"wandb" in one and str(process.pid).encode() in one]
    assert json.loads((tmp_path / "run/status.json").read_text())["resumable"]
    status = [file.read_text() for file in (tmp_path / "outputs/mlruns").glob("*/*/meta.yaml")]
    assert len(status) == 1 and "status: 5" in status[0]  # killed
