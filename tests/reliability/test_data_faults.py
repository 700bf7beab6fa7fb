"""Promise 10: data that are damaged, vanish or change, and killed readers: one line and no hang."""

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
from composed import configuration
from PIL import Image

from flowtrain import data, train
from flowtrain.data.image_files import ImageFileSplit
from flowtrain.data.image_sources import find_images
from flowtrain.data.tables import table
from flowtrain.data.tables.arrays import Array
from flowtrain.data.tables.block import BLOCK
from flowtrain.data.tables.inference import survey
from flowtrain.data.tables.table_file import TableFile
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint

SIDE = 8


def error_line(action) -> str:
    """The message of the error that ``action`` raises, in one line; empty if it raises none."""
    try:
        action()
    except FlowtrainError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def assert_none_wrong(promise, asked, wrong, total):
    """Record a promise of ``total`` cases, and fail with the wrong ones."""
    promise(10, asked, f"{total - len(wrong)} of {total}")
    assert not wrong, "\n".join(map(str, wrong))


# ---- truncated files ----------------------------------------------------------------------------------------------


def cuts(size, number):
    """Random lengths below ``size``, and 0."""
    return [0, *random.Random(size).sample(range(1, size), min(size, number) - 1)]


FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm")


@pytest.fixture
def images(tmp_path):
    """A folder with a noisy image of each format."""
    for number, kind in enumerate(FORMATS):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.{kind}", kind)
    return tmp_path


def open_images(folder, on_bad="stop"):
    found = find_images(folder)
    return ImageFileSplit(found, found.names, (3, SIDE, SIDE), on_bad=on_bad)


def test_a_truncated_image_is_named_or_skipped(images, count, promise):
    split, wrong, total = open_images(images), [], 0
    for number, name in enumerate(split.names):
        file, index = images / name, torch.tensor([number])
        whole, pixels = file.read_bytes(), split.take(index)[0]
        for length in cuts(len(whole), count(100)):
            total += 1
            file.write_bytes(whole[:length])
            error = error_line(lambda: split.take(index))
            kept = not error and torch.equal(
                split.take(index)[0], pixels
            )  # the missing bytes did not belong to the pixels
            skipping = open_images(images, "skip")
            skipping.take(index)
            if not (kept or error.startswith(f"cannot read the image {file} (index {number})")):
                wrong.append((name, length, error))
            elif [*skipping.bad] != ([] if kept else [number]):
                wrong.append((name, length, skipping.bad))
        file.write_bytes(whole)
    assert_none_wrong(promise, "images cut short, told by index and path, or skipped and counted", wrong, total)


def test_a_truncated_table_is_named(tmp_path, count, promise, caplog):
    import pyarrow as pa
    from pyarrow import parquet

    rows = np.random.default_rng(0).normal(size=(60, 3))
    table = {f"x{i}": column for i, column in enumerate(rows.T)}
    parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    np.save(tmp_path / "t.npy", rows)
    np.save(tmp_path / "f.npy", np.asfortranarray(rows))
    text = "".join(",".join(map(repr, map(float, row))) + "\n" for row in rows)
    (tmp_path / "t.csv").write_text("x0,x1,x2\n" + text)
    wrong, total = [], 0
    for name in ("t.parquet", "t.npy", "f.npy", "t.csv"):
        file = tmp_path / name
        whole = file.read_bytes()
        for length in cuts(len(whole), count(100)):
            total += 1
            caplog.clear()
            file.write_bytes(whole[:length])
            error = error_line(lambda: data.Table(path=str(file)).split("train"))
            at_a_line = name == "t.csv" and whole[:length].endswith(b"\n")
            if not (str(file) in error or at_a_line or "ends in the middle of a line" in caplog.text):
                wrong.append((name, length, error))
        file.write_bytes(whole)
    assert_none_wrong(promise, "tables cut short, told by path", wrong, total)


