"""Data that are damaged, go, or change, and processes that read them and are killed: one line, no hang."""

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
from flowtrain.data.image_files import ImageFileSplit, find_images
from flowtrain.data.table_file import BLOCK, Array, TableFile
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint

SIDE = 8


def line(action) -> str:
    """What stops ``action``, in one line; empty where nothing does."""
    try:
        action()
    except FlowtrainError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def counted(promise, asked, wrong, total):
    promise(10, asked, f"{total - len(wrong)} of {total}")
    assert not wrong, "\n".join(map(str, wrong))


# ---- files that were cut short -------------------------------------------------------------------------------------


def cuts(size, number):
    """Lengths below ``size``, 0 among them."""
    return [0, *random.Random(size).sample(range(1, size), min(size, number) - 1)]


FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm")


@pytest.fixture
def images(tmp_path):
    """A folder of one noisy image of each kind."""
    for number, kind in enumerate(FORMATS):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.{kind}", kind)
    return tmp_path


def opened(folder, on_bad="stop"):
    found = find_images(folder)
    return ImageFileSplit(found, found.names, (3, SIDE, SIDE), on_bad=on_bad)


def test_images_cut_short(images, count, promise):
    split, wrong, total = opened(images), [], 0
    for number, name in enumerate(split.names):
        file, index = images / name, torch.tensor([number])
        whole, pixels = file.read_bytes(), split.take(index)[0]
        for length in cuts(len(whole), count(100)):
            total += 1
            file.write_bytes(whole[:length])
            said = line(lambda: split.take(index))
            kept = not said and torch.equal(split.take(index)[0], pixels)  # what is missing was not of the pixels
            skipping = opened(images, "skip")
            skipping.take(index)
            if not (kept or said.startswith(f"cannot read the image {file} (index {number})")):
                wrong.append((name, length, said))
            elif [*skipping.bad] != ([] if kept else [number]):
                wrong.append((name, length, skipping.bad))
        file.write_bytes(whole)
    counted(promise, "images cut short, told by index and path, or skipped and counted", wrong, total)


def test_tables_cut_short(tmp_path, count, promise, caplog):
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
            said = line(lambda: data.Table(path=str(file)).split("train"))
            at_a_line = name == "t.csv" and whole[:length].endswith(b"\n")
            if not (str(file) in said or at_a_line or "ends in the middle of a line" in caplog.text):
                wrong.append((name, length, said))
        file.write_bytes(whole)
    counted(promise, "tables cut short, told by path", wrong, total)


def idx(values) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def test_mnist_cut_short(tmp_path, count, promise):
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
            said = line(lambda: data.MNIST(root=str(tmp_path), val_size=2, download=False).split("train"))
            if f"{raw / name} has " not in said:
                wrong.append((name, length, said))
        (raw / name).write_bytes(whole)
    counted(promise, "idx files cut short, told by path", wrong, total)


def test_a_wrong_checksum_says_so(tmp_path, promise):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"0" * 100)
    (tmp_path / "train_32x32.mat").write_bytes(b"0" * 100)
    wrong = []
    for images, file in ((data.CIFAR10, folder / "data_batch_1"), (data.SVHN, tmp_path / "train_32x32.mat")):
        said = line(lambda: images(root=str(tmp_path), download=False).split("train"))
        if not all(word in said for word in (f"the MD5 of {file} is c88a1ec806fc879d1dcc0a666a8d7e36, not ",)):
            wrong.append(said)
    counted(promise, "wrong checksums, told with the right ones", wrong, 2)


# ---- files that change ---------------------------------------------------------------------------------------------


def later(file) -> None:
    """As if it had been written a while after the run began."""
    now = time.time()
    os.utime(file, (now, now))


def changed_image(folder):
    split = opened(folder)
    split.source.listed_at.seconds -= 60
    Image.new("RGB", (SIDE, SIDE)).save(folder / split.names[2], "jpeg")
    return line(lambda: split.take(torch.tensor([2]))), f"{folder / split.names[2]} (index 2)", "has changed since"


def removed_image(folder):
    split = opened(folder)
    (folder / split.names[2]).unlink()
    return line(lambda: split.take(torch.tensor([2]))), f"{folder / split.names[2]} (index 2)", "FileNotFoundError"


