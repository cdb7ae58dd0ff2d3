"""Attention beyond the matrix of tests/test_ops.py: masks, shapes, dtypes and errors, on every implementation."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import measure
from fastlm.ops import scaled_dot_product_attention as attention
from fastlm.ops.attention_common import Options
from tests.parity import OPS, forced, keep_error_rule

implementation = forced("attention", "torch", "reference", "native", "blocked", "triton")


def leaves(*shapes, device="cpu", dtype=torch.float32):
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def manual(q, k, v, mask, causal):
    """Attention from its formula, in float64, on tensors of equal heads; `mask` is additive."""
    scores = q.double() @ k.double().mT / q.size(-1) ** 0.5
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        i, j = torch.arange(q.size(-2))[:, None], torch.arange(k.size(-2))
        scores = scores.masked_fill((j > i).to(scores.device), -torch.inf)
    return torch.nan_to_num(torch.softmax(scores, -1)) @ v.double()


def test_a_mask_and_causality_apply_together(implementation, device):
    q, k, v = leaves((1, 2, 5, 16), (1, 2, 7, 16), (1, 2, 7, 16), device=device)
    seen = torch.rand(5, 7, device=device) > 0.3
    additive = torch.zeros(5, 7, device=device).masked_fill(~seen, -torch.inf)
    expected = manual(q, k, v, additive, causal=True)
    for mask in (seen, additive):
        torch.testing.assert_close(attention(q, k, v, mask, is_causal=True), expected.float())


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_the_output_lies_in_memory_as_stocks(order):
    """People look at it as `[B, S, H·D]` without a copy where the query came from there."""
    pytest.importorskip("fastlm._native")
    sizes = [(2, 4, 40)[i] for i in order]
    q = torch.randn(*sizes, 3, 16)[..., 1, :].permute(*(order.index(i) for i in range(3)), 3).requires_grad_()
    expected = F.scaled_dot_product_attention(q, q, q)
    with fastlm.backend("native"):
        out = attention(q, q, q)
        assert out.stride() == expected.stride() == attention(q, q, q, softcap=3.0).stride()
        assert torch.compile(attention, backend="aot_eager")(q, q, q).stride() == expected.stride()
    for mine, stock in zip(*(torch.autograd.grad(x.square().sum(), q) for x in (out, expected)), strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window_size": (3, 0)}, {"return_lse": True}], ids=str)
def test_no_heads(options, device):
    q = torch.randn(2, 0, 6, 8, device=device, requires_grad=True)
    out = attention(q, q, q, **options)
    out = out[0] if options.get("return_lse") else out
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


def test_a_window_without_an_end(implementation, device):
    q = torch.randn(1, 2, 8, 16, device=device)
    found = attention(q, q, q, window_size=(2, sys.maxsize))
    torch.testing.assert_close(found, attention(q, q, q, window_size=(2, -1)))


@pytest.mark.parametrize("dim", [1, 15, 33])
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_of_odd_heads(queries, dim, implementation, device):
    q, k, v = leaves((2, 2, queries, dim), (2, 2, 70, dim), (2, 2, 70, dim), device=device)
    for mine, exact in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) + (x,) for x in (
            attention(q, k, v), manual(q, k, v, None, causal=False))), strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spread", [0, 0.02])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_keys_have_in_common_does_not_multiply_rounding(dtype, learned, spread, causal):
    """A query's gradient cancels where keys are equal: SDPA's formula in float32, which takes these calls, keeps that.

    Keys that nobody sees may hold anything.
    """
    pytest.importorskip("fastlm._native")
    op = OPS["attention"]
    q, k, v = torch.randn(1, 2, 20, 16), 5 + spread * torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 48)
    mask = torch.randn(1, 1, 20, 70) if learned else torch.arange(70) < 65
    k[:, :, 65:] = 5 if learned else 1e4
    tensors = (t if t.dtype is torch.bool else t.to(dtype) for t in (q, k, v, mask.expand(1, 1, 20, 70)))
    args = (*tensors, *[None] * 5, Options(0.0, causal, 0.25, -1, -1, 0.0, False))
    keep_error_rule(lambda draw: measure.errors(op, "native", args))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_queries_that_attend_to_nothing_are_zero_and_have_no_gradient(kind, implementation, device):
    q, k, v = leaves((1, 2, 4, 16), (1, 2, 6, 16), (1, 2, 6, 16), device=device)
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    mask[2] = False
    if kind == "additive":
        mask = torch.zeros(4, 6, device=device).masked_fill(~mask, -torch.inf).requires_grad_()
    out = attention(q, k, v, mask)
    inputs = [q, k, v] + [mask] * (kind == "additive")
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert (out[:, :, 2] == 0).all()
    assert (grads[0][:, :, 2] == 0).all()
    assert all(g.isfinite().all() for g in (out, *grads))
    without = torch.autograd.grad(attention(q[:, :, :2], k, v).square().sum(), q)[0]
    torch.testing.assert_close(grads[0][:, :, :2], without[:, :, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_mask_on_half_inputs_is_read_rightly(dtype, implementation, device):
    if implementation == "triton" and dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter computes bf16 dot products wrongly (triton issue 11584)")
    q, k, v = leaves((1, 2, 5, 16), (1, 2, 9, 16), (1, 2, 9, 16), device=device, dtype=dtype)
    mask = torch.randn(1, 2, 5, 9, device=device) * 4
    expected = manual(q, k, v, mask, causal=False)
    found = attention(q, k, v, mask)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * 4)


def test_a_learned_bias_gets_its_gradient_summed_over_broadcast_dimensions(implementation, device):
    q, k, v = leaves((3, 2, 5, 16), (3, 2, 6, 16), (3, 2, 6, 16), device=device)
    for shape in ((1, 2, 5, 6), (2, 1, 6), (5, 1), (3, 1, 1, 6)):
        bias = torch.randn(shape, device=device, requires_grad=True)
        found = torch.autograd.grad(attention(q, k, v, bias).square().sum(), bias)[0]
        expected = torch.autograd.grad(manual(q, k, v, bias, False).square().sum(), bias)[0]
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-5)


SHAPES = [
    ((5, 8), (7, 8), (7, 8), {}),
    ((4, 5, 8), (4, 7, 8), (4, 7, 3), {}),
    ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), {}),
    ((2, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 8), {}),
    ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), {}),
    ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), {}),
    ((2, 4, 5, 8), (4, 7, 8), (4, 7, 8), {}),
    ((4, 5, 8), (2, 7, 8), (2, 7, 8), {"enable_gqa": True}),
    ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8), {"enable_gqa": True}),
    ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8), {}),
    ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8), {}),
]


@pytest.mark.parametrize(("q", "k", "v", "options"), SHAPES)
def test_every_shape_that_stock_takes(q, k, v, options, implementation, device):
    tensors = leaves(q, k, v, device=device)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    found = attention(*tensors, **options)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_mask_over_five_dimensions(implementation, device):
    q, k, v = leaves(*[(2, 3, 4, 5, 8)] * 3, device=device)
    mask = torch.randn(3, 1, 5, 5, device=device)
    torch.testing.assert_close(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


BAD = {
    "key has head_dim 3, query has 8": lambda q, m: attention(q, q[..., :3], q),
    "value has length 3, key has 5": lambda q, m: attention(q, q, q[..., :3, :]),
    "heads of query, key and value": lambda q, m: attention(q, q[:, :3], q[:, :3]),
    "expected a multiple of key's 3": lambda q, m: attention(q, q[:, :3], q[:, :3], enable_gqa=True),
    "attn_mask has shape .5, 4.": lambda q, m: attention(q, q, q, m[:, :4]),
    "expected one that broadcasts": lambda q, m: attention(q, q, q, m.expand(3, 2, 4, 5, 5)),
    "attn_mask is torch.int32": lambda q, m: attention(q, q, q, m.int()),
    "attn_mask is torch.float64": lambda q, m: attention(q, q, q, m.double()),
    "key is torch.float16": lambda q, m: attention(q, q.half(), q),
    "query is torch.int32": lambda q, m: attention(q.int(), q.int(), q.int()),
    "query has shape": lambda q, m: attention(q[0, 0, 0], q, q),
    "dropout_p is 1.5": lambda q, m: attention(q, q, q, dropout_p=1.5),
    "window_size is": lambda q, m: attention(q, q, q, window_size=(-2, 0)),
    "window_size is 3": lambda q, m: attention(q, q, q, window_size=3),
    "softcap is -1": lambda q, m: attention(q, q, q, softcap=-1.0),
    "alibi_slopes has shape": lambda q, m: attention(q, q, q, alibi_slopes=q.new_ones(3)),
    "alibi_slopes is torch.int64": lambda q, m: attention(q, q, q, alibi_slopes=q.new_ones(4, dtype=torch.int64)),
    "sinks has shape": lambda q, m: attention(q, q, q, sinks=q.new_ones(2, 4)),
    "key_lengths has shape": lambda q, m: attention(q, q, q, key_lengths=q.new_ones(3, dtype=torch.int64)),
    "key_lengths is torch.float32": lambda q, m: attention(q, q, q, key_lengths=q.new_ones(2)),
    "key_lengths has 1 to 6, expected 0 to 5": lambda q, m: attention(
        q, q, q, key_lengths=q.new_tensor([1, 6], dtype=torch.int64)),
    "document_ids has shape": lambda q, m: attention(q, q, q, document_ids=q.new_ones(2, 4, dtype=torch.int64)),
    "expected a pair for 5 queries and 3": lambda q, m: attention(
        q, q[..., :3, :], q[..., :3, :], document_ids=q.new_ones(2, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_an_error_that_names_it(message, device):
    if device == "cuda" and message.startswith("key_lengths has 1 to 6"):
        pytest.skip("values on a GPU are not looked at: the host would wait for them")
    q, m = torch.randn(2, 4, 5, 8, device=device), torch.zeros(5, 5, device=device)
    with pytest.raises((RuntimeError, ValueError), match=f"attention: .*{message}"):
        BAD[message](q, m)


def test_what_is_no_tensor_or_number_is_named(device):
    q = torch.randn(5, 8)
    with pytest.raises(TypeError, match="attention: value must be a Tensor, got list"):
        attention(q, q, [1.0])
    for ids in (5, (None, torch.zeros(5)), (1, 2, 3)):
        with pytest.raises(TypeError, match="attention: document_ids must be a Tensor or a pair of them"):
            attention(q, q, q, document_ids=ids)
    for name in ("scale", "softcap", "dropout_p"):
        with pytest.raises(TypeError, match=f"attention: {name} must be a number, got 'x'"):
            attention(q, q, q, **{name: "x"})


def test_autocast_gives_the_dtype_that_stock_gives(device):
    q, k, v = leaves(*[(1, 2, 4, 8)] * 3, device=device)
    mask = torch.zeros(4, 4, device=device)
    with torch.autocast(device):
        assert attention(q, k.bfloat16(), v, mask).dtype is F.scaled_dot_product_attention(q, k, v).dtype
        assert attention(q.double(), k.double(), v.double()).dtype is torch.float64


def test_dropout_follows_the_seed_and_keeps_the_mean(device):
    q, k = leaves((1, 2, 6, 8), (1, 2, 64, 8), device=device)
    v = torch.ones(1, 2, 64, 8, device=device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert abs(results[0].mean().item() - 1) < 0.3


@pytest.mark.parametrize("name", ["torch", "blocked", "reference"])
def test_dropout_of_all_weights_leaves_nothing(name):
    q, k, v = leaves(*[(2, 2, 512, 8)] * 3)
    with fastlm.backend(name):
        out = attention(q, k, v, dropout_p=1.0)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float64_slopes_are_rounded_for_others(dtype, implementation, device):
    q, k, v = (x.detach() for x in leaves(*[(1, 2, 9, 16)] * 3, device=device, dtype=dtype))
    slopes = torch.rand(2, device=device)
    found, expected = (attention(q, k, v, alibi_slopes=x) for x in (slopes.double(), slopes))
    torch.testing.assert_close(found, expected)


def test_float32_slopes_and_sinks_of_float64_queries_round_nothing(implementation, device):
    if implementation == "triton":
        pytest.skip("has no float64")
    q, k, v = leaves(*[(1, 2, 9, 4)] * 3, device=device, dtype=torch.float64)
    slopes, sinks = torch.rand(2, device=device), torch.randn(2, device=device)
    found, expected = (attention(q, k, v, alibi_slopes=a, sinks=b, return_lse=True)
                       for a, b in ((slopes, sinks), (slopes.double(), sinks.double())))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_double_backward(implementation, device):
    if (implementation, device) == ("torch", "cuda"):
        pytest.skip("SDPA's kernels for the GPU have no second derivative")
    q, k, v = leaves(*[(1, 1, 3, 4)] * 3, device=device)
    first = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v), create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
    expected = torch.autograd.grad(manual(q, k, v, None, False).square().sum(), (q, k, v), create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in expected), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
@pytest.mark.parametrize("options", [
    {}, dict(is_causal=True, scale=0.3), dict(attn_mask=torch.ones(5, 5).tril().bool()),
    dict(attn_mask=torch.linspace(-1, 1, 25).view(5, 5))], ids=["dense", "causal", "boolean mask", "additive mask"])
@pytest.mark.parametrize("way", ["plain", "after a first backward", "checkpoint", "functorch"])
def test_double_backward_of_a_small_call(options, frozen, way):
    """SDPA's own node computes the gradients, and gives way where they are to be differentiated."""
    inputs = [x.requires_grad_(i not in frozen) for i, x in enumerate(leaves(*[(2, 2, 5, 4)] * 3))]
    places = [i for i in range(3) if i not in frozen]
    wanted = [inputs[i] for i in places]

    def attend(*inputs):
        return attention(*inputs, **options).square().sum()

    def second(first):
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    if way == "functorch":
        found = second(torch.func.grad(attend, tuple(places))(*inputs))
    else:
        out = checkpoint(attend, *inputs, use_reentrant=False) if way == "checkpoint" else attend(*inputs)
        if way == "after a first backward":
            torch.autograd.grad(out, wanted, retain_graph=True)
        found = second(torch.autograd.grad(out, wanted, create_graph=True))
    with fastlm.backend("reference"):
        expected = second(torch.autograd.grad(attend(*inputs), wanted, create_graph=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs inside opaque operators only")
def test_compiled_whole(device):
    q, k, v = leaves((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), device=device)
    mask = torch.randn(5, 7, device=device)

    def call(q, k, v):
        return attention(q, k, v, mask, is_causal=True, enable_gqa=True)

    torch._dynamo.reset()
    found, expected = torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def weights_of(seed, options, n=60, heads=2):
    """Return the weights that dropout left: with the identity as values they are the output."""
    q, k = leaves((1, heads, n, 8), (1, heads, n, 8), dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64).expand(1, heads, n, n)
    torch.manual_seed(seed)
    with fastlm.backend("blocked"):
        return q, k, attention(q, k, eye, **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0, "window_size": (9, 30)}], ids=str)
