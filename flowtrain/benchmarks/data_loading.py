"""The input pipeline: a training step that takes its batch from the loader, to the same step on one fixed batch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from flowtrain.benchmarks.ours import OPTIMIZER
from flowtrain.benchmarks.session import Row, Session, row
from flowtrain.config.build import build, build_flow
from flowtrain.config.compose import train_config
from flowtrain.data import Loader

WITH_DATA, FIXED = "with data", "one fixed batch"
RESIDENT, FOLDER = 1.03, 1.10
SMALL = ("model=glow", "model.levels=2", "model.steps=2", "model.hidden=64", *OPTIMIZER)
SLICE = 1.0  # seconds a round: long, so that what workers have ready when it begins does not count
IMAGES, SIDE = 512, 48  # of the folder


def rows(session: Session) -> Iterator[Row]:
    flip = ("dataset.flip=true", "dataset.shift=2")
    yield _row(session, "digits, on the device", ("dataset=digits", *SMALL), RESIDENT)
    yield _row(session, "32×32 images, on the device, augmented", ("dataset=synthetic", *flip, *SMALL), RESIDENT)
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder), 80 if session.smoke else IMAGES)
        what = ("dataset=image_folder", f"dataset.path={folder}", "dataset.image_size=32", *SMALL)
        yield _row(session, f"folder of {SIDE}×{SIDE} PNGs as 32×32 images, streamed", what, FOLDER)


def _row(session: Session, name: str, overrides: tuple[str, ...], target: float) -> Row:
    sizes = ("batch_size=8", "model.steps=1", "model.hidden=8") if session.smoke else ("batch_size=64",)
    cfg = train_config(*overrides, *sizes, f"seed={session.seed}")
    data = build(cfg.dataset, "dataset", on_bad=cfg.on_bad)
    loader = Loader(
        data.split("train"), cfg.batch_size, cfg.seed, data.augment, session.device, workers=cfg.trainer.workers
    )
    batches = loader.batches()
    fixed = next(batches)
    flow = build_flow(cfg, session.device)
    flow.initialize(*fixed)
    flow.train()
    optimizer = build(cfg.optimizer, "optimizer")(flow.parameters())

    def step(x: torch.Tensor, context: torch.Tensor | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        flow(x, context).mean().neg().backward()
        optimizer.step()

    variants = {WITH_DATA: lambda: step(*next(batches)), FIXED: lambda: step(*fixed)}
    times = session.times(variants, slice=SLICE)
    batches.close()
    return row("data", f"training step: {name}", times, WITH_DATA, FIXED, target)


def _write_images(folder: Path, count: int) -> None:
    """Ramps with noise, of which a PNG takes about as many bits as of a photograph."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 160, SIDE)
    for i in range(count):
        noise = torch.randint(0, 64, (SIDE, SIDE, 3), generator=draw)
        image = (ramp[:, None, None] + ramp[None, :, None]) / 2 + noise
        Image.fromarray(image.to(torch.uint8).numpy()).save(folder / f"{i:04}.png")
