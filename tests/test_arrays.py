"""dataset=arrays: files of every kind, their axes and numbers, and every command on what was trained on them."""

import json
import os
from functools import partial

import h5py
import numpy as np
import pytest
import torch
import zarr
from composed import ONLY_IMAGES, configuration
from inprocess import flowtrain

import flowtrain as library
from flowtrain import data, flows, train
from flowtrain.bijections import Flatten, StandardizeChannels
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.data import arrays
from flowtrain.data.array_files import Rows, find_layout, open_rows
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flows import parts
from flowtrain.plots.grid import image_grid

N = 40
DRAW = np.random.default_rng(0)
FIELD = DRAW.normal(101325, 100, (N, 8, 12)).astype(np.float32)
RGB = DRAW.integers(0, 256, (N, 8, 12, 3), dtype=np.uint8)
SPECTRA = DRAW.normal(size=(N, 10)).cumsum(1)
LABELS = DRAW.integers(1, 4, N)


def write(folder, array, kind: str):
    """Write ``array`` as ``kind``; the path."""
    path = folder / f"data.{kind}"
    if kind == "npy":
        np.save(path, array)
    elif kind == "npz":
        np.savez(path, x=array)
    elif kind == "packed.npz":
        np.savez_compressed(path, x=array)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("deep/x", data=array, chunks=True, compression="gzip")
    elif kind == "zarr":
        zarr.open_group(path, mode="w").create_array("x", data=array, chunks=(7, *array.shape[1:]))
    elif kind == "fortran.npy":
        np.save(path, np.asfortranarray(array))
    else:
        path.mkdir()
        pieces = array if kind == "each" else np.array_split(array, 3)
        for i, piece in enumerate(pieces):
            np.save(path / f"{i:03}.npy", piece)
    return path


KINDS = ["npy", "npz", "packed.npz", "h5", "zarr", "fortran.npy", "each", "stacks"]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_batches(tmp_path, monkeypatch, kind, held):
    path = write(tmp_path, RGB, kind)
    monkeypatch.setattr(arrays, "HELD_BYTES", 2**30 if held else 0)
    dataset = data.Arrays(path=str(path), val_size=5, test_size=7)
    assert dataset.spec == data.spec.DataSpec("arrays", (3, 8, 12), 256)
    order = np.random.default_rng(0).permutation(N)
    for name, chosen in (("test", order[:7]), ("val", order[7:12]), ("train", order[12:])):
        split = dataset.split(name)
        assert isinstance(split, data.ArraySplit) == held and len(split) == len(chosen)
        index = torch.tensor([3, 0, 3, 4])
        x, context = split.take(index)
        assert x.dtype == torch.uint8 and context is None
        np.testing.assert_array_equal(x.numpy(), RGB[chosen[index]].transpose(0, 3, 1, 2))
        assert str(path) in split.description


def test_nothing_is_read_beyond_the_rows_asked_for(tmp_path, monkeypatch):
    """A split larger than memory: a sparse file of 64 GiB, of which a batch is read in no time."""
    path = tmp_path / "huge.npy"
    header = np.lib.format.open_memmap(tmp_path / "head.npy", "w+", np.float32, (2, 4, 4))
    head = (tmp_path / "head.npy").read_bytes()[: header.offset]
    rows = 2**30
    grown = head.replace(b"(2, 4, 4), }" + b" " * 9, f"({rows}, 4, 4), }}".encode())
    path.write_bytes(grown)
    with open(path, "r+b") as file:
        file.truncate(len(grown) + rows * 64)
        file.seek(len(grown) + 64 * (rows - 1))
        file.write(np.full(16, 7, np.float32).tobytes())
    found = open_rows(path)
    assert found.shape == (rows, 4, 4)
    assert found.take(np.array([rows - 1, 5, rows - 1])).sum((1, 2)).tolist() == [112, 0, 112]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((9, 8, 8), "NHW"), ((9, 3, 8, 8), "NCHW"), ((9, 8, 8, 3), "NHWC"), ((9, 4, 5, 6), "NCHW"), ((9, 50), "NL")],
)
def test_the_axis_of_channels_is_found(tmp_path, shape, layout):
    assert find_layout(shape, tmp_path) == layout


