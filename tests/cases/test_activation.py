"""Activations beyond the matrix of tests/test_ops.py: small tails, modules, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.ops import geglu, gelu, swiglu
from tests.parity import INTERPRETED, forced, hold, leaf

implementation = forced("geglu", "torch", "reference", "native", "triton")


@pytest.mark.skipif(INTERPRETED, reason="the kernels for the CPU")
def test_tails_of_gelu():
    """Far from zero gelu is tiny, and still has digits there, unlike 1 + erf."""
    a = torch.linspace(-12, 12, 4001)
    exact = 0.5 * a.double() * torch.special.erfc(-a.double() / 2**0.5)
    with fastlm.backend("native"):
        found = geglu(a, torch.ones(4001))
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-37)


def test_not_a_number_and_infinity(implementation):
    gate = torch.tensor([torch.nan, torch.inf, 1.0])
    torch.testing.assert_close(swiglu(gate, torch.ones(3)), F.silu(gate), equal_nan=True)
    far = torch.tensor([-1e38, -3e38, -200.0, -torch.inf, -88.0], requires_grad=True)
    for fn in (F.silu, lambda x: swiglu(x, torch.ones(5))):
        found = fn(far)
        assert (found[:3] == 0).all()
        assert found[3].isnan()
        assert -2e-36 < found[4] <= 0
        slope, = torch.autograd.grad(found.sum(), far)
        assert (slope[:3] == 0).all()
        assert slope[3].isnan()
    found = geglu(gate, torch.ones(3), "tanh")
    torch.testing.assert_close(found, F.gelu(gate, approximate="tanh"), equal_nan=True)
    if implementation != "torch":  # which makes NaN of infinity
        assert geglu(gate, torch.ones(3))[1] == torch.inf


def test_halves_of_a_projection_are_read_in_place(implementation):
    x = torch.randn(3, 5, 66, requires_grad=True)
    for fn, stock in ((swiglu, F.silu), (geglu, F.gelu)):
        y, expected = fn(x[..., :33], x[..., 33:]), stock(x[..., :33]) * x[..., 33:]
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (y, expected)))


@pytest.mark.parametrize("apart", [(33, 40), (40, 33), (40, 50)])
def test_each_of_both_has_strides_of_its_own(apart, implementation):
    gate, up = (torch.randn(5, width)[:, :33].requires_grad_() for width in apart)
    for fn, stock in ((swiglu, F.silu), (geglu, F.gelu)):
        y, expected = fn(gate, up), stock(gate) * up
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(t.sin().sum(), (gate, up)) for t in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("fn", [swiglu, geglu, lambda a, b: geglu(a, b, "tanh")])
def test_double_backward(fn, implementation):
    a, b = (torch.randn(3, 7, requires_grad=True) for _ in range(2))
    kind = {swiglu: F.silu, geglu: F.gelu}.get(fn, lambda a: F.gelu(a, approximate="tanh"))
    grads = []
    for y in (fn(a, b), kind(a) * b):
        first = torch.autograd.grad(y.sin().sum(), (a, b), create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), (a, b)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_module(approximate, device):
    theirs, ours = nn.GELU(approximate), fastlm.nn.GELU(approximate)
    assert repr(ours) == repr(theirs)
    for dtype in (torch.float32, torch.bfloat16):
        hold(theirs, ours, lambda m, x: m(x), [leaf(3, 4, device=device, dtype=dtype)])


def test_gated_modules(device):
    x = leaf(2, 6, 8, device=device, dtype=torch.float32)
    for module, gate in ((fastlm.nn.SwiGLU, F.silu), (fastlm.nn.GEGLU, F.gelu)):
        for dim in (-1, 1):
            a, b = x.chunk(2, dim)
            torch.testing.assert_close(module(dim)(x), gate(a) * b)
            torch.testing.assert_close(module(dim)(a, b), gate(a) * b)
        with pytest.raises(ValueError, match="dimension 0 of the input has size 3, expected an even one"):
            module(0)(x.new_zeros(3))
    assert repr(fastlm.nn.SwiGLU()) == "SwiGLU(dim=-1)"
    assert repr(fastlm.nn.GEGLU(approximate="tanh")) == "GEGLU(dim=-1, approximate='tanh')"


X = torch.zeros(3, 4)
BAD = [
    (TypeError, "swiglu: up must be a Tensor, got NoneType", lambda: swiglu(X, None)),
    (TypeError, "geglu: gate must be floating point, got torch.int64", lambda: geglu(X.long(), X)),
    (ValueError, r"swiglu: up has shape \[4\], gate has \[3, 4\]", lambda: swiglu(X, X[0])),
    (RuntimeError, "gelu: approximate is 'sigmoid', expected 'none' or 'tanh'", lambda: gelu(X, "sigmoid")),
    (RuntimeError, "geglu: approximate is 'sigmoid'", lambda: geglu(X, X, "sigmoid")),
    (TypeError, "gelu: input must be a Tensor, got int", lambda: gelu(1)),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_an_error_that_names_it(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
