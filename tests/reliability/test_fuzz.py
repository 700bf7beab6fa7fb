"""Fuzzes overrides, checkpoints, images and tables: each works, or is refused in one line.

A hundred examples of each in a plain run, ten thousand with --long.
"""

import io
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from composed import configuration, flow_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowtrain.cli import exit_codes
from flowtrain.config import restore
from flowtrain.config.conversion import dotted_keys, to_dict
from flowtrain.config.schema import TrainConfig
from flowtrain.data import DownsampledImageNet, Power, Table
from flowtrain.data.array_files import open_rows
from flowtrain.data.arrays import fit_numbers
from flowtrain.data.inputs import ArrayRows, ImageFiles, TableRows, unnamed_columns
from flowtrain.data.spec import DataSpec
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint


def works(action) -> bool:
    """Whether ``action`` succeeds. If not, check that its error is one line, without warnings."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            action()
        except FlowtrainError as error:
            text = exit_codes.describe_error(error)[0]
            assert text and "\n" not in text and not caught
            return False
    return True


# ---- overrides -----------------------------------------------------------------------------------------------------

KEYS = [
    *dotted_keys(TrainConfig),
    "model.steps",
    "base",
    "dataset.bits",
    "optimizer.lr",
    "model",
    "dataset",
]
values = st.one_of(
    st.text(max_size=20),
    st.text("0123456789.,-+e_[]{}:$()'\"\\ =~*/@#%&|<>?!;\t\n", max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "true", "[]", "{}", "[1,2]", "{a:1}", "${seed}", "${nonsense}", "${oc.env:X}", "???", "1,2"]
    ),
    st.sampled_from(
        ["range(3)", "glob(*)", "choice(1,2)", "interval(0,1)", "shuffle(1)", "sort(3,1)", "int(x)", "${a:${b}}"]
    ),
)
words = st.one_of(
    st.builds(
        lambda sign, key, value: f"{sign}{key}={value}",
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.sampled_from(KEYS),
        values,
    ),
    st.builds(lambda key, value: f"{key}={value}", st.text(max_size=12), values),
    values.filter(lambda text: not text.startswith("-")),
)


@given(st.lists(words, min_size=1, max_size=3))
def test_any_override_works_or_is_refused(tmp_path_factory, line):
    from inprocess import flowtrain

    if any(word.startswith(("-", "hydra")) for word in line):
        return
    cwd = tmp_path_factory.getbasetemp()
    works(lambda: _silence(lambda: flowtrain(cwd, "train", *line, "--cfg", "job")))
    assert not (cwd / "outputs").exists()


def _silence(action):
    import contextlib

    with contextlib.redirect_stdout(io.StringIO()):
        return action()


# ---- files ---------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw):
    """A function that damages bytes: it replaces, drops, doubles or inserts some, cuts the end, or replaces all."""
    kind = draw(st.sampled_from(["replace", "replace", "replace", "cut", "drop", "double", "insert", "number", "new"]))
    where, more = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=8))
    seed = draw(st.integers(0, 2**32))

    def apply(data: bytes) -> bytes:
        at = min(int(where * len(data)), max(0, len(data) - 1))
        if kind == "new":
            return more * (seed % 50)
        if kind == "cut":
            return data[:at]
        if kind == "drop":
            return data[:at] + data[at + len(more) :]
        if kind == "double":
            return data[:at] + data[at : at + 64] + data[at:]
        if kind == "insert":
            return data[:at] + more + data[at:]
        if kind == "number":  # the greatest number, somewhere
            return data[:at] + b"\xff" * len(more) + data[at + len(more) :]
        out, places = bytearray(data), random.Random(seed)
        for byte in more:
            if out:
                out[places.randrange(len(out))] = byte
        return bytes(out)

    return apply


@pytest.fixture(scope="module")
def small_checkpoint():
    """The bytes of a checkpoint of a tiny flow."""
    words = ("model=nice", "model.hidden=2", "smoke=true")
    cfg, flow = configuration(*words), flow_of(*words)
    state = {
        "format": checkpoint.FORMAT,
        "config": to_dict(cfg),
        "model": flow.state_dict(),
        "ema": None,
        "columns": None,
        "step": 1,
    }
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


@given(damage(), st.booleans())
def test_any_damaged_checkpoint_is_read_or_refused(tmp_path_factory, small_checkpoint, change, sealed):
    """Damaged before it gets its digest (``sealed``), or after."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    if sealed:
        changed = change(small_checkpoint)
        hostile.seal(file, changed if len(changed) > 22 else changed + bytes(22))
    else:
        file.write_bytes(change(hostile.seal(file, small_checkpoint).read_bytes()))

    def read():
        restore.checkpoint_config(file)
        checkpoint.read(file)

    works(read)


def test_the_undamaged_checkpoint_is_read(tmp_path, small_checkpoint):
    """So that the test above tests more than a bad start."""
    hostile.seal(tmp_path / "good.pt", small_checkpoint)
    assert works(lambda: restore.checkpoint_config(tmp_path / "good.pt"))
    checkpoint.check(tmp_path / "good.pt")


