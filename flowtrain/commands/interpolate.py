"""``flowtrain interpolate``: paths in latent space between real examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands import InterpolateConfig
from flowtrain.commands.examples import columns_of, decode, draw_curves, encode, take_examples
from flowtrain.commands.outputs import free_name, open_array, open_table
from flowtrain.commands.restored import restore
from flowtrain.distributions import StandardNormal
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.plots.grid import labelled_rows, save_png
from flowtrain.runtime import distributed


def main(config: InterpolateConfig, run_dir: str) -> dict:
    """Walk from one example to another in latent space, ``config.steps`` examples between; returns the files' paths.

    The first and the last of a path are the real examples themselves: encoded, then decoded. The context of a
    conditional flow goes in a straight line from the one's to the other's, as the latents of ``path=linear`` do: of two
    classes, from one-hot vector to one-hot vector.

    Images and fields become interpolations.png, a row for each path; rows of a table interpolations.csv, with the
    number of the path and of the step; vectors of an array, such as spectra, curves.png too. All become
    interpolations.npy, (n, steps + 2, *shape).

    Raises:
        UsageError: there are no such examples, or the path does not suit the base distribution.
        FlowtrainError: an example on a path is not finite.
    """
    if config.examples is not None and (len(config.examples) < 2 or len(config.examples) % 2):
        raise UsageError(f"examples={config.examples}: name pairs: the first and the last of each path in turn")
    folder, restored = Path(run_dir), restore(config, config.ckpt, config.weights)
    flow, spec = restored.flow.eval(), restored.dataset.spec
    path = _path(config.path, flow)
    found = take_examples(restored, config.split, 2 * config.n, config.examples, config.seed)
    if not distributed.is_main():
        return {}
    n, many = len(found.x) // 2, config.steps + 2
    at = torch.linspace(0, 1, many, dtype=torch.float64, device=found.x.device)
    z = path(*_ends(encode(restored, found.x, found.context)), at)
    context = None if found.context is None else linear(*_ends(found.context), at).flatten(0, 1)
    x = decode(restored, z.flatten(0, 1), context).cpu()

    paths = {"npy": folder / "interpolations.npy"}
    with open_array(paths["npy"], n) as write:
        write(x.unflatten(0, (n, many)).numpy())
    labels = [f"{first} to {last}" for first, last in zip(found.numbers[::2], found.numbers[1::2])]
    if spec.is_image:
        paths["png"] = folder / "interpolations.png"
        save_png(labelled_rows(x, spec.grey_levels, labels), paths["png"])
    else:
        table = columns_of(restored, x).decode(x)
        place = np.arange(len(x))
        paths["csv"] = folder / "interpolations.csv"
        with open_table(paths["csv"]) as write:
            write({free_name("path", table): place // many + 1, free_name("step", table): place % many, **table})
        if restored.columns is None and config.plot and flow.dimensions > 2:
            paths |= draw_curves(folder / "curves.png", x.unflatten(0, (n, many)).numpy(), labels)
    print(f"{n} {path.__name__} paths, {config.split}, {config.steps} examples between: {', '.join(labels)}")
    for file in paths.values():
        print(file)
    return {name: str(file) for name, file in paths.items()}


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[::2], rows[1::2]


def _path(name: str, flow: Flow):
    """The function of the path. Raises UsageError for one that leaves the bulk of the base distribution."""
    normal = isinstance(flow.base, StandardNormal)
    if name == "spherical" and not normal:
        raise UsageError(
            f"path=spherical: keeps to the shell of a standard normal, and the base of this flow is "
            f"{type(flow.base).__name__}; path=linear"
        )
    return spherical if name == "spherical" or name == "auto" and normal else linear


def linear(first: Tensor, last: Tensor, at: Tensor) -> Tensor:
    """Points of straight lines, (n, steps, …), between rows (n, …) at the shares ``at`` (steps,)."""
    at = at.reshape(-1, *[1] * (first.dim() - 1))
    return ((1 - at) * first[:, None] + at * last[:, None]).to(first.dtype)


def spherical(first: Tensor, last: Tensor, at: Tensor) -> Tensor:
    """Points of great circles, (n, steps, …), between rows (n, …) at the shares ``at`` (steps,).

    sin((1 − t)θ)/sin θ · first + sin(tθ)/sin θ · last with the angle θ between them (Shoemake 1985; White 2016,
    equation 1): normal latents lie near a sphere, whose inside a straight line crosses. The line where both point the
    same way or opposite ways.

    >>> spherical(torch.eye(2)[:1], torch.eye(2)[1:], torch.tensor([0.5]))
    tensor([[[0.7071, 0.7071]]])
    """
    flat = first.flatten(1).double(), last.flatten(1).double()
    angle = torch.nn.functional.cosine_similarity(*flat).clamp(-1, 1).acos()[:, None]
    straight = angle.sin() < 1e-6
    shares = [
        torch.where(straight, share, (share * angle).sin() / torch.where(straight, 1, angle.sin()))
        for share in (1 - at, at)
    ]
    points = shares[0][..., None] * flat[0][:, None] + shares[1][..., None] * flat[1][:, None]
    return points.to(first.dtype).unflatten(2, first.shape[1:])