@pytest.mark.parametrize("shape", [(9, 2, 8, 8), (9, 3, 3, 3), (9, 3, 8, 3), (9, 1, 1, 64)])
def test_an_axis_that_cannot_be_told_is_asked_for(tmp_path, shape):
    with pytest.raises(UsageError, match="dataset.layout=NCHW or NHWC"):
        find_layout(shape, tmp_path)
    assert find_layout(shape, tmp_path, "NHWC") == find_layout(shape, tmp_path, "HWC") == "NHWC"


def test_one_example_a_file_or_many(tmp_path):
    (tmp_path / "one").mkdir()
    for i in range(12):
        np.save(tmp_path / "one" / f"{i}.npy", SPECTRA[:4])
    assert data.Arrays(path=str(tmp_path / "one")).spec.shape == (1, 4, 10)
    assert data.Arrays(path=str(tmp_path / "one"), layout="NL").spec.shape == (10,)
    np.save(tmp_path / "one" / "z.npy", SPECTRA)
    with pytest.raises(FlowtrainError, match=r"z.npy holds float64 \[40, 10\], unlike .*0.npy with float64 \[4, 10\]"):
        data.Arrays(path=str(tmp_path / "one")).split("train")


@pytest.mark.parametrize(
    ("array", "keys", "levels", "first"),
    [
        (RGB, {}, 256, lambda x: x),
        (RGB, {"bits": 3}, 8, lambda x: x >> 5),
        (RGB > 99, {}, 2, lambda x: x),
        (RGB.astype(np.uint16) * 10, {}, 4096, lambda x: x),
        (RGB.astype(np.uint16) * 257, {"bits": 5}, 32, lambda x: x >> 11),
        (RGB.astype(">i8") // 16, {}, 16, lambda x: x),
        (RGB // 16, {"grey_levels": 17}, 17, lambda x: x),
        (RGB.astype(float), {"grey_levels": 256}, 256, lambda x: x),
    ],
)
def test_integers_have_their_grey_levels(tmp_path, array, keys, levels, first):
    np.save(tmp_path / "x.npy", array)
    dataset = data.Arrays(path=str(tmp_path / "x.npy"), **keys)
    assert dataset.spec.grey_levels == levels
    split = dataset.split("test")
    x, _ = split.take(torch.arange(len(split)))
    assert x.dtype == (torch.uint8 if levels <= 256 else torch.int32) and int(x.max()) < levels
    chosen = np.random.default_rng(0).permutation(N)[: len(split)]
    np.testing.assert_array_equal(x.numpy(), first(array[chosen]).transpose(0, 3, 1, 2))


def test_real_numbers_stay_as_they_are(tmp_path):
    np.save(tmp_path / "x.npy", FIELD.astype(np.float64))
    dataset = data.Arrays(path=str(tmp_path / "x.npy"))
    assert dataset.spec.shape == (1, 8, 12) and dataset.spec.grey_levels is None and dataset.spec.is_image
    x, _ = dataset.split("test").take(torch.tensor([0]))
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x[0, 0].numpy(), FIELD[np.random.default_rng(0).permutation(N)[0]])


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_number_that_is_not_finite_is_named(tmp_path, monkeypatch, value, held):
    monkeypatch.setattr(arrays, "HELD_BYTES", 2**30 if held else 0)
    wrong = FIELD.astype(np.float64)
    place = int(np.random.default_rng(0).permutation(N)[-1])  # in the train split
    wrong[place, 2, 3] = value
    np.save(tmp_path / "x.npy", wrong)
    with pytest.raises(FlowtrainError, match=f"x.npy: index {place} holds NaN, an infinite .*on_bad=skip"):
        split = data.Arrays(path=str(tmp_path / "x.npy")).split("train")
        split.take(torch.arange(len(split)))
    skipped = data.Arrays(path=str(tmp_path / "x.npy"), on_bad="skip")
    parts = [skipped.split(name) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == N - 1
    assert all(part.take(torch.arange(len(part)))[0].isfinite().all() for part in parts)


def test_labels_are_classes_with_names(tmp_path):
    words = np.array(["eel", "cat", "dog"])[LABELS - 1]
    np.savez(tmp_path / "x.npz", x=FIELD, y=LABELS, words=words)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"], file["y"], file["words"] = FIELD, LABELS, words.astype("S")
    for end in ("npz", "h5"):
        for key, names in (("y", ("1", "2", "3")), ("words", ("cat", "dog", "eel"))):
            dataset = data.Arrays(path=str(tmp_path / f"x.{end}"), key="x", labels=key, context="label")
            assert dataset.spec.context == data.spec.LabelContext(3, names)
            split = dataset.split("val")
            _, context = split.take(torch.arange(len(split)))
            chosen = np.random.default_rng(0).permutation(N)[4:8]
            assert [names[i] for i in context.argmax(1)] == [str(w) for w in (LABELS if key == "y" else words)[chosen]]


def test_images_are_contexts_of_vectors(tmp_path):
    random = np.random.default_rng(0)
    images = (50 + 20 * random.normal(size=(N, 2, 8, 8))).astype(np.float32)
    images[:, 1] = 3.0
    theta = images[:, 0].mean((1, 2))[:, None] + random.normal(size=(N, 2))
    np.savez(tmp_path / "x.npz", theta=theta, image=images, y=LABELS)
    dataset = data.Arrays(path=str(tmp_path / "x.npz"), key="theta", context="image")
    assert dataset.spec.shape == (2,) and dataset.spec.context_shape == (2, 8, 8)
    x, context = dataset.split("train").take(torch.arange(32))
    chosen = np.random.default_rng(0).permutation(N)[8:]
    torch.testing.assert_close(x[:, 0].sort().values, torch.tensor(theta[chosen, 0]).float().sort().values)
    place = [int(np.flatnonzero(np.float32(theta[:, 0]) == value)[0]) for value in x[:, 0].numpy()]
    expected = (images[place, 0] - images[:, 0].mean()) / images[:, 0].std()
    torch.testing.assert_close(context[:, 0], torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    assert (context[:, 1] == 0).all()  # a channel that is constant
    words = ["dataset=arrays", "dataset.path=x.npz", "dataset.key=theta", "dataset.context=image", "embedding=conv"]
    run(tmp_path, "train", *words, "embedding.hidden=4", "model=nsf_coupling", *SMALL)
    (tmp_path / "x.npz").rename(tmp_path / "other.npz")
    np.save(tmp_path / "observed.npy", images[:3])
    run(tmp_path, "sample", "ckpt=run", "n=5", "context=observed.npy", "plot=false")
    samples = np.load(made(tmp_path, "run/sample/*/samples.npy"))
    assert samples.shape == (15, 2)
    flow = library.load(tmp_path / "run")
    given = dataset.spec.context.read(open_rows(tmp_path / "observed.npy"))
    log_prob = flow.log_prob(torch.from_numpy(samples).reshape(3, 5, 2), given[:, None])
    assert log_prob.shape == (3, 5)
    for words, says in (
        (["sample"], r"conditional on 'image': give context=FILE with an array of shape \[N, 2, 8, 8\]"),
        (["sample", "context=other.npz", "label=1"], "not class-conditional"),
        (["score", "input=other.npz"], "conditional on an array, which score does not read"),
    ):
        with pytest.raises(WorkerError, match=says):
            run(tmp_path, *words, "ckpt=run")
    for context, says in (("y", "context=y: is int64"), ("theta0", "has no such array")):
        with pytest.raises(UsageError, match=says):
            data.Arrays(path=str(tmp_path / "other.npz"), key="theta", context=context).find()
    record = dataset.find() | {"context": {"name": "image", "shape": [2, 8, 8], "mean": [0.0], "std": [1.0, 1.0]}}
    with pytest.raises(UsageError, match="record of the context is damaged"):
        data.Arrays(found=record, key="theta", context="image").spec  # noqa: B018


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"path": "none.npy"}, "dataset.path=none.npy: no such file"),
        ({}, "needs dataset.path=FILE"),
        ({"path": "two.npz"}, r"choose an array with dataset.key=: a \[40, 8, 12\], b \[40, 8, 12\], y \[40\]"),
        ({"path": "two.npz", "key": "c"}, r"dataset.key=c: .*two.npz has no such array; it has a \[40"),
        ({"path": "field.npy", "key": "c"}, "dataset.key=c: an .npy file holds a single array"),
        ({"path": "empty"}, "a folder without .npy files"),
        ({"path": "x.csv"}, "must end in .npy, .npz, .h5, .hdf5, .zarr"),
        ({"path": "line.npy"}, r"examples of shape \[\]: an array must be \(N, length\)"),
        ({"path": "complex.npy"}, "complex64: must be integers or real numbers"),
        ({"path": "below.npy"}, "holds -3: integers are grey levels from 0"),
        ({"path": "field.npy", "layout": "NHWC"}, r"dataset.layout=NHWC: .*which can be NHW"),
        ({"path": "field.npy", "layout": "WH"}, "dataset.layout=WH: must be one of NL, NHW"),
        ({"path": "field.npy", "bits": 5}, "dataset.bits=5: .*real numbers have no grey levels"),
        ({"path": "rgb.npy", "bits": 9}, "dataset.bits=9: .*of 8 bits"),
        ({"path": "two.npz", "key": "a", "labels": "y"}, "dataset.labels=y: labels are the context"),
        (
            {"path": "two.npz", "key": "a", "labels": "b", "context": "label"},
            "=b: .* labels for an array",
        ),
        ({"path": "spectra.npy", "flip": True}, "only images can be augmented"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, keys, says):
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", a=FIELD, b=FIELD, y=LABELS)
    np.save("field.npy", FIELD)
    np.save("rgb.npy", RGB)
    np.save("spectra.npy", SPECTRA)
    np.save("line.npy", SPECTRA[:, 0])
    np.save("complex.npy", FIELD * 1j)
    np.save("below.npy", LABELS[:, None] - 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(UsageError, match=says) as caught:
        data.Arrays(**keys).spec  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["npy", "npz", "packed.npz", "h5", "zarr"])
def test_a_damaged_file_is_one_line(tmp_path, kind):
    path = write(tmp_path, FIELD, kind)
    for file in [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FlowtrainError) as caught:
        data.Arrays(path=str(path)).split("train")
    assert "\n" not in str(caught.value) and "data." in str(caught.value)


def test_a_file_that_is_truncated_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "HELD_BYTES", 0)
    split = data.Arrays(path=str(write(tmp_path, FIELD, "npy"))).split("train")
    os.truncate(tmp_path / "data.npy", 5000)
    with pytest.raises(FlowtrainError, match=r"cannot read .*data.npy from index \d+ on: it is truncated"):
        split.take(torch.arange(len(split)))


