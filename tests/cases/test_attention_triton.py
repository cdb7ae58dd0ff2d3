"""Attention's Triton kernels, interpreted: every feature alone and in pairs, dropout, splits, pages, huge strides."""

import functools
import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import fastlm
from fastlm import measure
from fastlm.ops import attention_hopper_launch_triton as hopper
from fastlm.ops import attention_launch_triton as launch
from fastlm.ops import attention_triton, triton_kernels, varlen_attn
from fastlm.ops import scaled_dot_product_attention as attention
from fastlm.ops.attention import reference
from fastlm.ops.attention_common import Options
from tests.parity import keep_error_rule

BATCH, HEADS, DIM = 1, 2, 16


def features(queries, keys, dtype):
    """Return name -> changed arguments of the op; the same argument twice excludes a pair."""
    generator = torch.Generator().manual_seed(7)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    barred = rand(1, HEADS, queries, keys) > 0.3
    barred[:, :, -1] = False
    documents = torch.randint(3, (BATCH, queries), generator=generator), torch.randint(
        3, (BATCH, keys), generator=generator).sort(1).values
    return {
        "causal": dict(is_causal=True), "window": dict(left=keys // 3, right=5), "causal at the end": dict(right=0),
        "softcap": dict(softcap=1.5), "alibi": dict(slopes=rand(BATCH, HEADS) / 4),
        "sinks": dict(sinks=rand(HEADS) * 4), "documents": dict(ids=documents),
        "lengths": dict(lengths=torch.tensor([keys // 2] * BATCH)),
        "boolean mask": dict(mask=barred), "bias": dict(mask=(rand(1, HEADS, queries, keys) - 0.5).to(dtype)),
        "broadcast bias": dict(mask=rand(BATCH, 1, 1, keys) - 0.5), "grouped": dict(kv_heads=1),
        "wide values": dict(value_dim=24), "lse": dict(return_lse=True), "dropout": dict(dropout_p=0.3),
        "negative scale": dict(scale=-0.4),
    }


def combinations(size):
    for chosen in itertools.combinations(features(3, 3, torch.float32), size):
        given = [key for name in chosen for key in features(3, 3, torch.float32)[name]]
        if len(set(given)) == len(given):
            yield chosen


@pytest.mark.parametrize(("dim", "queries"), [(128, 150), (64, 200)])
def test_what_the_backward_kernel_for_hopper_has_before_and_after(dim, queries):
    """Sums, with ALiBi in three planes, and delta of whole tiles, zeros; and a gradient out of its blocks."""
    out, dout = torch.randn(2, 2, queries, dim).half(), torch.randn(2, queries, 2, dim).half().transpose(1, 2)
    lse, dlse, slopes = torch.randn(2, 2, queries), torch.randn(2, 2, queries), torch.rand(1, 2)
    lse[0, 0, 3] = -torch.inf
    call = launch.Call(out, out, out, None, None, slopes, *[None] * 4, Options(scale=0.1, dropout_p=0.3))
    shape = hopper.padded(call)
    assert shape[2] > queries
    sums, delta, total = (torch.full(s, torch.nan) for s in ((3, *shape), shape, (*shape, dim)))
    launch.launch(hopper.plan_prepare, call, out, lse, dlse, dout, sums, delta, total)
    assert (total == 0).all() and (sums[..., queries:] == torch.inf).all() and (delta[..., queries:] == 0).all()
    lse[0, 0, 3] = torch.inf
    bias = slopes[..., None] * (torch.arange(queries) % hopper.BACKWARD_ROWS[dim])
    for plane, sign in enumerate((0, 1, -1)):
        torch.testing.assert_close(sums[plane, :, :, :queries], (lse + sign * bias) * launch.LOG2_E)
    expected = ((out.float() * dout).sum(-1) - dlse) * 0.7
    torch.testing.assert_close(delta[:, :, :queries], expected, rtol=1e-4, atol=1e-4)

    found = torch.zeros(2, 2)
    launch.launch(hopper.plan_longest, dout, found)
    torch.testing.assert_close(found, dout.float().square().sum(-1).amax(-1))

    total.normal_()
    dq = torch.empty_like(out)
    launch.launch(hopper.plan_unfold, total, dq, 2.0)
    blocks = total.view(-1, 2, 8, 4, 8, 4, 2, 2)  # half, 8 columns, warp, row, 2 columns, 8 rows, column
    order = (0, 3, 6, 4, 1, 2, 5, 7) if dim == 128 else (0, 1, 3, 6, 4, 2, 5, 7)
    expected = blocks.permute(order).reshape(total.shape)[:, :, :queries] * 2
    torch.testing.assert_close(dq, expected.half())


def arguments(chosen, queries, keys, dtype):
    """Return the canonical arguments of the op with the chosen features."""
    given = {key: x for name in chosen for key, x in features(queries, keys, dtype)[name].items()}
    kv_heads, value_dim = given.pop("kv_heads", HEADS), given.pop("value_dim", DIM)
    shapes = ((HEADS, queries, DIM), (kv_heads, keys, DIM), (kv_heads, keys, value_dim))
    tensors = [torch.randn(BATCH, *shape).to(dtype) for shape in shapes]
    rest = [given.pop(name, None) for name in ("mask", "sinks", "slopes", "lengths")]
    ids = given.pop("ids", (None, None))
    return (*tensors, *rest, *ids, Options(**{"scale": DIM**-0.5} | given))


def check(draw, run=attention_triton.run):
    """Hold results and gradients for what `draw()` returns to the error rule; stock is the formula in its dtype."""
    def drawn(i):
        torch.manual_seed(i)
        return errors(draw(), run)
    keep_error_rule(drawn)


def errors(args, run):
    dropped = None
    if args[-1].dropout_p:
        torch.manual_seed(0)
        dropped = launch.dropped(launch.Call(*args[:-1], launch.draws(args[0]), args[-1]))

    def formula(*args):
        return reference(*args, dropped)

    ours, upstream, grads = measure.differentiate(run, args, constants=(5,))
    stock = measure.differentiate(formula, args, upstream, constants=(5,))
    exact = measure.differentiate(formula, measure.cast(args, torch.float64), [g.double() for g in upstream],
                                  constants=(5,))
    names = [*(f"result {i}" for i in range(len(ours))), *(f"gradient {i}" for i in range(len(grads)))]
    return measure.compare(names, ours + grads, stock[0] + stock[2], exact[0] + exact[2])


@pytest.mark.parametrize("chosen", [("dropout",), ("negative scale",), ("dropout", "grouped", "lengths", "causal")],
                         ids="+".join)
def test_what_the_matrix_lacks(chosen):
    check(lambda: arguments(chosen, 65, 130, torch.float32))


@pytest.mark.parametrize("chosen", list(combinations(2)), ids="+".join)
def test_every_pair(chosen):
    dtype = (torch.float32, torch.float16)[sum(map(len, chosen)) % 2]
    check(lambda: arguments(chosen, 9, 66, dtype))


def test_numbers_that_lie_apart():
    """Sinks, slopes, lengths and documents may have any strides."""
    def draw():
        *tensors, options = arguments(("alibi", "sinks", "lengths", "documents"), 9, 66, torch.float32)
        apart = (None if x is None else torch.stack((x, x.new_full(x.shape, 7)), -1)[..., 0] for x in tensors[4:])
        return *tensors[:4], *apart, options
    check(draw)


def test_every_triple(request):
    if not request.config.getoption("--deep"):
        pytest.skip("--deep")
    for chosen, dtype in itertools.product(combinations(3), (torch.float32, torch.float16)):
        check(functools.partial(arguments, chosen, 66, 17, dtype))


@pytest.mark.parametrize("shape", [(1, 1, 70, 66), (1, 2, 1, 1), (1, 1, 70, 1), (1, 2, 1, 66)])
def test_the_gradient_of_a_mask_is_summed_where_it_is_shared(shape):
    def draw():
        query, key, value, _, *rest = arguments(("grouped", "causal", "softcap", "sinks"), 70, 66, torch.float32)
        return query, key, value, torch.randn(shape), *rest
    check(draw)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_its_share_and_the_seed_decides(p):
    args, options, found = arguments((), 200, 300, torch.float32)[:-1], Options(dropout_p=p), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(launch.dropped(launch.Call(*args, launch.draws(args[0]), options)).float())
    dropped, again, other = found
    assert torch.equal(dropped, again)
    assert abs(dropped.mean() - p) < 4 * 0.5 / dropped.numel() ** 0.5
    if 0 < p < 1:
        # Neither rows, columns, heads nor seeds are alike: correlations of n draws are within 5 / sqrt(n) of 0.
        pairs = [(dropped[:, :, 1:], dropped[:, :, :-1]), (dropped[..., 1:], dropped[..., :-1]), (dropped, other),
                 (dropped[:, 1:], dropped[:, :-1]),
                 (dropped[:, :, 1:, 1:] * dropped[:, :, :-1, :-1], dropped[:, :, 1:, :-1] * dropped[:, :, :-1, 1:])]
        for a, b in pairs:
            found = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(found) < 5 / a.numel() ** 0.5
        assert dropped.mean((0, 1, 3)).std() < 2 * (p * (1 - p) / (2 * 300)) ** 0.5
        assert dropped.mean((0, 1, 2)).std() < 2 * (p * (1 - p) / (2 * 200)) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_dropout_drops_is_independent(p):
    """Pairs and triples of keys that lie evenly, where a product that mixes badly shows, and how many a row drops."""
    torch.manual_seed(5)
    args = (torch.empty(1, 1, 2000, DIM), torch.empty(1, 1, 2048, DIM), torch.empty(1, 1, 2048, DIM))
    call = launch.Call(*args, *[None] * 6, launch.draws(args[0]), Options(dropout_p=p))
    z = (launch.dropped(call)[0, 0].double() - p) / (p * (1 - p)) ** 0.5
    for step in (1, 2, 3, 64, 1000):
        pairs, triples = z[:, step:] * z[:, :-step], z[:, 2 * step:] * z[:, step:-step] * z[:, :-2 * step]
        assert abs(pairs.sum()) < 5 * pairs.numel() ** 0.5
        assert abs(triples.sum()) < 5 * triples.numel() ** 0.5
    sums = z.sum(1) / z.size(1) ** 0.5  # nearly normal numbers, of variance 1
    assert abs(sums.mean()) < 5 / 2000**0.5
    assert abs(sums.square().mean() - 1) < 5 * (2 / 2000) ** 0.5
    assert sums.abs().max() < 6


def test_dropout_is_the_same_under_checkpointing():
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))

    def call(q, k, v):
        with fastlm.backend("triton"):
            return attention(q, k, v, dropout_p=0.4)

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        out = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False) if checkpointed else call(q, k, v)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chosen", [(), ("sinks", "lengths"), ("dropout", "grouped"), ("window", "documents")],
                         ids="+".join)
