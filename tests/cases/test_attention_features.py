"""Every feature of attention alone and in pairs, on every implementation, against a definition of its own."""

import itertools
import os

import pytest
import torch
from torch.utils import _pytree as pytree

import fastlm
from fastlm import measure
from fastlm.ops import attention_lanes, attention_tiles
from fastlm.ops import scaled_dot_product_attention as attention

NAMES = ["reference", "torch", "native", "blocked"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")
BATCH, HEADS, DIM = 2, 2, 4


def define(q, k, v, attn_mask=None, is_causal=False, scale=None, window_size=(-1, -1), softcap=None, alibi_slopes=None,
           sinks=None, key_lengths=None, document_ids=None, **_):
    """Return output and log-sum-exp by the words of the issue, one batch row, head and query at a time."""
    queries, keys = q.size(2), k.size(2)
    outs, lses = [], []
    for b, h, i in itertools.product(range(q.size(0)), range(q.size(1)), range(queries)):
        shared = h // (q.size(1) // k.size(1))
        own = keys if key_lengths is None else int(key_lengths[b])
        logits, values = [], []
        for j in range(own):
            left, right = window_size
            at = i + own - queries
            ids = document_ids if isinstance(document_ids, tuple) else (document_ids, document_ids)
            if ((is_causal and j > i) or (left >= 0 and j < at - left) or (right >= 0 and j > at + right)
                    or (document_ids is not None and ids[0][b, i] != ids[1][b, j])):
                continue
            s = q[b, h, i] @ k[b, shared, j] * (q.size(3) ** -0.5 if scale is None else scale)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            if attn_mask is not None:
                one = attn_mask.expand(q.size(0), q.size(1), queries, keys)[b, h, i, j]
                if one.dtype is torch.bool and not one:
                    continue
                s = s if one.dtype is torch.bool else s + one
            if alibi_slopes is not None:
                s = s - alibi_slopes.expand(q.size(0), -1)[b, h] * abs(at - j)
            logits.append(s)
            values.append(v[b, shared, j])
        bottom = logits + ([] if sinks is None else [sinks[h].to(q.dtype)])
        lse = torch.stack(bottom).logsumexp(0) if bottom else q.new_tensor(-torch.inf)
        nothing = v.new_zeros(v.size(3)) + 0 * q[b, h, i].sum()
        outs.append(sum(((s - lse).exp() * x for s, x in zip(logits, values, strict=True)), nothing))
        lses.append(lse)
    shape = (*q.shape[:3],)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def features(queries, keys):
    """Return name -> keyword arguments; those of one argument exclude each other."""
    generator = torch.Generator().manual_seed(7)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    barred = rand(1, HEADS, queries, keys) > 0.3
    barred[:, :, -1] = False
    ids = tuple(torch.randint(2, (BATCH, n), generator=generator) for n in (queries, keys))
    return {
        "causal": dict(is_causal=True),
        "scale": dict(scale=0.7),
        "window": dict(window_size=(2, 1)),
        "causal at the end": dict(window_size=(-1, 0)),
        "softcap": dict(softcap=1.5),
        "alibi": dict(alibi_slopes=rand(HEADS).double()),
        "alibi for each row": dict(alibi_slopes=rand(BATCH, HEADS).double()),
        "sinks": dict(sinks=rand(HEADS) * 4 - 2),
        "lengths": dict(key_lengths=torch.tensor([keys - 2, keys // 2])),
        "no length": dict(key_lengths=torch.tensor([0, keys])),
        "documents": dict(document_ids=ids),
        "boolean mask": dict(attn_mask=barred),
        "bias": dict(attn_mask=rand(1, HEADS, queries, keys) - 0.5),
        "broadcast bias": dict(attn_mask=rand(BATCH, 1, 1, keys) - 0.5),
        "grouped": dict(kv_heads=1),
        "wide values": dict(value_dim=3),
        "lse": dict(return_lse=True),
    }


def combinations(names, size):
    for chosen in itertools.combinations(names, size):
        given = [key for name in chosen for key in features(3, 3)[name]]
        if len(set(given)) == len(given):
            yield chosen


@pytest.fixture(autouse=True, params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Cut also such small calls as these into tiles and lanes."""
    threads = torch.get_num_threads()
    if request.param == "many tiles":
        for name, value in dict(ROWS=2, ID_BLOCK=2, TILE_BYTES=8 * 2 * 7).items():
            monkeypatch.setattr(attention_tiles, name, value)
        monkeypatch.setattr(attention_lanes, "LANE_SCORES", 0)
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


CASES = [*combinations(features(3, 3), 1), *combinations(features(3, 3), 2)]


def run(fn, leaves, options):
    found = fn(*leaves, **options)
    results = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    finite = [(torch.where(r.isfinite(), r, 0) * g).sum() for r, g in zip(results, upstream, strict=True)]
    wanted = [t for t in (*leaves, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    return results + list(torch.autograd.grad(sum(finite), wanted, allow_unused=True, materialize_grads=True))


def check(chosen, queries, keys):
    """Hold every implementation to the definition: results and all gradients."""
    options = {key: x for c in chosen for key, x in features(queries, keys)[c].items()}
    kv_heads, value_dim = options.pop("kv_heads", HEADS), options.pop("value_dim", DIM)
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, queries, DIM), (kv_heads, keys, DIM), (kv_heads, keys, value_dim))
    tensors = [torch.randn(BATCH, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    for key in ("attn_mask", "sinks"):
        if key in options and options[key].is_floating_point():
            options[key] = options[key].double().requires_grad_()

    def expected(q, k, v, **options):
        found = define(q, k, v, **options)
        return found if options.get("return_lse") else found[0]

    def ours(q, k, v, **options):
        return attention(q, k, v, enable_gqa=kv_heads != HEADS, **options)

    exact = run(expected, tensors, options)
    for name in ["blocked"] if attention_tiles.ROWS < 16 else NAMES:
        single = name == "triton"  # which has no float64
        given = measure.cast((tensors, options), torch.float32) if single else (tensors, options)
        given = pytree.tree_map(lambda x: x.detach().requires_grad_(x.is_floating_point())
                                if isinstance(x, torch.Tensor) else x, given)
        if "alibi_slopes" in options:
            given[1]["alibi_slopes"].requires_grad_(False)
        with fastlm.backend(name):
            try:
                found = run(ours, *given)
            except RuntimeError as error:
                if single and "cannot run" in str(error):
                    continue
                raise
        for a, b in zip(found, exact, strict=True):
            tolerance = dict(rtol=1e-4, atol=1e-5) if single else dict(rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(a.double(), b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("chosen", CASES, ids="+".join)
def test_features_and_their_pairs(chosen):
    check(chosen, 4, 7)


@pytest.mark.parametrize("chosen", [*combinations(features(3, 3), 1), ("causal at the end", "lengths")], ids="+".join)
@pytest.mark.parametrize(("queries", "keys"), [(7, 4), (5, 5), (1, 6)])
def test_features_where_queries_are_more_or_as_many(chosen, queries, keys):
    check(chosen, queries, keys)


def test_every_triple(request):
    if not request.config.getoption("--deep"):
        pytest.skip("--deep")
    for chosen in combinations(features(3, 3), 3):
        check(chosen, 4, 7)
