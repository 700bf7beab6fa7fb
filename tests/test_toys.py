"""Points in the plane: six toys, and an image as a density."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import one_line

from flowtrain import data
from flowtrain.config.build import build
from flowtrain.data.spec import DataSpec
from flowtrain.errors import FlowtrainError

TOYS = {
    "moons": data.Moons,
    "rings": data.Rings,
    "pinwheel": data.Pinwheel,
    "checkerboard": data.Checkerboard,
    "spirals": data.Spirals,
    "eight_gaussians": data.EightGaussians,
}
EVERY = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


@EVERY
def test_splits_sizes_and_seeds(toy):
    dataset = toy(rows=1000, val_size=50, test_size=0.2)
    parts = [dataset.split(name) for name in ("train", "val", "test")]
    assert [len(split) for split in parts] == [750, 50, 200]
    points = torch.cat([split.data for split in parts])
    assert points.shape == (1000, 2) and points.dtype == torch.float32
    assert len(torch.unique(points, dim=0)) == 1000
    assert torch.equal(parts[0].data, toy(rows=1000, val_size=50, test_size=0.2).split("train").data)
    other = toy(rows=1000, split_seed=1)
    other = torch.cat([other.split(name).data for name in ("train", "val", "test")])
    assert len(torch.unique(torch.cat((points, other)), dim=0)) == 2000  # other points, not only another cut
    columns = parts[0].columns
    assert columns.names == ["x", "y"] and [column.kind for column in columns.modelled] == ["real", "real"]
    np.testing.assert_allclose([column.mean for column in columns.modelled], parts[0].data.double().mean(0), atol=1e-9)
    assert len(toy().split("train")) == 40_000


@EVERY
def test_scales_and_centres(toy):
    x = toy(rows=20_000).split("train").data
    assert x.abs().max() < 5 and x.abs().max() > 2
    assert x.mean(0).abs().max() < 0.1
    # the splits are draws from the same: each coordinate's distribution agrees
    from scipy import stats

    test = toy(rows=20_000).split("test").data
    assert all(stats.ks_2samp(x[:, i], test[:, i]).pvalue > 1e-3 for i in range(2))


def points(toy, rows=40_000):
    return toy(rows=rows).split("train").data.double().numpy()


def polar(x):
    return np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])


def test_rings_have_four_radii():
    radius, _ = polar(points(data.Rings))
    ring = np.rint(radius / 0.75)
    assert set(ring.tolist()) == {1, 2, 3, 4} and np.abs(radius - 0.75 * ring).std() < 0.08
    assert np.allclose(np.bincount(ring.astype(int))[1:] / len(ring), 0.25, atol=0.02)


def test_checkerboard_fills_every_other_field():
    x = points(data.Checkerboard)
    assert np.abs(x).max() <= 4
    fields = np.floor((x + 4) / 2).astype(int)
    assert ((fields.sum(1) % 2) == 0).all()
    counts = np.bincount(fields @ [4, 1], minlength=16)
    assert (counts > 0).sum() == 8 and counts[counts > 0].min() > 0.9 * counts.max()


def test_eight_gaussians_are_round_and_alike():
    x = points(data.EightGaussians)
    _, angle = polar(x)
    which = np.rint(angle / (np.pi / 4)).astype(int) % 8
    centres = np.stack([x[which == i].mean(0) for i in range(8)])
    expected = np.sqrt(8) * np.stack((np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)), 1)
    np.testing.assert_allclose(centres, expected, atol=0.05)
    spread = np.stack([np.cov(x[which == i].T) for i in range(8)])
    np.testing.assert_allclose(spread, np.broadcast_to(np.eye(2) / 8, (8, 2, 2)), atol=0.02)


def test_pinwheel_has_five_blades():
    radius, angle = polar(points(data.Pinwheel))
    waves = [abs(np.exp(1j * k * (angle - 0.25 * np.exp(radius / 2))).mean()) for k in range(1, 6)]
    assert waves[4] > 0.8 and max(waves[:4]) < 0.02


def test_spirals_follow_their_arms():
    x = points(data.Spirals)[:3000]
    turn = np.linspace(0, 3 * np.pi, 600)
    arm = (np.stack((-np.cos(turn), np.sin(turn)), 1) * turn[:, None] + 0.25) / 3
    near = [np.linalg.norm(x[:, None] - side, axis=2).min(1) for side in (arm, -arm)]
    assert np.minimum(*near).max() < 0.5 and np.minimum(*near).mean() < 0.12
    assert 0.47 < (near[0] < near[1]).mean() < 0.53
    assert np.abs(x.mean(0)).max() < 0.1


def test_moons_interlock():
    x = points(data.Moons) / 2 + (0.5, 0.25)
    upper = np.abs(np.hypot(x[:, 0], x[:, 1]) - 1)
    lower = np.abs(np.hypot(x[:, 0] - 1, x[:, 1] - 0.5) - 1)
    assert np.minimum(upper, lower).max() < 0.5 and np.minimum(upper, lower).mean() < 0.1
    assert 0.48 < (upper < lower).mean() < 0.52


def test_what_a_toy_refuses():
    one_line(lambda: data.Moons(rows=3), "dataset.rows=3", "at least 10")
    one_line(lambda: data.Moons(rows="many"), "dataset.rows=many", "whole number")
    one_line(lambda: data.Moons(path="here"), "dataset.path=here", "moons")
    assert data.Moons().spec == DataSpec("moons", (2,))
    one_line(lambda: build({"_target_": "flowtrain.data.Moons", "flip": True}, "dataset"), "no key 'dataset.flip'")
    one_line(lambda: data.Moons(rows=20, val_size=10, test_size=10).split("val"), "20 examples")
    assert data.Moons().augment is None


# ------------------------------------------------------------------ an image


@pytest.fixture
def grey(tmp_path):
    pixels = np.array([[0, 60, 120], [30, 90, 0]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    return pixels, str(tmp_path / "grey.png")


@pytest.mark.parametrize("invert", [False, True])
def test_a_image_is_a_density(grey, invert):
    pixels, path = grey
    split = data.ImageDensity(path=path, rows=60_000, invert=invert).split("train")
    x = split.data.numpy()
    side = 8 / 3  # of a pixel: the longer side spans 8
    assert np.abs(x[:, 0]).max() <= 4 and np.abs(x[:, 1]).max() <= side
    column, row = np.floor((x[:, 0] + 4) / side).astype(int), np.floor((side - x[:, 1]) / side).astype(int)
    weight = 255.0 - pixels if invert else pixels.astype(float)
    weight /= weight.sum()
    counts = np.zeros((2, 3))
    np.add.at(counts, (row.clip(0, 1), column.clip(0, 2)), 1)
    np.testing.assert_allclose(counts / len(x), weight, atol=0.01)  # the top row of the image is on top
    inside = x[(row == 1) & (column == 1)]
    np.testing.assert_allclose(inside.mean(0), [0, -side / 2], atol=0.05)
    np.testing.assert_allclose(inside.std(0), side / np.sqrt(12), atol=0.05)
    best = np.sum(weight[weight > 0] * np.log(weight[weight > 0] / side**2))
    assert f"{best:.4f} nats" in split.description and path in split.description


def test_colours_and_tall_images(tmp_path):
    Image.new("RGB", (10, 40), (200, 30, 90)).save(tmp_path / "tall.png")
    x = data.ImageDensity(path=str(tmp_path / "tall.png"), rows=5000).split("train").data
    assert 3.9 < x[:, 1].abs().max() <= 4 and 0.95 < x[:, 0].abs().max() <= 1


def test_images_that_are_no_density(tmp_path):
    one_line(lambda: data.ImageDensity().split("train"), "dataset=picture needs dataset.path=FILE")
    one_line(lambda: data.ImageDensity(path=str(tmp_path / "none.png")).split("train"), "no such image")
    one_line(lambda: data.ImageDensity(path="a.png", invert=1), "dataset.invert=1", "true or false")
    (tmp_path / "bad.png").write_text("text")
    one_line(
        lambda: data.ImageDensity(path=str(tmp_path / "bad.png")).split("train"), "cannot read", error=FlowtrainError
    )
    Image.new("L", (5, 5)).save(tmp_path / "black.png")
    one_line(lambda: data.ImageDensity(path=str(tmp_path / "black.png")).split("train"), "black all over")
    assert len(data.ImageDensity(path=str(tmp_path / "black.png"), invert=True, rows=20).split("train")) == 16
