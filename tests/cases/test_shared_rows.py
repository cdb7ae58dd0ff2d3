"""Rows that programs of one launch share: what the interpreter, whose programs run one by one, cannot wait for.

What a program publishes depends on its inputs alone. So it is run twice: first to publish, then with everything there.
"""

import pytest
import torch

from fastlm import measure
from fastlm.ops.norm import add_layer_op, add_rms_op, layer_op, rms_op
from fastlm.ops.softmax import log_op, masked_op, op
from tests.parity import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="interpreted programs")

if INTERPRETED:
    import triton
    import triton.language as tl

    from fastlm.ops import norm_triton, softmax_triton, triton_kernels

    @triton.jit
    def exchange(words, part, word, idle, parts, SLOTS: tl.constexpr):
        tl.store(words + part, word)
        slot = tl.arange(0, SLOTS)
        return tl.load(words + slot, slot < parts, idle)

    @triton.jit
    def exchange_once(words, part, word, idle, parts, SLOTS: tl.constexpr):
        return exchange(words, part, tl.max(word), idle, parts, SLOTS)[None, :]

    def launch(plan, *args):
        for _ in range(2):
            triton_kernels.launch(plan, *args)


@pytest.fixture
def shared(monkeypatch):
    """Let programs share rows of more than 100 numbers."""
    for module in (norm_triton, softmax_triton):
        for name, value in (("launch", launch), ("concurrent", lambda device: True),
                            ("multiprocessors", lambda device: 8)):
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(norm_triton, "exchange", exchange)
    monkeypatch.setattr(norm_triton, "PART", 32)
    monkeypatch.setattr(norm_triton, "BACKWARD_WIDTH", 32)
    monkeypatch.setattr(softmax_triton, "exchange_once", exchange_once)
    monkeypatch.setattr(softmax_triton, "LONG", 100)
    monkeypatch.setattr(softmax_triton, "PART", (32, 64))
    softmax_triton._walk.cache_clear()
    yield
    softmax_triton._walk.cache_clear()


def hold(op, *args):
    for error in measure.errors(op, "triton", args):
        assert error.ok, error


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [128, 201])
def test_norms(cols, dtype, added, centred, shared):
    x, residual, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((11, cols), (11, cols), cols, cols))
    norm = {(False, False): rms_op, (False, True): layer_op, (True, False): add_rms_op,
            (True, True): add_layer_op}[added, centred]
    assert norm_triton.split_rows(x, torch.ones(11))[:2] == ((2, 4) if cols == 128 else (1, 7))
    hold(norm, x, residual if added else None, weight, bias if centred else None, (cols,), 1e-5, centred)


def test_norms_of_zeros(shared):
    """Sums that are 0 are published too."""
    x, dy = torch.zeros(3, 128), torch.zeros(3, 128)
    rstd = norm_triton.forward(x, None, None, None, 1e-5, False)[3]
    assert (norm_triton.backward(dy, None, x, None, None, rstd, (True, None, None))[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cols", [128, 201])
def test_softmax(cols, dtype, shared):
    x = torch.randn(3, 2, 11, cols, dtype=dtype).transpose(0, 2)
    x[0, 0, 0] = -300.0
    x[1, 1, 1, :150] = -torch.inf
    mask = (torch.rand(3, cols) < 0.3).expand(x.shape)
    hold(op, x, -1)
    hold(log_op, torch.randn(50, cols, dtype=dtype), -1, None, 1.0, True)
    hold(masked_op, torch.randn(11, 2, 3, cols, dtype=dtype), -1, mask, 0.125, False)
    hold(op, torch.randn(128, 3, dtype=dtype).t(), -1)
