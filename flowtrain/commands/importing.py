"""``flowtrain import``: a flow of another library as a run that the other commands open."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from flowtrain.commands import ImportConfig
from flowtrain.commands.outputs import own_folder
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.conversion import key_names, to_dict, validate
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns
from flowtrain.data.tables.column import Column
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.importers.layers import Imported
from flowtrain.runtime import checkpoint, distributed

log = logging.getLogger("flowtrain")

ROWS, TOLERANCE = 1000, 1e-5
FAR = (1.0, 3.0, 10.0)  # scales of the rows
HELPERS = ("LinearCache", "_LinearCache")  # classes of nflows and normflows that are inside their layers


def main(config: ImportConfig, run_dir: str) -> dict:
    """Write the flow at ``config.path`` as checkpoints/best.pt of a new run, after its density has been compared.

    Raises:
        UsageError: nothing to import, or a module without a counterpart; nothing is written.
        FlowtrainError: the densities differ; nothing is written.
    """
    if not distributed.is_main():
        return {}
    with own_folder(run_dir, config.output) as folder:
        reader = _reader(config)
        theirs = _load(config, reader).double().eval().requires_grad_(False)
        found = reader.read(theirs)
        values, columns, ours = _build(config, found)
        difference = _difference(ours, theirs, reader, found)
        if not difference <= TOLERANCE:
            raise FlowtrainError(
                f"path={config.path}: log p of the imported flow differs by {difference:.2g} on some of {ROWS:,} rows,"
                f" more than {TOLERANCE:g}; nothing is written"
            )
        file = folder / "checkpoints" / "best.pt"
        checkpoint.save({"config": values, "columns": columns, "model": ours.state_dict(), "ema": None}, file)
    layers = len(found.layers)
    print(f"{layers} layers, D = {found.features}, log p differs by at most {difference:.1e} on {ROWS:,} rows")
    print(f"run: {os.path.relpath(folder)}", flush=True)
    return {"checkpoint": str(file), "greatest_difference": difference}


def _reader(config: ImportConfig) -> ModuleType:
    if config.from_ is None or config.path is None:
        raise UsageError(
            "from=LIBRARY and path=MODULE:FUNCTION or path=FILE are needed; LIBRARY: nflows, zuko, normflows"
        )
    if importlib.util.find_spec(config.from_) is None:
        raise UsageError(f"from={config.from_}: it is not installed: pip install {config.from_}")
    return importlib.import_module(f"flowtrain.importers.{config.from_}")


def _load(config: ImportConfig, reader: ModuleType) -> nn.Module:
    path = Path(config.path).expanduser()
    if path.is_file():
        flow = _load_file(config, path, reader)
    else:
        module, colon, function = config.path.partition(":")
        if not colon:
            raise UsageError(f"path={config.path}: there is no such file; or give module:function")
        sys.path.insert(0, os.getcwd())
        try:
            flow = getattr(importlib.import_module(module), function)()
        except Exception as error:  # whatever a user's own function raises
            raise UsageError(f"path={config.path}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.pop(0)
    if not isinstance(flow, nn.Module):
        raise UsageError(f"path={config.path}: is a {type(flow).__name__}, not a flow, which is a torch.nn.Module")
    return flow


def _load_file(config: ImportConfig, path: Path, reader: ModuleType) -> nn.Module:
    """A pickled module. Only classes of its library and of torch are made of it, and no function is called."""
    try:
        for module in reader.MODULES:
            importlib.import_module(module)
        allowed = [*reader.PICKLED, *_classes(config.from_), *_classes("torch.nn")]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        found = re.search(r"GLOBAL (\S+) was not", reason)
        raise UsageError(
            f"path={path}: it holds {found[1] if found else reason[:120]}, not only classes of {config.from_}; give"
            " path=module:function, a function of yours that makes the flow and loads its weights"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UsageError(f"path={path}: cannot be read ({' '.join(str(error).split())[:120]})") from error


def _classes(package: str) -> list:
    """The modules, distributions and transforms of a package, and the functions of torch.nn.functional."""
    kinds = nn.Module, torch.distributions.Distribution, torch.distributions.Transform
    found = {}
    for name, module in [*sys.modules.items()]:
        if name == package or name.startswith(f"{package}."):
            for item in [*vars(module).values()]:
                is_layer = isinstance(item, type) and (issubclass(item, kinds) or item.__name__ in HELPERS)
                if is_layer or inspect.isfunction(item) and item.__module__ == "torch.nn.functional":
                    found[id(item)] = item
    return [*found.values()]


def _build(config: ImportConfig, found: Imported) -> tuple[dict, dict, Flow]:
    """The configuration and the columns of the run, and the flow with the imported parameters."""
    layers = {f"layer{i}": layer for i, layer in enumerate(found.layers)}
    known = {*key_names(TrainConfig), *config.parts}
    values = {name: value for name, value in to_dict(config).items() if name in known}
    values["model"] = {
        "_target_": "flowtrain.flows.custom",
        "layers": {name: layer.node for name, layer in layers.items()},
    }
    names = [("x", found.features), ("c", found.context or 0)]
    modelled, context = (
        tuple(Column(f"{letter}{i}", "real", mean=0.0, std=1.0) for i in range(count)) for letter, count in names
    )
    columns = Columns(modelled, context).to_record()
    plain = validate(TrainConfig, values)
    flow = build_flow(plain, build_dataset(plain, columns).spec, "cpu").eval().requires_grad_(False)
    chain = flow.bijection.layers()
    for name, layer in layers.items():
        chain[name].load_state_dict(layer.state)
    return values, columns, flow


def _difference(ours: Flow, theirs: nn.Module, reader: ModuleType, found: Imported) -> float:
    """The greatest difference of log p, absolute where it is at most 1, else relative; in float64, so that it is that
    of the maps and not of their roundings."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(FAR).repeat_interleave(-(-ROWS // len(FAR)))[:ROWS, None].double()
    x = scale * torch.randn(ROWS, found.features, generator=generator, dtype=torch.float64)
    context = None
    if found.context:
        context = torch.randn(ROWS, found.context, generator=generator, dtype=torch.float64)
    value, other = ours.double()(x, context), _log_prob(theirs, reader, x, context)
    ours.float()
    apart = torch.where(value == other, 0.0, (value - other).abs().nan_to_num(nan=torch.inf))
    return (apart / other.abs().clamp(min=1)).max().item()


@torch.no_grad()
def _log_prob(theirs: nn.Module, reader: ModuleType, x: Tensor, context: Tensor | None) -> Tensor:
    return reader.log_prob(theirs, x, context)
