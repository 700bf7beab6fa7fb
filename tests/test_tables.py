"""Tables: MAF's five, patches of photographs, and a user's own with the links that belong to it."""

import logging
import pickle
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_data import one_line

from flowtrain import bijections as b
from flowtrain import data
from flowtrain.bijections.columns import fit_to_columns
from flowtrain.data import pickled_frames
from flowtrain.data.spec import ColumnContext
from flowtrain.data.tables import inference, table_file, text_file, text_stream
from flowtrain.data.tables.columns import Column, Columns, moments
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TABLES = (data.Power, data.Gas, data.Hepmass, data.Miniboone, data.BSDS300)


def genuine(file):
    if not (SHARED / file).exists():
        pytest.skip(f"no genuine {file} under {SHARED}/")
    return SHARED / file


def parts_of(dataset):
    return [dataset.split(name).data.numpy() for name in ("train", "val", "test")]


def equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------ the five of MAF, the arithmetic done again


def tenths(rows):
    """Contiguous: a tenth off the end for test, a tenth of what remains for val."""
    test = rows[-int(0.1 * len(rows)) :]
    rows = rows[: len(rows) - len(test)]
    val = rows[-int(0.1 * len(rows)) :]
    return rows[: len(rows) - len(val)], val, test


def by_train_and_val(parts):
    both = np.vstack(parts[:2])
    return [(part - both.mean(axis=0)) / both.std(axis=0) for part in parts]


@pytest.mark.parametrize("cls", [data.Power, data.Gas, data.Miniboone])
def test_published_sizes_are_those_of_tenths(cls):
    assert tuple(map(len, tenths(np.empty((sum(cls.sizes), 0))))) == cls.sizes


def power_again(rows):
    random, rows = np.random.RandomState(42), rows.copy()
    random.shuffle(rows)
    rows = np.delete(np.delete(rows, 3, axis=1), 1, axis=1)
    voltage = 0.01 * random.rand(len(rows))
    active = 0.001 * random.rand(len(rows))
    meters = random.rand(len(rows), 3)
    rows[:, 1] += voltage
    rows[:, 0] += active
    rows[:, 2:5] += meters
    return by_train_and_val(tenths(rows))


def test_power(tmp_path):
    rows = np.random.default_rng(0).normal(100, 10, (1005, 8)).round(3)
    (tmp_path / "power").mkdir()
    np.save(tmp_path / "power" / "data.npy", rows)
    found = parts_of(data.Power(root=str(tmp_path)))
    assert [len(part) for part in found] == [815, 90, 100]
    equal(found, power_again(rows))


