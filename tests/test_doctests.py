"""The examples in the library's docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import flowtrain

SOURCE = Path(flowtrain.__file__).parent
FILES = [SOURCE / "flow.py", SOURCE / "flow_distribution.py", SOURCE / "distributions.py"]
FILES += [SOURCE / "engine" / "calibration.py"]
FILES += [
    file
    for room in ("flows", "bijections", "nets", "inference", "scores", "targets", "data/simulations")
    for file in sorted((SOURCE / room).glob("*.py"))
]
WITH_EXAMPLES = [
    ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts) for file in FILES if ">>>" in file.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    if name == "flowtrain.inference.sbi":
        pytest.importorskip("sbi")
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted and not found.failed, "the differences are in the captured output"