def idx(values) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def test_a_truncated_idx_file_is_named(tmp_path, count, promise):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 28, 28), np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.zeros(20, np.uint8)))
    wrong, total = [], 0
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        whole = (raw / name).read_bytes()
        for length in cuts(len(whole), count(25)):
            total += 1
            (raw / name).write_bytes(whole[:length])
            error = error_line(lambda: data.MNIST(root=str(tmp_path), val_size=2, download=False).split("train"))
            if f"{raw / name} has " not in error:
                wrong.append((name, length, error))
        (raw / name).write_bytes(whole)
    assert_none_wrong(promise, "idx files cut short, told by path", wrong, total)


def test_a_wrong_checksum_is_shown_beside_the_right_one(tmp_path, promise):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"0" * 100)
    (tmp_path / "train_32x32.mat").write_bytes(b"0" * 100)
    wrong = []
    for images, file in ((data.CIFAR10, folder / "data_batch_1"), (data.SVHN, tmp_path / "train_32x32.mat")):
        error = error_line(lambda: images(root=str(tmp_path), download=False).split("train"))
        if not all(word in error for word in (f"the MD5 of {file} is c88a1ec806fc879d1dcc0a666a8d7e36, not ",)):
            wrong.append(error)
    assert_none_wrong(promise, "wrong checksums, told with the right ones", wrong, 2)


# ---- files that change ---------------------------------------------------------------------------------------------


def touch(file) -> None:
    """Set a file's time of change to now."""
    now = time.time()
    os.utime(file, (now, now))


def change_image(folder):
    split = open_images(folder)
    split.source.listed_at.seconds -= 60
    Image.new("RGB", (SIDE, SIDE)).save(folder / split.names[2], "jpeg")
    return (
        error_line(lambda: split.take(torch.tensor([2]))),
        f"{folder / split.names[2]} (index 2)",
        "has changed since",
    )


def remove_image(folder):
    split = open_images(folder)
    (folder / split.names[2]).unlink()
    return (
        error_line(lambda: split.take(torch.tensor([2]))),
        f"{folder / split.names[2]} (index 2)",
        "FileNotFoundError",
    )


