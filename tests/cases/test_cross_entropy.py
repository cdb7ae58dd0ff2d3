"""Cross entropy beyond the matrix of tests/test_ops.py: faults that other libraries had, and errors."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.dispatch import CannotRun
from fastlm.ops import cross_entropy
from tests.parity import INTERPRETED, forced

implementation = forced("cross_entropy", "torch", "reference", "native", "triton")


def case(device, *shape, ignored=0):
    x = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    target.view(-1)[:ignored] = -100
    return x, target


def agree(x, target, upstream=None, **options):
    """Assert that loss and gradient are stock's."""
    pairs = []
    for fn in (cross_entropy, F.cross_entropy):
        loss = fn(x, target, **options)
        grad = torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream)[0]
        pairs.append((loss, grad))
    torch.testing.assert_close(*pairs, equal_nan=True)


def test_logits_and_upstream_gradients_stay_as_they_are(implementation, device):
    """Backward in place has corrupted both (Liger-Kernel issues 272 and 1251)."""
    x, target = case(device, 6, 33, ignored=2)
    hidden = x * 2
    before = hidden.detach().clone()
    losses = cross_entropy(hidden, target, reduction="none")
    upstream = torch.randn_like(losses)
    kept = upstream.clone()
    first = torch.autograd.grad(losses, x, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(losses, x, upstream)[0]
    assert torch.equal(first, second)
    assert torch.equal(hidden, before)
    assert torch.equal(upstream, kept)


def test_logits_that_have_another_use(implementation, device):
    x, target = case(device, 6, 33)
    found, expected = (torch.autograd.grad(fn(x, target) + (x.softmax(1) ** 2).sum(), x)[0]
                       for fn in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(found, expected)


def test_each_loss_keeps_its_own_upstream_gradient(implementation, device):
    """reduction="none" has averaged its gradients (Liger-Kernel issue 968)."""
    x, target = case(device, 5, 17, ignored=1)
    agree(x, target, upstream=torch.randn(5, device=device), reduction="none")
    agree(x, target, upstream=torch.ones((), device=device).expand(5), reduction="none")


def test_the_upstream_scale_of_a_mean(implementation, device):
    x, target = case(device, 5, 17, ignored=1)
    agree(x, target, upstream=torch.tensor(-3.5, device=device))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_targets_ignored(reduction, implementation, device):
    x, _ = case(device, 4, 9)
    target = torch.full((4,), -100, device=device)
    agree(x, target, reduction=reduction)
    grad = torch.autograd.grad(cross_entropy(x, target).sum(), x)[0]
    assert (grad == 0).all()
    assert cross_entropy(x, target).isnan()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_rows(reduction, implementation, device):
    x, target = case(device, 0, 9)
    agree(x, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_class(reduction, implementation, device):
    x, target = case(device, 4, 1)
    agree(x, target, reduction=reduction)
    assert (cross_entropy(x, target) == 0).all()


def test_a_loss_without_grad_is_the_same_loss(implementation, device):
    """Without grad the loss has been 0 (Liger-Kernel issue 507)."""
    x, target = case(device, 6, 33, ignored=2)
    expected = cross_entropy(x, target).detach()
    with torch.no_grad():
        assert torch.equal(cross_entropy(x, target), expected)
    with torch.inference_mode():
        assert torch.equal(cross_entropy(x, target), expected)
    assert torch.equal(cross_entropy(x.detach(), target), expected)
    assert expected > 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs inside opaque operators only")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignore_index_when_compiled(reduction, device):
    """Under torch.compile an ignore_index has given a wrong loss (Liger-Kernel issue 1338)."""
    x, target = case(device, 6, 33)
    target[1] = target[3] = 2

    def loss(x, target):
        return cross_entropy(x, target, ignore_index=2, reduction=reduction)

    torch._dynamo.reset()
    found, expected = torch.compile(loss, fullgraph=True)(x, target), loss(x, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)))


def test_forms_of_input(implementation, device):
    agree(*case(device, 2, 5, 3, 4))
    agree(*case(device, 2, 5, 0))
    x = torch.randn(7, device=device, requires_grad=True)
    for reduction in ("none", "mean", "sum"):
        agree(x, torch.tensor(3, device=device), reduction=reduction)
    x, target = case(device, 4, 9)
    agree(x, target.to(torch.uint8))
    with pytest.warns(UserWarning, match="reduction"):
        assert cross_entropy(x, target, reduce=False).shape == (4,)
    with pytest.warns(UserWarning, match="reduction"):
        torch.testing.assert_close(cross_entropy(x, target, size_average=False),
                                   F.cross_entropy(x, target, reduction="sum"))


def test_probabilities_as_targets(device):
    x, _ = case(device, 4, 9)
    agree(x, torch.rand(4, 9, device=device), weight=torch.rand(9, device=device), label_smoothing=0.1)
    agree(torch.randn(9, requires_grad=True, device=device), torch.rand(9, device=device))


def test_the_kernel_gives_probabilities_no_gradient_and_says_so():
    pytest.importorskip("fastlm._native")
    x, target = torch.randn(4, 9), torch.rand(4, 9, requires_grad=True)
    with fastlm.backend("native"), pytest.raises(CannotRun, match="the target needs a gradient"):
        cross_entropy(x, target)
    with fastlm.backend("native", "torch"):
        found, expected = (torch.autograd.grad(fn(x, target), target)[0] for fn in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_wider_one_of_logits_and_probabilities(dtype, device):
    x, target = torch.randn(4, 9, device=device, dtype=dtype), torch.rand(4, 9, device=device)
    with fastlm.backend("native", "torch"):
        assert cross_entropy(x, target).dtype is F.cross_entropy(x, target).dtype


def test_a_class_weight_gets_no_gradient(implementation, device):
    x, target = case(device, 4, 9)
    weight = torch.rand(9, device=device, requires_grad=True)
    cross_entropy(x, target, weight, label_smoothing=0.1).backward()
    assert weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("even", [True, False])
def test_many_equal_numbers_are_summed_exactly(even, implementation, device):
    """All of a row's targets are alike: so are the signs of what rounding takes from each."""
    x, target = 10 * torch.randn(64, 32000, device=device), torch.randint(32000, (64,), device=device)
    if not even:
        if implementation == "triton":
            pytest.skip("takes no probabilities")
        target = torch.full_like(x, 1 / 32000)
    exact = F.cross_entropy(x.double(), target if even else target.double(), label_smoothing=float(even))
    found, stock = (fn(x, target, label_smoothing=float(even)) for fn in (cross_entropy, F.cross_entropy))
    bound = 2 * (stock - exact).abs() + 4 * torch.finfo(x.dtype).eps * exact
    assert (found - exact).abs() <= bound


def test_double_backward(implementation, device):
    x, target = case(device, 4, 9, ignored=1)
    found, expected = (
        torch.autograd.grad(torch.autograd.grad(fn(x, target), x, create_graph=True)[0].square().sum(), x)[0]
        for fn in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(found, expected)


def test_autocast_gives_float32_as_stock_does(device):
    x, target = case(device, 4, 9)
    with torch.autocast(device):
        for dtype in (torch.float32, torch.bfloat16):
            found, expected = (fn(x.to(dtype), target) for fn in (cross_entropy, F.cross_entropy))
            assert found.dtype is expected.dtype is torch.float32
        assert cross_entropy(x.bfloat16(), target, torch.ones(9, device=device).bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("backend", [("native", "torch"), ("torch",)])
def test_a_target_out_of_range_is_an_error_in_a_graph_too(backend):
    torch._dynamo.reset()
    with fastlm.backend(*backend), pytest.raises((IndexError, RuntimeError)):
        torch.compile(cross_entropy, backend="aot_eager")(torch.zeros(3, 4), torch.tensor([1, 4, 3]))


X, Y = torch.zeros(3, 4), torch.tensor([1, 2, 3])
BAD = [
    (IndexError, r"target\[2\] is 4, expected 0 to 3", lambda: cross_entropy(X, torch.tensor([1, 2, 4]))),
    (IndexError, r"target\[0\] is -1", lambda: cross_entropy(X, torch.tensor([-1, 2, 3]))),
    (IndexError, r"target\[0, 1\] is 9", lambda: cross_entropy(X[:, :, None].expand(3, 4, 2), torch.tensor(
        [[0, 9], [0, 0], [0, 0]]))),
    (ValueError, r"target has shape \[2\], expected \[3\]", lambda: cross_entropy(X, Y[:2])),
    (RuntimeError, r"target has shape \[3, 4\], expected \[3, 5\]",
     lambda: cross_entropy(torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.long))),
    (RuntimeError, "target is torch.int32", lambda: cross_entropy(X, Y.int())),
    (RuntimeError, "target is torch.float32", lambda: cross_entropy(X, Y.float())),
    (RuntimeError, r"weight is torch.float32\[3\], expected torch.float32\[4\]",
     lambda: cross_entropy(X, Y, torch.ones(3))),
    (RuntimeError, r"weight is torch.float32\[4\], expected torch.float16\[4\]",
     lambda: cross_entropy(X.half(), Y, torch.ones(4))),
    (RuntimeError, r"weight is torch.float32\[4\], expected torch.bfloat16\[4\]",
     lambda: cross_entropy(X[0].bfloat16(), X[0].bfloat16(), torch.ones(4))),
    (RuntimeError, "input is torch.int32", lambda: cross_entropy(X[:0].int(), Y[:0])),
    (RuntimeError, "ignore_index is 1", lambda: cross_entropy(X, X, ignore_index=1)),
    (RuntimeError, "input is torch.int64", lambda: cross_entropy(X.long(), Y)),
    (RuntimeError, "label_smoothing is 2", lambda: cross_entropy(X, Y, label_smoothing=2)),
    (ValueError, "reduction is 'median'", lambda: cross_entropy(X, Y, reduction="median")),
    (TypeError, "target must be a Tensor, got list", lambda: cross_entropy(X, [1, 2, 3])),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_an_error_that_names_it(kind, message, call):
    with pytest.raises(kind, match=f"cross_entropy: .*{message}"):
        call()
