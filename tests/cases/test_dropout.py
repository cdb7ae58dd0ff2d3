"""dropout_add: the mask's distribution, its seed, and that forward and backward draw the same one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastlm.ops import dropout_add
from tests.parity import forced

implementation = forced("dropout_add", "torch", "triton")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_scaled(p, implementation):
    x, residual = torch.ones(200, 100), torch.full((200, 100), 3.0)
    y = dropout_add(x, residual, p) - residual
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4, atol=1e-5)
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    for dim in (0, 1):  # no row and no column is special
        deviation = (kept.double().mean(dim) - (1 - p)).abs().max()
        assert deviation < 5 * (p * (1 - p) / kept.size(dim)) ** 0.5


def test_forward_and_backward_draw_the_same_mask(implementation):
    x, residual = (torch.randn(50, 60, requires_grad=True) for _ in range(2))
    y = dropout_add(x, residual, 0.3)
    factor = ((y - residual) / x).detach()
    upstream = torch.randn_like(y)
    dx, dresidual = torch.autograd.grad(y, (x, residual), upstream)
    torch.testing.assert_close(dx, upstream * factor, rtol=1e-3, atol=1e-3)
    assert torch.equal(dresidual, upstream)


def test_manual_seed_decides(implementation):
    x, residual = torch.randn(50, 60), torch.randn(50, 60)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append((dropout_add(x, residual, 0.3), dropout_add(x, residual, 0.3)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_mask_again(reentrant, implementation):
    x, residual = (torch.randn(20, 30, requires_grad=True) for _ in range(2))
    grads = []
    for again in (False, True):
        torch.manual_seed(3)
        run = (lambda *a: checkpoint(dropout_add, *a, use_reentrant=reentrant)) if again else dropout_add
        grads.append(torch.autograd.grad(run(x, residual, 0.4).square().sum(), (x, residual))
                     if not (again and reentrant) else _backward(run, x, residual))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def _backward(run, x, residual):
    run(x, residual, 0.4).square().sum().backward()
    return x.grad, residual.grad


def test_double_backward(implementation):
    x, residual = (torch.randn(20, 30, requires_grad=True) for _ in range(2))
    y = dropout_add(x, residual, 0.4)
    factor = ((y - residual) / x).detach()
    dx = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(dx.sum(), x)[0]
    torch.testing.assert_close(second, 6 * y.detach() * factor**2, rtol=1e-2, atol=1e-2)


def test_on_the_cpu_the_mask_is_stocks():
    x, residual = torch.randn(50, 60), torch.randn(50, 60)
    torch.manual_seed(1)
    found = dropout_add(x, residual, 0.3)
    torch.manual_seed(1)
    assert torch.equal(found, F.dropout(x, 0.3) + residual)


def test_without_training_nothing_is_drawn(implementation):
    x, residual = torch.randn(5, 6), torch.randn(5, 6)
    assert torch.equal(dropout_add(x, residual, 0.5, False), x + residual)


def test_16_bits(implementation):
    x, residual = torch.randn(50, 60).half(), torch.randn(50, 60).half()
    y = dropout_add(x, residual, 0.3)
    assert y.dtype is torch.float16
    assert (y == residual).float().mean() > 0.2


X = torch.zeros(3, 4)
BAD = [
    (ValueError, "p is 1.5, expected a probability", lambda: dropout_add(X, X, 1.5)),
    (ValueError, r"residual has shape \[4\], x has \[3, 4\]", lambda: dropout_add(X, X[0])),
    (TypeError, "residual must be a Tensor, got float", lambda: dropout_add(X, 0.0)),
    (TypeError, "x must be floating point, got torch.int64", lambda: dropout_add(X.long(), X)),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_an_error_that_names_it(kind, message, call):
    with pytest.raises(kind, match=f"dropout_add: {message}"):
        call()
