"""Norms beyond the matrix of tests/test_ops.py: faults that other libraries had, strides, modules, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.dispatch import CannotRun
from fastlm.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.parity import forced, hold, leaf, pair

implementation = forced("layer_norm", "torch", "reference", "native", "triton")


def inputs(*shape):
    return [torch.randn(shape, requires_grad=True) for _ in range(2)] + [
        torch.randn(shape[-1], requires_grad=True) for _ in range(2)]


def agree(ours, stock, leaves, **tolerance):
    """Assert that results and gradients are stock's."""
    found, expected = ours(*leaves), stock(*leaves)
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    upstream = [torch.randn_like(x) for x in found]
    grads = [torch.autograd.grad(x, leaves, upstream, allow_unused=True, retain_graph=True) for x in (found, expected)]
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


CALLS = {
    "rms": (lambda x, r, w, b: rms_norm(x, w.shape, w, 1e-6), lambda x, r, w, b: F.rms_norm(x, w.shape, w, 1e-6)),
    "layer": (lambda x, r, w, b: layer_norm(x, w.shape, w, b), lambda x, r, w, b: F.layer_norm(x, w.shape, w, b)),
    "add rms": (lambda x, r, w, b: add_rms_norm(x, r, w.shape, w, 1e-6),
                lambda x, r, w, b: (F.rms_norm(x + r, w.shape, w, 1e-6), x + r)),
    "add layer": (lambda x, r, w, b: add_layer_norm(x, r, w.shape, w, b),
                  lambda x, r, w, b: (F.layer_norm(x + r, w.shape, w, b), x + r)),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_and_upstream_gradients_stay_as_they_are(name, implementation):
    """A backward in place of the upstream gradient has corrupted others (Liger-Kernel issue 370)."""
    leaves = inputs(6, 33)
    hidden = [x * 2 for x in leaves]
    before = [x.detach().clone() for x in hidden]
    found = CALLS[name][0](*hidden)
    found = found if isinstance(found, tuple) else (found,)
    upstream = [torch.randn_like(y) for y in found]
    kept = [g.clone() for g in upstream]
    first, second = (torch.autograd.grad(found, leaves, upstream, allow_unused=True, retain_graph=True)
                     for _ in range(2))
    for a, b in zip((*first, *hidden, *upstream), (*second, *before, *kept), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_that_is_used_twice(name, implementation):
    """Input and residual share one gradient tensor, and each may be added to in place."""
    leaves = inputs(5, 32)
    found, expected = [], []
    for call, grads in zip(CALLS[name], (found, expected), strict=True):
        for _ in range(2):
            result = call(*leaves)
            normed, total = result if isinstance(result, tuple) else (result, leaves[0])
            (normed.square().sum() + (total * leaves[0]).sum() + leaves[1].sum()).backward()
        grads += [None if x.grad is None else x.grad.clone() for x in leaves]
        for x in leaves:
            x.grad = None
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("name", CALLS)
def test_double_backward(name, frozen, implementation):
    """Second derivatives, with any one input frozen: what backward keeps stands in for input and residual."""
    leaves = inputs(4, 9)
    leaves[frozen].requires_grad_(False)
    wanted = [x for x in leaves if x.requires_grad]
    grads = []
    for call in CALLS[name]:
        result = call(*leaves)
        result = sum(y.sin().sum() for y in (result if isinstance(result, tuple) else (result,)))
        first = torch.autograd.grad(result, wanted, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        grads.append(torch.autograd.grad(penalty, wanted, allow_unused=True, materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_functorch(name, implementation):
    leaves = inputs(4, 9)

    def loss(call):
        def run(*leaves):
            result = call(*leaves)
            return sum(y.sin().sum() for y in (result if isinstance(result, tuple) else (result,)))
        return torch.func.grad(run, tuple(range(4)))(*(x.detach() for x in leaves))
    for a, b in zip(*map(loss, CALLS[name]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_and_strides(name, implementation):
    for shape in ((7,), (0, 7), (2, 3, 4, 7)):
        agree(*CALLS[name], inputs(*shape), rtol=1e-4, atol=1e-5)
    leaves = inputs(4, 5, 7)
    wide = torch.randn(4, 5, 14)[..., 7:].requires_grad_()
    turned = torch.randn(5, 4, 7).transpose(0, 1).requires_grad_()
    agree(*CALLS[name], [wide, turned, *leaves[2:]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_float32_weight_of_16_bit_rows(dtype):
    x, w = torch.randn(5, 64).to(dtype), torch.randn(64)
    for ours, stock in ((rms_norm(x, (64,), w, 1e-6), F.rms_norm(x, (64,), w, 1e-6)),
                        (layer_norm(x, (64,), w, w), F.layer_norm(x, (64,), w, w))):
        assert ours.dtype is stock.dtype is dtype
        torch.testing.assert_close(ours, stock, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("add_norm", [add_rms_norm, add_layer_norm])
def test_a_float32_residual_of_bfloat16_rows(add_norm):
    """No kernel reads two dtypes: the call is torch's."""
    pytest.importorskip("fastlm._native")
    x, residual = torch.randn(256, 512).bfloat16(), torch.randn(256, 512)
    with fastlm.backend("torch"):
        expected = add_norm(x, residual, (512,))
    with fastlm.backend("native", "torch"):
        torch.testing.assert_close(add_norm(x, residual, (512,)), expected, rtol=0, atol=0)
    with fastlm.backend("native"), pytest.raises(CannotRun, match=r"residual is torch\.float32"):
        add_norm(x, residual, (512,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_default_eps_is_torchs(dtype):
    x = torch.full((2, 8), 1e-5, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, (8,)), F.rms_norm(x, (8,)))


def test_a_weight_gradient_of_many_rows_does_not_drift(implementation):
    """Long chains of float32 additions have cost digits: the sum is split."""
    if implementation == "triton":
        pytest.skip("too many rows to interpret")
    torch.manual_seed(0)
    x, dy = torch.randn(40000, 4) + 1, torch.randn(40000, 4) + 1
    weight = torch.ones(4, requires_grad=True)
    found = torch.autograd.grad(rms_norm(x, (4,), weight, 1e-6), weight, dy)[0]
    wide = torch.ones(4, dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(F.rms_norm(x.double(), (4,), wide, 1e-6), wide, dy.double())[0]
    assert (found - exact).abs().max() < 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_backward_of_an_added_norm_keeps_the_sum_alone(implementation):
    """Neither input nor residual is held until backward: of what is saved, only one tensor is as large as they are."""
    if implementation in ("torch", "reference"):
        pytest.skip("stock saves what it likes")
    x, residual, weight, _ = inputs(64, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_rms_norm(x * 1, residual * 1, (128,), weight)
    assert len({t.data_ptr() for t in kept if t.untyped_storage().nbytes() >= x.nbytes}) == 1


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 1e-3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [6, (4, 6)], ids=str)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_modules(name, shape, options, dtype, device):
    if name == "RMSNorm" and "bias" in options:
        pytest.skip("RMSNorm has no bias")
    theirs, ours = pair(name, shape, device=device, dtype=dtype, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    hold(theirs, ours, lambda m, x: m(x), [leaf(3, 4, 6, device=device, dtype=dtype)])


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_modules_with_a_residual(name, device):
    theirs, ours = pair(name, 6, device=device)
    leaves = [leaf(3, 6, device=device, dtype=torch.float32) for _ in range(2)]

    def call(module, x, residual):
        return module(x, residual) if module is ours else (module(x + residual), x + residual)

    hold(theirs, ours, call, leaves)
    assert isinstance(ours, getattr(nn, name))


X = torch.zeros(3, 4)
BAD = [
    (RuntimeError, r"rms_norm: input has shape \[3, 4\], expected \[\*, 5\]", lambda: rms_norm(X, (5,))),
    (RuntimeError, r"layer_norm: input has shape \[3, 4\], expected \[\*, \] for normalized_shape \[\]",
     lambda: layer_norm(X, ())),
    (RuntimeError, r"layer_norm: weight has shape \[3\], expected \[4\]", lambda: layer_norm(X, (4,), X[:, 0])),
    (RuntimeError, r"layer_norm: bias has shape \[3\], expected \[4\]",
     lambda: layer_norm(X, (4,), bias=X[:, 0])),
    (TypeError, "rms_norm: input must be a Tensor, got list", lambda: rms_norm([1.0], (1,))),
    (TypeError, "rms_norm: input must be floating point, got torch.int64", lambda: rms_norm(X.long(), (4,))),
    (RuntimeError, r"add_rms_norm: residual has shape \[3\], input has \[3, 4\]", lambda: add_rms_norm(X, X[:, 0], 4)),
    (TypeError, "add_layer_norm: residual must be a Tensor, got NoneType", lambda: add_layer_norm(X, None, (4,))),
]


@pytest.mark.parametrize(("kind", "message", "call"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input_gets_an_error_that_names_it(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