def test_keys_in_parts(chosen, monkeypatch):
    """A decoding call on a device with room splits the keys; the merge is what one pass gives."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 64)

    def draw():
        *tensors, options = arguments(chosen, 3, 400, torch.float32)
        return *tensors, options._replace(return_lse=True)
    *tensors, options = draw()
    assert launch._splits(launch.Call(*tensors, None, options)) == 3  # seven tiles of keys, at least two for each part
    check(draw)


@pytest.mark.parametrize("num_splits", [1, 2, 7, None])
def test_splits_of_packed_sequences_and_pages(num_splits):
    options = dict(enable_gqa=True, num_splits=num_splits, window_size=(-1, 0), sinks=torch.randn(4))
    pools = [torch.randn(20, 16, 2, 16) for _ in range(2)]
    table, used = torch.randperm(20)[:16].view(2, 8), torch.tensor([120, 3])
    query, cu_q = torch.randn(6, 4, 16), torch.tensor([0, 1, 4])
    with fastlm.backend("reference"):
        expected = varlen_attn(query, *pools, cu_q, None, 3, 128, seqused_k=used, block_table=table, **options)
    with fastlm.backend("triton"):
        found = varlen_attn(query, *pools, cu_q, None, 3, 128, seqused_k=used, block_table=table, **options)
        flat = [torch.cat([x[row].flatten(0, 1) for row in table]) for x in pools]
        packed = varlen_attn(query, *flat, cu_q, torch.tensor([0, 128, 256]), 3, 128, seqused_k=used, **options)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, packed)
    assert (found[4:] == 0).all()


def test_tiles_of_other_documents_are_skipped():
    ids = torch.arange(5).repeat_interleave(100)[None]
    found = launch._ranges(ids, ids, 8, 1, 64)[0]
    for tile, ranges in enumerate(found.tolist()):
        first, last = tile * 64 // 100 * 100, (min(tile * 64 + 63, 499) // 100 + 1) * 100
        assert ranges == [first, last, *((first, last) if last - first == 100 else (0, 0))]
    other = launch._ranges(ids, ids + 9, 8, 1, 64)[0]
    assert (other[:, 1] <= other[:, 0]).all()


def test_distances_of_far_positions(monkeypatch):
    """Beyond 2²² distances are converted to floats one by one."""
    monkeypatch.setattr(launch, "_near", lambda call: False)
    monkeypatch.setattr(triton_kernels, "_launches", {})
    check(lambda: arguments(("alibi", "causal"), 65, 130, torch.float32))


def test_offsets_have_64_bits(tmp_path):
    """Keys lie more than 2³¹ elements apart, in a file that has holes; so do the columns of the values."""
    far = 2**31 // 3
    x = torch.from_file(str(tmp_path / "holes"), shared=True, size=7 * far + 4096, dtype=torch.float16)
    q = torch.randn(1, 1, 4, 16, dtype=torch.float16)
    k, v = (x.as_strided((1, 1, 4, 16), (0, 0, far, step), offset) for step, offset in ((1, 0), (far // 4, 64)))
    copies = [torch.randn(1, 1, 4, 16, dtype=torch.float16) for _ in range(2)]
    for view, copy in zip((k, v), copies, strict=True):
        view.copy_(copy)
    with fastlm.backend("triton"):
        torch.testing.assert_close(attention(q, k, v), attention(q, *copies))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_is_ieee_unless_less_is_allowed(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        call = launch.Call(*arguments((), 3, 3, torch.float32)[:-1], None, Options())
        out = torch.empty(BATCH, HEADS, 3, DIM)
        arguments_ = launch.plan_forward(call, out, out[..., 0], out[..., 0], 1)[2]
        assert arguments_["EXACT"] == (precision == "highest")
        assert arguments_["q"] is call.query
    finally:
        torch.set_float32_matmul_precision("highest")
