"""Hypothesis' number of examples (100, always the same; 10,000 with --long), and the server of forked commands."""

import pytest
from forks import Server
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def pytest_configure(config):
    settings.register_profile("plain", max_examples=100, derandomize=True, **COMMON)
    settings.register_profile("long", max_examples=10_000, **COMMON)
    settings.load_profile("long" if config.getoption("--long") else "plain")


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()
