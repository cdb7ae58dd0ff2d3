"""Options and fixtures that every test file shares."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda: where the parity matrix runs")
    parser.addoption("--deep", action="store_true", help="also run combinations that take long")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that a kernel which leaves part of a result unwritten is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
