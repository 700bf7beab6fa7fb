"""Other libraries. The module of each builds flows like ours, of the same size, from the library's layers.

A module has the functions ``maf``, ``nsf_coupling``, ``nsf_autoregressive``, ``spline`` and ``glow``, as far as its
library has the layers for them.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from types import ModuleType

PACKAGES = {
    "nflows": "nflows",
    "zuko": "zuko",
    "normflows": "normflows",
    "freia": "FrEIA",
}  # name -> package
INSTALL = "pip install 'flowtrain[bench]'"


def import_installed(names: list[str]) -> tuple[dict[str, ModuleType], list[str]]:
    """Import the modules of the installed libraries among ``names``: name -> module, and the names of the others."""
    absent = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names if name not in absent}, absent


def versions(names) -> dict[str, str]:
    return {name: version(PACKAGES[name]) for name in names}
