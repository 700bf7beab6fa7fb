"""train, eval and sample, called as the command line calls them, for every model; and the same on two processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import ONLY_IMAGES, checkpoint_command_config, configuration, flow_of, options
from PIL import Image

import flowtrain
from flowtrain import train
from flowtrain.commands import eval as evaluation
from flowtrain.commands import sample
from flowtrain.commands.contexts import contexts
from flowtrain.commands.restored import restore
from flowtrain.config.schema import PublishedConfig
from flowtrain.errors import UsageError
from flowtrain.runtime import status

ROOT = Path(__file__).resolve().parent.parent
TINY = ["smoke=true", "logger=none", "report=false"]
EVAL = {"split": "test", "draws": 2, "examples": 40, "tolerance": 1e-3, "probes": 2, "weights": "auto"}
EVAL |= {"unlabelled": False, "json": False}
SAMPLE = {
    "n": 6,
    "temperature": 1.0,
    "label": None,
    "context": None,
    "guidance": 0.0,
    "decoding": "steps",
    "denoise": None,
    "output": None,
    "plot": True,
    "weights": "auto",
    "mcmc": False,
}


def train_run(run_dir, *overrides):
    run_dir.mkdir(exist_ok=True)
    config = configuration(*overrides)
    return config, train.main(config, str(run_dir))


def of_checkpoint(config, summary, folder, **keys):
    folder.mkdir()
    command = "eval" if "split" in keys else "sample"
    return checkpoint_command_config(command, config, ckpt=summary["checkpoint"], **keys), str(folder)


@pytest.mark.parametrize("model", options("model"))
def test_every_model_trains_evaluates_and_samples(model, tmp_path):
    config, summary = train_run(tmp_path, f"model={model}", *TINY)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["steps"] == 3 and 2 < summary["bits_per_dim"] < 8
    images = sorted((tmp_path / "samples").glob("*.png"))
    assert Image.open(images[-1]).size[0] > 200
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 3

    report = evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **EVAL))
    assert json.loads((tmp_path / "eval/eval.json").read_text()) == report
    assert report["examples"] == 40 and report["draws"] == 2 and report["weights"] == "ema"
    assert report["bits_per_dim_iw"] <= report["bits_per_dim"]
    each = np.load(tmp_path / "eval/log_likelihoods.npy")
    assert np.isfinite(each).sum() == 40 and np.nanmean(each) == pytest.approx(report["log_likelihood"], rel=1e-12)

    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **SAMPLE))
    integers = np.load(paths["npy"])
    assert integers.shape == (6, 1, 8, 8) and integers.dtype == np.uint8 and integers.max() <= 16
    again = sample.main(*of_checkpoint(config, summary, tmp_path / "again", **SAMPLE))
    assert (np.load(again["npy"]) == integers).all()

    flow = flowtrain.load(str(tmp_path))
    x = torch.from_numpy(integers)
    assert torch.equal(flow.decode(flow.encode(x)), x)
    assert flow.log_prob(x).shape == (6,)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of real, whole and named columns, as a file."""
    draw = np.random.default_rng(0)
    age, sort = draw.integers(18, 80, 200), draw.choice(["red", "green", "blue"], 200)
    lines = [f"{a},{a * 900 + draw.normal(0, 5000):.2f},{draw.normal():.4f},{s}" for a, s in zip(age, sort)]
    path = tmp_path_factory.mktemp("table") / "people.csv"
    path.write_text("age,income,score,sort\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("model", sorted({*options("model")} - {*ONLY_IMAGES}))
def test_every_model_of_vectors_trains_evaluates_and_samples_a_table(model, table, tmp_path):
    words = [f"model={model}", "dataset=table", f"dataset.path={table}", "dataset.context=[sort]", *TINY]
    config, summary = train_run(tmp_path, *words)
    assert np.isfinite(summary["log_likelihood"]) and "bits_per_dim" not in summary
    report = evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **{**EVAL, "examples": 15}))
    assert report["examples"] == 15 and "bits_per_dim" not in report
    keys = {**SAMPLE, "n": 40, "context": {"sort": "green"}}
    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **keys))
    rows = list(csv.DictReader(open(paths["csv"])))
    assert list(rows[0]) == ["age", "income", "score"] and len(rows) == 40
    assert all(row["age"].lstrip("-").isdigit() for row in rows)  # whole, as in the file
    ages, incomes = (np.array([float(row[name]) for row in rows]) for name in ("age", "income"))
    assert 0 < ages.mean() < 100 and 1e4 < incomes.mean() < 1e5  # in its units
    assert Image.open(paths["pairs"]).size[0] > 300
    with pytest.raises(UsageError, match="conditional on sort: give context="):
        sample.main(*of_checkpoint(config, summary, tmp_path / "none", **SAMPLE))


def test_points_of_the_plane_come_with_their_density(tmp_path):
    config, summary = train_run(tmp_path, "model=realnvp_vector", "dataset=moons", *TINY)
    assert Image.open(sorted((tmp_path / "samples").glob("*.png"))[-1]).size == (806, 400)
    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **SAMPLE))
    assert Image.open(paths["density"]).size == (806, 400)
    flow = flowtrain.load(str(tmp_path))
    assert flow.log_prob(torch.from_numpy(np.load(paths["npy"]))).isfinite().all()


