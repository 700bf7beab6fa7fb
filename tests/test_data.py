"""Data: splits, order, augmentation, and what a user is told when something is missing or damaged."""

import io
import math
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import IMAGES, configuration, options
from PIL import Image

from flowtrain import data
from flowtrain.config.build import build_dataset
from flowtrain.data import augment
from flowtrain.data.download import fetch
from flowtrain.data.image_files import ImageFileSplit, decode
from flowtrain.data.image_sources import find_images
from flowtrain.data.order import permutation, shard
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.data.split import split_indices
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime.seeds import seed_from

KEYS = "_target_ name root path download context val_size test_size split_seed".split()


def one_line(call, *parts, error=UsageError):
    """``call`` is refused with one line that holds all ``parts``."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error and "\n" not in text
    for part in parts:
        assert part in text, text


def genuine(*files):
    """A data root that holds ``files``, or skip."""
    root = Path(os.environ.get("FLOWTRAIN_DATA", "data"))
    if not all((root / file).exists() for file in files):
        pytest.skip(f"no genuine {files[0]} under {root}/ (set FLOWTRAIN_DATA)")
    return root


@pytest.fixture
def folder(tmp_path):
    """Twenty images in nested folders: colour, grey, RGBA, 16-bit and a photograph's size, and things beside."""
    draw = np.random.default_rng(0)
    for i in range(20):
        here = tmp_path / "images" / f"class{i % 3}"
        here.mkdir(parents=True, exist_ok=True)
        mode, sides = ("RGB", "L", "RGBA")[i % 3], ((12, 8), (8, 8), (40, 60))[i % 3]
        deep = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
        pixels = draw.integers(0, 256, (*sides, deep), dtype=np.uint8).squeeze()
        Image.fromarray(pixels).save(here / f"{i:02d}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "._05.png").write_text("what macOS leaves behind")
    return tmp_path / "images"


# ------------------------------------------------------------------ YAML


@pytest.mark.parametrize("name", sorted({*options("dataset")} - {"arrays", "simulator", "target"}))  # have their own
def test_every_dataset_has_the_shared_keys_and_builds_without_data(name, tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1.5,2\n2.5,1\n")
    file = [f"dataset.path={tmp_path}/t.csv"] if name == "table" else []
    config = configuration(f"dataset={name}", "model=maf", f"dataset.root={tmp_path}/none", *file)
    assert {*KEYS} <= {*config.dataset} and not {"levels", "halvings", "context_shape"} & {*config.dataset}
    spec = build_dataset(config).spec
    assert spec.name == config.dataset["name"] == name and spec.context is spec.context_shape is None
    assert spec.is_image == ("image_size" in config.dataset) == (spec.grey_levels is not None)
    if spec.is_image:
        side = config.dataset["image_size"]
        assert spec.shape == (config.dataset["channels"], side, side)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "svhn"])
def test_labels_are_a_context(name):
    config = configuration(f"dataset={name}", "dataset.context=label")
    assert build_dataset(config).spec.context == LabelContext(10)


