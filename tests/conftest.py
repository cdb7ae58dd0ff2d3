"""Options and fixtures that every test file shares."""

import os
import tempfile

import pytest
import torch

from fastlm import measure
from fastlm.ops import head
from tests.parity import INTERPRETED, skip_misinterpreted

# What an older state of these sources compiled must not answer for this one: operators may return other things now.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="fastlm-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn):
        """Patch the language for a kernel, and as its own library sees it, until the kernel has run."""
        scope = patch(fn)
        scope._changes += patch(tl.zeros.fn)._changes
        return scope

    # Each call of a function would patch it again, which took half of a test's time.
    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda: where the parity matrix runs")
    parser.addoption("--deep", action="store_true", help="also run combinations that take long")
    parser.addoption("--shard", default="1/1", help="i/n: run every n-th test from the i-th on, in one of n processes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # on by default, where torch's own products are exact
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    first, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[first - 1::count]


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Work of small models is fastest so, and a child process then computes the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN, so that a kernel which leaves part of a result unwritten is caught."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch, poisoned):
    """Hold an implementation to the error rule on a named sample, in blocks of 7 rows and tiles of 9 classes."""
    for name, value in dict(MIN_ROWS=7, BLOCK_BYTES=0, GPU_ROWS=(7, 7), HALF_ROWS=7, SUM_BYTES=0, TILE=9).items():
        monkeypatch.setattr(head, name, value)

    def check(op, name, dtype, sample, device):
        sample = next(s for s in op.samples("test", dtype, device) if s.name == sample)
        if reason := op.implementations[name].cannot(*sample.args):
            pytest.skip(reason)
        skip_misinterpreted(dtype)
        for error in measure.errors(op, name, sample.args):
            assert error.ok, error
    return check
