"""``flowtrain sample``: a grid of a checkpoint's samples, and the samples themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flowtrain import distributed
from flowtrain.assemble import build_flow, decode, is_picture, load_weights
from flowtrain.engine import checkpoint
from flowtrain.errors import FlowtrainError, Refused
from flowtrain.plots.grid import grid, save_png


def main(cfg, run_dir: str) -> dict:
    """Draw ``cfg.n`` samples at each temperature; write samples.png and samples.npy; returns their paths."""
    flow = build_flow(cfg, distributed.device())
    load_weights(flow, checkpoint.read(cfg.ckpt), cfg.weights)
    if cfg.label is not None:
        raise Refused(f"label={cfg.label}: this model is of no labels; leave label=null")
    rows = not isinstance(cfg.temperature, float)
    temperatures = list(cfg.temperature) if rows else [cfg.temperature]
    if not temperatures:
        raise Refused("temperature=[]: give at least one, such as [0.5,0.7]")
    if not distributed.is_main():
        return {}
    # one set of latents for all temperatures: the rows differ in nothing else
    latents = flow.latents(cfg.n, generator=torch.Generator().manual_seed(cfg.seed))
    samples = torch.cat([decode(flow, t * latents) for t in temperatures])
    if not samples.float().isfinite().all():
        raise FlowtrainError("some samples are not finite; a lower temperature may help")
    paths = {"npy": str(Path(run_dir) / "samples.npy")}
    np.save(paths["npy"], samples.numpy())
    if is_picture(cfg):
        paths["png"] = str(Path(run_dir) / "samples.png")
        save_png(grid(samples, cfg.dataset.levels, cfg.n if rows else None), Path(paths["png"]))
    for path in paths.values():
        print(path)
    return paths
