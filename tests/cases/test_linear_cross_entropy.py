"""linear_cross_entropy beyond the matrix: faults that other libraries had, errors, autocast, second order."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops import linear_cross_entropy


def problem(n=33, h=12, v=70, dtype=torch.float32, device="cpu"):
    x = torch.randn(n, h, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(v, h, dtype=dtype, device=device, requires_grad=True)
    return x, weight, torch.randint(v, (n,), device=device)


def grads(loss, *inputs, **kwargs):
    return torch.autograd.grad(loss, inputs, **kwargs)


def test_runs_a_block_at_a_time_by_default():
    assert fastlm.explain(linear_cross_entropy, *problem())[0].ran in ("native", "blocked")


def test_one_row_without_batch_dimension(device):
    x, weight, target = problem(1, device=device)
    for reduction in ("mean", "none"):
        ours = linear_cross_entropy(x[0], weight, target[0], reduction=reduction)
        stock = F.cross_entropy(F.linear(x[0], weight), target[0], reduction=reduction)
        assert ours.shape == stock.shape == ()
        torch.testing.assert_close(ours, stock)


def test_upstream_gradient_is_applied_and_left_alone(device):
    x, weight, target = problem(device=device)
    loss = linear_cross_entropy(x, weight, target)
    upstream = torch.tensor(3.0, device=device)
    found = grads(loss, x, weight, grad_outputs=upstream, retain_graph=True)
    assert upstream.item() == 3.0
    again = grads(loss, x, weight, grad_outputs=upstream)
    expected = grads(3 * F.cross_entropy(F.linear(x, weight), target), x, weight)
    for a, b, c in zip(found, again, expected, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_loss_without_gradients(device):
    x, weight, target = problem(device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight), target).detach())
    assert not loss.requires_grad


def test_accumulating_gradients_adds_up(device):
    x, weight, target = problem(64, device=device)
    for part in (slice(0, 30), slice(30, 64)):
        linear_cross_entropy(x[part], weight, target[part], reduction="sum").backward()
    expected = grads(F.cross_entropy(F.linear(x, weight), target, reduction="sum"), x, weight)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.parametrize("ignore_index", [None, -100, 3, 255])
def test_ignore_index(ignore_index, device):
    x, weight, target = problem(device=device)
    target[:5] = -100 if ignore_index is None else ignore_index
    expected = F.cross_entropy(F.linear(x, weight), target, ignore_index=-100 if ignore_index is None else ignore_index)
    found = linear_cross_entropy(x, weight, target, ignore_index=ignore_index)
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads(found, x, weight), grads(expected, x, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_all_ignored_gives_nan_and_zero_gradients(device):
    x, weight, target = problem(device=device)
    loss = linear_cross_entropy(x, weight, torch.full_like(target, -100))
    assert loss.isnan()
    assert all((g == 0).all() for g in grads(loss, x, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_whole_with_ignored_targets(reduction, device):
    x, weight, target = problem(device=device)
    target[::4] = -100

    def loss(x, weight, target):
        return linear_cross_entropy(x, weight, target, reduction=reduction, label_smoothing=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    eager, compiled = (grads(f(x, weight, target).sum(), x, weight) for f in (loss, compiled))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_gives_a_float32_loss(device):
    x, weight, target = problem(256, 64, 1000, device=device)
    with torch.autocast(device, torch.bfloat16), fastlm.backend("blocked"):
        found = linear_cross_entropy(x, weight, target)
        expected = F.cross_entropy(F.linear(x, weight), target)
    assert found.dtype is expected.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # stock rounds the logits
    for a, b in zip(grads(found, x, weight), grads(expected, x, weight), strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(reduction, device):
    x, weight, target = problem(5, 3, 7, torch.float64, device)
    bias = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)

    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=0.2)
    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (x, weight, bias))


def test_functional_transforms(device):
    x, weight, target = problem(6, 4, 9, device=device)
    found = torch.func.grad(linear_cross_entropy)(x.detach(), weight.detach(), target)
    torch.testing.assert_close(found, grads(F.cross_entropy(F.linear(x, weight), target), x)[0])
    per_sample = torch.func.vmap(torch.func.grad(linear_cross_entropy), (0, None, 0))(
        x.detach()[:, None], weight.detach(), target[:, None])
    for i in range(6):
        expected = grads(F.cross_entropy(F.linear(x[i:i + 1], weight), target[i:i + 1]), x)[0][i]
        torch.testing.assert_close(per_sample[i, 0], expected)


def test_accumulation_in_bf16_does_not_drift():
    """A weight gradient summed over many blocks is as near to float64 as stock's, which sums in one product."""
    x, weight, target = problem(2048, 8, 40000, torch.bfloat16)
    exact = grads(F.cross_entropy(F.linear(x.double(), weight.double()), target), weight)[0].double()
    stock = grads(F.cross_entropy(F.linear(x, weight), target), weight)[0].double()
    with fastlm.backend("blocked"):
        ours = grads(linear_cross_entropy(x, weight, target), weight)[0].double()
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