# ------------------------------------------------------------------ densities of fields


def test_the_density_of_a_field_is_in_its_own_units():
    """Standardized by its moments, a normal field has the density of a normal field of those moments."""
    rows = torch.from_numpy(FIELD)[:, None].double()
    layers = {"preprocess": partial(parts.normalize), "flatten": Flatten}
    flow = flows.custom((1, 8, 12), layers=layers).double()
    flow.bijection.preprocess.standardize.fit(None, rows)
    normal = torch.distributions.Normal(rows.mean(), rows.std(correction=0))
    torch.testing.assert_close(flow.log_prob(rows), normal.log_prob(rows).sum((1, 2, 3)), rtol=1e-6, atol=0)


def test_a_constant_channel_has_no_density():
    rows = torch.randn(9, 2, 4, 4)
    rows[:, 1] = 3
    with pytest.raises(ValueError, match="channel 1 is constant in 9 training examples"):
        StandardizeChannels((2, 4, 4)).fit(None, rows)


@pytest.mark.parametrize("model", [*ONLY_IMAGES, "maf"])
def test_models_of_images_take_fields(tmp_path, model):
    np.save(tmp_path / "x.npy", FIELD[:, :8, :8])
    config = configuration(f"model={model}", "dataset=arrays", f"dataset.path={tmp_path}/x.npy")
    if model in ("autoregressive", "pixelcnn"):
        with pytest.raises(UsageError, match="takes images of integers; these are real numbers"):
            build_flow(config, build_dataset(config).spec, "meta")
    else:
        assert build_flow(config, build_dataset(config).spec, "meta").shape == (1, 8, 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_fields_are_drawn_in_colours(channels):
    image = image_grid(torch.randn(4, channels, 8, 6) * 1e3 + 1e5, None)
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.float().std() > 20
    assert image_grid(torch.zeros(4, channels, 8, 6), None).shape == image.shape


# ------------------------------------------------------------------ commands


SMALL = ["smoke=true", "logger=none", "report=false", "hydra.run.dir=run"]


def run(folder, *words):
    assert flowtrain(folder, *words) == 0


def made(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_every_command_on_a_field(tmp_path):
    np.savez(tmp_path / "x.npz", x=FIELD, y=LABELS)
    words = ["dataset=arrays", "dataset.path=x.npz", "dataset.labels=y", "dataset.context=label", "model=nice"]
    run(tmp_path, "train", *words, *SMALL)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    expected = -96 * (0.5 * np.log(2 * np.pi * np.e) + np.log(100))  # of normals of deviation 100
    assert "bits_per_dim" not in summary and abs(summary["log_likelihood"] - expected) < 0.05 * abs(expected)
    run(tmp_path, "eval", "ckpt=run", "dataset.path=x.npz", "json=true")
    assert json.loads(made(tmp_path, "run/eval/*/eval.json").read_text())["examples"] == 4
    run(tmp_path, "sample", "ckpt=run", "n=6", "label=2")
    samples = np.load(made(tmp_path, "run/sample/*/samples.npy"))
    assert samples.shape == (6, 1, 8, 12) and abs(samples.mean() - 101325) < 100 and 50 < samples.std() < 200
    assert made(tmp_path, "run/sample/*/samples.png").stat().st_size > 100
    np.save(tmp_path / "new.npy", samples)
    run(tmp_path, "score", "ckpt=run", "input=new.npy", "label=2")
    scores = np.loadtxt(made(tmp_path, "run/score/*/scores.csv"), delimiter=",", skiprows=1)
    assert scores.shape == (6, 2) and np.isfinite(scores).all()
    run(tmp_path, "check", "ckpt=run", "examples=4", "jacobian=8")


def test_a_checkpoint_describes_its_arrays_without_them(tmp_path):
    path = write(tmp_path, RGB.astype(np.uint16), "each")
    run(tmp_path, "train", "dataset=arrays", f"dataset.path={path}", "model=nice", *SMALL)
    np.save(tmp_path / "first.npy", RGB[:5].transpose(0, 3, 1, 2).astype(np.int64))
    wrong = RGB[:5].astype(np.int64)
    wrong[3, 0, 0, 0] = 256
    np.save(tmp_path / "wrong.npy", wrong)
    moved = path.rename(tmp_path / "moved")
    run(tmp_path, "sample", "ckpt=run", "n=2")
    for name in ("moved", "first.npy"):
        run(tmp_path, "score", "ckpt=run", f"input={name}", f"output={name}.csv")
    lines = [(tmp_path / f"{name}.csv").read_text().splitlines() for name in ("moved", "first.npy")]
    assert (
        lines[0][0] == "file,log_likelihood,bits_per_dim" and lines[0][1].startswith("000.npy,") and len(lines[0]) == 41
    )
    for one, other in zip(lines[0][1:6], lines[1][1:6]):  # the same examples with the same noise
        assert float(one.split(",")[2]) == pytest.approx(float(other.split(",")[2]), rel=1e-5)
    with pytest.raises(FlowtrainError, match=r"wrong.npy: row 4 .*values outside the whole numbers 0 … 255"):
        flowtrain(tmp_path, "score", "ckpt=run", "input=wrong.npy")
    np.save(tmp_path / "field.npy", FIELD)
    with pytest.raises(FlowtrainError, match=r"field.npy holds float32 .* takes integers 0 … 255 of shape \[N, 3, 8"):
        flowtrain(tmp_path, "score", "ckpt=run", "input=field.npy")
    run(tmp_path, "eval", "ckpt=run", f"dataset.path={moved}")


def test_spectra_are_vectors_with_a_plot_of_curves(tmp_path):
    np.save(tmp_path / "x.npy", SPECTRA)
    run(tmp_path, "train", "dataset=arrays", "dataset.path=x.npy", "model=nsf_coupling", *SMALL)
    run(tmp_path, "sample", "ckpt=run", "n=5", "dataset.path=x.npy")
    assert np.load(made(tmp_path, "run/sample/*/samples.npy")).shape == (5, 10)
    assert made(tmp_path, "run/sample/*/curves.png").stat().st_size > 1000
    run(tmp_path, "score", "ckpt=run", "input=x.npy")
    assert len(made(tmp_path, "run/score/*/scores.csv").read_text().splitlines()) == 41


def test_a_split_that_is_read_batch_by_batch_trains_the_same(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", FIELD)
    words = ["dataset=arrays", f"dataset.path={tmp_path}/x.npy", "model=maf", "smoke=true", "logger=none"]
    results = []
    for held in (2**30, 0):
        monkeypatch.setattr(arrays, "HELD_BYTES", held)
        (folder := tmp_path / f"run{held}").mkdir()
        results.append(train.main(configuration(*words), str(folder))["log_likelihood"])
    assert results[0] == results[1]


def test_resume_finds_the_run(tmp_path):
    np.save(tmp_path / "x.npy", FIELD)
    words = ["train", "dataset=arrays", "dataset.path=x.npy", "model=maf", "smoke=true", "logger=none"]
    run(tmp_path, *words)
    run(tmp_path, *words, "resume=true", "max_steps=4")
    assert len([*tmp_path.glob("outputs/*/*")]) == 1


@pytest.mark.parametrize("grey_levels", [17, None])
def test_normalize_is_center_of_integers(grey_levels):
    layer = parts.normalize((1, 4, 4), grey_levels)
    assert [name for name, _ in layer.named_children()] == (
        ["dequantize", "center"] if grey_levels else ["standardize"]
    )


def test_rows_come_in_any_order():
    class Squares(Rows):
        shape, dtype = (10, 1), np.dtype(int)

        def read(self, start, stop):
            return np.arange(start, stop)[:, None] ** 2

    assert Squares().take(np.array([7, 2, 3, 7])).ravel().tolist() == [49, 4, 9, 49]
    assert Squares().take(np.array([], dtype=int)).shape == (0, 1)


FOUND = {"shape": [1, 4, 4], "layout": "NHW", "grey_levels": None, "dropped_bits": 0, "classes": []}


@pytest.mark.parametrize(
    "wrong", [{"shape": 4}, {"layout": "HWN"}, {"grey_levels": 1}, {"dropped_bits": -1}, {"classes": [1]}]
)
def test_a_damaged_record_of_a_checkpoint_is_refused(wrong):
    assert data.Arrays(found=FOUND).spec.shape == (1, 4, 4)
    with pytest.raises(UsageError, match="the record of the arrays is damaged"):
        data.Arrays(found=FOUND | wrong)
    with pytest.raises(UsageError, match="the record of the classes is damaged"):
        data.ImageFolder(context="label", found={"classes": [1]}).spec  # noqa: B018