def test_files_are_all_there():
    expected = "digits mnist fashion_mnist kmnist cifar10 svhn imagenet32 imagenet64 celeba celebahq image_folder"
    assert {*IMAGES} == {*expected.split(), "synthetic"}


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: data.Digits(bits=3), ("dataset.bits=3", "17")),
        (lambda: data.CIFAR10(bits=9), ("dataset.bits=9",)),
        (lambda: data.CIFAR10(bits=2.5), ("dataset.bits=2.5", "1 to 8")),
        (lambda: data.CIFAR10(image_size=0), ("dataset.image_size=0", "32")),
        (lambda: data.MNIST(image_size=32), ("dataset.image_size=32", "28")),
        (lambda: data.MNIST(channels=3), ("dataset.channels=3",)),
        (lambda: data.ImageFolder(channels=2), ("dataset.channels=2", "1 or 3")),
        (lambda: data.ImageFolder(image_size="big"), ("dataset.image_size=big", "pixels")),
        (lambda: data.ImageFolder(image_size=0), ("dataset.image_size=0", "at least 1")),
        (lambda: data.Synthetic(shape="8x8"), ("dataset.shape=8x8", "list of sides")),
        (lambda: data.Synthetic(shape=[3, 0, 8]), ("dataset.shape=[3, 0, 8]", "at least 1")),
        (lambda: data.CIFAR10(test_size=0.1), ("dataset.test_size=0.1", "own test split")),
        (lambda: data.CIFAR10(val_size=0), ("dataset.val_size=0",)),
        (lambda: data.CIFAR10(path="here"), ("dataset.path=here", "dataset.root")),
        (lambda: data.CIFAR10(flip="yes"), ("dataset.flip=yes", "true or false")),
        (lambda: data.CIFAR10(shift=32), ("dataset.shift=32",)),
        (lambda: data.CIFAR10(warp=0.5), ("dataset.warp=0.5", "dataset.context=label")),
        (lambda: data.CIFAR10(warp=None, shift=None, flip=True, test_size=0.1), ("dataset.test_size",)),
        (lambda: data.CIFAR10(context="label", warp=1), ("dataset.warp=1", "below 1")),
        (lambda: data.CIFAR10(context="label", warp="much"), ("dataset.warp=much", "a probability")),
        (lambda: data.CIFAR10(on_bad="ignore"), ("on_bad=ignore", "stop or skip")),
        (lambda: data.Synthetic(shape=[5], flip=True), ("dataset.flip",)),
        (lambda: data.Digits().split("valid"), ("split=valid", "train, val, test")),
    ],
)
def test_what_does_not_fit_is_refused(build, parts):
    one_line(build, *parts)


# ------------------------------------------------------------------ splits in memory


def test_digits():
    digits = data.Digits()
    assert digits.spec == DataSpec("digits", (1, 8, 8), grey_levels=17)
    parts = {name: digits.split(name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in parts.items()} == {"train": 1259, "val": 179, "test": 359}
    test = parts["test"].take(torch.arange(359))[0]
    assert test.dtype == torch.uint8 and test.max() == 16 and "1,797" not in parts["test"].description
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)
    assert np.array_equal(test[:, 0].numpy(), load_digits().images[order[:359]])


def test_cut_is_a_partition():
    parts = split_indices(1000, 0.1, 37, seed=5)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [863, 100, 37]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    assert len(split_indices(3, 0.1, 0.1, 0)["train"]) == 1  # a fraction takes at least one
    for length, val, test, says in (
        (1, 0.1, 0.1, ("1 example is too few for a train, validation and test split", "at least 3 are needed")),
        (2, 0.1, 0.1, ("2 examples are too few", "at least 3")),
        (1, 0.1, 0, ("1 example is too few for a train and validation split", "at least 2")),
        (10, 7, 5, ("a validation split of 7 and a test split of 5", "dataset.val_size=1 dataset.test_size=1")),
        (300, 5000, 0, ("300 examples", "5000", "dataset.val_size=30 would leave 270 for train")),
    ):
        one_line(lambda: split_indices(length, val, test, 0), *says)
    assert [len(split_indices(10, 1, 1, 0)[part]) for part in ("train", "val", "test")] == [8, 1, 1]


def test_synthetic_is_the_same_every_time_and_has_any_shape():
    one, two = (data.Synthetic(shape=[3, 8, 8]).split("train").data for _ in range(2))
    assert torch.equal(one, two) and one.shape[1:] == (3, 8, 8) and one.max() <= 255
    other = data.Synthetic(shape=[3, 8, 8], split_seed=1).split("train").data
    assert not torch.equal(one, other)
    assert data.Synthetic(shape=[5], bits=2).split("val").data.max() <= 3
    # neighbours agree: there is something to learn
    assert (one[..., 1:].int() - one[..., :-1].int()).abs().float().mean() < 25


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_bits_drop_the_last_ones(bits):
    whole = data.Synthetic(shape=[3, 4, 4]).split("test").data
    reduced = data.Synthetic(shape=[3, 4, 4], bits=bits)
    assert reduced.spec.grey_levels == 2**bits
    assert torch.equal(reduced.split("test").data.float(), (whole.float() / 2 ** (8 - bits)).floor())


