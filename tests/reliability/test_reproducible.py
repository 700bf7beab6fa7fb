"""Promise 12: two runs of a command are equal bit for bit, with any number of workers, and record their environment."""

import json
import re

import pytest
import torch
from inprocess import flowtrain
from PIL import Image

from flowtrain.engine import determinism
from flowtrain.errors import UsageError
from flowtrain.runtime import checkpoint

TRAIN = ("train", "smoke=true", "max_steps=6", "report=false", "logger=none", "compile=false")
FAMILIES = (
    "nice",
    "realnvp",
    "glow",
    "autoregressive",
    "maf",
    "iaf",
    "nsf_image",
    "nsf_autoregressive",
    "ffjord_image",
    "hybrid_image",
    "residual_image",
)


def train_run(cwd, *words):
    """Train, and return the metrics without times, the weights and averages, the log-likelihood, and the images."""
    cwd.mkdir()
    assert flowtrain(cwd, *TRAIN, *words) == 0
    (run,) = cwd.glob("outputs/*/*")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if not key.startswith("system/")} for line in lines]
    state = checkpoint.read(run / "checkpoints" / "last.pt")
    summary = json.loads((run / "summary.json").read_text())
    return (
        lines,
        {**state["model"], **{f"ema.{k}": v for k, v in state["ema"].items()}},
        summary["log_likelihood"],
        [file.read_bytes() for file in sorted((run / "samples").glob("*.png"))],
    )


def are_equal(one, other) -> bool:
    """Whether two runs are equal, weights bit for bit."""
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
        and one[2:] == other[2:]
    )


def test_one_command_twice_gives_the_same_bits(tmp_path, count, promise):
    chosen = FAMILIES[: max(3, count(len(FAMILIES)))]
    equal = sum(
        are_equal(*(train_run(tmp_path / f"{model}{again}", f"model={model}", "dataset=digits") for again in (1, 2)))
        for model in chosen
    )
    promise(12, "two runs of one command, the same to the bit (families)", f"{equal} of {len(chosen)}")
    assert equal == len(chosen)
    assert not are_equal(train_run(tmp_path / "a", "model=nice"), train_run(tmp_path / "b", "model=nice", "seed=2"))


def test_any_number_of_workers_gives_the_same_bits(tmp_path, count, promise):
    folder, generator = tmp_path / "images", torch.Generator().manual_seed(0)
    for split, n in (("train", 40), ("val", 16), ("test", 16)):
        (folder / split).mkdir(parents=True)
        for i in range(n):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / f"{i}.png")
    numbers = (0, 1, 2, 3)[: max(2, count(20))]
    words = ("model=nice", "dataset=image_folder", f"dataset.path={folder}", "dataset.image_size=8")
    runs = [train_run(tmp_path / str(n), *words, f"trainer.workers={n}") for n in numbers]
    equal = sum(are_equal(runs[0], run) for run in runs)
    promise(12, "trainer.workers=0, 1, …, the same to the bit", f"{equal} of {len(numbers)}")
    assert equal == len(numbers)


def test_deterministic_operations_are_used_and_their_cost_is_logged(tmp_path, promise):
    on = train_run(tmp_path / "on", "model=nsf_image", "deterministic=true")
    assert torch.are_deterministic_algorithms_enabled()
    (log,) = [file.read_text() for file in tmp_path.glob("on/outputs/*/*/train.log")]
    cost = re.search(r"deterministic=true: (a gradient takes ([\d.]+) times as long)", log)
    promise(12, "deterministic=true says what it costs (here, on a CPU)", cost[1])
    assert 0.1 < float(cost[2]) < 10
    torch.use_deterministic_algorithms(False)
    assert are_equal(on, train_run(tmp_path / "off", "model=nsf_image"))  # a CPU's operations are always deterministic
    with pytest.raises(UsageError, match="deterministic=true: put_ has no deterministic form"):
        determinism.enable()
        with determinism.determinism_errors():
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_a_run_records_its_environment(tmp_path):
    assert flowtrain(tmp_path, *TRAIN, "model=nice") == 0
    (run,) = tmp_path.glob("outputs/*/*")
    assert flowtrain(tmp_path, "eval", f"ckpt={run}", "examples=16") == 0
    records = [
        json.loads(file.read_text()) for file in (run / "environment.json", *run.glob("eval/**/environment.json"))
    ]
    assert len(records) == 2
    for record in records:
        assert record["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert {"flowtrain", "git", "python", "cuda", "device", "devices", "threads", "host", "command"} <= {*record}
