"""Where ``conf/`` is, how its YAML becomes plain values, and how plain values become objects."""

from __future__ import annotations

import copy
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flowtrain.config import runs
from flowtrain.config.schema import ROOTS, known_keys, settled
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import status


def conf_dir() -> Path:
    """The checkout's ``conf/``, else the wheel's."""
    here = Path(__file__).resolve().parent.parent
    for path in (here.parent / "conf", here / "conf"):
        if (path / "train.yaml").is_file():
            return path
    raise FlowtrainError(f"conf/ is neither beside nor inside {here}: the installation is incomplete")


def is_part(key: str) -> bool:
    """Whether a root key is a part that model files choose and refer to, such as ``univariate``: it has a group."""
    return key not in ("experiment", "launcher", "hydra", *known_keys("train")) and (conf_dir() / key).is_dir()


def plain(cfg) -> dict:
    """The resolved configuration as dicts, lists and scalars, to embed in a checkpoint."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def compose(command: str, overrides: list[str]) -> DictConfig:
    """What ``flowtrain command overrides`` is given, for callers that are inside another command."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    return OmegaConf.create(settle(loader.load_configuration(command, overrides, RunMode.RUN), command))


def settle(cfg: DictConfig, command: str, restored: bool = False) -> dict:
    """What a command is given: the composed tree without Hydra's node, resolved and with its types checked.

    ``smoke=true`` is applied, except to what a checkpoint ``restored``, where it has been already.
    """
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    if cfg.get("smoke") is True and not restored:
        shrink(cfg)
    return settled(ROOTS[command], plain(cfg), complete=not restored)


_run_dirs: dict[str, str] = {}


def run_dir(path: str, resume, *, _root_) -> str:
    """A training run's directory: the one to continue, else a new one at ``path``; the same one at each reading."""
    if path not in _run_dirs:
        if resume is True:
            found = runs.same_as(settle(_root_, "train"))
        else:
            found = runs.run_of(Path(resume)) if resume else None
        _run_dirs[path] = str(found) if found else runs.claim(path)
        if not found and runs.claiming:
            status.begun(_run_dirs[path])
    return _run_dirs[path]


def shrink(cfg: DictConfig) -> None:
    """``smoke=true``: cut what ``conf/smoke.yaml`` names, where the configuration has it, down to its size."""
    for key, size in OmegaConf.load(conf_dir() / "smoke.yaml").items():
        value = OmegaConf.select(cfg, key, default="absent")
        if value != "absent":  # null is no bound
            OmegaConf.update(cfg, key, size if value is None else min(value, size))


def levels(native: int, bits: int | None) -> int:
    """Grey levels after keeping the ``bits`` highest bits of ``native`` levels."""
    if bits is None:
        return native
    if native != 256:
        raise UsageError(f"dataset.bits={bits}: these data have {native} levels, not 256; leave dataset.bits=null")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise UsageError(f"dataset.bits={bits}: must be a whole number from 1 to 8, or null")
    return 2**bits


def halvings(side: int) -> int:
    """How often an image's side can be halved and stay a whole number of at least 4."""
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise UsageError(f"dataset.image_size={side}: must be a whole number of at least 1")
    count = 0
    while side % 2 == 0 and side // 2 >= 4:
        side, count = side // 2, count + 1
    return count


def one_hot(context, classes: int) -> list[int] | None:
    """The shape of a context that is a class, or None."""
    if context not in (None, "label"):
        raise UsageError(f"dataset.context={context}: must be label, or null")
    return None if context is None else [classes]


def side(shape) -> int:
    """The width of an image; of a vector its length, which what needs images then refuses."""
    return shape[-1]


def table_shape(path, columns, context) -> list[int]:
    """[D] of a table's file, from its header. UsageError without one, or for a column that it lacks."""
    from flowtrain.data import table_file  # brings numpy

    return table_file.table_shape(path, columns, context)


def table_context_shape(path, context) -> list[int] | None:
    """[C] of a table's context columns, or None."""
    from flowtrain.data import table_file

    return table_file.table_context_shape(path, context)


OmegaConf.register_new_resolver("table_shape", table_shape, replace=True)
OmegaConf.register_new_resolver("table_context_shape", table_context_shape, replace=True)
OmegaConf.register_new_resolver("side", side, replace=True)
OmegaConf.register_new_resolver("one_hot", one_hot, replace=True)
OmegaConf.register_new_resolver("levels", levels, replace=True)
OmegaConf.register_new_resolver("halvings", halvings, replace=True)
OmegaConf.register_new_resolver("beside", runs.beside, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
# cached: a composed configuration has one directory, however often that is read
OmegaConf.register_new_resolver("claim", runs.claim, replace=True, use_cache=True)