def test_integers_alone_are_reported_in_bits_too(tmp_path):
    draw = np.random.default_rng(0)
    np.save(tmp_path / "dice.npy", draw.integers(1, 7, (300, 4)))
    words = ["model=maf", "dataset=table", f"dataset.path={tmp_path / 'dice.npy'}", *TINY]
    config, summary = train_run(tmp_path / "run", *words)
    report = evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **{**EVAL, "examples": None}))
    assert report["bits_per_dim"] == pytest.approx(-report["log_likelihood"] / (4 * np.log(2)))
    assert report["bits_per_dim"] > np.log2(6) - 0.1  # no model beats the dice


def test_a_conditional_flow_draws_the_classes_asked_for(tmp_path):
    config, summary = train_run(tmp_path, *TINY, "dataset.context=label", "base=class_normal")
    for label, classes in ((None, [0, 1, 2, 3, 4, 5]), (3, [3] * 6), ([1, 7, 1], [1] * 6 + [7] * 6 + [1] * 6)):
        asked, folder = of_checkpoint(config, summary, tmp_path / f"{label}", **{**SAMPLE, "label": label})
        assert contexts(asked, restore(asked, asked.ckpt, "auto"))[slice(0, len(classes))].argmax(1).tolist() == classes
        assert np.load(sample.main(asked, folder)["npy"]).shape == (len(classes), 1, 8, 8)
    assert evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **EVAL))["examples"] == 40
    for label, says in ((10, "the classes are 0 to 9"), ([], "the classes are")):
        with pytest.raises(UsageError, match=says):
            sample.main(*of_checkpoint(config, summary, tmp_path / f"bad{label}", **{**SAMPLE, "label": label}))


def test_a_list_of_classes_draws_a_row_for_each(tmp_path):
    config, summary = train_run(tmp_path, *TINY, "dataset.context=label", "base=class_normal")
    keys = {**SAMPLE, "label": [3, 5], "temperature": [0.0, 1.0]}
    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "rows", **keys))
    rows = np.load(paths["npy"]).reshape(2, 2, 6, 64)  # temperature, class, sample
    means = [  # at temperature 0: the class's mean, six times
        np.load(sample.main(*of_checkpoint(config, summary, tmp_path / f"{label}", **only))["npy"]).reshape(6, 64)
        for label in (3, 5)
        for only in ({**SAMPLE, "label": label, "temperature": 0.0},)
    ]
    assert np.array_equal(rows[0], means) and not np.array_equal(rows[0, 0], rows[0, 1])
    assert (rows[1] != rows[0]).any((1, 2)).all()
    image = np.array(Image.open(paths["png"]).convert("L"))
    side = (len(image) - 5) // 4  # of a cell: 8 pixels, each enlarged to 11, and a frame of 5
    margin = image.shape[1] - 6 * side - 5
    assert side == 93 and side < margin < 4 * side and (image[:, :margin] < 100).any()  # labels
    shown = image[:, margin:][43::side, 43::side]  # a class's temperatures below each other
    pixels = rows.reshape(2, 2, 6, 8, 8)[..., 3, 3].swapaxes(0, 1).reshape(4, 6)
    assert np.array_equal(shown, np.round(pixels * (255 / 16)))


def test_classes_of_a_list_share_their_noise(tmp_path):
    config, summary = train_run(tmp_path, *TINY, "dataset.context=label")  # without classes in its density so far
    both = sample.main(*of_checkpoint(config, summary, tmp_path / "both", **{**SAMPLE, "label": [3, 3]}))
    first, again = np.load(both["npy"]).reshape(2, 6, 64)
    assert np.array_equal(first, again) and not np.array_equal(first[0], first[1])


def test_a_list_of_temperatures_draws_rows(tmp_path):
    config, summary = train_run(tmp_path, *TINY)
    keys = {**SAMPLE, "temperature": [0.0, 0.5, 1.0]}
    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **keys))
    integers = np.load(paths["npy"])
    assert len(integers) == 18
    assert (integers[:6] == integers[0]).all() and not (integers[12:] == integers[12]).all()
    width, height = Image.open(paths["png"]).size
    assert height == 3 * 93 + 5 and 6 * 93 + 5 < width < 8 * 93  # three rows, and labels beside them


