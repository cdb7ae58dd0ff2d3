"""Softmax beyond the matrix of tests/test_ops.py: masks, dtype, what backward keeps, modules, errors."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm.ops import log_softmax, masked_softmax, softmax
from tests.parity import INTERPRETED, forced, hold, leaf

implementation = forced("masked_softmax", "torch", "reference", "native", "triton")


def test_a_mask_keeps_where_it_is_true(implementation):
    x = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, False, True]])
    p = masked_softmax(x, mask, scale=2.0)
    assert p[0, 1] == 0
    torch.testing.assert_close(p[:, ::2], torch.softmax(2 * x[:, ::2], -1))
    bias = torch.zeros(1, 3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(p, torch.softmax(2 * x + bias, -1))


def test_where_nothing_is_kept_all_is_zero(implementation):
    """Result and gradients, first and second, are zero there, not NaN; the other rows are as they were."""
    x = torch.randn(4, 33, requires_grad=True)
    mask = torch.rand(4, 33) < 0.5
    mask[1] = False
    mask[2:] = True
    p = masked_softmax(x, mask)
    assert (p[1] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.tensor([1.0, 0, 1, 1]))
    first = torch.autograd.grad(p.square().sum(), x, create_graph=True)[0]
    assert (first[1] == 0).all()
    assert (first[~mask] == 0).all()
    second = torch.autograd.grad(first.square().sum(), x)[0]
    assert second.isfinite().all()
    expected = torch.autograd.grad(torch.softmax(x, -1)[2:].square().sum(), x)[0]
    torch.testing.assert_close(first[2:], expected[2:])


def test_a_whole_mask_of_one_column(implementation):
    """A mask may have one column for all: a query that sees nothing."""
    x, mask = torch.randn(2, 3, 5), torch.tensor([[True], [False], [True]])
    p = masked_softmax(x, mask)
    torch.testing.assert_close(p, torch.softmax(x, -1) * mask)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_far_below_zero(masked, implementation):
    """What lies beyond the end of a row is no maximum."""
    x, mask = torch.randn(3, 21) - 300, torch.rand(3, 21) < 0.7 if masked else None
    expected = torch.softmax(x.masked_fill(~mask, -torch.inf) if masked else x, -1)
    torch.testing.assert_close(masked_softmax(x, mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays_in_its_row(dtype, implementation):
    x = torch.randn(3, 20, dtype=dtype)
    x[1, 3] = torch.nan
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 7] = False
    p = masked_softmax(x, mask)
    assert p[1, mask[1]].isnan().all()
    assert p[[0, 2]].isfinite().all()
    if implementation == "triton":
        assert p[1, 7] == 0


def test_small_shares_in_16_bits(implementation):
    """A share that the result's dtype has is not 0, however small beside the largest."""
    x = torch.tensor([[0.0, -16.0, -30.0, -80.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(masked_softmax(x).double(), torch.softmax(x.double(), -1), rtol=2**-7, atol=0)


@pytest.mark.parametrize("fn", [softmax, log_softmax, masked_softmax])
def test_dtype_casts_first(fn):
    x = torch.randn(3, 5).bfloat16().requires_grad_()
    y = fn(x, dim=-1, dtype=torch.float32)
    assert y.dtype is torch.float32
    stock = torch.log_softmax if fn is log_softmax else torch.softmax
    torch.testing.assert_close(y, stock(x, -1, dtype=torch.float32))
    assert torch.autograd.grad(y.sum(), x)[0].dtype is torch.bfloat16
    assert fn(torch.tensor([1, 2]), dim=0, dtype=torch.float64).dtype is torch.float64


@pytest.mark.parametrize("fn", [softmax, log_softmax, lambda x, dim: masked_softmax(x, x > -1, dim, scale=0.5)])
def test_double_backward(fn, implementation):
    x = torch.randn(3, 4, 5, requires_grad=True)
    stock = {softmax: torch.softmax, log_softmax: torch.log_softmax}.get(
        fn, lambda x, dim: torch.softmax((0.5 * x).masked_fill(x <= -1, -torch.inf), dim))
    for dim in (1, -1):
        if implementation == "native" and dim == 1 and fn not in (softmax, log_softmax):
            continue
        first = [torch.autograd.grad(f(x, dim).sin().sum(), x, create_graph=True)[0] for f in (fn, stock)]
        torch.testing.assert_close(*first)
        torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), x)[0] for g in first))


def test_backward_keeps_the_result_alone():
    """The input is not held until backward: a softmax costs no more memory than stock's."""
    with fastlm.backend("triton" if INTERPRETED else "native"):
        x = torch.randn(64, 128, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = masked_softmax(x, torch.ones(64, 128, dtype=torch.bool))
    assert [t.data_ptr() for t in kept if t.untyped_storage().nbytes() >= x.nbytes] == [y.data_ptr()]


def test_log_softmax_of_a_certain_class():
    x = torch.tensor([[0.0, 200.0]])
    assert torch.equal(log_softmax(x, -1), torch.tensor([[-200.0, 0.0]]))


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.filterwarnings("ignore:.*dim.*")
def test_log_softmax_module(dim, device):
    theirs, ours = nn.LogSoftmax(dim), fastlm.nn.LogSoftmax(dim)
    assert repr(ours) == repr(theirs)
    for dtype in (torch.float32, torch.bfloat16):
        hold(theirs, ours, lambda m, x: m(x), [leaf(3, 4, device=device, dtype=dtype)])


X = torch.zeros(2, 3)
BAD = [
    (TypeError, r"masked_softmax: mask must be a boolean Tensor \(True keeps\), got torch.float32",
     lambda: masked_softmax(X, X)),
    (TypeError, r"masked_softmax: mask must be a boolean Tensor \(True keeps\), got list",
     lambda: masked_softmax(X, [True])),
    (ValueError, r"masked_softmax: mask has shape \[2\], which does not broadcast to input's \[2, 3\]",
     lambda: masked_softmax(X, X[:, 0] > 0)),
    (ValueError, r"masked_softmax: mask has shape \[1, 2, 3\]", lambda: masked_softmax(X, X[None] > 0)),
    (IndexError, "masked_softmax: dim 2 is out of range", lambda: masked_softmax(X, dim=2)),
    (IndexError, "log_softmax: dim -3 is out of range", lambda: log_softmax(X, -3)),
    (TypeError, "log_softmax: input must be floating point", lambda: log_softmax(X.int(), 0)),
    (TypeError, "softmax: input must be floating point", lambda: softmax(X[:0].int(), 0)),
    (TypeError, "softmax: input must be a Tensor, got float", lambda: softmax(1.0, 0)),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_an_error_that_names_it(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
