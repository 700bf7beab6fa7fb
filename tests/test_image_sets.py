"""Labelled and non-square image sets: class folders, WebDataset archives, parquet; and file names of any bytes."""

import csv
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from inprocess import flowtrain
from PIL import Image
from pyarrow import parquet

from flowtrain import data
from flowtrain.data.image_files import decode
from flowtrain.data.image_sources import expand_braces, find_images
from flowtrain.data.labels import class_number, printable, sort_classes
from flowtrain.data.spec import LabelContext
from flowtrain.errors import FlowtrainError, UsageError

ANIMALS = ["cat", "dog", "eel"]


def pixels(number: int) -> np.ndarray:
    """An 8×8 image that says its number."""
    return np.full((8, 8, 3), number, dtype=np.uint8)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "png")
    return file.getvalue()


def write_folders(folder, numbers, names=ANIMALS):
    """Image i into the folder of class i mod 3."""
    for i in numbers:
        here = folder / names[i % 3]
        here.mkdir(parents=True, exist_ok=True)
        (here / f"{i:03}.png").write_bytes(png(i))
    return folder


def write_tar(path, numbers, names=ANIMALS):
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            for end, content in (("png", png(i)), ("cls", f"{names[i % 3]}\n".encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{i:03}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def make(kind, folder):
    """30 images of three classes as ``kind``; the path."""
    if kind == "folder":
        return write_folders(folder / "images", range(30))
    if kind == "zip":
        files = write_folders(folder / "images", range(30))
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            [archive.write(file, file.relative_to(folder)) for file in sorted(files.rglob("*.png"))]  # images/cat/…
        return folder / "images.zip"
    if kind == "tar":
        return write_tar(folder / "images.tar", range(30))
    if kind in ("tars", "braces"):
        (folder / "tars").mkdir()
        for shard in range(3):
            write_tar(folder / "tars" / f"shard-{shard:03}.tar", range(10 * shard, 10 * shard + 10))
        return folder / "tars" if kind == "tars" else folder / "tars/shard-{000..002}.tar"
    images, labels = [png(i) for i in range(30)], [i % 3 for i in range(30)]
    if kind == "parquet":
        table = pa.table({"jpg": images, "label": [ANIMALS[label] for label in labels], "n": labels})
        parquet.write_table(table, folder / "x.parquet")
        return folder / "x.parquet"
    structs = pa.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)])
    table = pa.table({"image": structs, "label": labels})
    names = {"info": {"features": {"label": {"names": ANIMALS, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    (folder / "parts").mkdir()
    for part in range(3):
        parquet.write_table(table.slice(10 * part, 10), folder / "parts" / f"part-{part}.parquet")
    return folder / "parts"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tars", "braces", "parquet", "huggingface"])
def test_every_image_comes_with_its_class(tmp_path, kind, workers):
    images = data.ImageFolder(path=str(make(kind, tmp_path)), image_size=8, context="label", val_size=4, test_size=5)
    assert images.spec.context == LabelContext(3, ("cat", "dog", "eel"))
    seen = []
    for name, count in (("train", 21), ("val", 4), ("test", 5)):
        split = images.split(name)
        assert len(split) == count
        for _, x, context in data.evaluation_batches(split, 8, workers=workers):
            numbers = x[:, 0, 0, 0].long()
            assert context.argmax(1).tolist() == (numbers % 3).tolist() and context.shape == (len(x), 3)
            seen += numbers.tolist()
    assert sorted(seen) == list(range(30))
    x, context, _ = next(data.Loader(images.split("train"), 6, workers=workers).batches())
    assert context.argmax(1).tolist() == (x[:, 0, 0, 0].long() % 3).tolist()


def test_folders_of_splits_hold_class_folders(tmp_path):
    for part, numbers in (("train", range(9)), ("val", range(9, 15)), ("test", (16, 19))):  # test has dogs alone
        write_folders(tmp_path / part, numbers)
    images = data.ImageFolder(path=str(tmp_path), image_size=8, context="label")
    for part, classes in (("train", {0, 1, 2}), ("val", {0, 1, 2}), ("test", {1})):
        split = images.split(part)
        x, context = split.take(torch.arange(len(split)))
        assert context.argmax(1).tolist() == (x[:, 0, 0, 0].long() % 3).tolist()
        assert {*context.argmax(1).tolist()} == classes
    write_folders(tmp_path / "test", [0], ["fox"] * 3)
    with pytest.raises(UsageError, match="the class fox is none of cat, dog, eel"):
        data.ImageFolder(path=str(tmp_path), image_size=8, context="label").split("test")


def test_a_replaced_image_brings_its_own_class(tmp_path):
    folder = write_folders(tmp_path / "images", range(12))
    (folder / "cat/000.png").write_text("no image")
    images = data.ImageFolder(path=str(folder), image_size=8, context="label", on_bad="skip", val_size=1, test_size=1)
    split = images.split("train")
    x, context = split.take(torch.arange(len(split)))
    assert context.argmax(1).tolist() == (x[:, 0, 0, 0].long() % 3).tolist()
    assert len(split.bad) + (0 not in [int(n[-7:-4]) for n in split.names]) == 1


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda folder: write_folders(folder / "x", range(6)) / "cat", "000.png has no class: put the images into"),
        (
            lambda folder: write_folders(folder / "x", range(6), ["cat"] * 3).parent,
            "has no class",
        ),
        (lambda folder: folder / "none", "none does not exist"),
        (lambda folder: folder / "{00..02}.tar", "00.tar does not exist"),
    ],
)
def test_images_without_classes_are_refused(tmp_path, build, says):
    with pytest.raises(UsageError, match=says) as caught:
        data.ImageFolder(path=str(build(tmp_path)), image_size=8, context="label").spec  # noqa: B018
    assert "\n" not in str(caught.value)


def test_a_parquet_names_its_columns(tmp_path):
    path = make("parquet", tmp_path)
    assert data.ImageFolder(path=str(path), labels="n", context="label").spec.context.names == ("0", "1", "2")
    with pytest.raises(UsageError, match="dataset.labels=m: .*x.parquet has no such column; it has jpg, label, n"):
        data.ImageFolder(path=str(path), labels="m").split("train")
    with pytest.raises(UsageError, match="dataset.labels=n: is the name of a column of a .parquet"):
        data.ImageFolder(path=str(make("folder", tmp_path)), labels="n").split("train")
    parquet.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), path)
    with pytest.raises(UsageError, match=r"several columns of bytes \(a, b\)"):
        find_images(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(FlowtrainError, match="cannot read .*x.parquet"):
        find_images(path)


def test_braces_stand_for_numbers(tmp_path):
    assert [path.name for path in expand_braces(tmp_path / "a{08..11}.tar")] == [f"a{i:02}.tar" for i in (8, 9, 10, 11)]
    assert [path.name for path in expand_braces(tmp_path / "{0..1}-{0..1}.tar")] == [
        "0-0.tar",
        "0-1.tar",
        "1-0.tar",
        "1-1.tar",
    ]
    assert expand_braces(tmp_path / "a.tar") == []


def test_classes_are_sorted_and_found_by_name_or_number():
    assert sort_classes(["10", "9", "9", "-1"]) == ("-1", "9", "10") and sort_classes(["b", "10", "a"]) == (
        "10",
        "a",
        "b",
    )
    assert class_number("dog", 3, ANIMALS) == class_number(1, 3, ANIMALS) == 1
    assert class_number(10, 2, ("9", "10")) == 1 and class_number(0, 2, ("9", "10")) == 0
    for label, says in (("dig", "did you mean dog"), (3, "cat, dog, eel, or their numbers, 0 to 2"), (-1, "0 to 2")):
        with pytest.raises(UsageError, match=f"label={label}: .*{says}"):
            class_number(label, 3, ANIMALS)
    with pytest.raises(UsageError, match="rename it"):
        sort_classes(["${x}"])


# ------------------------------------------------------------------ sides


@pytest.mark.parametrize(
    ("sides", "crop"), [((4, 8), (5, 15, 0, 20)), ((8, 4), (0, 20, 5, 15)), ((8, 8), (0, 20, 0, 20))]
)
def test_an_image_is_cropped_to_the_ratio_of_its_sides(sides, crop):
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    top, bottom, left, right = crop
    image[top:bottom, left:right] = 200
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    out = decode(file, sides, 3)
    assert out.shape == (3, *sides) and (out == 200).all()


@pytest.mark.parametrize("size", [[8], [8, 0], [8, 8, 3], "8x8", [8.5, 8]])
def test_sides_that_are_none(size):
    with pytest.raises(UsageError, match="dataset.image_size="):
        data.ImageFolder(path="x", image_size=size)


# ------------------------------------------------------------------ commands


SMALL = ["smoke=true", "logger=none", "report=false", "hydra.run.dir=run", "model=nice"]


def test_every_command_on_labelled_images(tmp_path):
    write_folders(tmp_path / "images", range(36))
    words = ["dataset=image_folder", "dataset.path=images", "dataset.image_size=[4,8]", "dataset.context=label"]
    assert flowtrain(tmp_path, "train", *words, *SMALL) == 0
    assert flowtrain(tmp_path, "eval", "ckpt=run", "dataset.path=images") == 0
    assert flowtrain(tmp_path, "sample", "ckpt=run", "n=4", "label=dog") == 0  # without the images
    (samples,) = tmp_path.glob("run/sample/*/samples.npy")
    assert np.load(samples).shape == (4, 3, 4, 8)
    with pytest.raises(FlowtrainError, match="label=fox: the classes are cat, dog, eel, or their numbers, 0 to 2"):
        flowtrain(tmp_path, "sample", "ckpt=run", "n=4", "label=fox")
    scores = {}
    for name, more in (("images", []), ("images/dog", ["label=dog"])):  # the folders say the class, or the user
        assert flowtrain(tmp_path, "score", "ckpt=run", f"input={name}", f"output={tmp_path}/out.csv", *more) == 0
        scores[name] = list(csv.reader(open(tmp_path / "out.csv", newline="")))[1:]
    assert [row[0] for row in scores["images"]][12:14] == ["dog/001.png", "dog/004.png"] and len(scores["images"]) == 36
    with pytest.raises(FlowtrainError, match="label=null: give the class, cat, dog, eel, or a folder for each class"):
        flowtrain(tmp_path, "score", "ckpt=run", "input=images/dog")


# ------------------------------------------------------------------ names of any bytes

ODD = os.fsdecode(b"caf\xe9.png")  # Latin-1, not UTF-8


@pytest.fixture
def odd_folder(tmp_path):
    folder = write_folders(tmp_path / "images", range(30), [os.fsdecode(b"chat\xe9"), "dog", "eel"])
    (folder / ODD).write_bytes(png(99))
    return folder


def test_odd_names_are_printable():
    assert printable(ODD) == "caf\\xe9.png" and printable("café.png") == "café.png"


def test_odd_names_train_and_score(tmp_path, odd_folder, monkeypatch):
    words = ["dataset=image_folder", f"dataset.path={odd_folder}", "dataset.image_size=8", "trainer.workers=1"]
    assert flowtrain(tmp_path, "train", *words, *SMALL) == 0
    for output in ("scores.csv", "scores.parquet"):
        assert flowtrain(tmp_path, "score", "ckpt=run", f"input={odd_folder}", f"output={output}") == 0
    names = [row[0] for row in csv.reader(open(tmp_path / "scores.csv", newline="", encoding="utf-8"))][1:]
    assert (
        len(names) == 31 and names[-1] == "eel/029.png" and "caf\\xe9.png" in names and names.count("chat\\xe9/000.png")
    )
    assert parquet.read_table(tmp_path / "scores.parquet")["file"].to_pylist() == names


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_of_an_odd_name(odd_folder, workers, caplog):
    (odd_folder / ODD).write_text("no image")
    images = data.ImageFolder(path=str(odd_folder), image_size=8, val_size=1, test_size=1)
    split = images.split("train")
    assert ODD in split.names and len(split.digest()) == 64
    with pytest.raises(FlowtrainError, match=r"cannot read the image .*caf\\xe9.png"):
        list(data.evaluation_batches(split, 8, workers=workers))
    split.on_bad = "skip"
    with caplog.at_level(logging.WARNING):
        list(data.evaluation_batches(split, 8, workers=workers))
    caplog.text.encode("utf-8")


def test_a_class_of_an_odd_name(odd_folder):
    (odd_folder / ODD).unlink()
    images = data.ImageFolder(path=str(odd_folder), image_size=8, context="label")
    assert images.spec.context.names == ("chat\\xe9", "dog", "eel") and len(images.split("train"))


def test_a_folder_of_an_odd_name(tmp_path, odd_folder):
    """The command as a process of its own, whose stdout takes UTF-8 alone."""
    odd = odd_folder.rename(tmp_path / os.fsdecode(b"photos\xe9"))
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    words = ["dataset=image_folder", f"dataset.path='{odd}'", "dataset.image_size=8", *SMALL]
    for command in (["train", *words], ["eval", "ckpt=run"], ["score", "ckpt=run", f"input='{odd / ODD}'"]):
        done = subprocess.run(
            [sys.executable, "-m", "flowtrain", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=False,
        )
        told = rb"data: \S+photos\\xe9, as \S+ says\n" if command[0] == "eval" else b""
        assert done.returncode == 0 and re.fullmatch(told, done.stderr)
    assert "photos\\xe9" in (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert list(tmp_path.glob("run/score/*/scores.csv"))