def test_power_on_genuine_minutes(tmp_path):
    text = genuine("power_sample/household_power_consumption.first48424.txt.xz")
    frame = pd.read_csv(text, sep=";", na_values="?").dropna()
    frame["minute"] = [60 * int(time[:2]) + int(time[3:5]) for time in frame["Time"]]
    rows = frame.drop(columns=["Date", "Time"]).to_numpy(dtype=np.float64)
    assert rows.shape == (48_424 - 5, 8)
    np.save(tmp_path / "data.npy", rows)
    dataset = data.Power(path=str(tmp_path / "data.npy"))
    found = parts_of(dataset)
    equal(found, power_again(rows))
    both = np.vstack(found[:2])
    np.testing.assert_allclose(both.mean(0, dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(both.std(0, dtype=np.float64), 1, atol=1e-5)
    split = dataset.split("train")
    assert "48,4" not in split.description and "not MAF's 1,659,917" in split.description
    assert split.columns.names[1] == "voltage" and not split.columns.all_integer


def sensors(rows=400):
    """16 sensors of which 8 are left, the first of each alike pair going."""
    random = np.random.default_rng(0)
    own = random.normal(size=(rows, 8))
    twins = own + 0.05 * random.normal(size=own.shape)
    names = [f"R{i}" for i in range(1, 17)]
    values = np.empty((rows, 16))
    values[:, ::2], values[:, 1::2] = own, twins
    values = np.hstack((random.normal(size=(rows, 3)), 5 * values + 2))
    return pd.DataFrame(values, columns=["Time", "Meth", "Eth", *names])


def gas_again(frame):
    frame = frame.drop("Meth", axis=1).drop("Eth", axis=1).drop("Time", axis=1)
    while True:
        several = (frame.corr() > 0.98).to_numpy().sum(axis=1) > 1
        if not several.any():
            break
        frame = frame.drop(frame.columns[np.where(several)[0][0]], axis=1)
    assert list(frame) == [f"R{i}" for i in range(2, 17, 2)]
    return tenths(((frame - frame.mean()) / frame.std()).to_numpy())


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_gas(tmp_path, protocol):
    """A pickle of today's pandas, and one whose classes lie where those of ten years ago lay."""
    (tmp_path / "gas").mkdir()
    frame = sensors()
    if protocol == 0:
        frame.columns = np.array(list(frame), dtype=object)
    content = pickle.dumps(frame, protocol)
    if protocol == 0:
        assert b"cpandas.core.indexes.base\n" in content and b"cpandas.core.internals.managers\n" in content
        content = content.replace(b"cpandas.core.indexes.base\n", b"cpandas.indexes.base\n")
        content = content.replace(b"cpandas.core.internals.managers\n", b"cpandas.core.internals\n")
    (tmp_path / "gas" / "ethylene_CO.pickle").write_bytes(content)
    found = parts_of(data.Gas(root=str(tmp_path)))
    assert [len(part) for part in found] == [324, 36, 40]
    equal(found, gas_again(sensors()))


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    file = tmp_path / "ethylene_CO.pickle"
    file.write_bytes(pickle.dumps({"table": sensors(), "more": Evil()}))
    one_line(lambda: data.Gas(path=str(file)).split("train"), str(file), "not only tables", error=FlowtrainError)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(pickle.UnpicklingError):
        pickled_frames.read(file)


def write_collisions(folder, gz=""):
    """28 columns: a label, 21 continuous ones and 6 discrete; the test file has one more, and names that are wrong."""
    random = np.random.default_rng(0)
    tables = []
    for rows in (300, 200):
        label = random.integers(0, 2, (rows, 1))
        discrete = random.integers(0, 3, (rows, 6))
        tables.append(np.hstack((label, random.normal(size=(rows, 10)), discrete, random.normal(size=(rows, 11)))))
    signal = np.flatnonzero(tables[0][:, 0] == 1)
    tables[0][signal[:5], 1] = -9  # five times the least value: the column stays
    tables[0][signal[:6], 11] = -9  # six times: it goes, as the next five do
    tables[1] = np.hstack((tables[1], np.full((200, 1), 1000.0)))
    names = ["# label", *(f"f{i}" for i in range(27))]
    for part, table in zip(("train", "test"), tables, strict=True):
        header = names if part == "train" else ["# label", *names]
        frame = pd.DataFrame(table)
        frame.to_csv(folder / f"1000_{part}.csv{gz}", header=header, index=False)
    return tables


def hepmass_again(train, test):
    train, test = train[train[:, 0] == 1][:, 1:], test[test[:, 0] == 1][:, 1:-1]
    mean, std = train.mean(axis=0), train.std(axis=0, ddof=1)
    train, test = (train - mean) / std, (test - mean) / std
    kept = [i for i, column in enumerate(train.T) if sorted(Counter(column).items())[0][1] <= 5]
    train, test = train[:, kept], test[:, kept]
    vals = int(0.1 * len(train))
    return train[:-vals], train[-vals:], test


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_hepmass(tmp_path, gz):
    folder = tmp_path / "hepmass"
    folder.mkdir()
    again = hepmass_again(*write_collisions(folder, gz))
    keys = {"path": str(folder / f"1000_train.csv{gz}")} if gz else {"root": str(tmp_path)}
    equal(parts_of(data.Hepmass(**keys)), again)
    (folder / f"1000_test.csv{gz}").unlink()
    one_line(lambda: data.Hepmass(**keys).split("val"), "in one folder", "1000_test.csv")


@pytest.mark.parametrize("raw", [False, True])
def test_miniboone(tmp_path, raw):
    random = np.random.default_rng(0)
    rows = random.normal(size=(500, 43))
    rows[:7, 1] = -200  # no outlier: only the first column counts
    clean = rows
    if raw:  # as the particles come: with outliers, and columns that pile up at their least value
        outlier = np.full((6, 43), -999.0)
        piled = random.normal(size=(506, 7)).clip(0)
        rows = np.hstack((np.vstack((rows[:300], outlier, rows[300:])), piled))
        clean = np.vstack((rows[:300], rows[306:]))
        clean = clean[:, [i for i, column in enumerate(clean.T) if Counter(column)[min(column)] <= 5]]
        assert clean.shape == (500, 42)
        rows = np.hstack((rows, random.normal(size=(506, 1))))  # and one more that stays
        clean = np.hstack((clean, np.delete(rows, range(300, 306), 0)[:, -1:]))
    np.save(tmp_path / "data.npy", rows)
    equal(parts_of(data.Miniboone(path=str(tmp_path))), by_train_and_val(tenths(clean)))


def test_bsds300(tmp_path):
    import h5py

    random = np.random.default_rng(0)
    parts = [random.normal(size=(n, 63)) for n in (20, 5, 9)]
    (tmp_path / "BSDS300").mkdir()
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as archive:
        for name, part in zip(("train", "validation", "test"), parts, strict=True):
            archive[name] = part
    equal(parts_of(data.BSDS300(root=str(tmp_path))), parts)


@pytest.mark.parametrize("cls", TABLES)
def test_whole_tables(tmp_path, cls, monkeypatch):
    """NAME.npy: all splits in one, prepared already."""
    rows = np.random.default_rng(0).normal(size=(24, cls.dims)).astype(np.float32)
    file = tmp_path / f"{cls.__name__.upper()}.npy"
    np.save(file, rows)
    one_line(lambda: cls(root=str(tmp_path)).split("train"), str(file), "not the", error=FlowtrainError)
    monkeypatch.setattr(cls, "sizes", (12, 7, 5))
    for keys in ({"root": str(tmp_path)}, {"path": str(file)}, {"path": str(tmp_path)}):
        equal(parts_of(cls(**keys)), (rows[:12], rows[12:19], rows[19:]))
    assert cls(root=str(tmp_path)).split("val").description.endswith(f"{file}, prepared as for MAF")
    np.save(file, rows[:, 1:])
    one_line(lambda: cls(root=str(tmp_path)).split("val"), f"{cls.dims}", error=FlowtrainError)


@pytest.mark.parametrize("cls", TABLES)
def test_missing_and_damaged_tables(tmp_path, cls):
    says = (f"dataset={cls.native_name}", cls.file, str(tmp_path), "zenodo")
    one_line(lambda: cls(root=str(tmp_path)).split("test"), *says)
    file = tmp_path / cls.file
    file.parent.mkdir()
    file.write_text("nothing of the kind")
    (tmp_path / "hepmass").mkdir(exist_ok=True)
    (tmp_path / "hepmass" / "1000_test.csv").write_text("")
    one_line(lambda: cls(root=str(tmp_path)).split("test"), f"cannot read {file}", error=FlowtrainError)
    one_line(lambda: cls(val_size=0.1), "dataset.val_size=0.1", "own val split")


@pytest.mark.parametrize(("cls", "package"), [(data.Gas, "pandas"), (data.Hepmass, "pandas"), (data.BSDS300, "h5py")])
def test_a_package_that_is_lacking_is_named(tmp_path, monkeypatch, cls, package):
    file = tmp_path / cls.file
    file.parent.mkdir()
    if cls is data.Gas:
        sensors(20).to_pickle(file)
    elif cls is data.Hepmass:
        write_collisions(file.parent)
    file.touch()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    one_line(lambda: cls(root=str(tmp_path)).split("test"), "pip install 'flowtrain[tables]'")


# ------------------------------------------------------------------ patches


def ramp(height, width, down, right):
    return (down * np.arange(height)[:, None] + right * np.arange(width)).astype(np.uint8)


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def whole(rows):
    """Patches (N, 64) in 0 … 256 less their mean, from rows (N, 63)."""
    rows = rows.double()
    return 256 * torch.cat((rows, -rows.sum(1, keepdim=True)), 1).numpy()


def test_patches_are_the_image_plus_noise_less_the_mean(tmp_path):
    for i in range(3):
        save(ramp(20, 30, 3, 5), tmp_path / f"{i}.png")
    keys = {"path": str(tmp_path), "train_patches": 4000, "val_size": 1, "test_size": 1}
    split = data.Patches(**keys).split("train")
    assert split.data.shape == (4000, 63) and split.data.dtype == torch.float32
    noise = whole(split.data) - (ramp(8, 8, 3, 5).reshape(64) - ramp(8, 8, 3, 5).mean())
    assert np.abs(noise).max() < 1
    assert abs(noise.std() - np.sqrt(63 / 64 / 12)) < 2e-3
    assert "not equal to" in split.description and "1 images" in split.description
    assert torch.equal(split.data, data.Patches(**keys).split("train").data)
    assert not torch.equal(split.data, data.Patches(**keys, split_seed=1).split("train").data)
    np.testing.assert_allclose(
        [column.std for column in split.columns.modelled], split.data.double().std(0, correction=0), rtol=1e-6
    )


def test_patches_come_from_every_place_alike(tmp_path):
    pixels = np.zeros((9, 10), dtype=np.uint8)
    pixels[0, 0], pixels[8, 9], pixels[0, 9], pixels[8, 0] = 40, 80, 120, 160  # each place sees other corners
    save(pixels, tmp_path / "train" / "a.png")
    save(pixels, tmp_path / "test" / "a.png")
    patches = whole(data.Patches(path=str(tmp_path), train_patches=6000).split("train").data)
    spots = [(patches[:, i] - np.median(patches, 1)) > 20 for i in (0, 63, 7, 56)]
    places = Counter(zip(*(spot.tolist() for spot in spots), strict=True))
    counts = [places[key] for key in ((True, False, False, False), (False, True, False, False))]
    counts += [places[key] for key in ((False, False, True, False), (False, False, False, True))]
    assert all(900 < count < 1100 for count in counts) and places[(False,) * 4] > 1800


@pytest.mark.parametrize("kind", ["folders", "archives"])
def test_patches_of_own_test_images(tmp_path, kind):
    for part, slopes in (("train", (0, 4)), ("test", (4, 0))):
        save(ramp(12, 12, *slopes), tmp_path / part / "a.png")
        if kind == "archives":
            with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
                archive.add(tmp_path / part / "a.png", "images/a.png")
            (tmp_path / part / "a.png").unlink()
            (tmp_path / part).rmdir()
    dataset = data.Patches(path=str(tmp_path), train_patches=30, val_patches=20, test_patches=10)
    for name, slopes, number in (("train", (0, 4), 30), ("val", (0, 4), 20), ("test", (4, 0), 10)):
        patches = whole(dataset.split(name).data)
        assert patches.shape == (number, 64)
        assert np.abs(patches - (ramp(8, 8, *slopes).reshape(64) - 14.0)).max() < 1.01
    assert not torch.equal(dataset.split("train").data[:20], dataset.split("val").data)


def test_patches_where_the_images_are_cut(tmp_path):
    for i in range(10):
        save(ramp(10, 10, 2 * i + 1, 0), tmp_path / f"{i}.png")
    dataset = data.Patches(
        path=str(tmp_path), val_size=2, test_size=0.2, train_patches=600, val_patches=200, test_patches=200
    )
    seen = []
    for name, images in (("train", 6), ("val", 2), ("test", 2)):
        patches = whole(dataset.split(name).data).reshape(-1, 8, 8)
        slopes = Counter(np.rint((patches[:, 7] - patches[:, 0]).mean(1) / 7).astype(int).tolist())
        assert len(slopes) == images and min(slopes.values()) > 50
        seen += slopes
    assert sorted(seen) == list(range(1, 20, 2))


def test_images_that_patches_cannot_be_drawn_from(tmp_path, caplog):
    one_line(lambda: data.Patches().split("train"), "dataset=bsds_patches", "dataset.path=FOLDER")
    one_line(lambda: data.Patches(path=str(tmp_path / "none")).split("train"), "does not exist")
    one_line(lambda: data.Patches(path=str(tmp_path)).split("train"), "no images")
    one_line(lambda: data.Patches(train_patches=0), "dataset.train_patches=0", "at least 1")
    one_line(lambda: data.Patches(val_patches=1.5), "dataset.val_patches=1.5", "whole number")
    for i in range(6):
        save(ramp(10, 10, i, 0), tmp_path / f"{i}.png")
    save(ramp(7, 30, 1, 1), tmp_path / "small.png")
    (tmp_path / "bad.png").write_text("not an image")
    keys = {"path": str(tmp_path), "val_size": 1, "test_size": 1, "train_patches": 600, "split_seed": 1}
    one_line(lambda: data.Patches(**keys).split("train"), "cannot read the image", "skip", error=FlowtrainError)
    split = data.Patches(**keys, on_bad="skip").split("train")
    assert 350 < len(split) < 450 and "4 images" in split.description
    assert sum("cannot read" in record.message for record in caplog.records) == 1


def test_genuine_patches():
    dataset = data.Patches(path=str(genuine("bsds300_images")), train_patches=20_000, test_patches=5_000)
    train, test = dataset.split("train"), dataset.split("test")
    assert "200 images" in train.description and "100 images" in test.description
    for split in (train, test):
        patches = whole(split.data).reshape(-1, 8, 8) / 256
        assert np.abs(patches.mean((1, 2))).max() < 1e-6 and 0.08 < patches.std() < 0.13
        apart = [np.mean((patches[:, :, k:] - patches[:, :, : 8 - k]) ** 2) for k in (1, 3, 7)]
        assert apart[0] < 0.4 * apart[1] < 0.8 * apart[2]  # neighbours are alike, as in nature


# ------------------------------------------------------------------ a user's own table

N = 500


@pytest.fixture
def frame():
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "income": random.lognormal(10, 1, N),
            "children": random.integers(0, 5, N),
            "time": 1.6e9 + 3600 * random.random(N),
            "colour": random.choice(["red", "green", "blue"], N),
            "married": random.random(N) < 0.4,
            "age": random.integers(18, 90, N).astype(float),
        }
    )