def test_initial_weights_come_from_a_checkpoint(tmp_path):
    _, summary = train_run(tmp_path / "first", *TINY)
    _, second = train_run(
        tmp_path / "second", *TINY, "max_steps=1", "optimizer.lr=0.0", f"init={summary['checkpoint']}"
    )
    assert second["bits_per_dim"] == pytest.approx(summary["bits_per_dim"], abs=1e-6)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tmp_path):
    words = [*TINY, "model.dropout=0.3", "trainer.accumulate=2"]
    _, eager = train_run(tmp_path / "eager", *words)
    _, compiled = train_run(tmp_path / "compiled", *words, "compile=true")
    assert compiled["bits_per_dim"] == pytest.approx(eager["bits_per_dim"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_trains_when_shrunk(experiment, tmp_path):
    channels = configuration(f"experiment={experiment}").dataset.get("channels")  # None: a table
    small = (
        ["dataset=synthetic", "dataset.context=null", "dataset.warp=0", f"dataset.shape=[{channels},16,16]"]
        if channels
        else ["dataset=moons"]
    )
    config, summary = train_run(tmp_path, f"experiment={experiment}", *small, *TINY)
    assert summary["steps"] == 3
    report = evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **{**EVAL, "draws": 1}))
    assert np.isfinite(report["log_likelihood"])
    if "published" in report:
        assert "other data (" in report["published"]["not_comparable"]
    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **{**SAMPLE, "plot": False}))
    assert np.load(paths["npy"]).shape == ((6, channels, 16, 16) if channels else (6, 2))


def test_two_processes_do_not_write_one_run(tmp_path):
    with status.lock(tmp_path), pytest.raises(UsageError, match=f"is being trained by process {os.getpid()} on"):
        train_run(tmp_path, *TINY)
    train_run(tmp_path, *TINY)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer.lr=-1.0"], "optimizer: Invalid learning rate"),
        (["+optimizer.foo=1"], "no key 'optimizer.foo'"),
        (["scheduler=exponential", "scheduler.every=0"], "scheduler: .*every=0 at least 1"),
        (["trainer.decay='['"], "trainer.decay=.*no regular expression"),
        (["batch_size=5000"], "batch_size=5000 is larger than the train split"),
        (["dataset.image_size=8", "model.levels=4"], "the sides can be halved 3 times"),
    ],
)
def test_what_cannot_be_is_refused(words, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        train_run(tmp_path, *words)


PUBLISHED = {"split": "test", "data": "mnist", "grey_levels": 256, "source": "a paper", "from_memory": False}


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ({"value": 3.35, "unit": "bits_per_dim", "space": "integers"}, 4.0),
        ({"value": -1.0, "unit": "nats", "space": "integers"}, -2129.35),
        ({"value": 1980.5, "unit": "nats", "space": "unit"}, 2129.35),  # 8 bits a dimension less
        ({"value": 1.0, "unit": "nats", "space": "logit"}, None),
        ({"value": 1.0, "unit": "bits_per_dim", "space": "integers", "split": "val"}, None),
        ({"value": 1.0, "unit": "bits_per_dim", "space": "integers", "grey_levels": 32}, None),
        ({"value": 1.0, "unit": "bits_per_dim", "space": "integers", "data": "cifar10"}, None),
    ],
)
def test_published_figures_are_compared_in_their_own_unit(published, ours):
    nats = -4.0 * 768 * np.log(2)
    result = evaluation.Evaluation(4.0, 0.1, nats, 1.0, 10, 1, torch.full((10,), nats))
    row = evaluation.compare(PublishedConfig(**{**PUBLISHED, **published}), result, 768, "test", 256, "mnist test")
    assert row["ours"] == (pytest.approx(ours, abs=0.01) if ours else None)
    assert bool(row["not_comparable"]) == (ours is None)


def process(*words, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flowtrain", "train", *words, "logger=none"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (metrics,) = cwd.glob("outputs/*/*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["model=glow", "model.steps=2", "model.hidden=16", "model.dropout=0.3", "mixing.start=whitening"],
        ["model=realnvp", "model.hidden=4", "dataset.shift=1"],
    ],
    ids=["glow", "realnvp"],
)
def test_one_and_two_processes_give_the_same_losses(words, tmp_path):
    """Order, noise, dropout, augmentation, the start from data and batch norm's moments are the global batch's."""
    words = [*words, "max_steps=6", "trainer.log_every=1", "trainer.val_every=3", "trainer.val_examples=64"]
    runs = []
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        runs.append(process(*words, f"devices={devices}", cwd=tmp_path / str(devices)))
    assert len(runs[0]) == len(runs[1]) == 8
    for one, two in zip(*runs):
        for key in ("train/bits_per_dim", "val/bits_per_dim"):
            if key in one:
                assert two[key] == pytest.approx(one[key], abs=2e-5), (one["step"], key)


@pytest.mark.long
def test_all_cifar10_test_images_survive_encoding():
    data = Path(os.environ.get("FLOWTRAIN_DATA", "data"))
    if not (data / "cifar-10-batches-py").exists():
        pytest.skip("CIFAR-10 is not there: set FLOWTRAIN_DATA to a folder that holds cifar-10-batches-py")
    from flowtrain.data import CIFAR10

    config = configuration("dataset=cifar10", "dataset.download=false", f"dataset.root={data}")
    keys = {key: value for key, value in config.dataset.items() if key != "_target_"}
    images = CIFAR10(**keys).split("test")
    flow = flow_of("dataset=cifar10", "model.steps=4").eval()
    flow.initialize(images.take(torch.arange(256))[0])
    for index in torch.arange(len(images)).split(500):
        x, _ = images.take(index)
        assert torch.equal(flow.decode(flow.encode(x)), x)