def test_dropout_drops_the_same_weights_in_backward_and_again_under_the_same_seed(options, monkeypatch):
    monkeypatch.setattr(fastlm.ops.attention_tiles, "TILE_BYTES", 60 * 16 * 8)
    monkeypatch.setattr(fastlm.ops.attention_lanes, "LANE_SCORES", 0)
    q, k, dropped = weights_of(1, options | {"dropout_p": 0.3})
    with torch.no_grad(), fastlm.backend("reference"):
        whole = attention(q, k, torch.eye(60, dtype=torch.float64).expand(1, 2, 60, 60), **options)
    factor = torch.where(dropped.detach() == 0, 0.0, 1 / 0.7)
    torch.testing.assert_close(dropped.detach(), whole * factor)
    seen = whole > 0
    assert abs((factor[seen] == 0).double().mean().item() - 0.3) < 0.06
    v = torch.randn(1, 2, 60, 5, dtype=torch.float64, requires_grad=True)

    def ours(q, k, v):
        torch.manual_seed(1)
        with fastlm.backend("blocked"):
            return attention(q, k, v, dropout_p=0.3, **options)

    def expected(q, k, v):
        with fastlm.backend("reference"):
            weights = attention(q, k, torch.eye(60, dtype=torch.float64).expand(1, 2, 60, 60), **options)
        return weights * factor @ v

    found = [f(q, k, v) for f in (ours, expected)]
    torch.testing.assert_close(*found)
    first = [torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True) for o in found]
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v)) for grads in first]
    checkpointed = torch.utils.checkpoint.checkpoint(ours, q, k, v, use_reentrant=False)
    again = torch.autograd.grad(checkpointed.square().sum(), (q, k, v))
    for a, b, c in zip(*first, again, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(weights_of(2, options | {"dropout_p": 0.3})[2] == 0, dropped == 0)


@pytest.mark.parametrize("make", [
    lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t.mT.contiguous().mT,
    lambda t: t[:, :, :1].expand_as(t), lambda t: torch.cat([t, t], 3)[..., ::2]], ids=range(4))
@pytest.mark.parametrize("options", [{"window_size": (3, 1)}, {"softcap": 3.0}, {"return_lse": True}], ids=str)
def test_strides_and_expanded_inputs(make, options, implementation, device):
    tensors = [make(t.detach()) for t in leaves(*[(2, 2, 9, 8)] * 3, device=device)]
    for t in tensors:
        t.requires_grad_()
    same = [t.detach().clone().contiguous().requires_grad_() for t in tensors]
    found, expected = attention(*tensors, **options), attention(*same, **options)
    found, expected = (x[0] + x[1][..., None] if isinstance(x, tuple) else x for x in (found, expected))
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad(o, x, upstream) for o, x in ((found, tensors), (expected, same))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sinks": torch.ones(2)}], ids=str)
def test_weights_too_small_to_count_are_zero_and_never_denormal(options):
    """Far keys of ALiBi: exp(-150) is a denormal number, with which products take many times as long."""
    tensors = leaves(*[(1, 2, 200, 8)] * 3)
    found = []
    for name in ("blocked", "reference"):
        with fastlm.backend(name):
            out = attention(*tensors, alibi_slopes=torch.tensor([1.0, 3.0]), **options)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ((a == 0) | (a.abs() >= torch.finfo(a.dtype).tiny)).all()


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs inside opaque operators only")
def test_features_compile_whole_and_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, k, v, ids, slopes, sinks):
        out, lse = attention(q, k, v, window_size=(9, 2), softcap=3.0, alibi_slopes=slopes, sinks=sinks,
                             document_ids=ids, return_lse=True, dropout_p=0.0)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for n in (20, 33, 47, 65):
        q, k, v = leaves(*[(2, 4, n, 8)] * 3)
        sinks = torch.randn(4, requires_grad=True)
        args = (q, k, v, torch.randint(2, (2, n)), torch.rand(4), sinks)
        found, expected = compiled(*args), call(*args)
        torch.testing.assert_close(found, expected)
        wanted = (q, k, v, sinks)
        for a, b in zip(*(torch.autograd.grad(x, wanted) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs inside opaque operators only")
def test_numbers_may_be_symbols_of_the_compiler():
    torch._dynamo.reset()
    slopes = torch.rand(4)

    def call(q, k, scale, cap):
        return attention(q, k, k, enable_gqa=True) + attention(q, k, k, enable_gqa=True, scale=scale, softcap=cap,
                                                               alibi_slopes=slopes)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, heads, scale, cap in ((8, 4, 0.5, 2.0), (9, 2, 0.6, 3.0)):
        args = torch.randn(3, 4, n, 8), torch.randn(3, heads, n, 8), scale, cap
        torch.testing.assert_close(compiled(*args), call(*args))


def test_functional_transforms():
    q, k, v = (t.detach() for t in leaves(*[(3, 1, 2, 6, 8)] * 3, dtype=torch.float64))

    def loss(q, k, v):
        return attention(q, k, v, window_size=(2, 1), softcap=2.0).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    for i in range(3):
        leaf = q[i].clone().requires_grad_()
        torch.testing.assert_close(found[i], torch.autograd.grad(loss(leaf, k[i], v[i]), leaf)[0])
    _, tangent = torch.func.jvp(lambda q: attention(q, k[0], v[0]), (q[0],), (torch.ones_like(q[0]),))
    step = 1e-6
    numeric = (attention(q[0] + step, k[0], v[0]) - attention(q[0] - step, k[0], v[0])) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-7)


def test_functional_gradient_of_a_mask():
    """Functorch hides from SDPA that a mask needs a gradient."""
    q, k, v, mask = (t.detach() for t in leaves(*[(2, 2, 5, 8)] * 3, (5, 5)))

    def loss(function):
        return lambda q, mask: function(q, k, v, mask).sin().sum()

    found, expected = (torch.func.grad(loss(f), (0, 1))(q, mask) for f in (attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(found, expected)


def test_third_order_of_a_linear_loss():
    q, k, v = leaves(*[(1, 1, 3, 4)] * 3, dtype=torch.float64)

    def hessian(function):
        return torch.autograd.functional.hessian(lambda q: function(q, k, v).sum(), q, create_graph=True)

    with sdpa_kernel(SDPBackend.MATH):
        expected = hessian(F.scaled_dot_product_attention)
    found = hessian(attention)
    torch.testing.assert_close(found, expected)
    assert torch.isfinite(torch.autograd.grad(found.square().sum(), q)[0]).all()


def test_dropout_is_drawn_once():
    q, k, v = (t.detach() for t in leaves((1, 2, 4, 8), *[(2, 2, 4, 8)] * 2))
    with fastlm.backend("torch"):
        torch.manual_seed(0)
        expected = attention(q, k, v, None, 0.5), torch.rand(1)
    torch.manual_seed(0)
    torch.testing.assert_close((attention(q, k, v, None, 0.5), torch.rand(1)), expected)