# ------------------------------------------------------------------ order and loader


def test_seeds_and_shards():
    seeds = {seed_from(seed, n) for seed in range(50) for n in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert (
        seed_from(1, 2) != seed_from(2, 1)
        and seed_from(1, 2) != seed_from(1, 2, 0)
        and seed_from(-1, 3) != seed_from(1, 3)
    )
    assert seed_from(0) == 0xE220A8397B1DCDAF >> 1  # splitmix64's first number from 0, as published
    for world in (1, 2, 3, 5):
        parts = [range(7)[shard(7, rank, world)] for rank in range(world)]
        assert [i for part in parts for i in part] == list(range(7))


def numbered_split(length=23, size=4):
    """A split whose example i is filled with i."""
    return data.ArraySplit(torch.arange(length, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size))


def steps(loader, start, number):
    batches = loader.batches(start)
    return [next(batches)[0] for _ in range(number)]


def test_loader_goes_on_from_any_step():
    loader = data.Loader(numbered_split(), 5, seed=3)
    assert loader.steps_per_epoch == 4
    whole = steps(loader, 0, 12)
    for start in (1, 4, 7):
        assert all(torch.equal(a, b) for a, b in zip(steps(loader, start, 5), whole[start:], strict=False))
    epochs = [torch.cat(whole[i : i + 4])[:, 0, 0, 0].tolist() for i in (0, 4, 8)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    assert epochs[1] == permutation(3, 1, 23)[:20].tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch(world):
    draw = torch.Generator().manual_seed(0)
    split = data.ArraySplit(torch.randint(0, 256, (40, 3, 6, 6), generator=draw, dtype=torch.uint8))
    augment = data.Augment(flip=True, shift=2)
    alone = steps(data.Loader(split, 12, seed=1, augment=augment), 2, 4)
    ranks = [steps(data.Loader(split, 12, seed=1, augment=augment, rank=r, world=world), 2, 4) for r in range(world)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch, torch.cat([rank[step] for rank in ranks]))


def test_batches_that_cannot_be_are_refused():
    split = data.Digits().split("train")
    one_line(lambda: data.Loader(split, 4096), "batch_size=4096", "larger than the train split (1259)")
    one_line(lambda: data.Loader(split, 10, world=4), "batch_size=10", "4 devices")
    one_line(lambda: data.Loader(split, 0), "batch_size=0")


def test_a_resumed_run_needs_the_same_data():
    state = data.Loader(numbered_split(23), 5, seed=3).state_dict()
    data.Loader(numbered_split(23), 5, seed=3).load_state_dict(state)
    one_line(
        lambda: data.Loader(numbered_split(24), 5, seed=3).load_state_dict(state),
        "was 23",
        "now 24",
        error=FlowtrainError,
    )


@pytest.mark.parametrize(("length", "world"), [(23, 1), (23, 2), (23, 3), (5, 8), (0, 2)])
def test_ordered_gives_every_example_once(length, world):
    shares = [list(data.evaluation_batches(numbered_split(length), 4, rank=rank, world=world)) for rank in range(world)]
    batches = sorted(index.tolist() for share in shares for index, _, _ in share)
    assert batches == [list(range(length))[i : i + 4] for i in range(0, length, 4)]  # whole, for any world
    assert all(x[:, 0, 0, 0].tolist() == index.tolist() for share in shares for index, x, _ in share)


def test_ordered_takes_some_evenly():
    index = torch.cat([index for index, _, _ in data.evaluation_batches(numbered_split(20), 4, examples=5)])
    assert index.tolist() == [0, 4, 8, 12, 16]
    assert sum(len(i) for i, _, _ in data.evaluation_batches(numbered_split(20), 4, examples=100)) == 20


# ------------------------------------------------------------------ augmentation


def test_flip_mirrors_about_half():
    x = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(1000, 3, 4, 4)
    out, context = data.Augment(flip=True)(x, None, seed=0, step=0)
    same, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(-1)))
    assert bool((same ^ mirrored).all()) and 400 < int(mirrored.sum()) < 600
    assert context is None and not torch.equal(out, data.Augment(flip=True)(x, None, seed=0, step=1)[0])