def changed_archive(folder):
    with tarfile.open(folder / "all.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
    split = opened(folder / "all.tar")
    split.source.listed_at.seconds -= 60
    later(folder / "all.tar")
    return line(lambda: split.take(torch.tensor([0]))), f"{folder}/all.tar:0.png (index 0)", "has changed since"


def table_changed_between_two_readings(folder):
    np.save(folder / "t.npy", np.random.default_rng(0).normal(size=(60, 3)))
    table, infer_columns = data.Table(path=str(folder / "t.npy")), TableFile.infer_columns

    def infer_and_change(self, names):
        found = infer_columns(self, names)
        np.save(folder / "t.npy", np.zeros((90, 3)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableFile, "infer_columns", infer_and_change)
        return line(lambda: table.split("train")), f"{folder}/t.npy", "has changed while it was read"


def array_cut_short_while_it_is_read(folder):
    np.save(folder / "t.npy", np.zeros((3 * BLOCK, 2)))
    blocks = TableFile(folder / "t.npy").blocks(["c0", "c1"])
    next(blocks)
    os.truncate(folder / "t.npy", 2 * BLOCK * 16)
    return line(lambda: list(blocks)), f"{folder}/t.npy from row {2 * BLOCK - 7} on", "the file is truncated"


CHANGES = (
    changed_image,
    removed_image,
    changed_archive,
    table_changed_between_two_readings,
    array_cut_short_while_it_is_read,
)


def test_files_that_change_while_a_run_reads_them(images, promise):
    wrong = []
    for change in CHANGES:
        said, *words = change(images)
        if not all(word in said for word in words):
            wrong.append((change.__name__, said))
    counted(promise, "files that change or go while they are read, told by index and path", wrong, len(CHANGES))


def test_reading_an_array_by_slices(tmp_path):
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
    "trainer.tensorboard=false",
    "trainer.val_every=100",
    "trainer.sample_every=null",
    "trainer.warmup_steps=0",
    "dataset.val_size=4",
    "dataset.test_size=4",
)


@pytest.fixture
def folder(tmp_path):
    """40 images."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02}.png")
    return tmp_path / "images"


def trained(folder, name, *words):
    run_dir = folder.parent / name
    run_dir.mkdir()
    config = configuration(*WORDS, f"dataset.path={folder}", *words)
    return train.main(config, str(run_dir)), run_dir


def killing(patch, at):
    """Kill one of the processes that read for step ``at`` of a run, once."""
    gradient, done = Trainer.gradient, []

    def spoiled(self, x, context=None):
        if self.step == at and not done:
            done.append(True)
            victim = random.Random(at).choice(multiprocessing.active_children())
            os.kill(victim.pid, signal.SIGKILL)
        return gradient(self, x, context)

    patch.setattr(Trainer, "gradient", spoiled)


def weights(run_dir):
    return checkpoint.read(run_dir / "checkpoints/last.pt")["model"]


def test_a_killed_reader(folder, count, promise, caplog):
    _, whole = trained(folder, "whole")
    wrong, total = [], count(6)
    for number in range(total):
        at, on_bad = number % 5 + 1, ("stop", "skip")[number % 2]
        began, said = time.monotonic(), ""
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, at)
            try:
                _, run_dir = trained(folder, f"killed{number}", f"on_bad={on_bad}")
            except FlowtrainError as error:
                said = str(error)
        if on_bad == "stop":
            kept = all(word in said for word in ("a data worker ended early", f"{folder}/", "(index "))
        else:
            kept = not said and "new workers read them again" in caplog.text
            kept = kept and all(map(torch.equal, weights(whole).values(), weights(run_dir).values()))
        if not kept:
            wrong.append((on_bad, at, said or "others weights, or none killed"))
        if time.monotonic() - began > 60:
            wrong.append((at, "a hang"))
    counted(promise, "readers killed: one line, or on_bad=skip goes on bit-identically", wrong, total)


def test_what_is_skipped_is_counted(folder, promise, caplog):
    for number in (3, 17, 30):
        (folder / f"{number:02}.png").write_bytes(b"nothing")
    said = line(lambda: trained(folder, "stopped"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        summary, run_dir = trained(folder, "skipping", "on_bad=skip", "max_steps=24")
    told = sum(int(text.split()[1]) for text in caplog.messages if text.startswith("on_bad=skip: "))
    seen = summary["unreadable"]
    promise(10, "unreadable images of a run, counted by on_bad=skip in log and summary", f"{seen} of {told}")
    assert "cannot read the image" in said and "(index " in said and math.isfinite(summary["bits_per_dim"])
    assert 1 <= seen == told <= 3 and json.loads((run_dir / "summary.json").read_text())["unreadable"] == seen


def test_other_data_are_not_trained_on_by_resuming(tmp_path):
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(60, 3)))
    keys = {"path": str(tmp_path / "t.npy")}
    state = data.Loader(data.Table(**keys).split("train"), 4).state_dict()
    np.save(tmp_path / "t.npy", np.random.default_rng(1).normal(size=(60, 3)))
    other = data.Loader(data.Table(**keys).split("train"), 4)
    assert "cannot resume: the SHA-256 of the train split was" in line(lambda: other.load_state_dict(state))
    del state["data"]
    assert "cannot resume: the SHA-256 of the train split was None" in line(lambda: other.load_state_dict(state))