def write(frame, path):
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path, index=False)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "semicolon", "parquet", "category", "many_blocks"])
def test_a_table_is_read_as_it_stands(tmp_path, frame, kind, monkeypatch):
    path = tmp_path / ("t.parquet" if kind in ("parquet", "category") else "t.csv")
    if kind == "category":
        frame.astype({"colour": "category"}).to_parquet(path)
    elif kind == "semicolon":
        frame.to_csv(path, sep=";", index=False, encoding="utf-8-sig")
    else:
        write(frame, path)
    if kind == "many_blocks":
        monkeypatch.setattr(text_stream, "HEAD", 2**11)
        monkeypatch.setattr(text_stream, "PIECE", 2**11)
        monkeypatch.setattr(text_file, "CHUNK", 2**11)
    dataset = data.Table(path=str(path), context=["age", "colour"], val_size=50, test_size=0.2)
    parts = {name: dataset.split(name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in parts.items()} == {"train": 350, "val": 50, "test": 100}
    order = np.random.default_rng(0).permutation(N)
    rows = {"test": sorted(order[:100]), "val": sorted(order[100:150]), "train": sorted(order[150:])}
    offset = frame["time"].iloc[0]
    train = frame.iloc[rows["train"]]
    for name, split in parts.items():
        chosen = frame.iloc[rows[name]]
        assert split.data.dtype == split.context.dtype == torch.float32
        codes = np.stack((chosen["income"], chosen["children"], chosen["time"] - offset, chosen["married"]), 1)
        np.testing.assert_array_equal(split.data.numpy(), codes.astype(np.float32))
        age = (chosen["age"] - train["age"].mean()) / train["age"].std(ddof=0)
        colours = [chosen["colour"] == colour for colour in ("blue", "green", "red")]
        np.testing.assert_allclose(split.context.numpy(), np.stack((age, *colours), 1), atol=1e-6)
        x, context = split.take(torch.tensor([3, 1]))
        assert x.shape == (2, 4) and context.shape == (2, 4)
    assert str(path) in parts["val"].description and "conditional on age, colour" in parts["val"].description
    assert "2 real + 1 integer + 1 categorical columns" in parts["val"].description


def test_columns_know_what_they_are(tmp_path, frame):
    split = data.Table(path=write(frame, tmp_path / "t.csv"), context=["age", "colour"]).split("train")
    columns, test = split.columns, data.Table(path=str(tmp_path / "t.csv"), context=["age", "colour"]).split("test")
    assert columns == test.columns  # of the train split
    assert columns.names == ["income", "children", "time", "married"]
    assert kinds(columns) == ["real", "integer", "real", "categorical"] and not columns.all_integer
    assert [column.categories for column in columns.modelled] == [(), (), (), ("false", "true")]
    assert (columns.context_names, columns.context_shape) == (["age", "colour"], (4,))
    x = split.data.double().numpy()
    shift, var = np.array([0, 0.5, 0, 0.5]), np.array([0, 1 / 12, 0, 1 / 12])
    np.testing.assert_allclose([column.mean for column in columns.modelled], x.mean(0) + shift, rtol=1e-9)
    np.testing.assert_allclose([column.std for column in columns.modelled], np.sqrt(x.var(0) + var), rtol=1e-9)
    assert [column.offset for column in columns.modelled] == [0, 0, frame["time"][0], 0]
    whole = data.Table(path=str(tmp_path / "t.csv"), columns=["children", "married", "age"]).split("train")
    assert whole.columns.all_integer and kinds(whole.columns)[2] == "integer"  # 18.0 is a whole number


def test_another_file_is_read_by_what_a_checkpoint_knows(tmp_path, frame):
    columns = data.Table(path=write(frame, tmp_path / "t.csv"), context=["age", "colour"]).split("train").columns
    other = frame[frame["colour"] != "blue"].iloc[::-1][list(frame)[::-1]].assign(more=1)
    keys = {"context": ["age", "colour"]}
    dataset = data.Table(path=write(other, tmp_path / "other.csv"), **keys)
    dataset.use_columns(columns)
    split = dataset.split("test")
    order = np.random.default_rng(0).permutation(len(other))
    x, context = columns.encode(other.iloc[sorted(order[: len(other) // 10])])
    assert torch.equal(split.data, x) and torch.equal(split.context, context) and split.columns == columns
    other.loc[other.index[3], "colour"] = "pink"
    dataset = data.Table(path=write(other, tmp_path / "other.csv"), **keys)
    dataset.use_columns(columns)
    one_line(lambda: dataset.split("test"), "column 'colour', row 4", "'pink' is not one of blue, green, red")


def test_columns_survive_a_checkpoint(tmp_path, frame):
    columns = data.Table(path=write(frame, tmp_path / "t.csv"), context=["age", "colour"]).split("train").columns
    torch.save({"columns": columns.to_record()}, tmp_path / "c.pt")
    record = torch.load(tmp_path / "c.pt", weights_only=True)["columns"]
    assert Columns.from_record(record) == columns
    one_line(lambda: Columns.from_record({"modelled": [{"nome": 1}]}), "damaged", error=FlowtrainError)


def test_new_rows_are_encoded_as_the_splits_were_and_decoded_back(tmp_path, frame):
    dataset = data.Table(path=write(frame, tmp_path / "t.parquet"), context=["age", "colour"])
    split = dataset.split("train")
    train = frame.iloc[sorted(np.random.default_rng(0).permutation(N)[100:])]
    for rows in (train, {name: train[name].tolist() for name in train}):
        x, context = split.columns.encode(rows)
        assert torch.equal(x, split.data) and torch.equal(context, split.context)
    back = split.columns.decode(split.data)
    assert list(back) == split.columns.names and back["children"].dtype == np.int64
    assert back["married"].tolist() == [str(value).lower() for value in train["married"]]
    assert back["children"].tolist() == train["children"].tolist()
    np.testing.assert_allclose(back["income"], train["income"], rtol=1e-7)
    np.testing.assert_allclose(back["time"], train["time"], rtol=0, atol=3e-4)  # float32 alone: 128 seconds
    given = split.columns.encode_context({"age": [30.5], "colour": ["red"]})
    assert torch.equal(given[0, 1:], torch.tensor([0, 0, 1.0]))


def test_categories_that_look_like_numbers_are_found_among_numbers():
    columns = Columns((Column("grade", "categorical", ("1", "2.5", "A", "true")),))
    for given in (["A", "2.5", "1"], np.array(["A", 2.5, 1.0], dtype=object), ["A", 2.5, 1]):
        assert columns.encode({"grade": given})[0].tolist() == [[2], [1], [0]]
    assert columns.encode({"grade": np.array([True])})[0].tolist() == [[3]]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"children": None}, ("column 'children' is missing",)),
        ({"income": [1.0, np.nan]}, ("column 'income'", "row 12", "missing")),
        ({"income": [1.0, None]}, ("column 'income'", "row 12", "missing")),
        ({"income": ["1.5", "many"]}, ("column 'income'", "row 12", "'many' is not a number")),
        ({"children": [1, 2.5]}, ("column 'children'", "row 12", "2.5 is not a whole number")),
        ({"married": [True, None]}, ("column 'married'", "row 12", "missing")),
        ({"colour": ["red", "pink"]}, ("column 'colour'", "row 12", "'pink' is not one of blue, green, red")),
        ({"age": [1e300, 2]}, ("column 'age'", "row 11", "not a finite number in float32")),
    ],
)
def test_new_rows_that_do_not_fit_are_refused(tmp_path, frame, change, parts):
    columns = data.Table(path=write(frame, tmp_path / "t.csv"), context=["age", "colour"]).split("train").columns
    rows = {"income": [1, 2], "children": [0, 1], "time": [0, 0], "colour": ["red"] * 2, "married": [True] * 2}
    rows = {name: values for name, values in (rows | {"age": [20, 30]} | change).items() if values is not None}
    one_line(lambda: columns.encode(rows, first_row=11), *parts)


def test_arrays(tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float16)
    rows[:, 2] = np.arange(60) % 7
    np.save(tmp_path / "a.npy", rows)
    split = data.Table(path=str(tmp_path / "a.npy"), columns=[2, "c0"], context=[3]).split("test")
    assert split.columns.names == ["c2", "c0"] and kinds(split.columns) == ["integer", "real"]
    chosen = sorted(np.random.default_rng(0).permutation(60)[:6])
    np.testing.assert_array_equal(split.data.numpy(), rows[chosen][:, [2, 0]].astype(np.float32))
    one_line(lambda: data.Table(path=str(tmp_path / "a.npy"), columns=[7]).split("test"), "'c7'", "c0, c1, c2, c3")
    np.save(tmp_path / "b.npy", rows[None])
    one_line(lambda: data.Table(path=str(tmp_path / "b.npy")).split("test"), "(rows, columns)")
    np.save(tmp_path / "o.npy", np.array([[None]]))
    one_line(lambda: data.Table(path=str(tmp_path / "o.npy")).split("test"), "Python objects", error=FlowtrainError)
    np.save(tmp_path / "v.npy", np.zeros((9, 2), dtype="V0"))  # values without bytes
    one_line(lambda: data.Table(path=str(tmp_path / "v.npy")).split("test"), "not an .npy", error=FlowtrainError)


def kinds(columns):
    return [column.kind for column in columns.modelled]


def csv(text, rows=40):
    """A table of columns a and b, its first rows those of ``text``."""
    return "a,b\n" + text + "".join(f"{i / 7},{i % 5}.5\n" for i in range(rows))


@pytest.mark.parametrize(
    ("text", "keys", "parts"),
    [
        (csv("1,2\n,3\n"), {}, ("missing in 'a' 1 (first in row 2)", "dataset.missing=drop")),
        (csv("1,2\n1,NaN\n"), {}, ("missing in 'b'", "row 2")),
        (csv("inf,2\n"), {}, ("column 'a'", "row 1", "not finite")),
        (csv("1,2\n1,-\n"), {}, ("missing in 'b'", "row 2")),
        (
            "a,b\n" + "".join(f"$1{i},{i}.5\n" for i in range(40)),
            {},
            ("t.csv: column 'a', row 1: '$10'", "write 1234.5"),
        ),
        ("a,b\n" + "".join(f"1.{i}D-03,{i}.5\n" for i in range(40)), {}, ("'a', row 1: '1.0D-03'", "write 1234.5")),
        ("a,b\n" + "".join(f"1.{i} ± 0.1,{i}.5\n" for i in range(40)), {}, ("row 1: '1.0 ± 0.1'", "write 1234.5")),
        ("a,b\nV,A\n" + "".join(f"{i / 7},{i / 9}\n" for i in range(40)), {}, ("'a', row 1: 'V'", "most values")),
        (csv("1,1e39\n"), {}, ("column 'b'", "too large for float32")),
        ("a,b\n" + "1,x\n2,\n3,y\n" * 20, {}, ("missing in 'b' 20", "row 2")),
        ("a,b\n" + "1,2\n" * 40, {}, ("no column is left to model",)),
        ("a,b\n" + "1.5,1\n" * 9 + "2.5,2\n", {"val_size": 1, "test_size": 8}, ("'a' is constant", "train split")),
        (csv(""), {"context": ["a", "b"]}, ("dataset.columns", "no column is left")),
        (csv(""), {"columns": ["a", "a"]}, ("'a' is named twice",)),
        (csv(""), {"columns": ["Z"]}, ("no column 'Z'", "there are a, b")),
        (csv(""), {"context": ["aa"]}, ("dataset.context", "no column 'aa'", "did you mean 'a'")),
        (csv(""), {"columns": "a"}, ("dataset.columns=a", "must be a list")),
        (csv("", 2), {}, ("2 examples are too few",)),
        ("a,b\n", {}, ("has no rows",)),
        ("", {}, ("it is empty",)),
        (
            "a,b\n" + "".join(f"{i % 7},id{i}\n" for i in [*range(1500), 0]),
            {"columns": ["a", "b"]},
            ("column 'b'", "1,000 different texts"),
        ),
    ],
)
def test_tables_that_cannot_be_modelled_are_refused(tmp_path, text, keys, parts):
    (tmp_path / "t.csv").write_text(text)
    one_line(lambda: data.Table(path=str(tmp_path / "t.csv"), **keys).split("train"), *parts)


def test_text_far_down_a_column_of_numbers_is_refused_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(text_stream, "HEAD", 2**10)
    monkeypatch.setattr(text_stream, "PIECE", 2**10)
    monkeypatch.setattr(text_file, "CHUNK", 2**10)
    (tmp_path / "t.csv").write_text(csv("", 500) + "1.5,x\n" + "2,3\n" * 300)
    one_line(
        lambda: data.Table(path=str(tmp_path / "t.csv")).split("train"), "column 'b', row 501", "'x' is not a number"
    )
    (tmp_path / "t.csv").write_text(csv("", 500) + "1.5\n")
    one_line(lambda: data.Table(path=str(tmp_path / "t.csv")).split("train"), "row 501", "has 1 field, not 2")


def test_files_that_are_no_tables(tmp_path):
    one_line(lambda: data.Table().split("train"), "dataset=table needs dataset.path=FILE")
    one_line(lambda: data.Table(path=str(tmp_path / "t.csv")).split("train"), "t.csv: no such file")
    one_line(lambda: data.Table(path=str(tmp_path / "t.xls")).split("train"), "must end in .csv,", ".parquet")
    one_line(lambda: data.Power(context=["a"]), "dataset.context=['a']", "nothing to be conditional on")
    (tmp_path / "t.parquet").write_text("nothing")
    one_line(lambda: data.Table(path=str(tmp_path / "t.parquet")).split("train"), "cannot read", error=FlowtrainError)
    pd.DataFrame({"a": [[1], [2]]}).to_parquet(tmp_path / "t.parquet")
    one_line(lambda: data.Table(path=str(tmp_path / "t.parquet")).split("train"), "column 'a' holds list")


def test_whole_numbers_too_far_apart_and_rounded_numbers_are_said(tmp_path, caplog):
    random = np.random.default_rng(0)
    rows = np.stack((random.integers(0, 2**40, 2000), random.normal(size=2000).round(1)), 1)
    np.save(tmp_path / "a.npy", rows)
    with caplog.at_level(logging.WARNING):
        columns = data.Table(path=str(tmp_path / "a.npy"), columns=[0, 1]).split("train").columns
    assert kinds(columns) == ["real", "real"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "'c0': whole numbers" in said[0] and "'c1': real numbers that often repeat" in said[1]


def test_separators_are_those_outside_of_quotes(tmp_path):
    for head, mark in (('"width, depth, height";b', ";"), ("a|b", "|")):
        (tmp_path / "t.csv").write_text(head + "\n" + "".join(f"{i / 7}{mark}{i % 5}.5\n" for i in range(40)))
        assert kinds(data.Table(path=str(tmp_path / "t.csv")).split("train").columns) == ["real", "real"]


def test_files_in_another_code_or_empty(tmp_path, caplog):
    (tmp_path / "t.csv").write_bytes("größe,b\n1,2\n".encode("latin-1"))
    one_line(
        lambda: data.Table(path=str(tmp_path / "t.csv")).split("train"),
        "t.csv is not in UTF-8",
        "dataset.read={encoding: latin-1}",
    )
    (tmp_path / "t.csv").write_bytes(b"")
    one_line(lambda: data.Table(path=str(tmp_path / "t.csv")).split("train"), "it is empty")
    assert not caplog.records  # the refusal says it all


def test_whole_numbers_that_float64_does_not_hold_are_said(tmp_path, caplog):
    (tmp_path / "t.csv").write_text("n\n" + "".join(f"{2**53 + 2 * i + 1}\n" for i in range(0, 300, 2)) * 2)
    columns = data.Table(path=str(tmp_path / "t.csv")).split("train").columns
    assert kinds(columns) == ["real"] and "'n': numbers up to" in caplog.records[0].getMessage()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("bits", "kind"), [(0x7F800001, "u4"), (0x7FF0000000000001, "u8")])
def test_a_signalling_nan_is_refused_without_a_warning(tmp_path, bits, kind):
    rows = np.random.default_rng(0).normal(size=(40, 2)).astype(f"f{kind[1]}")
    rows.view(kind)[2, 1] = bits
    np.save(tmp_path / "a.npy", rows)
    one_line(lambda: data.Table(path=str(tmp_path / "a.npy")).split("train"), "missing in 'c1' 1 (first in row 3)")
    columns = Columns((Column("c0", "real"), Column("c1", "real")))
    frame = next(table_file.TableFile(tmp_path / "a.npy").blocks(["c0", "c1"]))
    one_line(lambda: columns.encode(frame), "column 'c1', row 3")


def test_a_large_offset_keeps_integers_exact(tmp_path):
    years = 2_000_000_000 + np.random.default_rng(0).integers(0, 1000, (300, 1))
    np.save(tmp_path / "a.npy", years)
    split = data.Table(path=str(tmp_path / "a.npy")).split("train")
    assert split.columns.all_integer and split.data.abs().max() < 1000
    assert sorted(split.columns.decode(split.data)["c0"].tolist()) == sorted(
        years[sorted(np.random.default_rng(0).permutation(300)[60:])].ravel().tolist()
    )


def test_moments_are_taken_in_blocks(monkeypatch):
    from flowtrain.data.tables import columns

    monkeypatch.setattr(columns, "BLOCK", 7)
    rows = (1e4 + np.random.default_rng(0).normal(size=(50, 3))).astype(np.float32)
    mean, std = moments(rows)
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(std, rows.astype(np.float64).std(0), rtol=1e-10)


# ------------------------------------------------------------------ its description, before its data


def test_the_rows_of_a_table_describe_it(tmp_path, frame):
    def spec(path, **keys):
        return data.Table(path=str(path), **keys).spec

    for file in ("t.csv", "t.parquet"):
        path = write(frame, tmp_path / file)
        assert spec(path).shape == (6,) and [column.name for column in spec(path).columns] == list(frame)
        known = data.Table(path=path, context=["age", "colour", "married"])
        assert known.spec.shape == (3,)
        assert known.spec.context == ColumnContext(("age", "colour", "married"), (6,))
        again = data.Table(path=str(tmp_path / "elsewhere"), context=["age"])
        again.use_columns(known.split("train").columns)  # of a checkpoint: no file is asked
        assert (again.spec.shape, again.spec.context) == (known.spec.shape, known.spec.context)
        assert spec(path, columns=["income", "age"], context=["age"]).context_shape == (1,)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(3, 9)))
    assert spec(tmp_path / "a.npy", context=[1, "c3"]).context == ColumnContext(("c1", "c3"), (2,))
    one_line(lambda: data.Table().spec, "dataset=table needs dataset.path=FILE")
    one_line(lambda: spec("none.csv"), "none.csv: no such file")
    one_line(lambda: spec(tmp_path / "t.csv", columns=["incom"]), "did you mean 'income'?")