def test_stock_options_are_honoured():
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    x, weight, target = problem()
    if options is None:
        with pytest.raises(TypeError, match=r"2\.13"):
            linear_cross_entropy(x, weight, target, options=object())
        return
    calls = fastlm.explain(linear_cross_entropy, x, weight, target, options=options())
    assert calls[0].ran == "torch"
    assert "options" in calls[0].declined["blocked"]


BAD = {
    "input": (dict(input=torch.tensor(1.0)), RuntimeError, "input must be"),
    "width": (dict(linear_weight=torch.randn(7, 5)), RuntimeError, "linear_weight must be"),
    "target shape": (dict(target=torch.zeros(9, dtype=torch.int64)), ValueError, "target has shape"),
    "target dtype": (dict(target=torch.zeros(6, dtype=torch.int32)), RuntimeError, "int64"),
    "bias": (dict(linear_bias=torch.randn(8)), RuntimeError, "linear_bias has shape"),
    "class weights": (dict(weight=torch.randn(8)), RuntimeError, "weight is"),
    "class weights' dtype": (dict(weight=torch.randn(7).double()), RuntimeError, "weight is"),
    "reduction": (dict(reduction="average"), ValueError, "reduction must be one of"),
    "smoothing": (dict(label_smoothing=1.5), RuntimeError, "label_smoothing"),
    "no tensor": (dict(input=[1.0]), TypeError, "input must be a Tensor"),
    "integers": (dict(input=torch.ones(6, 4, dtype=torch.int64)), RuntimeError, "floating point"),
    "range": (dict(target=torch.tensor([0, 1, 2, 3, 4, 7])), IndexError, "target 7 is out of bounds"),
    "negative": (dict(target=torch.tensor([0, 1, 2, 3, 4, -1])), IndexError, "target -1 is out of bounds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    change, error, message = BAD[case]
    good = dict(input=torch.randn(6, 4), linear_weight=torch.randn(7, 4), target=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(error, match=message):
        linear_cross_entropy(**good | change)


def test_meta_tensors():
    target = torch.zeros(3, dtype=torch.int64, device="meta")
    module = fastlm.nn.LinearCrossEntropyLoss(4, 3, device="meta")
    assert module(torch.randn(3, 4, device="meta"), target).is_meta


def test_forward_mode_runs_stock():
    """Kernels have no forward-mode derivative: by default stock runs, asked for by name they refuse."""
    x, weight, target = problem(6, 4, 9)
    found = torch.func.hessian(lambda x: linear_cross_entropy(x, weight, target))(x.detach())
    expected = torch.func.hessian(lambda x: F.cross_entropy(F.linear(x, weight), target))(x.detach())
    torch.testing.assert_close(found, expected)
    with fastlm.backend("blocked"), pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: linear_cross_entropy(x, weight, target), (x.detach(),), (x.detach(),))
