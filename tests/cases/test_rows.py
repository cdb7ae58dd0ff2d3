"""The operators over csrc/rows.h as PyTorch's own checks see them, and compositions of them compiled whole."""

import pytest
import torch

import fastlm
from fastlm import ops

_native = pytest.importorskip("fastlm._native")


def randn(*shape):
    return torch.randn(shape)


def angles():
    return randn(1, 5, 1, 4).expand(-1, -1, 2, -1)


def blank(*shape):
    return torch.zeros(()).expand(shape)


CASES = {
    "norm_native": lambda: ([randn(6, 33), randn(33)], [1, -1, 1, -1], 1e-5, False),
    "norm_native centred": lambda: ([randn(6, 33), randn(33), randn(33)], [1, -1, 1, 0], 1e-5, True),
    "add_norm_native": lambda: ([randn(6, 33), randn(6, 33), randn(33)], [1, 1, 1, -1], 1e-5, False),
    "add_norm_native frozen": lambda: ([randn(6, 33), randn(6, 33)], [0, 0, -1, -1], 1e-5, False),
    "gated_native": lambda: ([randn(6, 33), randn(6, 33)], [1, 0], "gelu"),
    "rotary_native": lambda: ([randn(2, 5, 3, 10).transpose(1, 2), angles(), angles()], [1, 0, 0], False),
    "softmax_native": lambda: ([randn(6, 33), randn(6, 33) > 0], [1, 0], 0.5),
    "norm_native_backward": lambda: ([randn(6, 33)], [randn(6)], [randn(6, 33), randn(33)], [1, -1, 1, -1], 1e-5,
                                     False),
    "add_norm_native_backward": lambda: ([randn(6, 33), randn(6, 33)], [randn(6)],
                                         [randn(6, 33), blank(6, 33), randn(33)], [1, 0, 1, -1], 1e-5, False),
    "gated_native_backward": lambda: ([randn(6, 33)], [], [randn(6, 33), randn(6, 33)], [1, 0], "silu"),
    "rotary_native_backward": lambda: ([randn(2, 3, 5, 10)], [], [blank(2, 3, 5, 10), angles(), angles()], [1, 0, 0],
                                       True),
    "softmax_native_backward": lambda: ([randn(6, 33)], [], [randn(6, 33), blank(6, 33) > 0], [1, 0], 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.fastlm, name.split()[0]).default, CASES[name]())


def test_a_block_compiled_whole():
    """Norm with residual, gate and masked softmax in one graph: gradients as in eager, also with a frozen input."""
    norm, mask = fastlm.nn.RMSNorm(64), torch.rand(3, 64) < 0.5

    def block(x, residual):
        y, total = norm(x, residual)
        return (ops.swiglu(y, total) * ops.masked_softmax(total, mask)).sum()

    torch._dynamo.reset()
    with fastlm.backend("native"):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for frozen in (False, True):
            x, residual = randn(3, 64).requires_grad_(not frozen), randn(3, 64).requires_grad_()
            wanted = [t for t in (x, residual, norm.weight) if t.requires_grad]
            grads = [torch.autograd.grad(f(x, residual), wanted) for f in (block, compiled)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


def test_small_calls_stay_stock_and_say_why():
    call, = fastlm.explain(ops.rms_norm, randn(4, 64), (64,))
    assert call.ran == "torch"
    assert "slower than torch below" in call.declined["native"] or "not yet measured" in call.declined["native"]
