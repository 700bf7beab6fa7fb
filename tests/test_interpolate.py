"""Paths between real examples and their reconstructions: exact ends, the parts of a multi-scale latent, refusals."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from composed import checkpoint_command_config, configuration
from PIL import Image

from flowtrain import train
from flowtrain.commands import interpolate, reconstruct
from flowtrain.commands.restored import restore
from flowtrain.errors import FlowtrainError, UsageError

PATHS = {
    "n": 3, "steps": 2, "split": "test", "examples": None, "path": "auto", "plot": True, "weights": "auto", "seed": 1
}  # fmt: skip
AGAIN = {
    "n": 4, "split": "test", "examples": None, "keep": None, "temperature": 1.0, "tolerance": 1e-3, "plot": True,
    "weights": "auto", "seed": 1,
}  # fmt: skip


def run(tmp_path, *overrides):
    config = configuration(*overrides, "smoke=true", "logger=none")
    (tmp_path / "run").mkdir()
    return config, train.main(config, str(tmp_path / "run"))["checkpoint"]


def call(command, trained, folder, **keys):
    config, checkpoint = trained
    folder.mkdir(exist_ok=True)
    name = command.__name__.rpartition(".")[2]
    defaults = PATHS if command is interpolate else AGAIN
    return command.main(checkpoint_command_config(name, config, ckpt=checkpoint, **{**defaults, **keys}), str(folder))


def restored(trained):
    config, checkpoint = trained
    return restore(checkpoint_command_config("interpolate", config, ckpt=checkpoint, **PATHS), checkpoint, "auto")


@pytest.mark.parametrize("context", ["null", "label"])
def test_paths_between_images_end_at_the_images(context, tmp_path):
    trained = run(tmp_path, "dataset=digits", "model=glow", f"dataset.context={context}")
    paths = call(interpolate, trained, tmp_path / "out", examples=[3, 14, 15, 92], steps=3)
    x = np.load(paths["npy"])
    assert x.shape == (2, 5, 1, 8, 8)
    real = restored(trained).split("test").take(torch.tensor([3, 14, 15, 92]))[0].numpy()
    assert np.array_equal(x[:, [0, -1]].reshape(4, 1, 8, 8), real)
    assert all((x[row, place] != x[row, place + 1]).any() for row in range(2) for place in range(4))
    assert (x == np.round(x)).all() and x.min() >= 0 and x.max() <= 16
    width, height = Image.open(paths["png"]).size
    assert width > 5 * height / 2 > 200
    again = np.load(call(interpolate, trained, tmp_path / "line", examples=[3, 14, 15, 92], path="linear")["npy"])
    assert np.array_equal(again[:, [0, -1]], x[:, [0, -1]]) and not np.array_equal(again[:, 2], x[:, 2])
    other = np.load(call(interpolate, trained, tmp_path / "other")["npy"])
    assert other.shape == (3, 4, 1, 8, 8)
    assert np.array_equal(other, np.load(call(interpolate, trained, tmp_path / "same")["npy"]))


def test_great_circles_keep_the_radius():
    torch.manual_seed(1)
    first, last = torch.randn(2, 5, 3, 4)
    at = torch.linspace(0, 1, 7, dtype=torch.float64)
    path = interpolate.spherical(first, last, at)
    assert torch.equal(path[:, 0], first) and torch.equal(path[:, -1], last)
    unit = first / first.flatten(1).norm(dim=1)[:, None, None], last / last.flatten(1).norm(dim=1)[:, None, None]
    radii = interpolate.spherical(*unit, at).flatten(2).norm(dim=2)
    assert torch.allclose(radii, torch.ones_like(radii), atol=1e-6)
    angles = torch.nn.functional.cosine_similarity(path[:, 0].flatten(1), path[:, 3].flatten(1)).acos()
    total = torch.nn.functional.cosine_similarity(first.flatten(1), last.flatten(1)).acos()
    whole = torch.nn.functional.cosine_similarity(path[:, 3].flatten(1), last.flatten(1)).acos()
    assert torch.allclose(angles + whole, total, atol=1e-4)  # in the plane of both
    for end in (first, -first):  # no circle is the one
        assert torch.allclose(interpolate.spherical(first, end, at), interpolate.linear(first, end, at))


def people(tmp_path):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "height": 170 + 10 * random.normal(size=200).round(3),
            "shoes": random.integers(35, 47, 200),
            "sex": random.choice(["m", "f"], 200),
            "age": random.integers(20, 60, 200),
        }
    )
    frame.loc[::7, "height"] = None
    frame.to_csv(tmp_path / "people.csv", index=False)
    return frame


def test_a_table_in_its_own_units(tmp_path):
    frame = people(tmp_path)
    words = [f"dataset.path={tmp_path}/people.csv", "dataset.context=[age]", "dataset.missing=model"]
    trained = run(tmp_path, "dataset=table", "model=maf", *words)
    paths = call(interpolate, trained, tmp_path / "out", examples=[0, 7], steps=4)
    table = pd.read_csv(paths["csv"])
    assert list(table) == ["path", "step", "height", "shoes", "sex"] and table["step"].tolist() == [0, 1, 2, 3, 4, 5]
    rows = restored(trained).columns.decode(restored(trained).split("test").take(torch.tensor([0, 7]))[0])
    for end, place in ((0, 0), (5, 1)):
        assert table["shoes"][end] == rows["shoes"][place] and table["sex"][end] == rows["sex"][place]
        if rows["height"][place] is None:
            assert np.isnan(table["height"][end])
        else:
            assert table["height"][end] == pytest.approx(rows["height"][place], abs=1e-3)
    assert set(table["sex"]) <= {"m", "f"} and table["shoes"].between(30, 50).all()

    report = call(reconstruct, trained, tmp_path / "again", n=20)
    assert report["differ"] == 0 and report["relative"] < 1e-4 and [*report["columns"]] == ["height", "shoes", "sex"]
    table = pd.read_csv(tmp_path / "again/reconstructions.csv")
    first, second = table[table["kept"] == "original"], table[table["kept"] == "kept 100 %"]
    assert first["example"].tolist() == second["example"].tolist() == report["examples"]
    assert first["shoes"].tolist() == second["shoes"].tolist()
    error = np.nanmax(np.abs(first["height"].to_numpy() - second["height"].to_numpy()))
    assert error == pytest.approx(report["columns"]["height"]["largest"], abs=1e-9)
    known = frame[["height", "shoes", "sex"]].astype(str)
    assert set(map(tuple, first[["shoes", "sex"]].astype(str).to_numpy())) <= set(
        map(tuple, known[["shoes", "sex"]].to_numpy())
    )


def test_the_coarse_scales_are_kept(tmp_path):
    trained = run(tmp_path, "dataset=digits", "model=realnvp")
    report = call(reconstruct, trained, tmp_path / "out")
    x = np.load(tmp_path / "out/reconstructions.npy")
    scales = reconstruct.multi_scale(restored(trained).flow)
    assert report["kept"] == reconstruct.scale_shares(scales) and report["kept"][0] == 1 and len(report["kept"]) > 1
    assert len(x) == 1 + len(report["kept"]) and np.array_equal(x[0], x[1])
    assert report["differ"] == report["largest"] == 0 and json.loads((tmp_path / "out/reconstruct.json").read_text())
    call(reconstruct, trained, tmp_path / "parts", keep=[0.5, 1.0, 0.0], temperature=0.0)
    parts = np.load(tmp_path / "parts/reconstructions.npy")
    flow, real = restored(trained).flow.eval(), torch.from_numpy(x[0])
    z = flow.encode(real)
    for share, found in ((0.5, parts[2]), (0.0, parts[3])):
        kept = z.clone()
        kept[:, : z.shape[1] - round(share * z.shape[1])] = 0  # the base's samples at temperature 0
        assert np.array_equal(flow.decode(kept).numpy(), found)
    assert (parts[3] == parts[3][0]).all() and not (parts[2] == parts[2][0]).all()


def test_real_numbers_return_within_the_tolerance(tmp_path):
    trained = run(tmp_path, "dataset=moons", "model=maf")
    report = call(reconstruct, trained, tmp_path / "out")
    assert 0 < report["largest"] < 1e-4 and report["exact"] and report["kept"] == [1.0]
    with pytest.raises(FlowtrainError, match="does not return its own examples: largest error"):
        call(reconstruct, trained, tmp_path / "strict", tolerance=1e-12)
    assert json.loads((tmp_path / "strict/reconstruct.json").read_text())["largest"] == report["largest"]
    rows = list(csv.reader((tmp_path / "strict/reconstructions.csv").open()))
    assert rows[0] == ["example", "kept", "x", "y"] and len(rows) == 1 + 8
    paths = call(interpolate, trained, tmp_path / "paths")
    assert sorted(paths) == ["csv", "npy"]

    for command, keys, says in (
        (reconstruct, {"keep": 0.5}, "no coarse and fine parts"),
        (reconstruct, {"keep": [1.0, 1.5]}, "at most 1"),
        (reconstruct, {"keep": []}, r"keep=\[\]: give at least one"),
        (reconstruct, {"examples": [10**6]}, "the test split has"),
        (reconstruct, {"n": 10**6}, "n=1000000: needs"),
        (interpolate, {"examples": [1, 2, 3]}, "name pairs"),
        (interpolate, {"examples": []}, "name pairs"),
    ):
        with pytest.raises(UsageError, match=says):
            call(command, trained, tmp_path / "refused", **keys)
    assert not [*(tmp_path / "refused").iterdir()]


def test_a_base_that_is_not_normal_has_straight_paths(tmp_path):
    trained = run(tmp_path, "dataset=moons", "model=maf", "base=mixture")
    with pytest.raises(UsageError, match=r"the base of this flow is Mixture; path=linear"):
        call(interpolate, trained, tmp_path / "out", path="spherical")
    both = [np.load(call(interpolate, trained, tmp_path / path, path=path)["npy"]) for path in ("auto", "linear")]
    assert np.array_equal(*both)


def test_curves_are_drawn(tmp_path):
    spectra = np.cumsum(np.random.default_rng(0).normal(size=(100, 16)), 1).astype(np.float32)
    np.save(tmp_path / "spectra.npy", spectra)
    trained = run(tmp_path, "dataset=arrays", f"dataset.path={tmp_path}/spectra.npy", "model=maf")
    paths = call(interpolate, trained, tmp_path / "out")
    assert Image.open(paths["curves"]).size[0] > 500 and np.load(paths["npy"]).shape == (3, 4, 16)
    call(reconstruct, trained, tmp_path / "again")
    assert (tmp_path / "again/curves.png").is_file()
