"""``flowtrain reconstruct``: real examples, encoded and decoded again, with all of their latents or a part of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections import Bijection, MultiScale
from flowtrain.bijections.ode import continuous_layers
from flowtrain.commands import ReconstructConfig
from flowtrain.commands.examples import Examples, columns_of, decode, draw_curves, encode, take_examples
from flowtrain.commands.outputs import free_name, open_array, open_table
from flowtrain.commands.restored import Restored, restore
from flowtrain.data import Columns
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.plots.grid import labelled_rows, save_png
from flowtrain.runtime import distributed, files, seeds

SHOWN = 12  # columns whose error is printed, those with the largest


def main(config: ReconstructConfig, run_dir: str) -> dict:
    """Encode and decode examples, print how far that is from the originals, and write reconstruct.json and the
    examples into ``run_dir``; returns the content of reconstruct.json.

    For each share in ``config.keep`` that is below 1, the latents of the finest scales are drawn anew and only that
    share, from the coarsest scale on, is the example's own (Dinh et al. 2017, figure 4 of appendix D).

    Images and fields become reconstructions.png: a row of originals, a row for each share; rows of a table become
    reconstructions.csv. All become reconstructions.npy, (1 + shares, n, *shape), the originals first.

    Raises:
        UsageError: there are no such examples, or ``config.keep`` does not suit the flow.
        FlowtrainError: an exact flow does not return its examples: an integer differs, or a real number by more than
            ``config.tolerance`` standard deviations. The files have been written.
    """
    folder, restored = Path(run_dir), restore(config, config.ckpt, config.weights)
    flow, spec = restored.flow.eval(), restored.dataset.spec
    shares = _shares(config.keep, flow)
    found = take_examples(restored, config.split, config.n, config.examples, config.seed)
    if not distributed.is_main():
        return {}
    z = encode(restored, found.x, found.context)
    again = decode(restored, z, found.context).cpu()
    partial = [_keep(restored, z, found, share, config) for share in shares if share < 1]
    rows = [found.x.cpu().to(again.dtype), again, *partial]
    names = ["original", "kept 100 %", *(f"kept {100 * share:.4g} %" for share in shares if share < 1)]

    paths = {"npy": folder / "reconstructions.npy"}
    with open_array(paths["npy"], len(rows)) as write:
        write(torch.stack(rows).numpy())
    columns = columns_of(restored, rows[0])
    if columns is None:
        report = _image_errors(rows[0], again, spec.grey_levels)
        if report["differ"] or report["relative"] > config.tolerance:
            rows, names = [*rows[:2], (rows[0] - again).abs(), *rows[2:]], [*names[:2], "difference", *names[2:]]
        paths["png"] = folder / "reconstructions.png"
        save_png(labelled_rows(torch.cat(rows), spec.grey_levels, names), paths["png"])
    else:
        report = _column_errors(rows[0], again, columns)
        paths["csv"] = folder / "reconstructions.csv"
        _write_table(paths["csv"], rows, names, columns, found.numbers)
        if restored.columns is None and config.plot and flow.dimensions > 2:
            labels = [f"example {number}" for number in found.numbers]
            paths |= draw_curves(folder / "curves.png", torch.stack(rows, 1).numpy(), labels)
    exact = not continuous_layers(flow)
    report = {
        "split": config.split,
        "examples": found.numbers,
        "kept": shares,
        "exact": exact,
        **report,
        "weights": restored.weights,
        "checkpoint": config.ckpt,
    }
    files.write_json(folder / "reconstruct.json", report)
    print(table(report))
    for file in paths.values():
        print(file)
    if exact and (report["differ"] or report["relative"] > config.tolerance):
        raise FlowtrainError(
            f"the flow does not return its own examples: {_differences(report)}; flowtrain check names the layer"
        )
    return report


# ---- parts of the latent -------------------------------------------------------------------------------------------


def multi_scale(flow: Flow) -> MultiScale | None:
    """The multi-scale layer whose output is the latent; None: the flow has one scale.

    >>> from flowtrain.flows import glow
    >>> multi_scale(glow((1, 8, 8), levels=2, steps=1, hidden=4)).split_shapes
    [(2, 4, 4), (8, 2, 2)]
    """
    layer: Bijection | None = flow.bijection
    while layer is not None and not isinstance(layer, MultiScale):
        layer = next(reversed([*layer.layers().values()]), None) if layer.container else None
    return layer


def scale_shares(scales: MultiScale) -> list[float]:
    """The shares of the latent from the coarsest scale on: of all scales, of all but the finest, …, of the coarsest."""
    sizes = [math.prod(shape) for shape in scales.split_shapes]
    return [sum(sizes[first:]) / sum(sizes) for first in range(len(sizes))]


def _shares(keep: float | list[float] | None, flow: Flow) -> list[float]:
    """The shares to keep, the largest first. Raises UsageError."""
    scales = multi_scale(flow)
    if keep is None:
        return [1.0] if scales is None else scale_shares(scales)
    shares = sorted({*(keep if isinstance(keep, list) else [keep])}, reverse=True)
    if not shares:
        raise UsageError("keep=[]: give at least one, such as [1.0,0.5]")
    if shares[0] > 1:
        raise UsageError(f"keep={keep}: shares of the latent are at most 1")
    if scales is None and shares != [1.0]:
        raise UsageError(
            f"keep={keep}: the latent of this flow has no coarse and fine parts: only a flow with scales, such as "
            "realnvp or glow on images, has; leave keep=null"
        )
    return shares


def _keep(restored: Restored, z: Tensor, found: Examples, share: float, config: ReconstructConfig) -> Tensor:
    """The data of latents whose last numbers, the coarsest, are kept, with noise that is the same for each share."""
    new = restored.flow.base_samples(len(z), config.temperature, found.context, seeds.generator(config.seed, 0)).to(z)
    first = z.shape[1] - round(share * z.shape[1])
    return decode(restored, torch.cat((new[:, :first], z[:, first:]), 1), found.context).cpu()


# ---- errors --------------------------------------------------------------------------------------------------------


def _image_errors(x: Tensor, again: Tensor, grey_levels: int | None) -> dict:
    """What differs: in grey levels, or of a field in its own units; ``relative`` in standard deviations of a field."""
    error = (x.double() - again.double()).abs()
    differ = int((error > 0).sum()) if grey_levels else 0
    relative = 0.0 if grey_levels else error.max().item() / max(x.double().std().item(), 1e-30)
    return {
        **_largest_and_mean(error),
        "relative": relative,
        "differ": differ,
        "numbers": x.numel(),
        "unit": "grey levels" if grey_levels else None,
    }


def _column_errors(x: Tensor, again: Tensor, columns: Columns) -> dict:
    """The error of each column in its own unit, for a time seconds; ``relative`` is the largest in standard deviations
    of the column in the train split, ``differ`` counts integers and texts that differ."""
    found, relative, differ = {}, 0.0, 0
    x, again = x.double(), again.double()
    for i, column in enumerate(columns.modelled):
        error = (x[:, i] - again[:, i]).abs()
        if column.kind == "angle":
            error = torch.minimum(error, column.high - column.low - error)
        error[x[:, i].isnan() & again[:, i].isnan()] = 0
        error = error.nan_to_num(math.inf)
        wrong = int((error > 0).sum())
        found[column.name] = _largest_and_mean(error)
        if column.kind in ("integer", "categorical"):
            differ += wrong
            found[column.name]["differ"] = wrong
        else:
            relative = max(relative, error.max().item() / column.std)
    worst = max(found.values(), key=lambda one: one["largest"])
    mean = sum(one["mean"] for one in found.values()) / len(found)
    return {
        "largest": worst["largest"],
        "mean": mean,
        "relative": relative,
        "differ": differ,
        "numbers": len(x) * len(found),
        "unit": None,
        "columns": found,
    }


def _largest_and_mean(error: Tensor) -> dict:
    return {"largest": error.max().item(), "mean": error.mean().item()}


def _differences(report: Mapping) -> str:
    parts = []
    if report["differ"]:
        parts.append(f"{report['differ']:,} of {report['numbers']:,} numbers differ")
    parts.append(f"largest error {report['largest']:.3g}")
    if report["relative"]:
        parts.append(f"{report['relative']:.2g} standard deviations")
    return ", ".join(parts)


def table(report: Mapping) -> str:
    unit = f" {report['unit']}" if report["unit"] else ""
    rows = [
        ("examples", f"{len(report['examples'])} ({report['split']})"),
        ("largest error", f"{report['largest']:.3g}{unit}"),
        ("mean error", f"{report['mean']:.3g}{unit}"),
        ("numbers that differ", f"{report['differ']:,} of {report['numbers']:,}") if report["unit"] else None,
        ("kept", ", ".join(f"{100 * share:.4g} %" for share in report["kept"])),
        None if report["exact"] else ("exact", "no: an ODE's solver decides the error"),
        ("weights", report["weights"]),
        ("checkpoint", report["checkpoint"]),
    ]
    worst = sorted(report.get("columns", {}).items(), key=lambda item: -item[1]["largest"])[:SHOWN]
    for name, one in worst:
        text = f"largest {one['largest']:.3g}, mean {one['mean']:.3g}"
        rows.append((f"error of {name}", f"{one['differ']} differ" if "differ" in one else text))
    lines = [row for row in rows if row]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _write_table(path: Path, rows: list[Tensor], names: list[str], columns: Columns, numbers: list[int]) -> None:
    decoded = columns.decode(torch.cat(rows))
    what = {
        free_name("example", decoded): np.tile(numbers, len(rows)),
        free_name("kept", decoded): np.repeat(np.array(names, dtype=object), len(numbers)),
    }
    with open_table(path) as write:
        write({**what, **decoded})
