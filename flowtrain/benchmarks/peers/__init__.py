"""Other people's libraries, each a module here that builds their flows like one of ours and of the same size.

A module has those of the functions ``maf``, ``nsf_coupling``, ``nsf_autoregressive``, ``spline`` and ``glow`` that its
library has the parts for.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from types import ModuleType

PACKAGES = {"nflows": "nflows", "zuko": "zuko", "normflows": "normflows", "freia": "FrEIA"}  # name -> what is imported
INSTALL = "pip install 'flowtrain[bench]'"


def present(names: list[str]) -> tuple[dict[str, ModuleType], list[str]]:
    """The modules of those of ``names`` that are installed, and the names of those that are not."""
    absent = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names if name not in absent}, absent


def versions(names) -> dict[str, str]:
    return {name: version(PACKAGES[name]) for name in names}