def test_a_table_that_is_no_longer_what_it_was(tmp_path, frame):
    dataset = data.Table(path=write(frame, tmp_path / "t.csv"))
    assert dataset.spec.shape == (6,)
    write(frame.iloc[:-50], tmp_path / "t.csv")
    one_line(lambda: dataset.split("train"), "t.csv has changed since it was first read", error=FlowtrainError)


# ------------------------------------------------------------------ its links

MADE_UP = Columns(
    (
        Column("real", "real", mean=2.0, std=0.5),
        Column("count", "integer", mean=3.5, std=2.0),
        Column("text", "categorical", ("a", "b", "c"), mean=1.4, std=0.9),
    )
)


def fit_layer(cls, columns=MADE_UP):
    layer = cls((len(columns.names),))
    layer.fit(columns, torch.zeros(2, len(columns.names)))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_of_integers_and_categories_are_dequantized(dtype, monkeypatch):
    layer = fit_layer(b.DequantizeColumns).to(dtype)
    edge = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    far = inference.EXACT
    x = torch.tensor([[0.3, -2, 0], [-1.7, 5, 2], [1e9, far - 1, 1], [0.1, -far, 2]])
    for u in (torch.zeros((), dtype=dtype), torch.full((), 0.5, dtype=dtype), edge):
        monkeypatch.setattr(global_batch, "uniform", lambda shape, u=u, **_: u.expand(shape))
        y, log_det = layer(x)
        assert y.dtype == log_det.dtype == dtype and torch.equal(log_det, torch.zeros(4, dtype=dtype))
        assert torch.equal(y[:, 0], x[:, 0].to(dtype))
        assert ((y[:, 1:] >= x[:, 1:]) & (y[:, 1:] < x[:, 1:].to(dtype) + 1)).all()
        back, log_det = layer.inverse(y)
        assert torch.equal(back, x.to(dtype)) and torch.equal(log_det, torch.zeros(4, dtype=dtype))
    beyond = torch.tensor([[0.5, -7.2, -0.4], [0.5, 99.9, 3.3]])
    assert torch.equal(fit_layer(b.DequantizeColumns).inverse(beyond)[0], torch.tensor([[0.5, -8, 0], [0.5, 99, 2]]))


