"""Suite ``data``: a training step that takes its batch from the loader, against the same step on one fixed batch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from flowtrain import data, flows
from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import Load, Row, Session, row
from flowtrain.data.batch import Batch

WITH_DATA, FIXED = "with data", "one fixed batch"
RESIDENT, FOLDER = 1.03, 1.10
WORKERS = 2  # processes that read the folder
SLICE = 1.0  # seconds a round; long, so that batches that are ready at its start do not matter
IMAGES, SIDE = 512, 48  # in the folder


def rows(session: Session) -> Iterator[Row]:
    digits = data.Digits()
    yield _measure(
        session,
        "digits, on the device",
        digits,
        partial(flows.parts.logit, grey_levels=digits.spec.grey_levels),
        RESIDENT,
    )
    center = partial(flows.parts.center, grey_levels=256)
    images = data.Synthetic(flip=True, shift=2)
    yield _measure(session, "32×32 images, on the device, augmented", images, center, RESIDENT)
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder), 80 if session.smoke else IMAGES)
        images = data.ImageFolder(path=folder, image_size=32)
        yield _measure(session, f"folder of {SIDE}×{SIDE} PNGs as 32×32 images, streamed", images, center, FOLDER)


def _measure(session: Session, name: str, dataset: data.Dataset, preprocess, target: float) -> Row:
    batch, steps, hidden = (8, 1, 8) if session.smoke else (64, 2, 64)
    loader = data.Loader(dataset.split("train"), batch, session.seed, dataset.augment, session.device, workers=WORKERS)
    batches = loader.batches()
    fixed = next(batches)
    torch.manual_seed(session.seed)
    flow = flows.glow(dataset.spec.shape, levels=2, steps=steps, hidden=hidden, preprocess=preprocess).to(
        session.device
    )
    flow.initialize(fixed.x, fixed.context)
    flow.train()
    optimizer = ours.optimizer(flow.parameters())

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        flow(batch.x, batch.context).mean().neg().backward()
        optimizer.step()

    variants = {WITH_DATA: lambda: step(next(batches)), FIXED: lambda: step(fixed)}
    times = session.times(variants, slice=SLICE)
    batches.close()
    return row("data", f"training step: {name}", times, WITH_DATA, FIXED, target, Load(batch, "images"))


def _write_images(folder: Path, count: int) -> None:
    """Write ``count`` PNGs of ramps with noise, which compress about as well as photographs."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 160, SIDE)
    for i in range(count):
        noise = torch.randint(0, 64, (SIDE, SIDE, 3), generator=generator)
        image = (ramp[:, None, None] + ramp[None, :, None]) / 2 + noise
        Image.fromarray(image.to(torch.uint8).numpy()).save(folder / f"{i:04}.png")
