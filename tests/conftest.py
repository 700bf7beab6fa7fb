import json
import os
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # audit.py, layers.py

_promises: list[tuple[int, str, str]] = []  # of docs/reliability.md, as this run has seen them
_began = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")
    parser.addoption(
        "--reliability", action="store_true", help="the promises of reliability alone, counted in full, not a tenth"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs with --long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--reliability"):
        others = [item for item in items if "promise" not in item.fixturenames]
        items[:] = [item for item in items if "promise" in item.fixturenames]
        config.hook.pytest_deselected(items=others)
    if config.getoption("--long"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; runs with --long"))


def pytest_terminal_summary(terminalreporter, config):
    if not _promises:
        return
    if config.getoption("--reliability"):  # for scripts/reliability
        found = {
            "date": f"{date.today()}",
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "promises": sorted(_promises),
            "seconds": time.monotonic() - _began,
        }
        (config.rootpath / "outputs" / "reliability.json").write_text(json.dumps(found, indent=2) + "\n")
    rows = [("promise", "asked", "seen"), *((str(number), asked, seen) for number, asked, seen in sorted(_promises))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("reliability")
    for row in rows:
        terminalreporter.write_line(" | ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def count(pytestconfig):
    """``count(full)``: how many of ``full`` cases this run does: all with --reliability, else a tenth."""
    share = 1 if pytestconfig.getoption("--reliability") else 10
    return lambda full: -(-full // share)


@pytest.fixture(scope="session")
def promise():
    """``promise(number, asked, seen)``: a line of the table at the end of the run. Said before the assertion, so that
    a promise that is not kept is in the table too."""
    return lambda number, asked, seen: _promises.append((number, asked, seen))