IMAGES = {}
for suffix in ("png", "jpeg", "gif", "bmp", "ppm", "webp", "tiff"):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, suffix)
    IMAGES[suffix] = out.getvalue()


@given(st.sampled_from(sorted(IMAGES)), damage())
def test_any_damaged_image_is_read_or_refused(tmp_path_factory, suffix, change):
    folder = tmp_path_factory.getbasetemp() / "images"
    folder.mkdir(exist_ok=True)
    file = folder / f"x.{suffix}"
    file.write_bytes(change(IMAGES[suffix]))
    works(lambda: next(ImageFiles(file, (3, 8, 8)).groups()))
    file.unlink()


def _make_archive(kind: str) -> bytes:
    import tarfile

    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("a/1.png", "a/2.png"):
                archive.writestr(name, IMAGES["png"])
    else:
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name in ("a/1.png", "a/2.png"):
                member = tarfile.TarInfo(name)
                member.size = len(IMAGES["png"])
                archive.addfile(member, io.BytesIO(IMAGES["png"]))
    return out.getvalue()


ARCHIVES = {kind: _make_archive(kind) for kind in ("zip", "tar")}


@given(st.sampled_from(sorted(ARCHIVES)), damage())
def test_any_damaged_archive_of_images_is_read_or_refused(tmp_path_factory, kind, change):
    file = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    file.write_bytes(change(ARCHIVES[kind]))
    works(lambda: next(ImageFiles(file, (3, 8, 8)).groups()))


def _make_tables() -> dict[str, bytes]:
    import pandas as pd

    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"a": draw.normal(size=20), "b": draw.integers(0, 9, 20), "c": list("xyxyz" * 4)})
    out = {"csv": frame.to_csv(index=False).encode(), "parquet": frame.to_parquet(index=False)}
    buffer = io.BytesIO()
    np.save(buffer, draw.normal(size=(20, 3)))
    return out | {"npy": buffer.getvalue()}


TABLES = _make_tables()


@given(st.sampled_from(sorted(TABLES)), damage(), st.booleans())
def test_any_damaged_table_is_read_or_refused(tmp_path_factory, kind, change, as_input):
    file = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    file.write_bytes(change(TABLES[kind]))
    if as_input:
        works(lambda: list(TableRows(file, unnamed_columns(3, None)).groups()))
    else:
        works(lambda: Table(path=str(file), val_size=2, test_size=2).split("train"))


@given(st.text(max_size=200) | st.text("1234567890,.;\n\r\t\"' -e", max_size=200))
def test_any_text_as_csv_is_read_or_refused(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "text.csv"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    works(lambda: Table(path=str(file), val_size=1, test_size=1).split("train"))


def grey_images(file):
    """The input of a model of grey 4×4 images."""
    rows = open_rows(file)
    return ArrayRows(rows, fit_numbers(rows, DataSpec("images", (1, 4, 4), 256)))


@given(damage())
def test_any_damaged_array_of_images_is_read_or_refused(tmp_path_factory, change):
    out = io.BytesIO()
    np.save(out, np.zeros((3, 1, 4, 4), dtype=np.uint8))
    file = Path(tmp_path_factory.getbasetemp() / "fuzzed_images.npy")
    file.write_bytes(change(out.getvalue()))
    works(lambda: list(grey_images(file).groups()))


def _make_batches() -> dict[str, bytes]:
    out = io.BytesIO()
    np.savez_compressed(out, data=np.zeros((4, 3 * 32 * 32), dtype=np.uint8))
    return {
        "val_data.npz": out.getvalue(),
        "val_data": pickle.dumps({"data": np.zeros((2, 3 * 32 * 32), dtype=np.uint8)}),
    }


@given(st.sampled_from(sorted(_make_batches())), damage())
def test_any_damaged_batch_of_imagenet_is_read_or_refused(tmp_path_factory, name, change):
    folder = tmp_path_factory.getbasetemp() / "imagenet"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(change(_make_batches()[name]))
    works(lambda: DownsampledImageNet(path=str(folder)).split("test"))
    (folder / name).unlink()


@given(damage())
def test_any_damaged_prepared_table_is_read_or_refused(tmp_path_factory, change):
    out = io.BytesIO()
    np.save(out, np.random.default_rng(0).normal(size=(200, 8)))
    file = tmp_path_factory.getbasetemp() / "data.npy"
    file.write_bytes(change(out.getvalue()))
    works(lambda: Power(path=str(file)).split("train"))


@pytest.mark.parametrize(
    "shape", ["(10**15,)", "(1000000000000000, 8)", "(-1, 8)", "(2**70,)", "(True, 8)", "(8.5, 2)"]
)
def test_an_array_that_declares_more_than_it_holds_is_refused(tmp_path, shape):
    """Before memory is allocated for it."""
    for suffix, read in {
        "table": lambda file: Table(path=str(file)).split("train"),
        "prepared": lambda file: Power(path=str(file)).split("train"),
        "images": grey_images,
    }.items():
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        file = tmp_path / f"{suffix}.npy"
        file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(640))
        assert not works(lambda: read(file)), suffix