def change_archive(folder):
    with tarfile.open(folder / "all.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
    split = open_images(folder / "all.tar")
    split.source.listed_at.seconds -= 60
    touch(folder / "all.tar")
    return error_line(lambda: split.take(torch.tensor([0]))), f"{folder}/all.tar:0.png (index 0)", "has changed since"


def change_table_between_two_readings(folder):
    np.save(folder / "t.npy", np.random.default_rng(0).normal(size=(60, 3)))
    dataset = data.Table(path=str(folder / "t.npy"))

    def survey_and_change(*words):
        found = survey(*words)
        np.save(folder / "t.npy", np.zeros((90, 3)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "survey", survey_and_change)
        return error_line(lambda: dataset.split("train")), f"{folder}/t.npy", "has changed while it was read"


def truncate_array_while_it_is_read(folder):
    np.save(folder / "t.npy", np.zeros((3 * BLOCK, 2)))
    blocks = TableFile(folder / "t.npy").blocks(["c0", "c1"])
    next(blocks)
    os.truncate(folder / "t.npy", 2 * BLOCK * 16)
    return error_line(lambda: list(blocks)), f"{folder}/t.npy from row {2 * BLOCK - 7} on", "the file is truncated"


CHANGES = (
    change_image,
    remove_image,
    change_archive,
    change_table_between_two_readings,
    truncate_array_while_it_is_read,
)


def test_a_file_that_changes_while_it_is_read_is_named(images, promise):
    wrong = []
    for change in CHANGES:
        error, *words = change(images)
        if not all(word in error for word in words):
            wrong.append((change.__name__, error))
    assert_none_wrong(
        promise, "files that change or go while they are read, told by index and path", wrong, len(CHANGES)
    )


def test_slices_of_an_array_file_equal_those_of_the_array(tmp_path):
    for rows in (np.arange(24.0).reshape(4, 3, 2), np.arange(12)[:, None], np.zeros((3, 0)), np.zeros((0, 2))):
        for order in "CF":
            np.save(tmp_path / "a.npy", np.array(rows, order=order))
            found = Array(tmp_path / "a.npy")
            assert (found.shape, found.dtype, found.ndim, len(found)) == (rows.shape, rows.dtype, rows.ndim, len(rows))
            for part in (slice(0, 2), slice(1, 99), slice(3, 3), slice(None)):
                assert np.array_equal(found[part], rows[part]) and found[part].shape == rows[part].shape


# ---- runs ----------------------------------------------------------------------------------------------------------

WORDS = (
    "model=realnvp",
    "dataset=image_folder",
    f"dataset.image_size={SIDE}",
    "dataset.channels=1",
    "batch_size=4",
    "model.hidden=4",
    "model.blocks=1",
    "max_steps=12",
    "trainer.workers=2",
    "logger=none",
    "trainer.val_every=100",
    "trainer.sample_every=null",
    "trainer.warmup_steps=0",
    "dataset.val_size=4",
    "dataset.test_size=4",
)


@pytest.fixture
def folder(tmp_path):
    """A folder of 40 images."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02}.png")
    return tmp_path / "images"


def train_run(folder, name, *words):
    run_dir = folder.parent / name
    run_dir.mkdir()
    config = configuration(*WORDS, f"dataset.path={folder}", *words)
    return train.main(config, str(run_dir)), run_dir


def kill_reader(patch, at):
    """Make a run kill one of its reader processes at step ``at``."""
    gradient, kills = Trainer.gradient, []

    def kill_and_compute(self, batch):
        if self.step == at and not kills:
            kills.append(True)
            victim = random.Random(at).choice(multiprocessing.active_children())
            os.kill(victim.pid, signal.SIGKILL)
        return gradient(self, batch)

    patch.setattr(Trainer, "gradient", kill_and_compute)


def read_weights(run_dir):
    return checkpoint.read(run_dir / "checkpoints/last.pt")["model"]


def test_a_killed_reader_is_reported_or_replaced(folder, count, promise, caplog):
    _, whole = train_run(folder, "whole")
    wrong, total = [], count(6)
    for number in range(total):
        at, on_bad = number % 5 + 1, ("stop", "skip")[number % 2]
        start, error = time.monotonic(), ""
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            kill_reader(patch, at)
            try:
                _, run_dir = train_run(folder, f"killed{number}", f"on_bad={on_bad}")
            except FlowtrainError as failure:
                error = str(failure)
        if on_bad == "stop":
            kept = all(word in error for word in ("a data worker ended early", f"{folder}/", "(index "))
        else:
            kept = not error and "new workers read them again" in caplog.text
            kept = kept and all(map(torch.equal, read_weights(whole).values(), read_weights(run_dir).values()))
        if not kept:
            wrong.append((on_bad, at, error or "other weights, or none killed"))
        if time.monotonic() - start > 60:
            wrong.append((at, "a hang"))
    assert_none_wrong(promise, "readers killed: one line, or on_bad=skip goes on bit-identically", wrong, total)


def test_skipped_images_are_counted(folder, promise, caplog):
    for number in (3, 17, 30):
        (folder / f"{number:02}.png").write_bytes(b"nothing")
    error = error_line(lambda: train_run(folder, "stopped"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        summary, run_dir = train_run(folder, "skipping", "on_bad=skip", "max_steps=24")
    logged = sum(int(text.split()[1]) for text in caplog.messages if text.startswith("on_bad=skip: "))
    skipped = summary["unreadable"]
    promise(10, "unreadable images of a run, counted by on_bad=skip in log and summary", f"{skipped} of {logged}")
    assert "cannot read the image" in error and "(index " in error and math.isfinite(summary["bits_per_dim"])
    assert 1 <= skipped == logged <= 3 and json.loads((run_dir / "summary.json").read_text())["unreadable"] == skipped


def test_resuming_with_other_data_is_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(60, 3)))
    keys = {"path": str(tmp_path / "t.npy")}
    state = data.Loader(data.Table(**keys).split("train"), 4).state_dict()
    np.save(tmp_path / "t.npy", np.random.default_rng(1).normal(size=(60, 3)))
    other = data.Loader(data.Table(**keys).split("train"), 4)
    assert "cannot resume: the SHA-256 of the train split was" in error_line(lambda: other.load_state_dict(state))
    del state["data"]
    assert "cannot resume: the SHA-256 of the train split was None" in error_line(lambda: other.load_state_dict(state))
