"""Tables pickled by any version of pandas, read without letting the pickle run other code."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

_MODULES = {  # name -> its module in today's libraries; an old file names the modules of its time
    "DataFrame": "pandas",
    "BlockManager": "pandas.core.internals",
    "_unpickle_block": "pandas._libs.internals",
    "_new_Index": "pandas.core.indexes.base",
    "Index": "pandas",
    "RangeIndex": "pandas",
    "StringDtype": "pandas",
    "ArrowStringArray": "pandas.arrays",
    "_restore_array": "pyarrow.lib",
    "type_for_alias": "pyarrow.lib",
    "py_buffer": "pyarrow",
    "ndarray": "numpy",
    "dtype": "numpy",
    "_reconstruct": "numpy._core.multiarray",
    "scalar": "numpy._core.multiarray",
    "_frombuffer": "numpy._core.numeric",
    "_reconstructor": "copyreg",
    "encode": "_codecs",
    "object": "builtins",
    "slice": "builtins",
    "bytearray": "builtins",
}
_NEW_NAMES = {"Int64Index": "Index", "UInt64Index": "Index", "Float64Index": "Index", "new_block": "_unpickle_block"}


def read(path: Path):
    """The pandas table in ``path``. Raises pickle.UnpicklingError if it holds more than tables of numbers and text."""
    with open(path, "rb") as file:
        return _FrameUnpickler(file, encoding="latin1").load()  # Python 2 pickled text as bytes


class _FrameUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        name = _NEW_NAMES.get(name, name)
        if name not in _MODULES:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, not only tables")
        return getattr(importlib.import_module(_MODULES[name]), name)
