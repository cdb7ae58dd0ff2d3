"""The options of the tests, for benchmarks: `pytest benchmarks --benchmark-enable --device cpu`."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")
