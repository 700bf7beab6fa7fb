"""How much hypothesis tries: the same few examples in every plain run, ten thousand with --long; and the server of
forked commands."""

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
    one = Server()
    yield one
    one.close()
