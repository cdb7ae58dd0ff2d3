"""varlen_attn beyond the matrix: beside attention sequence by sequence, pages, errors, torch's conventions."""

import inspect
import os
import sys

import pytest
import torch
from torch.nn.attention import varlen

import fastlm
from fastlm.ops import attention_lanes, varlen_attn
from fastlm.ops import scaled_dot_product_attention as attention

NAMES = ["reference", "torch", "native", "blocked"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(params=[*NAMES, "lanes"])
def implementation(request, monkeypatch):
    name, threads = request.param, torch.get_num_threads()
    if name == "lanes":
        name = "blocked"
        monkeypatch.setattr(attention_lanes, "LANE_SCORES", 0)
        torch.set_num_threads(2)
    with fastlm.backend(name):
        yield name
    torch.set_num_threads(threads)


def packed(queries=(3, 0, 7), keys=(5, 4, 6), heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    shapes = ((sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, dim))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    offsets = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys)]
    return (*tensors, *offsets, max(queries), max(keys))


def one_by_one(q, k, v, cu_q, cu_k, **options):
    """Call attention for each sequence; the oracle, with pages and used keys already cut out."""
    outs, lses = [], []
    slopes = options.pop("alibi_slopes", None)
    for n in range(len(cu_q) - 1):
        rows = [x[a[n]:a[n + 1]].transpose(0, 1)[None] for x, a in ((q, cu_q), (k, cu_k), (v, cu_k))]
        slope = slopes if slopes is None or slopes.dim() == 1 else slopes[n]
        with fastlm.backend("reference"):
            out, lse = attention(*rows, enable_gqa=True, return_lse=True, alibi_slopes=slope, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].T)
    return torch.cat(outs), torch.cat(lses)


def test_the_signature_is_torchs_with_three_more():
    ours, theirs = (inspect.signature(f).parameters for f in (varlen_attn, varlen.varlen_attn))
    if "num_splits" not in theirs:
        pytest.skip("this torch is older than 2.13")
    assert list(ours) == [*theirs, "softcap", "alibi_slopes", "sinks"]
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


