"""Which tests run, and the table of promises at the end of a run.

A plain run leaves out tests/reliability and tests marked ``slow``. ``--all`` runs them, and so does naming their file.
"""

import json
import os
import sys
import time
from datetime import date
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side, and a run with one thread has none to choose from
HERE = Path(__file__).parent
RELIABILITY = HERE / "reliability"
sys.path.insert(0, str(HERE))  # audit.py, layers.py

_promises: list[tuple[int, str, str]] = []  # numbered as in docs/reliability.md; what was asked; what was seen
_start = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run slow tests and tests/reliability too")
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")
    parser.addoption(
        "--reliability", action="store_true", help="only the promises of reliability, at full counts, not a tenth"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out of a plain run; runs with --all, or when its file is named")
    config.addinivalue_line("markers", "workers: jobs run in processes of their own, as they do for a user")
    config.addinivalue_line("markers", "long: takes minutes; runs with --long")
    if config.args_source is config.ArgsSource.ARGS or config.getoption("--reliability"):
        config.option.all = True


def pytest_report_header(config):
    if not config.option.all:
        return "plain run: without tests/reliability and slow tests; --all runs them too"


def pytest_ignore_collect(collection_path, config):
    return True if collection_path == RELIABILITY and not config.option.all else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one file run in one process, for its fixtures. So do all of reliability, which watch the clock. Pages of
    test_docs are shared out. (xdist's own groups have no effect from pytest 9.2 on.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            if file.endswith("test_docs.py"):
                return nodeid
            return "reliability" if file.startswith("tests/reliability/") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "long" in item.keywords and not config.option.long:
            item.add_marker(pytest.mark.skip(reason="takes minutes; runs with --long"))
    if config.getoption("--reliability"):
        _keep(config, items, lambda item: "promise" in item.fixturenames)
    if not config.option.all:
        _keep(config, items, lambda item: "slow" not in item.keywords)


def _keep(config, items, chosen):
    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["promises"] = _promises


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _promises.extend(map(tuple, getattr(node, "workeroutput", {}).get("promises", ())))


def pytest_terminal_summary(terminalreporter, config):
    if not _promises:
        return
    if config.getoption("--reliability"):  # for scripts/reliability
        found = {
            "date": f"{date.today()}",
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "promises": sorted(_promises),
            "seconds": time.monotonic() - _start,
        }
        (config.rootpath / "outputs" / "reliability.json").write_text(json.dumps(found, indent=2) + "\n")
    rows = [("promise", "asked", "seen"), *((str(number), asked, seen) for number, asked, seen in sorted(_promises))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("reliability")
    for row in rows:
        terminalreporter.write_line(" | ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


@pytest.fixture(autouse=True)
def each_test_starts_alike():
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)  # commands with deterministic=true leave it on


@pytest.fixture(scope="session")
def count(pytestconfig):
    """``count(full)``: how many of ``full`` cases this run tests: all with --reliability, else a tenth."""
    share = 1 if pytestconfig.getoption("--reliability") else 10
    return lambda full: -(-full // share)


@pytest.fixture(scope="session")
def promise():
    """``promise(number, asked, seen)``: add a line to the table at the end of the run. Tests call it before their
    assertion, so that the table has broken promises too."""
    return lambda number, asked, seen: _promises.append((number, asked, seen))