def test_a_link_is_the_identity_until_it_is_fitted_and_is_loaded_fitted():
    x = torch.randn(5, 3)
    for cls in (b.DequantizeColumns, b.Standardize):
        assert torch.equal(cls((3,))(x)[0], x)
        other = cls((3,))
        other.load_state_dict(fit_layer(cls).state_dict())
        torch.manual_seed(0)
        z = other(x)[0]
        torch.manual_seed(0)
        assert torch.equal(z, fit_layer(cls)(x)[0]) and not torch.equal(z, x)


def test_links_refuse_what_they_cannot_fit():
    for cls in (b.DequantizeColumns, b.Standardize):
        with pytest.raises(ValueError, match="rows of a table"):
            cls((3, 8, 8))
        with pytest.raises(ValueError, match="4 columns, not 3"):
            cls((4,)).fit(MADE_UP, torch.zeros(2, 4))
        with pytest.raises(ValueError, match="3 columns, not None"):
            cls((3,)).fit(None, torch.zeros(2, 3))


def table_flow(columns, **body):
    def chain(shape, context_shape=None):
        links = {"dequantize": b.DequantizeColumns, "standardize": b.Standardize, **body}
        made = b.Chain(shape, links)
        fit_to_columns(made, columns, torch.zeros(2, len(columns.names)))
        return made

    return Flow((len(columns.names),), chain)