OPTIONS = [{}, {"window_size": (-1, 0)}, {"window_size": (2, 1)}, {"scale": 0.3}, {"softcap": 2.0},
           {"alibi_slopes": torch.rand(4)}, {"alibi_slopes": torch.rand(3, 4)}, {"sinks": torch.randn(4)},
           {"window_size": (-1, 0), "sinks": torch.randn(4), "softcap": 1.0, "alibi_slopes": torch.rand(4)}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_beside_attention_of_each_sequence(options, implementation):
    args = packed()
    found = varlen_attn(*args, enable_gqa=True, return_aux=varlen.AuxRequest(lse=True), **options)
    expected = one_by_one(*args[:5], **options)
    assert found[1].shape == (10, 4)
    torch.testing.assert_close(varlen_attn(*args, enable_gqa=True, **options), found[0])
    upstream = [torch.randn_like(x) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r, args[:3], upstream) for r in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_used_keys(implementation):
    args, used = packed(), torch.tensor([2, 4, 6])
    found = varlen_attn(*args, enable_gqa=True, seqused_k=used, window_size=(2, 0))
    kept = torch.cat([torch.arange(2), torch.arange(5, 15)])
    expected, _ = one_by_one(args[0], args[1][kept], args[2][kept], args[3], torch.tensor([0, 2, 6, 12]),
                             window_size=(2, 0))
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), args[:3]) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cu_seq_k", [None, torch.tensor([0, 8, 16])])
def test_pages(cu_seq_k, implementation):
    pool_k, pool_v = (torch.randn(6, 4, 2, 8, requires_grad=True) for _ in range(2))
    table, used = torch.tensor([[5, 0, -1], [2, 4, 1]]), torch.tensor([7, 9])
    query, cu_seq_q = torch.randn(5, 4, 8, requires_grad=True), torch.tensor([0, 1, 5])
    found = varlen_attn(query, pool_k, pool_v, cu_seq_q, cu_seq_k, 4, 12, enable_gqa=True, seqused_k=used,
                        block_table=table, window_size=(-1, 0))
    k, v = (torch.cat([x[[5, 0]].flatten(0, 1)[:7], x[[2, 4, 1]].flatten(0, 1)[:9]]) for x in (pool_k, pool_v))
    expected, _ = one_by_one(query, k, v, cu_seq_q, torch.tensor([0, 7, 16]), window_size=(-1, 0))
    torch.testing.assert_close(found, expected)
    tensors = (query, pool_k, pool_v)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_pages_of_a_sequence_without_queries_and_slopes_of_each(implementation):
    query, cu_seq_q, slopes = torch.randn(5, 4, 8, requires_grad=True), torch.tensor([0, 2, 2, 5]), torch.rand(3, 4)
    pool, table, used = torch.randn(4, 4, 2, 8), torch.tensor([[3], [1], [0]]), torch.tensor([3, 4, 2])
    found = varlen_attn(query, pool, pool, cu_seq_q, None, 3, 4, enable_gqa=True, seqused_k=used, block_table=table,
                        alibi_slopes=slopes)
    keys = torch.cat([pool[3, :3], pool[1], pool[0, :2]])
    expected, _ = one_by_one(query, keys, keys, cu_seq_q, torch.tensor([0, 3, 7, 9]), alibi_slopes=slopes)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.square().sum(), query)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_page_that_sequences_share_gets_the_gradient_of_each(implementation):
    pool_k, pool_v = (torch.randn(3, 4, 2, 8, requires_grad=True) for _ in range(2))
    query, cu_seq_q, used = torch.randn(5, 4, 8), torch.tensor([0, 2, 5]), torch.tensor([7, 8])
    found = varlen_attn(query, pool_k, pool_v, cu_seq_q, None, 3, 8, enable_gqa=True, seqused_k=used,
                        block_table=torch.tensor([[2, 0], [2, 1]]))
    k, v = (torch.cat([x[2], x[0, :3], x[2], x[1]]) for x in (pool_k, pool_v))
    expected, _ = one_by_one(query, k, v, cu_seq_q, torch.tensor([0, 7, 15]))
    grads = [torch.autograd.grad(x.sin().sum(), (pool_k, pool_v)) for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_page_that_one_sequence_lists_twice_gets_both_gradients(implementation):
    q = torch.randn(3, 2, 16)
    pages = torch.randn(3, 4, 2, 16, requires_grad=True)
    args = (q, pages, pages, torch.tensor([0, 3]), None, 3, 8)
    options = dict(seqused_k=torch.tensor([8]), block_table=torch.tensor([[1, 1]]))
    grads = []
    for name in (implementation, "reference"):
        with fastlm.backend(name):
            grads += torch.autograd.grad(varlen_attn(*args, **options).square().sum(), pages)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_sequences_without_queries_have_gradients_of_zero(implementation):
    args = packed(queries=(0, 0, 0))
    out = varlen_attn(*args, enable_gqa=True)
    assert out.shape == (0, 4, 8)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), args[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_behind_the_last_sequence_attend_to_nothing(dtype, poisoned, implementation):
    q, k, v, cu_q, cu_k, *longest = packed()
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (torch.cat([q, torch.ones(2, 4, 8)]), k, v))
    sinks = torch.randn(4, dtype=dtype, requires_grad=True)
    out, lse = varlen_attn(q, k, v, cu_q, cu_k, *longest, enable_gqa=True, sinks=sinks,
                           return_aux=varlen.AuxRequest(lse=True))
    assert (out[-2:] == 0).all()
    assert (lse[-2:] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    assert (grads[0][-2:] == 0).all()
    assert all(g.isfinite().all() for g in grads)


def test_tokens_of_no_sequence_have_gradients_of_zero(implementation):
    x, cu = torch.randn(4, 2, 16, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    out = varlen_attn(x, x, x, cu, cu, 0, 0, softcap=20.0)
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


PAGES = torch.tensor([[0], [2], [1]])
POOL = dict(key=torch.zeros(2, 4, 2, 8), value=torch.zeros(2, 4, 2, 8), cu_seq_k=None,
            seqused_k=torch.tensor([3, 4, 2]))
BAD = {
    "cu_seq_q is": (ValueError, dict(cu_seq_q=torch.tensor([0, 5, 3, 10]))),
    "expected to rise from 0 to at most 15": (ValueError, dict(cu_seq_k=torch.tensor([0, 5, 9, 16]))),
    "cu_seq_k must be|cu_seq_k has shape": (RuntimeError, dict(cu_seq_k=torch.tensor([0, 15]))),
    "cu_seq_q is torch.float32": (RuntimeError, dict(cu_seq_q=torch.tensor([0.0, 3, 3, 10]))),
    "cu_seq_q must be": (RuntimeError, dict(cu_seq_q=[0, 3, 3, 10])),
    "max_q is 6": (ValueError, dict(max_q=6)),
    "max_k is 5": (ValueError, dict(max_k=5)),
    "window_size is": (ValueError, dict(window_size=(-2, 0))),
    "softcap is -1": (ValueError, dict(softcap=-1.0)),
    "key has 2 heads, query has 4": (ValueError, dict(enable_gqa=False)),
    "sinks has shape": (RuntimeError, dict(sinks=torch.randn(3))),
    "alibi_slopes has shape": (RuntimeError, dict(alibi_slopes=torch.randn(2, 4))),
    "seqused_k is": (ValueError, dict(seqused_k=torch.tensor([6, 0, 0]))),
    r"cu_seq_q is \[1, 3, 3, 10\]": (ValueError, dict(cu_seq_q=torch.tensor([1, 3, 3, 10]))),
    r"seqused_k is \[-1, 0, 0\]": (ValueError, dict(seqused_k=torch.tensor([-1, 0, 0]))),
    "block_table has pages 0 to 2, expected 0 to 1": (ValueError, POOL | dict(block_table=PAGES)),
    "block_table has pages -1 to 1, expected 0 to 1": (ValueError, POOL | dict(block_table=PAGES - 1)),
    "needs seqused_k|key has shape": (RuntimeError, dict(block_table=torch.zeros(3, 2, dtype=torch.int32))),
    "cu_seq_k is None": (RuntimeError, dict(cu_seq_k=None)),
    "key is torch.float16": (RuntimeError, dict(key=torch.zeros(15, 2, 8).half())),
    "key has head_dim 7": (RuntimeError, dict(key=torch.zeros(15, 2, 7))),
    "value has shape": (RuntimeError, dict(value=torch.zeros(14, 2, 8))),
    "query must be a Tensor": (TypeError, dict(query=1)),
    "num_splits": (ValueError, dict(num_splits=-3)),
    "max_q must be a number": (TypeError, dict(max_q="x")),
    "max_k must be a number": (TypeError, dict(max_k=None)),
    "return_aux must be an AuxRequest": (TypeError, dict(return_aux=True)),
    "scale must be a number": (TypeError, dict(scale="x")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    error, change = BAD[message]
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    arguments = dict(zip(names, packed(), strict=True), enable_gqa=True) | change
    with pytest.raises(error, match=f"varlen_attn: .*({message})"):
        varlen_attn(**arguments)


def test_what_runs_on_the_cpu(monkeypatch):
    """SDPA for each sequence, unless it lacks the feature, would mask a long sequence densely, or for training.

    On Zen 5 the kernel in C++ runs.
    """
    native = sys.modules.get("fastlm._native")
    if native:
        monkeypatch.setattr(native, "cpu", "zen5")
        monkeypatch.setattr(native, "amx", False)
        for lengths, expected in (((16, 8), "torch"), ((3, 1, 4, 2), "native"), ((200, 300), "native")):
            args = packed(lengths, lengths, dim=64)
            assert fastlm.explain(varlen_attn, *args, enable_gqa=True)[0].ran == expected
        for cpu in ("zen5", "intel"):
            monkeypatch.setattr(native, "cpu", cpu)
            assert fastlm.explain(varlen_attn, *packed(), enable_gqa=True, softcap=2.0)[0].ran == "native"
        assert fastlm.explain(varlen_attn, *packed(), enable_gqa=True)[0].ran == "torch"
        monkeypatch.setattr(native, "cpu", "generic")
    long = packed((20, 0, 40), (20, 0, 40))
    few, frozen = packed(), tuple(x.detach() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                                    for x in long)
    ahead = tuple(x.detach() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                  for x in packed((20, 0, 40), (50, 4, 60)))
    stock = [(few, {}), (few, {"window_size": (-1, 0)}), (frozen, {}), (frozen, {"window_size": (-1, 0)}), (ahead, {})]
    tiled = [(long, {}), (frozen, {"softcap": 2.0}), (frozen, {"sinks": torch.ones(4)}), (few, {"window_size": (3, 0)}),
             (ahead, {"window_size": (-1, 0)}), (frozen, {"alibi_slopes": torch.ones(4)})]
    for expected, cases in (("torch", stock), ("blocked", tiled)):
        for args, options in cases:
            call, = fastlm.explain(varlen_attn, *args, enable_gqa=True, **options)
            assert call.ran == expected, options


def test_second_order_and_the_compiler():
    args = packed((2, 3), (3, 2), 2, 2, 4, torch.float64)

    def call(q, k, v):
        return varlen_attn(q, k, v, *args[3:], window_size=(-1, 0))

    assert torch.autograd.gradcheck(call, args[:3])
    assert torch.autograd.gradgradcheck(call, args[:3])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(*args[:3]), call(*args[:3]))
