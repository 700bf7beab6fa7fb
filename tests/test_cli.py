"""The command line, judged by exit codes, files and the one line that it says."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import inprocess
import pytest
from composed import options

from flowtrain import __version__
from flowtrain.cli import exit_codes, main, worker
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.cli.help import help_text
from flowtrain.commands import COMMANDS
from flowtrain.config.conversion import key_names
from flowtrain.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
TINY = ["max_steps=2", "smoke=true", "logger=none", "report=false"]


def environment(**more):
    """The variables of a process that runs this checkout on one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def flowtrain(*words, cwd, **env):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "flowtrain", *words]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """What the command line says when it refuses, in this process; nothing may have been made."""

    def say(*words) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["flowtrain"])
        with pytest.raises(UsageError) as caught:
            main.run(list(words))
        assert not (tmp_path / "outputs").exists()
        text, code = exit_codes.describe_error(caught.value)
        assert code == 2 and "\n" not in text
        return text

    return say


@pytest.mark.parametrize(
    "word, says",
    [
        ("modle=glow", "no key 'modle'; did you mean 'model'?"),
        ("model=glwo", "did you mean 'glow'?"),
        ("model=3", "there are"),
        ("norm=null", "norm=null: choose one of actnorm, batchnorm"),
        ("optimizer=none", "there are adam"),
        ("experiment=nowhere", "experiment=nowhere: no such option"),
        ("lr=1", "did you mean 'optimizer.lr'?"),
        ("model.stepz=2", "did you mean 'model.step"),
        ("model.steps=two", "model.steps=two: must be a number"),
        ("~model.foo", "no key 'model.foo'"),
        ("~seed", "~seed: cannot be left out"),
        ("~logger", "choose one of csv, mlflow"),
        ("max_steps=abc", "max_steps=abc: must be a whole number of at least 1"),
        ("batch_size=-1", "batch_size=-1"),
        ("seed=", "seed="),
        ("devices=0", "devices=0: must be auto, or a whole number"),
        ("devices=9999", "devices=9999: there "),
        ("trainer.clip=-1", "trainer.clip=-1"),
        ("dataset.shape=3", "no key 'dataset.shape'"),
        ("dataset.flip=1", "must be true or false"),
        ("model=[1,", "cannot read"),
        ("seed=1,2", "add --multirun"),
        ("nonsense", "'nonsense' is not key=value"),
        ("--multirn", "did you mean '--multirun'?"),
        ("init=nowhere", "init=nowhere: no such file"),
        ("resume=nowhere", "resume=nowhere: no such file"),
        ("hydra.nonsense=1", "hydra.nonsense"),
    ],
)
def test_train_refuses(refusal, word, says):
    assert says in refusal("train", word)


def test_other_refusals(refusal):
    assert "did you mean 'train'?" in refusal("trian")
    assert "nothing here takes it" in refusal("train", "model=nice", "mixing=lu")
    words = "is not a multiple of processes × trainer.accumulate = 1 × 7; batch_size=63 is"
    assert words in refusal("train", "batch_size=64", "trainer.accumulate=7")
    assert "model.ode=3: model.ode is a mapping" in refusal("train", "model=ffjord", "model.ode=3")
    assert "takes no preprocess" in refusal("train", "model=autoregressive", "preprocess.alpha=0.1")
    assert "norm: no layer of this model refers to it" in refusal(
        "train", "model=custom", "dataset=moons", "+norm=actnorm"
    )
    assert "no such option" in refusal("train", "--multirun", "model=nice,glwo")
    assert "--cfg shows one job" in refusal("train", "--multirun", "model=nice,glow", "--cfg", "job")
    assert "under outputs/" in refusal("eval")
    assert "ckpt=nowhere: no such file" in refusal("sample", "ckpt=nowhere")