def test_shift_replicates_the_border():
    x = torch.randint(0, 256, (200, 2, 5, 6), dtype=torch.uint8)
    out, _ = data.Augment(shift=1)(x, None, seed=0, step=0)
    assert out.shape == x.shape and out.is_contiguous()
    padded = torch.nn.functional.pad(x.float(), (1, 1, 1, 1), mode="replicate").byte()
    windows = torch.stack([padded[:, :, i : i + 5, j : j + 6] for i in range(3) for j in range(3)])
    fits = (windows == out).flatten(2).all(2)
    assert bool(fits.any(0).all()) and bool(fits.any(1).all())  # each is one of the nine, and all nine occur


def test_warped_images_have_half_their_label():
    x, labels = torch.randint(0, 17, (400, 1, 8, 6), dtype=torch.uint8), torch.eye(4).repeat(100, 1)
    out, context = data.Augment(warp=0.7)(x, labels, seed=0, step=0)
    warped = (context.sum(1) == 0.5).tolist()
    assert out.dtype == torch.uint8 and out.max() <= 16 and 240 < sum(warped) < 320
    assert torch.equal(context.argmax(1), labels.argmax(1)) and {*context.unique().tolist()} == {0.0, 0.5, 1.0}
    assert [not torch.equal(a, b) for a, b in zip(out, x, strict=True)] == warped
    halves = [data.Augment(warp=0.7)(x[i : i + 200], labels[i : i + 200], 0, 0, i // 200, 2) for i in (0, 200)]
    assert all(
        torch.equal(torch.cat(both), one) for both, one in zip(zip(*halves, strict=True), (out, context), strict=True)
    )


def warped(x, uniform=0.5, **deviations):
    """Images under maps of so many standard deviations."""
    names = "turn", "shear", "down", "right", "scale", "stretch"
    normal = torch.tensor([float(deviations.get(name, 0)) for name in names])[:, None].expand(-1, len(x))
    return augment._warped(x, normal, torch.full((len(x),), uniform))


def moments(image):
    """The mean place of an image's mass, (down, right), and its second moments, (2, 2), in pixels."""
    weight = image / image.sum()
    places = torch.stack(torch.meshgrid(*(torch.arange(side) + 0.5 for side in image.shape), indexing="ij"))
    mean = (weight * places).sum((1, 2))
    apart = places - mean[:, None, None]
    return mean, torch.einsum("hw,ihw,jhw->ij", weight, apart, apart)


def test_warping_is_an_affine_map_in_pixels():
    """Also of an image that is no square."""
    bar = torch.zeros(1, 1, 32, 64)
    bar[..., 14:18, 24:40] = 1.0  # 4 by 16
    (mean, _), small = moments(bar[0, 0]), {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(warped(bar), bar, atol=1e-4, rtol=0)
    turned = warped(bar, turn=math.pi / 2 / augment.TURN)[0, 0]
    torch.testing.assert_close(turned[8:24, 30:34], torch.ones(16, 4), atol=1e-4, rtol=0)
    assert turned.sum().item() == pytest.approx(64, rel=1e-4)
    moved, _ = moments(warped(bar, down=1, right=1)[0, 0])
    torch.testing.assert_close(mean - moved, augment.MOVE * torch.tensor([32.0, 64.0]), **small)
    wide = moments(warped(bar, scale=-2)[0, 0])[1], moments(warped(bar, stretch=-2)[0, 0])[1]
    factor, before = math.exp(4 * augment.SCALE), moments(bar[0, 0])[1]
    torch.testing.assert_close(
        torch.stack(wide)[:, [0, 1], [0, 1]], before.diag() * torch.tensor([[1, factor], [factor, 1]]), **small
    )
    sheared = moments(warped(bar.mT.contiguous(), shear=2)[0, 0])[1]  # a high bar: x − 0.3·y of the source
    assert (-sheared[0, 1] / sheared[0, 0]).item() == pytest.approx(2 * augment.SHEAR, rel=0.05)


@pytest.mark.parametrize("level", [16, 255, 65535])
def test_warping_keeps_the_range_of_grey_levels(level):
    x = torch.full((500, 1, 6, 9), level, dtype=torch.uint8 if level < 256 else torch.int32)
    normal = torch.randn(6, 500)
    for uniform in (0.0, 1 - 2**-24):
        assert torch.equal(augment._warped(x, normal, torch.full((500,), uniform)), x)
    halves = x.clone()
    halves[..., ::2, :] = 0
    numbers = augment._warped(
        halves[:1].expand(500, -1, -1, -1),
        torch.tensor([0.0, 0, 0.3, 0, 0, 0])[:, None].expand(-1, 500),
        torch.rand(500),
    )
    assert (
        {*numbers.unique().tolist()} <= {*range(level + 1)} and len(numbers.unique()) > 2 and numbers.dtype == x.dtype
    )


def test_augment_of_a_dataset():
    assert data.CIFAR10().augment is None and data.CIFAR10(context="label", warp=0.5).augment.warp == 0.5
    assert data.CIFAR10(flip=True, shift=3).augment.shift == 3


# ------------------------------------------------------------------ images


def test_image_folder(folder):
    images = data.ImageFolder(path=str(folder), image_size=8, val_size=3, test_size=0.2)
    parts = {name: images.split(name) for name in ("train", "val", "test")}
    assert [len(split) for split in parts.values()] == [13, 3, 4]
    assert len({name for split in parts.values() for name in split.names}) == 20
    x = parts["train"].take(torch.arange(13))[0]
    assert x.shape == (13, 3, 8, 8) and x.dtype == torch.uint8
    assert str(folder) in parts["train"].description and parts["train"].streams
    grey = (
        data.ImageFolder(path=str(folder), image_size=8, channels=1, bits=5).split("train").take(torch.tensor([0]))[0]
    )
    assert grey.shape == (1, 1, 8, 8) and grey.max() < 32


def test_images_of_the_right_size_are_kept_exactly(folder):
    name = folder / "class1" / "01.png"  # grey 8×8
    with open(name, "rb") as file:
        assert np.array_equal(decode(file, (8, 8), 1)[0], np.asarray(Image.open(name)))
    with open(name, "rb") as file:
        rgb = decode(file, (8, 8), 3)
    assert np.array_equal(rgb[0], rgb[1]) and np.array_equal(rgb[0], rgb[2])


def test_decode_crops_the_centre_and_resizes():
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 200  # the centred square is even
    assert (decode(png(pixels), (5, 5), 3) == 200).all()
    assert (decode(png(pixels), (20, 20), 3) == 200).all()
    assert (decode(png(pixels), (10, 10), 3, box=(0, 0, 10, 10)) == 0).all()


def test_decode_scales_16_bits():
    deep = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "png")
    assert np.array_equal(decode(file, (8, 8), 1)[0], deep >> 8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_read_where_they_lie(folder, tmp_path, kind):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            [archive.write(path, path.relative_to(folder)) for path in files]
    else:
        with tarfile.open(tmp_path / "images.tar", "w") as archive:
            [archive.add(path, path.relative_to(folder)) for path in files]
    there, packed = (
        data.ImageFolder(path=str(path), image_size=8).split("train") for path in (folder, tmp_path / f"images.{kind}")
    )
    assert there.names == packed.names
    index = torch.arange(len(there))
    assert torch.equal(there.take(index)[0], packed.take(index)[0])
    streamed = torch.cat([x for _, x, _ in data.evaluation_batches(packed, 4, workers=2)])
    assert torch.equal(streamed, there.take(index)[0])


def test_streaming_is_the_same_for_any_workers_and_ranks(folder):
    split = data.ImageFolder(path=str(folder), image_size=8).split("train")
    state = torch.random.get_rng_state()
    alone = steps(data.Loader(split, 4, seed=1, augment=data.Augment(flip=True)), 2, 6)
    ranks = [
        steps(data.Loader(split, 4, seed=1, augment=data.Augment(flip=True), rank=rank, world=2, workers=2), 2, 6)
        for rank in range(2)
    ]
    for step, batch in enumerate(alone):
        assert torch.equal(batch, torch.cat([rank[step] for rank in ranks]))
    assert torch.equal(state, torch.random.get_rng_state())  # the noise does not depend on who read the images


def test_links_in_a_circle_end(folder):
    (folder / "class0" / "up").symlink_to(folder)
    assert len(find_images(folder).names) == 20


def test_own_folders_of_a_image_set(tmp_path):
    for part, number in (("train", 8), ("valid", 3)):
        (tmp_path / "celeba_hq" / part).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "celeba_hq" / part / f"{i}.png")
    images = data.CelebAHQ(root=str(tmp_path), image_size=8, val_size=2)
    assert [len(images.split(name)) for name in ("train", "val", "test")] == [6, 2, 3]
    (tmp_path / "celeba_hq" / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "celeba_hq" / "test" / "0.png")
    assert [len(images.split(name)) for name in ("train", "val", "test")] == [8, 3, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image(folder, caplog, workers):
    bad = folder / "class0" / "03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    (folder / "class1" / "04.png").write_text("not an image")

    def open_split(on_bad):
        images = data.ImageFolder(path=str(folder), image_size=8, on_bad=on_bad)
        return ImageFileSplit(find_images(folder), find_images(folder).names, images.spec.shape, on_bad=on_bad)

    split = open_split("stop")
    names = split.names
    one_line(
        lambda: list(data.evaluation_batches(split, 4, workers=workers)),
        f"cannot read the image {bad} (index {names.index('class0/03.png')})",
        "on_bad=skip",
        error=FlowtrainError,
    )
    split = open_split("skip")
    first, second = (steps(data.Loader(split, 5, workers=workers), 0, 8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(split.bad) == 2 and sum("cannot read" in record.message for record in caplog.records) == 1
    index = torch.cat([index for index, _, _ in data.evaluation_batches(open_split("skip"), 4, workers=workers)])
    assert len(index) == 18 and names.index("class0/03.png") not in index.tolist()  # evaluation repeats nothing


def test_a_folder_of_nothing_readable_ends(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_text("nothing")
    split = data.ImageFolder(path=str(tmp_path), image_size=8, on_bad="skip").split("train")
    one_line(lambda: steps(data.Loader(split, 2), 0, 1), "unreadable images", error=FlowtrainError)
    one_line(lambda: split.take(torch.tensor([0])), "unreadable images", error=FlowtrainError)


def test_a_gigantic_image_is_unreadable(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    split = ImageFileSplit(find_images(tmp_path), ["a.png", "b.png"], (1, 8, 8))
    one_line(lambda: split.take(torch.tensor([0])), "9000x9000", "64,000,000", error=FlowtrainError)


def test_missing_and_empty_folders(tmp_path):
    one_line(lambda: data.ImageFolder().split("train"), "dataset.path=FOLDER")
    one_line(lambda: data.ImageFolder(path=str(tmp_path / "none")).split("train"), "dataset.path=", "does not exist")
    one_line(lambda: data.ImageFolder(path=str(tmp_path)).split("train"), "dataset.path", "no images", ".png")
    (tmp_path / "images.rar").touch()
    one_line(lambda: data.ImageFolder(path=str(tmp_path / "images.rar")).split("train"), ".zip, .tar or .parquet")
    (tmp_path / "images.zip").write_text("no archive")
    one_line(lambda: data.ImageFolder(path=str(tmp_path / "images.zip")).split("train"), "zip", error=FlowtrainError)
    one_line(lambda: data.CelebAHQ(root=str(tmp_path)).split("train"), "dataset=celebahq", "celeba_hq")
    one_line(lambda: data.CelebA(root=str(tmp_path)).split("train"), "img_align_celeba", "list_eval_partition.txt")


def test_celeba(tmp_path):
    faces = tmp_path / "celeba" / "img_align_celeba"
    faces.mkdir(parents=True)
    pixels = np.zeros((218, 178, 3), dtype=np.uint8)
    pixels[40:188, 15:163] = 77
    for i in range(6):
        Image.fromarray(pixels).save(faces / f"{i:06d}.png")
    table = tmp_path / "celeba" / "list_eval_partition.txt"
    table.write_text("".join(f"{i:06d}.png {max(0, i - 3)}\n" for i in range(6)))
    celeba = data.CelebA(root=str(tmp_path), flip=True)
    assert [len(celeba.split(name)) for name in ("train", "val", "test")] == [4, 1, 1]
    assert (celeba.split("test").take(torch.tensor([0]))[0] == 77).all()
    table.write_text(table.read_text() + "000009.png 2\n")
    one_line(lambda: celeba.split("test"), "1 of the 2 images")


# ------------------------------------------------------------------ downsampled ImageNet


def write_batches(folder, size, number=4, npz=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem in [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]:
        rows = np.random.default_rng(len(stem)).integers(0, 256, (number, 3 * size * size), dtype=np.uint8)
        content = {"data": rows, "labels": list(range(number)), "mean": rows.mean(0)}
        if npz:
            np.savez(folder / f"{stem}.npz", data=rows, labels=np.arange(number))
        else:
            (folder / stem).write_bytes(pickle.dumps(content, protocol=4))


@pytest.mark.parametrize("npz", [True, False])
def test_imagenet_batches(tmp_path, npz):
    write_batches(tmp_path / "imagenet32" / "Imagenet32_train", 32, npz=npz)
    images = data.DownsampledImageNet(name="imagenet32", root=str(tmp_path), val_size=5)
    parts = {name: images.split(name) for name in ("train", "val", "test")}
    assert [len(split) for split in parts.values()] == [35, 5, 4]
    assert "Chrabaszcz" in parts["test"].description and "not comparable" in parts["test"].description
    rows = np.random.default_rng(len("val_data")).integers(0, 256, (4, 3072), dtype=np.uint8)
    assert np.array_equal(parts["test"].data.flatten(1).numpy(), rows)


def test_imagenet_png_folders(tmp_path):
    for part, number in (("train", 6), ("valid", 3)):
        (tmp_path / f"{part}_64x64").mkdir()
        for i in range(number):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{part}_64x64" / f"{i}.png")
    images = data.DownsampledImageNet(name="imagenet64", root=str(tmp_path), image_size=64, val_size=2)
    parts = {name: images.split(name) for name in ("train", "val", "test")}
    assert [len(split) for split in parts.values()] == [4, 2, 3]
    assert "van den Oord" in parts["train"].description
    assert parts["test"].take(torch.arange(3))[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    Image.new("RGB", (32, 32)).save(tmp_path / "valid_64x64" / "0.png")
    one_line(lambda: parts["test"].take(torch.tensor([0])), "32x32, not 64x64", error=FlowtrainError)
    write_batches(tmp_path, 64)
    one_line(lambda: images.split("test"), "both", "different data")


def test_imagenet_missing_and_damaged(tmp_path):
    images = data.DownsampledImageNet(name="imagenet32", root=str(tmp_path))
    one_line(lambda: images.split("train"), "dataset=imagenet32", "train_data_batch", "32x32")
    write_batches(tmp_path, 32, npz=False)
    (tmp_path / "train_data_batch_7").unlink()
    one_line(lambda: images.split("train"), "train_data_batch_7")
    (tmp_path / "val_data").write_bytes(pickle.dumps({"data": os.getcwd}))
    one_line(lambda: images.split("test"), "val_data", "arrays only", error=FlowtrainError)


# ------------------------------------------------------------------ torchvision's sets


def write_mnist(root, name="MNIST", number=30):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.random.default_rng(0).integers(0, 256, (number, 28, 28), dtype=np.uint8)
        sizes = np.array([number, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + sizes + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + sizes[:4] + bytes(number))


@pytest.mark.parametrize("cls", [data.MNIST, data.FashionMNIST, data.KMNIST])
def test_files_in_the_format_of_mnist(tmp_path, cls):
    write_mnist(tmp_path, cls.torchvision_class)
    images = cls(root=str(tmp_path), val_size=6, bits=2)
    assert [len(images.split(name)) for name in ("train", "val", "test")] == [24, 6, 30]
    assert images.split("test").data.shape == (30, 1, 28, 28) and images.split("test").data.max() == 3


def test_missing_files_are_named(tmp_path):
    for cls, part in ((data.MNIST, "MNIST/raw/"), (data.CIFAR10, "data_batch_1..5"), (data.SVHN, "_32x32.mat")):
        images = cls(root=str(tmp_path / "none"), download=False)
        one_line(lambda images=images: images.split("train"), "not found under", part, "dataset.download=false")
    assert not (tmp_path / "none").exists()


def test_damaged_files_are_named(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_line(lambda: data.MNIST(root=str(tmp_path)).split("train"), "damaged", "MNIST/raw", error=FlowtrainError)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in data.CIFAR10()._files("train"):
        (tmp_path / name).write_text("no pickle")
    one_line(lambda: data.CIFAR10(root=str(tmp_path)).split("train"), "damaged", error=FlowtrainError)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def fails(self, root, part, download):
        Path(root, "half").write_text("half a file")
        raise RuntimeError("Error downloading\nTried http://nowhere")

    monkeypatch.setattr(data.CIFAR10, "_build", fails)
    root = tmp_path / "none"
    one_line(lambda: data.CIFAR10(root=str(root)).split("train"), "dataset=cifar10", "batches.meta", "Tried")
    assert not root.exists()


def test_a_download_arrives_whole(tmp_path, monkeypatch):
    real = data.MNIST._build

    def arrives(self, root, part, download):
        if download:
            write_mnist(Path(root))
            (Path(root) / "MNIST/raw/train-images-idx3-ubyte.gz").write_text("not wanted")
            print("progress")
        return real(self, root, part, False)

    monkeypatch.setattr(data.MNIST, "_build", arrives)
    assert len(data.MNIST(root=str(tmp_path / "new"), val_size=5).split("val")) == 5
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["MNIST"]
    assert len(list((tmp_path / "new/MNIST/raw").iterdir())) == 4


def test_fetch_keeps_stdout_clean(tmp_path, capsys):
    fetch(tmp_path, ["a"], lambda folder: print(Path(folder, "a").write_text("whole")))
    assert capsys.readouterr().out == "" and (tmp_path / "a").read_text() == "whole"


def test_genuine_mnist():
    root = genuine("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte")
    images = data.MNIST(root=str(root))
    parts = [images.split(name) for name in ("train", "val", "test")]
    assert [len(split) for split in parts] == [55_000, 5_000, 10_000]
    pixels = torch.cat([split.data for split in parts[:2]]).float() / 255
    assert abs(pixels.mean() - 0.1307) < 1e-4 and abs(pixels.std() - 0.3081) < 1e-4


def test_genuine_cifar10():
    root = genuine("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch")
    images = data.CIFAR10(root=str(root))
    parts = [images.split(name) for name in ("train", "val", "test")]
    assert [len(split) for split in parts] == [45_000, 5_000, 10_000]
    mean = torch.cat([split.data for split in parts[:2]]).float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)


def test_labels_come_as_a_one_hot_context():
    from sklearn.datasets import load_digits

    digits = data.Digits(context="label")
    assert digits.spec.context == LabelContext(10) and digits.spec.context_shape == (10,)
    split = digits.split("test")
    x, context = split.take(torch.arange(5))
    order = np.random.default_rng(0).permutation(1797)[:5]
    assert context.dtype == torch.float32 and context.sum(1).tolist() == [1] * 5
    assert context.argmax(1).tolist() == load_digits().target[order].tolist()
    assert next(data.Loader(split, 4).batches())[1].shape == (4, 10)
    assert [c.shape for _, _, c in data.evaluation_batches(split, 200)] == [(200, 10), (159, 10)]
    one_line(lambda: data.Digits(context="colour"), "dataset.context=colour", "label, or null")
    one_line(lambda: data.Synthetic(context="label"), "dataset.context=label", "no labels")