def test_the_density_is_that_of_the_units_of_the_file():
    from scipy import stats

    flow = table_flow(Columns(MADE_UP.modelled[:1])).double()
    x = torch.linspace(-3, 5, 50, dtype=torch.float64)[:, None]
    np.testing.assert_allclose(flow(x).numpy(), stats.norm(2.0, 0.5).logpdf(x[:, 0].numpy()), rtol=1e-12)
    centred = table_flow(Columns(MADE_UP.modelled[1:2])).double()
    with global_batch.bin_centres():
        log_prob = centred(torch.tensor([[3.0]]))
    np.testing.assert_allclose(log_prob.numpy(), stats.norm(3.5, 2.0).logpdf(3.5), rtol=1e-12)


def test_probabilities_of_all_integers_sum_to_one(monkeypatch):
    """∫ p(x + ε) dε over every whole number, by quadrature."""
    flow = table_flow(Columns(MADE_UP.modelled[1:2]), scale=partial(b.Elementwise, univariate=b.ExpAffine)).double()
    torch.nn.init.constant_(flow.bijection.scale.theta, 0.3)
    at, weight = np.polynomial.legendre.leggauss(32)
    at, weight = torch.tensor((at + 1) / 2)[:, None], torch.tensor(weight / 2)
    monkeypatch.setattr(global_batch, "uniform", lambda shape, **_: at.expand(shape))
    total = sum((flow(torch.full((32, 1), float(x))).exp() * weight).sum().item() for x in range(-40, 40))
    assert total == pytest.approx(1, abs=1e-9)


def test_a_table_survives_encoding(tmp_path, frame):
    """Through the links, there and back: the very integers and categories, and the reals to float32."""
    split = data.Table(path=write(frame, tmp_path / "t.csv")).split("train")
    flow = table_flow(split.columns, mixing=b.LULinear)
    back = flow.decode(flow.encode(split.data))
    discrete = [kind != "real" for kind in kinds(split.columns)]
    assert discrete == [False, True, False, True, True, True]
    assert torch.equal(back[:, discrete], split.data[:, discrete])
    torch.testing.assert_close(back, split.data, rtol=1e-5, atol=1e-2)
    z = flow.bijection.standardize(flow.bijection.dequantize(split.data)[0])[0]
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(6), atol=0.05, rtol=0)
