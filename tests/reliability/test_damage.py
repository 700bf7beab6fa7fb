"""Promise 3: a damaged checkpoint is noticed before a tensor of it is used, and what can go on without it does."""

import logging
import random
import re
import shutil

import pytest
import torch
from inprocess import flowtrain

from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint

TRAIN = (
    "train",
    "model=realnvp_vector",
    "model.pairs=1",
    "model.hidden=8",
    "norm=actnorm",
    "dataset=moons",
    "dataset.rows=400",
    "batch_size=32",
    "max_steps=35",
    "trainer.save_every=10",
    "trainer.val_every=10",
    "trainer.tensorboard=false",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with one finished run."""
    folder = tmp_path_factory.mktemp("home")
    assert flowtrain(folder, *TRAIN) == 0
    return folder


@pytest.fixture
def run(home, tmp_path):
    """A copy of that run, as if it had been killed before it finished."""
    shutil.copytree(home / "outputs", tmp_path / "outputs")
    (run,) = tmp_path.glob("outputs/*/*")
    (run / "summary.json").unlink()
    return run


@pytest.fixture
def said():
    """What flowtrain logs, whatever Hydra makes of the logging meanwhile."""
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener = Listener()
    logging.getLogger("flowtrain").addHandler(listener)
    yield messages
    logging.getLogger("flowtrain").removeHandler(listener)


def flipped(whole: bytes, bit: int) -> bytes:
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def damages(whole: bytes, flips: int, cuts: int) -> list[tuple[str, bytes | None]]:
    """Kinds of damage and what is left: bits flipped all over the file, and of its start and end, where what tells
    of the rest stands; ends cut off; nothing; no file."""
    dice, size = random.Random(3), len(whole)
    ends = [*range(64), *range(8 * (size - 100), 8 * size)]
    bits = dice.sample(ends, flips // 10) + dice.sample(range(64, 8 * (size - 100)), flips - flips // 10)
    lengths = dice.sample(range(1, size), cuts)
    return [
        *(("flip", flipped(whole, bit)) for bit in bits),
        *(("cut", whole[:length]) for length in lengths),
        ("empty", b""),
        ("missing", None),
    ]


def put(file, content: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


def told(kind: str, file, text: str) -> bool:
    """Whether one line names the file and, where there is one, its digest beside the one that was written."""
    digests = {
        "flip": r"SHA-256 is [0-9a-f]{64}, ([0-9a-f?]{64} was written|what was written is not there)",
        "cut": r"SHA-256 is [0-9a-f]{64}, what was written is not there",
        "empty": r"SHA-256 is [0-9a-f]{64}, what was written is not there",
        "missing": "cannot be read",
    }
    return "\n" not in text and text.isprintable() and str(file) in text and bool(re.search(digests[kind], text))


def test_every_damage_is_noticed(run, tmp_path, count, promise, monkeypatch):
    whole, file = (run / "checkpoints/last.pt").read_bytes(), tmp_path / "x.pt"
    used, cases, noticed = [], damages(whole, count(1000), count(1000)), 0
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: used.append(1) or load(*args, **kwargs))
    for kind, content in cases:
        put(file, content)
        texts = []
        for read in (checkpoint.read, checkpoint.read_config):
            try:
                read(file)
            except FlowtrainError as error:
                texts.append(str(error))
        noticed += not used and len(texts) == 2 and all(told(kind, file, text) for text in texts)
        used.clear()
    promise(3, "damage noticed before a tensor is used: flips, cuts, empty, missing", f"{noticed} of {len(cases)}")
    assert noticed == len(cases)
    put(file, whole)
    assert checkpoint.read(file)["step"] == 35 and used


def state_of(file) -> dict:
    """Of a checkpoint, all that a kill may not change."""
    return {key: value for key, value in checkpoint.read(file).items() if key not in ("seconds", "config")}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_goes_on_from_the_checkpoint_before(run, tmp_path, count, promise, said):
    folder = run / "checkpoints"
    expected, previous = state_of(folder / "last.pt"), checkpoint.read(folder / "previous.pt")
    assert previous["step"] == 30
    files = {file: file.read_bytes() for file in folder.glob("*.pt")}
    cases, kept = damages(files[folder / "last.pt"], count(20), count(20)), 0
    for number, (kind, content) in enumerate(cases):
        for file, data in files.items():
            put(file, data)
        put(folder / "last.pt", content)
        said.clear()
        (run / "summary.json").unlink(missing_ok=True)
        words = (*TRAIN, "resume=true") if number % 2 else (TRAIN[0], f"resume={run}")
        code = flowtrain(tmp_path, *words)
        warnings = [text for text in said if "continuing from" in text]
        kept += (
            code == 0
            and len(warnings) == 1
            and warnings[0].endswith("; continuing from previous.pt")
            and told(kind, folder / "last.pt", warnings[0])
            and "resumed at step 30" in said
            and same(state_of(folder / "last.pt"), expected)
        )
    promise(3, "training went on from previous.pt, with one warning, to the same weights", f"{kept} of {len(cases)}")
    assert kept == len(cases)


def test_what_only_reads_a_checkpoint_ends(run, tmp_path, count, promise, said, capsys):
    file = run / "checkpoints/best.pt"
    cases, ended = damages(file.read_bytes(), count(20), count(20))[:-1], 0  # a missing best.pt is none
    for kind, content in cases:
        put(file, content)
        for command in ("eval", "sample"):
            with pytest.raises(FlowtrainError) as caught:
                flowtrain(tmp_path, command, f"ckpt={run}")
            ended += caught.value.exit_code == 1 and told(kind, file, str(caught.value))
    promise(3, "eval and sample of a damaged checkpoint ended with exit 1 and one line", f"{ended} of {2 * len(cases)}")
    assert ended == 2 * len(cases)
    assert not (run / "eval").exists() and not (run / "sample").exists()
    said.clear()
    capsys.readouterr()
    assert flowtrain(tmp_path, "eval") == 0  # of the last run: the next one of its checkpoints, and says so
    assert told(kind, file.relative_to(tmp_path), said[0]) and "last.pt" in capsys.readouterr().out


def test_a_run_without_a_whole_checkpoint_says_so(run, tmp_path, said):
    for file in (run / "checkpoints").glob("*.pt"):
        put(file, flipped(file.read_bytes(), 4000))
    with pytest.raises(FlowtrainError, match=r"last\.pt: damaged; its SHA-256"):
        flowtrain(tmp_path, "train", f"resume={run}")
    assert flowtrain(tmp_path, *TRAIN, "resume=true") == 0
    text = "\n".join(said)
    assert len(re.findall("no checkpoint of .* can be used: .*last.pt.*; .*previous.pt.*; .*best.pt", text)) == 1
    assert "so this is a new one" in text


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """What was verified is what is loaded, though a training run has put a newer file in its place meanwhile."""
    file, load = tmp_path / "a.pt", torch.load
    for read in (checkpoint.read, lambda path: checkpoint.read(path, mmap=True)):
        checkpoint.save({"x": torch.zeros(50)}, file)

        def late(source, **options):
            checkpoint.save({"x": torch.ones(500)}, file)
            return load(source, **options)

        monkeypatch.setattr(torch, "load", late)
        assert read(file)["x"].tolist() == [0.0] * 50
        monkeypatch.undo()