@pytest.mark.parametrize(
    "content, says",
    [
        ("model: {stepz: 8}", "experiment/mine.yaml: no key 'model.stepz'; did you mean 'model.step"),
        ("model: {steps: two}", "experiment/mine.yaml: model.steps=two"),
        ("trainer: {clipp: 1}", "did you mean 'trainer.clip'?"),
        ("batchsize: 8", "did you mean 'batch_size'?"),
        ("batch_size: many", "batch_size=many"),
        ("defaults: [{override /model: glwo}]", "did you mean 'glow'?"),
        ("allow: [os]", "allow= comes from the command line only"),
        ("published: {value: 1}", "published.unit: is missing"),
    ],
)
def test_experiment_with_a_mistake(refusal, tmp_path, content, says):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    assert says in refusal("train", "--config-dir", "mine", "experiment=mine")


def test_own_files_with_a_mistake(refusal, tmp_path):
    for group in ("experiment", "trainer"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine/experiment/bare.yaml").write_text("batch_size: 8\n")
    (tmp_path / "mine/trainer/typo.yaml").write_text("defaults: [default, _self_]\nclipp: 1\n")
    (tmp_path / "mine/trainer/part.yaml").write_text("clip: 1\n")
    assert "@package _global_" in refusal("train", "--config-dir", "mine", "experiment=bare")
    assert "did you mean 'trainer.clip'?" in refusal("train", "--config-dir", "mine", "trainer=typo")
    assert "trainer.accumulate: is missing" in refusal("train", "--config-dir", "mine", "trainer=part")
    assert "no such directory" in refusal("train", "--config-dir", "nowhere")


def test_one_line_and_code_of_the_process(tmp_path):
    done = flowtrain("train", "modle=glow", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "flowtrain: no key 'modle'; did you mean 'model'?\n"
    assert "Traceback" in flowtrain("train", "modle=glow", cwd=tmp_path, HYDRA_FULL_ERROR="1").stderr
    assert list(tmp_path.iterdir()) == []


def test_help_and_version_without_torch(tmp_path):
    code = "import sys; from flowtrain.cli.main import run; run(sys.argv[1:]); "
    code += "assert not {'torch', 'hydra'} & set(sys.modules)"
    for word in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    code = code.replace("'torch', 'hydra'", "'torch'")
    command = [sys.executable, "-c", code, "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    groups = [path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"]
    for word in [f"{name}:" for name in groups] + [f"{name}=" for name in groups]:
        assert word in done.stdout, word
    for key in key_names(COMMANDS["train"].config):
        assert re.search(rf"  {key}[ .:]", done.stdout), key
    for command in ("eval", "sample"):
        done = flowtrain(command, "--help", cwd=tmp_path)
        own = {*key_names(COMMANDS[command].config)} - {*key_names(COMMANDS["train"].config)}
        assert done.returncode == 0 and all(f"  {key} " in done.stdout for key in own)


def test_completion(tmp_path):
    def complete(line, shell="bash"):
        return flowtrain("-sc", f"query={shell}", cwd=tmp_path, COMP_LINE=line).stdout.split()

    (tmp_path / "outputs").mkdir()
    assert complete("flowtrain tr") == ["train"]
    assert {"model=glow", "model=nice"} <= set(complete("flowtrain train model=", "fish"))
    assert "optimizer.momentum=" in complete("flowtrain train optimizer=sgd optimizer.m")
    assert complete("flowtrain eval ckpt=out") == ["ckpt=outputs/"]
    assert complete("flowtrain compare outputs out") == ["outputs/"]
    assert complete("flowtrain eval ckpt=nowhere dr") == []
    for shell in ("bash", "zsh", "fish"):
        assert "flowtrain" in flowtrain("-sc", f"install={shell}", cwd=tmp_path).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished run."""
    cwd = tmp_path_factory.mktemp("a folder with spaces")
    done = flowtrain("train", *TINY, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


def test_a_run_its_evaluation_and_its_samples(trained):
    (run,) = (trained / "outputs/digits-glow").iterdir()
    for name in (".hydra/config.yaml", "train.log", "summary.json", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert (run / name).is_file(), name
    done = flowtrain("eval", "json=true", "examples=20", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 20
    assert done.stderr.startswith(f"ckpt={run.relative_to(trained)}/checkpoints/best.pt")
    assert len(list(run.glob("eval/*/eval.json"))) == 1
    assert flowtrain("sample", "n=4", f"ckpt={run}", cwd=trained).returncode == 0
    assert len(list(run.glob("sample/*/samples.npy"))) == 1
    with pytest.raises(UsageError, match="fixed by the checkpoint") as refused:
        inprocess.flowtrain(trained, "eval", "model.steps=3")
    assert exit_codes.describe_error(refused.value)[1] == 2


def test_the_compiler_is_not_imported_to_evaluate(trained):
    """Nor torchvision: they take longer than torch."""
    code = "import sys; from flowtrain.cli.main import run; run(['eval', 'examples=2']); run(['sample', 'n=4']); "
    code += "print(*{'torch._dynamo', 'sympy', 'torchvision'} & {*sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, env=environment(), capture_output=True, text=True)
    assert done.stderr == "\n" and not done.returncode, done.stderr


def test_resume(trained, capsys):
    def train(*words):
        assert inprocess.flowtrain(trained, "train", *TINY, *words) == 0
        return capsys.readouterr().out

    assert "has finished already" in train("resume=true")
    assert "a new one" in train("resume=true", "seed=5")
    first, second = sorted((trained / "outputs/digits-glow").iterdir())
    assert inprocess.flowtrain(trained, "train", f"resume={second}", "max_steps=4") == 0
    assert json.loads((second / "summary.json").read_text())["steps"] == 4
    assert len(list((trained / "outputs/digits-glow").iterdir())) == 2


def test_a_damaged_checkpoint(trained):
    (run, *_) = (trained / "outputs/digits-glow").iterdir()
    whole = (run / "checkpoints/last.pt").read_bytes()
    (trained / "cut.pt").write_bytes(whole[: len(whole) // 2])
    done = flowtrain("eval", "ckpt=cut.pt", cwd=trained)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cut.pt" in done.stderr


@pytest.mark.parametrize("devices", [1, 2])
def test_a_refusal_inside_the_job_leaves_no_run(tmp_path, devices):
    words = ["dataset=mnist", "dataset.download=false", "dataset.root=nowhere", f"devices={devices}"]
    done = flowtrain("train", *words, *TINY, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_value_that_the_data_set_refuses_leaves_no_run(tmp_path):
    with pytest.raises(WorkerError, match="dataset.bits=5: digits has 17 grey levels") as caught:
        inprocess.flowtrain(tmp_path, "train", "dataset.bits=5")
    assert caught.value.exit_code == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_reader_that_has_left_is_no_error_of_the_job(tmp_path, monkeypatch):
    def print_into_nothing(**_):
        raise BrokenPipeError

    monkeypatch.setattr(worker, "execute", print_into_nothing)
    with pytest.raises(BrokenPipeError):  # about which main() says nothing
        inprocess.flowtrain(tmp_path, "check", "model=maf", "dataset=moons")


def test_a_knob_that_the_constructor_does_not_take(tmp_path):
    for word, says in (
        ("dataset.bits=9", "dataset.bits=9: must be between 1 and 8"),
        ("+model.stepz=3", "did you mean 'model.steps'?"),
        ("+univariate.foo=3", "no key 'univariate.foo'"),
        ("+model.shape=[3]", "model.shape: the dataset decides this"),
        ("model.levels=9", "model.levels=9: "),
        ("+scheduler.flor=1", "no key 'scheduler.flor'; did you mean 'scheduler.floor'?"),
    ):
        with pytest.raises(exit_codes.WorkerError, match=re.escape(says)) as caught:
            inprocess.flowtrain(tmp_path, "train", "dataset=mnist", "dataset.download=false", word)
        assert caught.value.exit_code == 2 and not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_job_that_fails_does_not_stop_a_sweep(tmp_path):
    # the second job's data are missing
    done = flowtrain(
        "train",
        "--multirun",
        "dataset=digits,mnist,digits",
        "dataset.download=false",
        "dataset.root=nowhere",
        *TINY,
        cwd=tmp_path,
    )
    (sweep,) = (tmp_path / "outputs/sweeps").iterdir()
    rows = list(csv.DictReader(open(sweep / "results.csv", newline="")))
    assert done.returncode == 1
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert rows[1]["error"] and float(rows[2]["bits_per_dim"]) > 0 and rows[0]["steps"] == "2"
    assert "Traceback" not in done.stderr and str(sweep / "results.csv") in done.stdout


def test_two_processes_leave_one_run(tmp_path):
    done = flowtrain("train", "devices=2", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs/digits-glow").iterdir()
    assert (run / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number, code, devices", [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)])
def test_a_signal_saves_and_leaves(tmp_path, number, code, devices):
    small = ["model.hidden=8", "trainer.log_every=1", "logger=none", "compile=false"]
    words = ["train", "max_steps=1000000", f"devices={devices}", *small]
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in err
    (run,) = (tmp_path / "outputs/digits-glow").iterdir()
    assert (run / "checkpoints/last.pt").is_file() and not (run / "summary.json").exists()


def test_a_signal_before_the_first_step(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", "train"], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    time.sleep(0.8)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "flowtrain: interrupted by SIGTERM\n"
    assert process.returncode == 143


SWALLOW = """
import os, signal, sys
from flowtrain.cli.main import main
from flowtrain.runtime.signals import end_at_once
end_at_once()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except SystemExit:
    pass
sys.argv = ["flowtrain", "train"]
main()
"""


def test_a_signal_ends_the_command_though_a_library_swallows_its_exit(tmp_path):
    words = [sys.executable, "-c", SWALLOW]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stderr, done.returncode) == ("flowtrain: interrupted by SIGTERM\n", 143)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["model", "dataset", "optimizer", "scheduler", "experiment"])
def test_every_option_composes(group, tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    for name in options(group):
        file = ["dataset.path=a.csv"] if name == "table" else []
        assert inprocess.flowtrain(tmp_path, "train", f"{group}={name}", *file, "--cfg", "job") == 0, name
    assert not (tmp_path / "outputs").exists()


def test_vectors_have_no_keys_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("image_size=8", "channels=1", "bits=5", "flip=true", "shift=1"):
        with pytest.raises(UsageError, match=f"no key 'dataset.{key.partition('=')[0]}'"):
            main.run(["train", "model=maf", "dataset=moons", f"dataset.{key}"])


def test_a_file_that_options_share_is_no_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="dataset=_image: no such option; .*there are arrays, bsds300, "):
        main.run(["train", "dataset=_image"])
    monkeypatch.setenv("COMP_LINE", "flowtrain train dataset=")
    assert main.run(["-sc", "query=bash"]) == 0
    offered = capsys.readouterr().out.split()
    assert "dataset=moons" in offered and not [word for word in offered if word.startswith("dataset=_")]


def test_help_lists_each_key_once_with_its_default_and_comment(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/_shared.yaml").write_text("clip: 1.0  # the norm,\n            # at most\nworkers: 2\n")
    (tmp_path / "trainer/mine.yaml").write_text("# A trainer. Of mine.\ndefaults: [_shared, _self_]\nclip: 3.0\n")
    text = help_text("train", ["trainer=mine", "model=maf"], str(tmp_path))
    assert len(re.findall(r"^  seed +1 +\S", text, re.MULTILINE)) == 1
    assert re.search(r"^  trainer.clip +3.0 +the norm, at most$", text, re.MULTILINE)
    assert re.search(r"^  trainer.workers +2$", text, re.MULTILINE)
    assert re.search(r"^  \* mine +A trainer$", text, re.MULTILINE) and "_shared" not in text
    assert "Keys of model=maf:" in text and "Keys of model=glow:" not in text
    assert re.search(r"^  model.ode.rtol +1e-5$", help_text("train", ["model=ffjord"]), re.MULTILINE)
    with pytest.raises(UsageError, match="model=glwo: no such option; did you mean 'glow'?"):
        help_text("train", ["model=glwo"])
