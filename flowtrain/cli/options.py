"""The options of a config group, for help, completion, messages and sweeps alike."""

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType

_every_file = ConfigRepository.get_group_options


def hide_shared_files() -> None:
    """Leave out files whose name starts with ``_``: options share them through their defaults lists."""
    ConfigRepository.get_group_options = _options


def _options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
    return [name for name in _every_file(self, group_name, results_filter) if not name.startswith("_")]
