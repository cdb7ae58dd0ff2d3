"""Attention in Triton: FlashAttention-2's tiling, an online softmax in base 2, a deterministic backward.

Backward has one kernel for dk and dv, which walks the queries, and one for dq and the mask's gradient, which walks the
keys; nothing is accumulated with atomics. Tiles that the causal mask or the end of the keys cuts are walked in a
loop of their own, so that all others compare no indices. Probabilities are exp2((s - lse)·factor), where the factor
scales the scores and turns them to base 2; lse is +inf for a query that attends to no key.
"""

import torch
import triton
import triton.language as tl

from fastlm.autograd import Differentiable
from fastlm.ops.attention import reference
from fastlm.ops.attention_common import Options

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = tl.constexpr(1.4426950408889634)

ACCEPTS = {"length 1", "length 127", "length 128", "length 129", "causal", "causal, more keys", "causal, more queries",
           "cross", "grouped", "one key head", "head size 1", "head size 3", "head size 80", "head size 128",
           "head size 256", "wide values", "scale", "outliers", "boolean mask", "shared mask", "key padding",
           "additive mask", "learned bias", "float32 bias", "minus infinity", "causal and mask", "causal and bias",
           "no rows", "no queries", "no keys", "lengths before heads", "transposed", "expanded keys"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cannot(query, key, value, attn_mask, sinks, slopes, key_lengths, query_ids, key_ids, options):
    if not (query.is_cuda or INTERPRETED):
        return "needs a GPU"
    if query.dtype not in DTYPES:
        return f"no kernel for {query.dtype}"
    features = {"dropout": options.dropout_p, "a window": options.left >= 0 or options.right >= 0,
                "a softcap": options.softcap, "the log-sum-exp": options.return_lse, "sinks": sinks is not None,
                "ALiBi": slopes is not None, "key lengths": key_lengths is not None,
                "documents": query_ids is not None}
    missing = [name for name, wanted in features.items() if wanted]
    if missing:
        return f"no kernel for {' and '.join(missing)}"
    if options.scale <= 0:
        return f"scale {options.scale} is not positive"
    if query.size(3) > 256 or value.size(3) > 256:
        return f"head size {max(query.size(3), value.size(3))} is above 256"
    return None


def loses(query, *rest):
    return "not yet run on a GPU" if query.is_cuda else "interpreted"


def run(query, key, value, attn_mask, *features):
    tensors, options = (query, key, value, attn_mask), features[-1]
    if attn_mask is not None and attn_mask.requires_grad and attn_mask.dtype != query.dtype:
        # A float32 gradient has no room for probabilities that were rounded to half precision.
        tensors = (query.float(), key.float(), value.float(), attn_mask)
    return _attention(tensors, options.is_causal, options.scale)[0].to(query.dtype)


def forward(tensors, needs, causal, scale):
    query, key, value, mask = tensors
    out = query.new_zeros(*query.shape[:3], value.size(3))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if any(needs) else None
    if out.numel() and key.size(2):
        _launch(plan_forward(query, key, value, mask, out, lse, causal, scale))
    return [out] if lse is None else [out, lse]


def backward(grads, saved, tensors, needs, causal, scale):
    query, key, value, mask = tensors
    (out, lse), (dout,) = saved, grads
    results = [torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None
               for t, n in zip(tensors, needs, strict=True)]
    if not out.numel() or not key.size(2):
        return results
    dq, dk, dv, dmask = results
    if key.size(2) == 1:
        dq = dk = dmask = None  # the softmax over one key is constant, so zeros are exact
    delta = torch.empty_like(lse)
    _launch(plan_delta(out, dout, delta))
    inputs = (query, key, value, mask, dout, lse, delta)
    if dk is not None or dv is not None:
        _launch(plan_keys(*inputs, dk, dv, causal, scale))
    if dmask is not None and dmask.shape != (*lse.shape, key.size(2)):
        dmask = lse.new_zeros(*lse.shape, key.size(2))  # reduced below, over the dimensions that the mask broadcasts
    if dq is not None or dmask is not None:
        _launch(plan_queries(*inputs, dq, dmask, causal, scale))
    if dmask is not None:
        results[3] = dmask.sum_to_size(mask.shape).to(mask.dtype)
    return results


def _launch(plan):
    kernel, grid, arguments = plan
    with torch.cuda.device_of(next(iter(arguments.values()))):
        kernel[grid](**arguments)


def plan_forward(query, key, value, mask, out, lse, causal, scale):
    """Return (kernel, grid, arguments)."""
    tiles = _tiles("forward", query, value)
    arguments = _arguments(query, key, value, mask, causal, scale, tiles, o=out)
    blocks = triton.cdiv(query.size(2), tiles["M"])
    return forward_kernel, (blocks * query.size(0) * query.size(1),), dict(arguments, lse=lse)


def plan_delta(out, dout, delta):
    """Return (kernel, grid, arguments) of Σ_d o · do for each query."""
    rows = 32
    batch, heads, queries, dim = out.shape
    arguments = dict(o=out, do=dout, delta=delta, H=heads, Sq=queries, D=dim, M=rows, BLOCK=_block(dim), num_warps=4,
                     **_strides(o=out, do=dout))
    return delta_kernel, (triton.cdiv(queries, rows) * batch * heads,), arguments


def plan_keys(query, key, value, mask, dout, lse, delta, dk, dv, causal, scale):
    """Return (kernel, grid, arguments) of the gradients of keys and values."""
    tiles = _tiles("keys", query, value)
    arguments = _arguments(query, key, value, mask, causal, scale, tiles, do=dout)
    blocks = triton.cdiv(key.size(2), tiles["N"])
    return keys_kernel, (blocks * key.size(0) * key.size(1),), dict(arguments, lse=lse, delta=delta, dk=dk, dv=dv)


def plan_queries(query, key, value, mask, dout, lse, delta, dq, dmask, causal, scale):
    """Return (kernel, grid, arguments) of the gradients of queries and mask."""
    tiles = _tiles("queries", query, value)
    arguments = _arguments(query, key, value, mask, causal, scale, tiles, do=dout)
    blocks = triton.cdiv(query.size(2), tiles["M"])
    return (queries_kernel, (blocks * query.size(0) * query.size(1),),
            dict(arguments, lse=lse, delta=delta, dq=dq, dmask=dmask))


def _arguments(query, key, value, mask, causal, scale, tiles, **more):
    """Return what all kernels but delta's share; strides are those of (batch, head, row, column)."""
    batch, heads, queries, dim = query.shape
    shown = None if mask is None else mask.expand(batch, heads, queries, key.size(2))
    exact = query.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return dict(q=query, k=key, v=value, mask=shown, **more, H=heads, group=heads // key.size(1), Sq=queries,
                Sk=key.size(2), scale=float(scale), D=dim, DV=value.size(3), BLOCK_D=_block(dim),
                BLOCK_DV=_block(value.size(3)), CAUSAL=causal, PRECISION="ieee" if exact else "tf32", **tiles,
                **_strides(q=query, k=key, v=value, mask=shown, **more))


def _strides(**tensors):
    return {f"{name}_{axis}": stride for name, t in tensors.items()
            for axis, stride in zip("bhsd", (0, 0, 0, 0) if t is None else t.stride(), strict=True)}


def _block(dim):
    return max(16, triton.next_power_of_2(dim))


def _tiles(kernel, query, value):
    """Choose rows of queries (M) and of keys (N) in a tile, warps and pipeline stages of a kernel."""
    wide = max(_block(query.size(3)), _block(value.size(3)))
    half = query.element_size() == 2
    column = 0 if wide <= 64 else 1 if wide == 128 else 2
    M, N, warps, stages = TILES[kernel, half][column]
    return {"M": M, "N": N, "num_warps": warps, "num_stages": stages}


# (M, N, warps, stages) for tiles up to 64, 128 and 256 wide. Bounded by registers and shared memory, as
# tests/test_triton.py checks; not yet timed.
TILES = {
    ("forward", True): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    ("forward", False): ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    ("keys", True): ((64, 128, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1)),
    ("keys", False): ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    ("queries", True): ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    ("queries", False): ((32, 32, 4, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
}


@triton.jit
def _tile(base, row, stride, stride_d, BLOCK: tl.constexpr):
    return base + row[:, None].to(tl.int64) * stride + tl.arange(0, BLOCK)[None, :] * stride_d


@triton.jit
def _load(base, row, rows, stride, stride_d, D: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Load a tile `[row, BLOCK]`; columns beyond D, and unless WHOLE the rows beyond `rows`, are zero."""
    pointers = _tile(base, row, stride, stride_d, BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    if WHOLE and D == BLOCK:
        tile = tl.load(pointers)
    elif WHOLE:
        tile = tl.load(pointers, column < D, 0.0)
    elif D == BLOCK:
        tile = tl.load(pointers, row[:, None] < rows, 0.0)
    else:
        tile = tl.load(pointers, (row[:, None] < rows) & (column < D), 0.0)
    return tile


@triton.jit
def _store(base, tile, row, rows, stride, stride_d, D: tl.constexpr, BLOCK: tl.constexpr):
    inside = (row[:, None] < rows) & (tl.arange(0, BLOCK)[None, :] < D)
    tl.store(_tile(base, row, stride, stride_d, BLOCK), tile.to(base.dtype.element_ty), inside)


@triton.jit
def _factor(mask, scale):
    """Return what `_scores` are multiplied by before exp2: with an additive mask they are scaled already."""
    factor = scale * LOG2_E
    if mask is not None:  # noqa: SIM102 (an `and` would ask None for its dtype)
        if mask.dtype.element_ty != tl.int1:
            factor = scale * 0.0 + LOG2_E
    return factor


@triton.jit
def _scores(a, b, scale, mask, mask_s, mask_d, row, col, Sq, Sk, CUT: tl.constexpr, CAUSAL: tl.constexpr,
            PRECISION: tl.constexpr):
    """Return a·bᵀ under the mask and, in a tile that is CUT, under causality and the end of the keys.

    `row` (of a query) and `col` (of a key) are indices that broadcast to the shape of the result.
    """
    s = tl.dot(a, b.T, input_precision=PRECISION)
    if mask is not None:
        at = mask + row.to(tl.int64) * mask_s + col.to(tl.int64) * mask_d
        inside = (row < Sq) & (col < Sk)
        if mask.dtype.element_ty == tl.int1:
            s = tl.where(tl.load(at, inside, 0), s, -float("inf"))
        else:
            s = s * scale + tl.load(at, inside, 0.0).to(tl.float32)
    if CUT:
        s = tl.where(col < Sk, s, -float("inf"))
        if CAUSAL:
            s = tl.where(col <= row, s, -float("inf"))
    return s


@triton.jit
def _key_range(start, Sk, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Return where the whole key tiles of a query tile end, and where its last one, cut, ends."""
    whole, end = Sk // N * N, Sk
    if CAUSAL:
        whole = tl.minimum(whole, (start + 1) // N * N)
        end = tl.minimum(end, start + M)
    return whole, end


@triton.jit
def _attend(acc, total, highest, query, k, v, mask, row, start, end, Sq, Sk, scale, k_s, k_d, v_s, v_d, mask_s, mask_d,
            D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, N: tl.constexpr,
            CAUSAL: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the keys from `start` to `end` to the running output, sum and maximum of a tile of queries."""
    factor = _factor(mask, scale)
    for begin in range(start, end, N):
        col = begin + tl.arange(0, N)
        key = _load(k, col, Sk, k_s, k_d, D, BLOCK_D, not CUT)
        s = _scores(query, key, scale, mask, mask_s, mask_d, row[:, None], col[None, :], Sq, Sk, CUT, CAUSAL, PRECISION)
        new = tl.maximum(highest, tl.max(s, 1))
        base = new
        if mask is not None:
            base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2((s - base[:, None]) * factor)
        shrink = tl.exp2((highest - base) * factor)
        value = _load(v, col, Sk, v_s, v_d, DV, BLOCK_DV, not CUT)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        highest = new
    return acc, total, highest


@triton.jit
def forward_kernel(q, k, v, mask, o, lse, H, group, Sq, Sk, scale, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h,
                   v_s, v_d, mask_b, mask_h, mask_s, mask_d, o_b, o_h, o_s, o_d, D: tl.constexpr, DV: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                   CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(Sq, M)
    # Backwards, so that the longest causal rows start first.
    start = (blocks - 1 - tl.program_id(0) % blocks) * M
    at = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = at // H, at % H
    row = start + tl.arange(0, M)
    query = _load(q + b * q_b + h * q_h, row, Sq, q_s, q_d, D, BLOCK_D, False)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    if mask is not None:
        mask += b * mask_b + h * mask_h
    acc = tl.zeros((M, BLOCK_DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    highest = tl.full((M,), -float("inf"), tl.float32)
    whole, end = _key_range(start, Sk, M, N, CAUSAL)
    acc, total, highest = _attend(acc, total, highest, query, k, v, mask, row, 0, whole, Sq, Sk, scale, k_s, k_d, v_s,
                                  v_d, mask_s, mask_d, D, DV, BLOCK_D, BLOCK_DV, N, CAUSAL, False, PRECISION)
    acc, total, highest = _attend(acc, total, highest, query, k, v, mask, row, whole, end, Sq, Sk, scale, k_s, k_d, v_s,
                                  v_d, mask_s, mask_d, D, DV, BLOCK_D, BLOCK_DV, N, CAUSAL, True, PRECISION)
    if lse is not None:
        summed = tl.where(total == 0.0, float("inf"), highest + tl.log2(total) / _factor(mask, scale))
        tl.store(lse + at * Sq + row, summed, row < Sq)
    total = tl.where(total == 0.0, 1.0, total)
    _store(o + b * o_b + h * o_h, acc / total[:, None], row, Sq, o_s, o_d, DV, BLOCK_DV)


@triton.jit
def delta_kernel(o, do, delta, H, Sq, o_b, o_h, o_s, o_d, do_b, do_h, do_s, do_d, D: tl.constexpr, M: tl.constexpr,
                 BLOCK: tl.constexpr):
    blocks = tl.cdiv(Sq, M)
    row = tl.program_id(0) % blocks * M + tl.arange(0, M)
    at = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = at // H, at % H
    out = _load(o + b * o_b + h * o_h, row, Sq, o_s, o_d, D, BLOCK, False).to(tl.float32)
    dout = _load(do + b * do_b + h * do_h, row, Sq, do_s, do_d, D, BLOCK, False).to(tl.float32)
    tl.store(delta + at * Sq + row, tl.sum(out * dout, 1), row < Sq)


@triton.jit
def _walk_queries(dkey, dvalue, key, value, q, do, lse, delta, mask, col, start, end, Sq, Sk, scale, q_s, q_d, do_s,
                  do_d, mask_s, mask_d, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_DV: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr, DK: tl.constexpr,
                  PRECISION: tl.constexpr):
    """Add what the queries from `start` to `end` give to the gradients of a tile of keys and values.

    Scores are transposed, `[N, M]`. Keys beyond Sk need no mask: their gradients are not stored.
    """
    factor = _factor(mask, scale)
    for begin in range(start, end, M):
        row = begin + tl.arange(0, M)
        query = _load(q, row, Sq, q_s, q_d, D, BLOCK_D, False)
        s = _scores(key, query, scale, mask, mask_s, mask_d, row[None, :], col[:, None], Sq, Sk, CAUSAL, CAUSAL,
                    PRECISION)
        p = tl.exp2((s - tl.load(lse + row, row < Sq, float("inf"))[None, :]) * factor)
        dout = _load(do, row, Sq, do_s, do_d, DV, BLOCK_DV, False)
        dvalue = tl.dot(p.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
        if DK:
            dp = tl.dot(value, dout.T, input_precision=PRECISION)
            ds = p * (dp - tl.load(delta + row, row < Sq, 0.0)[None, :])
            dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue


@triton.jit
def keys_kernel(q, k, v, mask, do, lse, delta, dk, dv, H, group, Sq, Sk, scale, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d,
                v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, do_b, do_h, do_s, do_d, D: tl.constexpr,
                DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(Sk, N)
    start = tl.program_id(0) % blocks * N
    at = (tl.program_id(0) // blocks).to(tl.int64)
    kv_heads = H // group
    b, kv_head = at // kv_heads, at % kv_heads
    col = start + tl.arange(0, N)
    key = _load(k + b * k_b + kv_head * k_h, col, Sk, k_s, k_d, D, BLOCK_D, False)
    value = _load(v + b * v_b + kv_head * v_h, col, Sk, v_s, v_d, DV, BLOCK_DV, False)
    dkey = tl.zeros((N, BLOCK_D), tl.float32)
    dvalue = tl.zeros((N, BLOCK_DV), tl.float32)
    first, whole = 0, 0
    if CAUSAL:
        first = tl.minimum(start // M * M, Sq)
        whole = tl.minimum(tl.cdiv(start + N - 1, M) * M, tl.cdiv(Sq, M) * M)
    for i in range(0, group):
        h = kv_head * group + i
        here = mask
        if mask is not None:
            here = mask + b * mask_b + h * mask_h
        query, dout, offset = q + b * q_b + h * q_h, do + b * do_b + h * do_h, (b * H + h) * Sq
        if CAUSAL:
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, query, dout, lse + offset, delta + offset, here, col, first, whole, Sq, Sk,
                scale, q_s, q_d, do_s, do_d, mask_s, mask_d, D, DV, BLOCK_D, BLOCK_DV, M, True, dk is not None,
                PRECISION)
        dkey, dvalue = _walk_queries(
            dkey, dvalue, key, value, query, dout, lse + offset, delta + offset, here, col, whole, Sq, Sq, Sk, scale,
            q_s, q_d, do_s, do_d, mask_s, mask_d, D, DV, BLOCK_D, BLOCK_DV, M, False, dk is not None, PRECISION)
    if dk is not None:
        _store(dk + at * Sk * D, dkey * scale, col, Sk, D, 1, D, BLOCK_D)
    if dv is not None:
        _store(dv + at * Sk * DV, dvalue, col, Sk, DV, 1, DV, BLOCK_DV)


@triton.jit
def _walk_keys(dquery, query, dout, k, v, mask, dmask, row, lse, delta, start, end, Sq, Sk, scale, k_s, k_d, v_s, v_d,
               mask_s, mask_d, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               N: tl.constexpr, CAUSAL: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr):
    """Add what the keys from `start` to `end` give to the gradients of a tile of queries and of the mask."""
    factor = _factor(mask, scale)
    for begin in range(start, end, N):
        col = begin + tl.arange(0, N)
        key = _load(k, col, Sk, k_s, k_d, D, BLOCK_D, not CUT)
        value = _load(v, col, Sk, v_s, v_d, DV, BLOCK_DV, not CUT)
        s = _scores(query, key, scale, mask, mask_s, mask_d, row[:, None], col[None, :], Sq, Sk, CUT, CAUSAL, PRECISION)
        p = tl.exp2((s - lse[:, None]) * factor)
        ds = p * (tl.dot(dout, value.T, input_precision=PRECISION) - delta[:, None])
        if dmask is not None:
            at = dmask + row[:, None].to(tl.int64) * Sk + col[None, :]
            tl.store(at, ds.to(dmask.dtype.element_ty), (row[:, None] < Sq) & (col[None, :] < Sk))
        dquery = tl.dot(ds.to(key.dtype), key, dquery, input_precision=PRECISION)
    return dquery


@triton.jit
def queries_kernel(q, k, v, mask, do, lse, delta, dq, dmask, H, group, Sq, Sk, scale, q_b, q_h, q_s, q_d, k_b, k_h, k_s,
                   k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, do_b, do_h, do_s, do_d, D: tl.constexpr,
                   DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                   CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(Sq, M)
    start = (blocks - 1 - tl.program_id(0) % blocks) * M
    at = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = at // H, at % H
    row = start + tl.arange(0, M)
    query = _load(q + b * q_b + h * q_h, row, Sq, q_s, q_d, D, BLOCK_D, False)
    dout = _load(do + b * do_b + h * do_h, row, Sq, do_s, do_d, DV, BLOCK_DV, False)
    row_lse = tl.load(lse + at * Sq + row, row < Sq, float("inf"))
    row_delta = tl.load(delta + at * Sq + row, row < Sq, 0.0)
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    if mask is not None:
        mask += b * mask_b + h * mask_h
    if dmask is not None:
        dmask += at * Sq * Sk
    dquery = tl.zeros((M, BLOCK_D), tl.float32)
    whole, end = _key_range(start, Sk, M, N, CAUSAL)
    dquery = _walk_keys(dquery, query, dout, k, v, mask, dmask, row, row_lse, row_delta, 0, whole, Sq, Sk, scale, k_s,
                        k_d, v_s, v_d, mask_s, mask_d, D, DV, BLOCK_D, BLOCK_DV, N, CAUSAL, False, PRECISION)
    dquery = _walk_keys(dquery, query, dout, k, v, mask, dmask, row, row_lse, row_delta, whole, end, Sq, Sk, scale, k_s,
                        k_d, v_s, v_d, mask_s, mask_d, D, DV, BLOCK_D, BLOCK_DV, N, CAUSAL, True, PRECISION)
    if dq is not None:
        _store(dq + at * Sq * D, dquery * scale, row, Sq, D, 1, D, BLOCK_D)


def _reference(tensors, causal, scale):
    return (reference(*tensors, *[None] * 5, Options(is_causal=causal, scale=scale)),)


def _fake(tensors, needs, causal, scale):
    query, _, value, _ = tensors
    out = query.new_empty(*query.shape[:3], value.size(3))
    return [out, query.new_empty(query.shape[:3], dtype=torch.float32)] if any(needs) else [out]


_attention = Differentiable("attention_triton", statics="bool causal, float scale", outputs=1, forward=forward,
                            fake=_fake, backward=backward, reference=_reference, reads_results=True)
