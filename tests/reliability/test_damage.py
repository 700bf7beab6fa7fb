"""Promise 3: damage of a checkpoint is noticed before a tensor is used, and training continues without it."""

import logging
import random
import re
import shutil

import pytest
import torch
from forks import are_equal
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
    "logger=none",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("home")
    assert flowtrain(folder, *TRAIN) == 0
    return folder


@pytest.fixture
def run(home, tmp_path):
    """A copy of that run without its summary, as if it had been killed."""
    shutil.copytree(home / "outputs", tmp_path / "outputs")
    (run,) = tmp_path.glob("outputs/*/*")
    (run / "summary.json").unlink()
    return run


@pytest.fixture
def messages():
    """The messages that flowtrain logs, whatever logging Hydra configures."""
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener = Listener()
    logging.getLogger("flowtrain").addHandler(listener)
    yield messages
    logging.getLogger("flowtrain").removeHandler(listener)


def flip(whole: bytes, bit: int) -> bytes:
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def damages(whole: bytes, flips: int, cuts: int) -> list[tuple[str, bytes | None]]:
    """Kinds of damage and the remaining bytes.

    Bits are flipped everywhere, and a tenth of them in the headers at the start and the end. The end is cut off. The
    file is empty, or missing.
    """
    dice, size = random.Random(3), len(whole)
    ends = [*range(64), *range(8 * (size - 100), 8 * size)]
    bits = dice.sample(ends, flips // 10) + dice.sample(range(64, 8 * (size - 100)), flips - flips // 10)
    lengths = dice.sample(range(1, size), cuts)
    return [
        *(("flip", flip(whole, bit)) for bit in bits),
        *(("cut", whole[:length]) for length in lengths),
        ("empty", b""),
        ("missing", None),
    ]


def write(file, content: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


def describes(kind: str, file, text: str) -> bool:
    """Whether a message is one line with the file, its digest, and the digest that was written if it is known."""
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
        write(file, content)
        texts = []
        for read in (checkpoint.read, checkpoint.read_config):
            try:
                read(file)
            except FlowtrainError as error:
                texts.append(str(error))
        noticed += not used and len(texts) == 2 and all(describes(kind, file, text) for text in texts)
        used.clear()
    promise(3, "damage noticed before a tensor is used: flips, cuts, empty, missing", f"{noticed} of {len(cases)}")
    assert noticed == len(cases)
    write(file, whole)
    assert checkpoint.read(file)["step"] == 35 and used


def read_state(file) -> dict:
    """Read what a kill must not change of a checkpoint."""
    return {key: value for key, value in checkpoint.read(file).items() if key not in ("seconds", "config")}


def test_training_continues_from_the_previous_checkpoint(run, tmp_path, count, promise, messages):
    folder = run / "checkpoints"
    expected, previous = read_state(folder / "last.pt"), checkpoint.read(folder / "previous.pt")
    assert previous["step"] == 30
    files = {file: file.read_bytes() for file in folder.glob("*.pt")}
    cases, kept = damages(files[folder / "last.pt"], count(20), count(20)), 0
    for number, (kind, content) in enumerate(cases):
        for file, data in files.items():
            write(file, data)
        write(folder / "last.pt", content)
        messages.clear()
        (run / "summary.json").unlink(missing_ok=True)
        words = (*TRAIN, "resume=true") if number % 2 else (TRAIN[0], f"resume={run}")
        code = flowtrain(tmp_path, *words)
        warnings = [text for text in messages if "continuing from" in text]
        kept += (
            code == 0
            and len(warnings) == 1
            and warnings[0].endswith("; continuing from previous.pt")
            and describes(kind, folder / "last.pt", warnings[0])
            and "resumed at step 30" in messages
            and are_equal(read_state(folder / "last.pt"), expected)
        )
    promise(3, "training went on from previous.pt, with one warning, to the same weights", f"{kept} of {len(cases)}")
    assert kept == len(cases)


def test_other_commands_exit_at_a_damaged_checkpoint(run, tmp_path, count, promise, messages, capsys):
    file = run / "checkpoints/best.pt"
    cases, ended = damages(file.read_bytes(), count(20), count(20))[:-1], 0  # a missing best.pt is no damage
    for kind, content in cases:
        write(file, content)
        for command in ("eval", "sample"):
            with pytest.raises(FlowtrainError) as caught:
                flowtrain(tmp_path, command, f"ckpt={run}")
            ended += caught.value.exit_code == 1 and describes(kind, file, str(caught.value))
    promise(3, "eval and sample of a damaged checkpoint ended with exit 1 and one line", f"{ended} of {2 * len(cases)}")
    assert ended == 2 * len(cases)
    assert not (run / "eval").exists() and not (run / "sample").exists()
    messages.clear()
    capsys.readouterr()
    assert flowtrain(tmp_path, "eval") == 0  # the last run: uses its next checkpoint and logs that
    assert describes(kind, file.relative_to(tmp_path), messages[0]) and "last.pt" in capsys.readouterr().out


def test_a_run_without_an_intact_checkpoint_is_reported(run, tmp_path, messages):
    for file in (run / "checkpoints").glob("*.pt"):
        write(file, flip(file.read_bytes(), 4000))
    with pytest.raises(FlowtrainError, match=r"last\.pt: damaged; its SHA-256"):
        flowtrain(tmp_path, "train", f"resume={run}")
    assert flowtrain(tmp_path, *TRAIN, "resume=true") == 0
    text = "\n".join(messages)
    assert len(re.findall("no checkpoint of .* can be used: .*last.pt.*; .*previous.pt.*; .*best.pt", text)) == 1
    assert "so this is a new one" in text


def test_the_verified_file_is_loaded_although_a_newer_one_replaces_it(tmp_path, monkeypatch):
    """A training run replaces the file between its verification and its loading."""
    file, load = tmp_path / "a.pt", torch.load
    for read in (checkpoint.read, lambda path: checkpoint.read(path, mmap=True)):
        checkpoint.save({"x": torch.zeros(50)}, file)

        def replace_and_load(source, **options):
            checkpoint.save({"x": torch.ones(500)}, file)
            return load(source, **options)

        monkeypatch.setattr(torch, "load", replace_and_load)
        assert read(file)["x"].tolist() == [0.0] * 50
        monkeypatch.undo()
