"""Attention's kernels in Triton, shared by attention and varlen_attn; attention_launch_triton.py launches them.

FlashAttention-2's tiling with an online softmax in base 2 and a deterministic backward: one pass for dk and dv, which
walks the queries, one for dq, which walks the keys, and one for the mask's gradient, which walks the batch and the
heads that share the mask. Nothing is accumulated with atomics.

The rows of a tile are queries of the G heads that share a head of keys: row r is query r // G of the group's head
r % G. So few queries with many heads still fill a tile, and keys are read once for the group. All that bars keys by
position is one band, lower ≤ j - i ≤ upper. Tiles that its edges or the end of the keys cut are walked in loops of
their own; the tiles between compare no positions. An argument that is None is a feature that is off, and costs nothing.

The gradient ds is that of the scores after scale, cap, mask and bias: p ⊙ (dp - delta), delta = Σ o·do - dlse.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Band(NamedTuple):
    """Queries and keys of a row of the batch; query i sees key j where lower ≤ j - i ≤ upper. `ahead` is Sk - Sq."""

    queries: tl.tensor
    keys: tl.tensor
    ahead: tl.tensor
    lower: tl.tensor
    upper: tl.tensor
    LOWER: tl.constexpr
    UPPER: tl.constexpr


class Scoring(NamedTuple):
    """What all scores depend on; `factor` is what exp2 multiplies them by: log2(e), times the scale unless SCALED."""

    factor: tl.tensor
    scale: tl.tensor
    cap: tl.tensor
    threshold: tl.tensor
    boost: tl.tensor
    SCALED: tl.constexpr
    EXACT: tl.constexpr


class Keys(NamedTuple):
    """The keys and values of one head: in a row, or in the pages of a table."""

    k: tl.tensor
    v: tl.tensor
    k_b: tl.tensor
    k_s: tl.tensor
    k_d: tl.tensor
    v_b: tl.tensor
    v_s: tl.tensor
    v_d: tl.tensor
    table: tl.tensor
    page_size: tl.tensor
    pages: tl.tensor
    documents: tl.tensor


class Queries(NamedTuple):
    """The queries of the heads that share one head of keys: of `group` heads from `head` on.

    What has one row for each query and head (output, log-sum-exp, delta, dq) is contiguous and shares row numbers.
    """

    q: tl.tensor
    q_h: tl.tensor
    q_s: tl.tensor
    q_d: tl.tensor
    do: tl.tensor
    do_h: tl.tensor
    do_s: tl.tensor
    do_d: tl.tensor
    mask: tl.tensor
    mask_h: tl.tensor
    mask_s: tl.tensor
    mask_d: tl.tensor
    slopes: tl.tensor
    documents: tl.tensor
    draws: tl.tensor
    row: tl.tensor
    row_h: tl.tensor
    row_s: tl.tensor
    head: tl.tensor
    group: tl.tensor


class Size(NamedTuple):
    """Widths of keys and values, and of the tiles that hold them."""

    D: tl.constexpr
    DV: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr


# --- tiles in memory -------------------------------------------------------------------------------------------


@triton.jit
def _load(base, offset, inside, stride_d, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile `[R, BLOCK]` whose rows begin at `offset` `[R]`: 0 beyond D and, unless None, where not `inside`."""
    column = tl.arange(0, BLOCK)
    pointers = base + offset[:, None] + (column.to(tl.int64) * stride_d)[None, :]
    if inside is None:
        if D == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, (column < D)[None, :], 0.0)
    elif D == BLOCK:
        tile = tl.load(pointers, inside[:, None], 0.0)
    else:
        tile = tl.load(pointers, inside[:, None] & (column < D)[None, :], 0.0)
    return tile


@triton.jit
def _store(base, offset, inside, tile, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(base + offset[:, None] + column[None, :], tile.to(base.dtype.element_ty),
             inside[:, None] & (column < D)[None, :])


@triton.jit
def _load_keys(source, j, band, size, WHOLE: tl.constexpr):
    """Load the keys and values at positions j `[N]`; WHOLE promises that all are there."""
    inside = None
    if not WHOLE:
        inside = j < band.keys
    if source.table is None:
        at_k, at_v = j.to(tl.int64) * source.k_s, j.to(tl.int64) * source.v_s
    else:
        page = tl.load(source.table + j // source.page_size, j < band.keys, 0)
        page = tl.minimum(tl.maximum(page, 0), source.pages - 1).to(tl.int64)
        slot = (j % source.page_size).to(tl.int64)
        at_k, at_v = page * source.k_b + slot * source.k_s, page * source.v_b + slot * source.v_s
    key = _load(source.k, at_k, inside, source.k_d, size.D, size.BLOCK_D)
    value = _load(source.v, at_v, inside, source.v_d, size.DV, size.BLOCK_DV)
    return key, value


@triton.jit
def _split(source, r):
    """Return the query and the head of rows r."""
    return r // source.group, source.head + r % source.group


@triton.jit
def _row(source, r):
    """Return the row numbers of rows r in the output and what is laid out like it."""
    i, head = _split(source, r)
    return source.row + i.to(tl.int64) * source.row_s + head * source.row_h


@triton.jit
def _load_query(source, r, band, size):
    i, head = _split(source, r)
    at = i.to(tl.int64) * source.q_s + head * source.q_h
    return _load(source.q, at, i < band.queries, source.q_d, size.D, size.BLOCK_D)


@triton.jit
def _load_upstream(source, r, band, size, lse, delta, scoring):
    """Load, of rows r, the outputs' gradients, the log-sum-exp as a score (∞ where nothing is seen), and delta."""
    i, head = _split(source, r)
    inside = i < band.queries
    at = i.to(tl.int64) * source.do_s + head * source.do_h
    dout = _load(source.do, at, inside, source.do_d, size.DV, size.BLOCK_DV)
    sums = tl.load(lse + _row(source, r), inside, -float("inf"))
    sums = tl.where(sums == -float("inf"), float("inf"), _as_score(sums, scoring))
    return dout, sums, tl.load(delta + _row(source, r), inside, 0.0)


# --- who sees whom ---------------------------------------------------------------------------------------------


@triton.jit
def _edges(ahead, left, right, CAUSAL: tl.constexpr):
    """Return lower and upper of a Band; they mean nothing where there is no such edge."""
    lower, upper = ahead, ahead
    if left is not None:
        lower = ahead - left
    if right is not None:
        upper = ahead + right
        if CAUSAL:
            upper = tl.minimum(upper, 0)
    elif CAUSAL:
        upper = ahead * 0
    return lower, upper


@triton.jit
def _keys_seen(first, last, band, ranges):
    """Return the range of keys that queries from `first` to `last` see, and the range that every one of them sees."""
    start, end, low, high = first * 0, band.keys, first * 0, band.keys
    if band.LOWER:
        start = tl.maximum(first + band.lower, 0)
        low = last - 1 + band.lower
    if band.UPPER:
        end = tl.minimum(end, last + band.upper)
        high = tl.minimum(high, first + band.upper + 1)
    if ranges is not None:
        start = tl.maximum(start, tl.load(ranges))
        end = tl.minimum(end, tl.load(ranges + 1))
    return start, end, low, high


@triton.jit
def _queries_seeing(first, last, band, ranges):
    """Return the range of queries that see keys from `first` to `last`, and the range of those that see every one."""
    start, end, low, high = first * 0, band.queries, first * 0, band.queries
    if band.UPPER:
        start = tl.maximum(first - band.upper, 0)
        low = last - 1 - band.upper
    if band.LOWER:
        end = tl.minimum(end, last - band.lower)
        high = tl.minimum(high, first - band.lower + 1)
    if ranges is not None:
        start = tl.maximum(start, tl.load(ranges))
        end = tl.minimum(end, tl.load(ranges + 1))
    end = tl.where(first < band.keys, end, 0)
    high = tl.where(last <= band.keys, high, 0)
    return start, end, low, high


@triton.jit
def _align(start, end, low, high, STEP: tl.constexpr):
    """Return where a walk over a range starts, where its whole tiles start and end, and where it ends."""
    start = start // STEP * STEP
    low = tl.minimum(tl.cdiv(tl.maximum(low, start), STEP) * STEP, tl.maximum(end, start))
    high = tl.maximum(tl.maximum(tl.minimum(high, end), 0) // STEP * STEP, low)
    return start, low, high, end


@triton.jit(do_not_specialize=["S", "others_S", "blocks", "group"])
def documents_kernel(ids, others, ranges, S, others_S, blocks, group, M: tl.constexpr, STEP: tl.constexpr):
    """Write for each tile of M rows of `ids` `[B, S]` the range of `others` that holds all its documents."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks
    at = tl.minimum(tile * M // group + tl.arange(0, M), tl.minimum((tile * M + M - 1) // group, S - 1))
    own = tl.load(ids + b * S + at)
    low, high = tl.min(own, 0), tl.max(own, 0)
    start, end = others_S, others_S * 0
    for begin in range(0, others_S, STEP):
        at = tl.minimum(begin + tl.arange(0, STEP), others_S - 1)
        other = tl.load(others + b * others_S + at)
        shared = (tl.min(other, 0) <= high) & (tl.max(other, 0) >= low)
        start = tl.where(shared, tl.minimum(start, begin), start)
        end = tl.where(shared, tl.minimum(begin + STEP, others_S), end)
    tl.store(ranges + tl.program_id(0) * 2, start)
    tl.store(ranges + tl.program_id(0) * 2 + 1, end)


# --- scores ----------------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, EXACT: tl.constexpr):
    """Return acc + a b; float32 in IEEE arithmetic if it is to be EXACT, else in TF32."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _exp(s, base, scoring):
    """Return 2^((s - base)·factor); where it need not be EXACT, with the product and the sum in one instruction."""
    if scoring.EXACT:
        x = (s - base) * scoring.factor
    else:
        x = s * scoring.factor - base * scoring.factor
    return tl.exp2(x)


@triton.jit
def _as_score(x, scoring):
    """Return a logit in the unit of the scores. A product there and back again would round it."""
    if not scoring.SCALED:
        x = x * (LOG2_E / scoring.factor)
    return x


@triton.jit
def _dropout(x, i, head, j, queries, band, scoring):
    """Return `x`, scaled up, where a weight is kept, else 0.

    A weight's bits are the 64 random ones of its query's row mixed with its key (as MurmurHash3 ends): a Philox for
    each weight would take longer than the products. `dropped` of attention_launch_triton.py does the same.
    """
    row = queries.row + i.to(tl.int64) * queries.row_s + head * queries.row_h
    bits = tl.load(queries.draws + row, i < band.queries, 0)
    mixed = (j.to(tl.uint32) * 0x9E3779B9) ^ bits.to(tl.uint32)
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) ^ (bits >> 32).to(tl.uint32)
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    mixed = mixed ^ (mixed >> 16)
    return tl.where(mixed.to(tl.int32, bitcast=True) >= scoring.threshold, x * scoring.boost, 0.0)


@triton.jit
def _tanh(x):
    """Return tanh x; near 0, where 1 - exp(-2x) cancels, by its series."""
    a = tl.abs(x)
    e = tl.exp2(a * (-2 * LOG2_E))
    y = a * a
    series = 2.1869488536155203e-2 + y * (-8.863235529902197e-3 + y * 3.592128036572481e-3)
    series = -0.3333333333333333 + y * (0.13333333333333333 + y * (-5.396825396825397e-2 + y * series))
    t = tl.where(a < 0.4, a + a * y * series, (1 - e) / (1 + e))
    return tl.where(x < 0, -t, t)


@triton.jit
def _scores(s, i, head, j, queries, keys, band, scoring, CUT: tl.constexpr, WHOLE: tl.constexpr):
    """Return the scores made of the products s, -∞ where query i may not see key j, and the cap's derivative.

    i, head and j broadcast to the shape of s. Unless SCALED, the scale is left to `factor`. Positions are compared in
    tiles that are CUT only. WHOLE promises that all keys are there, which lets loads be vectors.
    """
    bend = 1.0
    if scoring.cap is not None:
        t = _tanh(s * (scoring.scale / scoring.cap))
        s = t * scoring.cap
        bend = 1.0 - t * t
    elif scoring.SCALED:
        s = s * scoring.scale
    if queries.slopes is not None:
        s -= tl.load(queries.slopes + head) * tl.abs(i + band.ahead - j).to(tl.float32)
    if queries.mask is not None:
        at = queries.mask + (head * queries.mask_h + i.to(tl.int64) * queries.mask_s) + j.to(tl.int64) * queries.mask_d
        inside = i < band.queries
        if not WHOLE:
            inside = inside & (j < band.keys)
        if queries.mask.dtype.element_ty == tl.int1:
            s = tl.where(tl.load(at, inside, 0), s, -float("inf"))
        else:
            s += tl.load(at, inside, 0.0).to(tl.float32)
    if queries.documents is not None:
        own, other = tl.load(queries.documents + i, i < band.queries, 0), tl.load(keys.documents + j, j < band.keys, 0)
        s = tl.where(own == other, s, -float("inf"))
    if CUT:
        seen = j < band.keys
        if band.LOWER:
            seen &= j - i >= band.lower
        if band.UPPER:
            seen &= j - i <= band.upper
        s = tl.where(seen, s, -float("inf"))
    return s, bend


# --- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, start, end, N: tl.constexpr,
            CUT: tl.constexpr):
    """Add the keys from `start` to `end` to the running output, sum and maximum of a tile of queries."""
    i, head = _split(queries, r[:, None])
    for begin in range(start, end, N):
        j = tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, N), N), N)
        key, value = _load_keys(keys, j, band, size, not CUT)
        s = _dot(query, key.T, None, scoring.EXACT)
        s, _ = _scores(s, i, head, j[None, :], queries, keys, band, scoring, CUT, not CUT)
        new = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = _exp(s, base[:, None], scoring)
        shrink = _exp(highest, base, scoring)
        total = total * shrink + tl.sum(p, 1)
        highest = new
        if queries.draws is not None:
            p = _dropout(p, i, head, j[None, :], queries, band, scoring)
        acc = _dot(p.to(value.dtype), value, acc * shrink[:, None], scoring.EXACT)
    return acc, total, highest


@triton.jit
def _forward(tile, split, splits, rows_in_all, band, queries, keys, scoring, size, sinks, ranges, o, lse,
             M: tl.constexpr, N: tl.constexpr):
    """Compute the output and log-sum-exp of a tile of rows, over one of `splits` parts of the keys if not None."""
    r = tile * M + tl.arange(0, M)
    first, last = _ends(tile, queries, band, M)
    start, end, low, high = _keys_seen(first, last, band, ranges)
    highest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    i, head = _split(queries, r)
    inside = i < band.queries
    if sinks is not None:
        highest = _as_score(tl.load(sinks + head).to(tl.float32), scoring)
        if split is not None:
            highest = tl.where(split == 0, highest, -float("inf"))
        total = tl.where(highest == -float("inf"), 0.0, 1.0)
    at = _row(queries, r)
    if split is not None:
        start = start // N * N
        part = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), N), splits) * N
        start += split * part
        end = tl.minimum(end, start + part)
        at += split * rows_in_all
    start, low, high, end = _align(start, end, low, high, N)
    query = _load_query(queries, r, band, size)
    acc = tl.zeros((M, size.BLOCK_DV), tl.float32)
    if band.LOWER:
        acc, total, highest = _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, start, low,
                                      N, True)
    acc, total, highest = _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, low, high,
                                  N, False)
    acc, total, highest = _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, high, end,
                                  N, True)
    total = tl.where(total == 0.0, 1.0, total)  # of rows that see nothing, whose maximum is -∞
    if not scoring.SCALED:
        highest = highest * scoring.scale
    tl.store(lse + at, highest + tl.log2(total) * LN_2, inside)
    acc = acc / total[:, None]
    _store(o, at * size.DV, inside, acc, size.DV, size.BLOCK_DV)


@triton.jit
def _ends(tile, queries, band, M: tl.constexpr):
    """Return the first query of a tile of rows, and the one after its last."""
    return tile * M // queries.group, tl.minimum((tile * M + M - 1) // queries.group + 1, band.queries)


@triton.jit
def combine_kernel(parts, part_lse, o, lse, rows_in_all, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Merge the parts of a row's keys: each counts by its share of the exponentials' sum."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), -float("inf"), tl.float32)
    for split in range(0, splits):
        highest = tl.maximum(highest, tl.load(part_lse + split * rows_in_all + row))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    column = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    total = tl.zeros((), tl.float32)
    for split in range(0, splits):
        at = split * rows_in_all + row
        share = tl.exp2((tl.load(part_lse + at) - base) * LOG2_E)
        part = tl.load(parts + at * DV + column, column < DV, 0.0)
        acc += tl.where(share > 0, share * part, 0.0)  # nobody wrote the part of a row of no sequence
        total += share
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + row, highest + tl.log2(total) * LN_2)
    tl.store(o + row * DV + column, (acc / total).to(o.dtype.element_ty), column < DV)


# --- backward --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows_in_all", "Y", "Z", "do_x", "do_y"])
def delta_kernel(o, do, dlse, delta, rows_in_all, Y, Z, do_x, do_y, do_z, do_d, DV: tl.constexpr, M: tl.constexpr,
                 BLOCK_DV: tl.constexpr, EXACT: tl.constexpr):
    """Write Σ_d o·do - dlse of each row; rows count over dimensions X, Y, Z, of which `do` has its own strides.

    The sum is the diagonal of a product, so that it is rounded as do·v is: where a query sees one key, o is v and the
    gradient exactly 0.
    """
    r = tl.arange(0, M)
    row = tl.program_id(0).to(tl.int64) * M + r
    inside = row < rows_in_all
    at = row // Z // Y * do_x + row // Z % Y * do_y + row % Z * do_z
    out = _load(o, row * DV, inside, 1, DV, BLOCK_DV)
    dout = _load(do, at, inside, do_d, DV, BLOCK_DV)
    products = _dot(dout, out.T, None, EXACT)
    sums = tl.sum(tl.where(r[:, None] == r[None, :], products, 0.0), 1)
    tl.store(delta + row, sums - tl.load(dlse + row, inside, 0.0), inside)


@triton.jit
def _walk_queries(dkey, dvalue, key, value, j, queries, keys, band, scoring, size, lse, delta, start, end,
                  M: tl.constexpr, CUT: tl.constexpr, DK: tl.constexpr):
    """Add what rows from `start` to `end` give to the gradients of a tile of keys and values; scores are `[N, M]`."""
    for begin in range(start, end, M):
        r = begin + tl.arange(0, M)
        query = _load_query(queries, r, band, size)
        dout, row_lse, row_delta = _load_upstream(queries, r, band, size, lse, delta, scoring)
        s = _dot(key, query.T, None, scoring.EXACT)
        i, head = _split(queries, r[None, :])
        s, bend = _scores(s, i, head, j, queries, keys, band, scoring, CUT, False)
        p = _exp(s, row_lse[None, :], scoring)
        weights = p
        if queries.draws is not None:
            weights = _dropout(p, i, head, j, queries, band, scoring)
        dvalue = _dot(weights.to(dout.dtype), dout, dvalue, scoring.EXACT)
        if DK:
            dp = _dot(value, dout.T, None, scoring.EXACT)
            if queries.draws is not None:
                dp = _dropout(dp, i, head, j, queries, band, scoring)
            ds = p * (dp - row_delta[None, :]) * bend
            dkey = _dot(ds.to(query.dtype), query, dkey, scoring.EXACT)
    return dkey, dvalue


@triton.jit
def _backward_keys(tile, first_col, col_s, band, queries, keys, scoring, size, ranges, lse, delta, dk, dv,
                   M: tl.constexpr, N: tl.constexpr):
    """Compute the gradients of a tile of keys and values, whose rows are `first_col` + j·col_s in dk and dv.

    Keys from the last on, and rows of queries from the last on, need no mask: what they give is not stored, or 0.
    """
    j = tile * N + tl.arange(0, N)
    key, value = _load_keys(keys, j, band, size, False)
    start, end, low, high = _queries_seeing(tile * N, tile * N + N, band, ranges)
    start, low, high, end = _align(start * queries.group, end * queries.group, low * queries.group,
                                   high * queries.group, M)
    dkey = tl.zeros((N, size.BLOCK_D), tl.float32)
    dvalue = tl.zeros((N, size.BLOCK_DV), tl.float32)
    DK: tl.constexpr = dk is not None
    if band.UPPER:
        dkey, dvalue = _walk_queries(dkey, dvalue, key, value, j[:, None], queries, keys, band, scoring, size, lse,
                                     delta, start, low, M, True, DK)
    if not band.LOWER:
        high = end
    dkey, dvalue = _walk_queries(dkey, dvalue, key, value, j[:, None], queries, keys, band, scoring, size, lse, delta,
                                 low, high, M, False, DK)
    if band.LOWER:
        dkey, dvalue = _walk_queries(dkey, dvalue, key, value, j[:, None], queries, keys, band, scoring, size, lse,
                                     delta, high, end, M, True, DK)
    at = first_col + j.to(tl.int64) * col_s
    if dk is not None:
        _store(dk, at * size.D, j < band.keys, dkey * scoring.scale, size.D, size.BLOCK_D)
    if dv is not None:
        _store(dv, at * size.DV, j < band.keys, dvalue, size.DV, size.BLOCK_DV)


@triton.jit
def _slope(query, dout, lse, delta, r, queries, keys, j, band, scoring, size, CUT: tl.constexpr):
    """Return the gradient of a tile of scores `[M, N]`, the cap's derivative, and the keys."""
    i, head = _split(queries, r[:, None])
    key, value = _load_keys(keys, j, band, size, not CUT)
    s = _dot(query, key.T, None, scoring.EXACT)
    s, bend = _scores(s, i, head, j[None, :], queries, keys, band, scoring, CUT, not CUT)
    p = _exp(s, lse[:, None], scoring)
    dp = _dot(dout, value.T, None, scoring.EXACT)
    if queries.draws is not None:
        dp = _dropout(dp, i, head, j[None, :], queries, band, scoring)
    return p * (dp - delta[:, None]), bend, key


@triton.jit
def _walk_keys(dquery, query, dout, lse, delta, r, queries, keys, band, scoring, size, start, end, N: tl.constexpr,
               CUT: tl.constexpr):
    """Add what the keys from `start` to `end` give to the gradient of a tile of queries."""
    for begin in range(start, end, N):
        j = tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, N), N), N)
        ds, bend, key = _slope(query, dout, lse, delta, r, queries, keys, j, band, scoring, size, CUT)
        dquery = _dot((ds * bend).to(key.dtype), key, dquery, scoring.EXACT)
    return dquery


@triton.jit
def _backward_queries(tile, band, queries, keys, scoring, size, ranges, lse, delta, dq, M: tl.constexpr,
                      N: tl.constexpr):
    """Compute the gradient of a tile of rows of queries."""
    r = tile * M + tl.arange(0, M)
    first, last = _ends(tile, queries, band, M)
    start, end, low, high = _keys_seen(first, last, band, ranges)
    start, low, high, end = _align(start, end, low, high, N)
    query = _load_query(queries, r, band, size)
    dout, row_lse, row_delta = _load_upstream(queries, r, band, size, lse, delta, scoring)
    dquery = tl.zeros((M, size.BLOCK_D), tl.float32)
    if band.LOWER:
        dquery = _walk_keys(dquery, query, dout, row_lse, row_delta, r, queries, keys, band, scoring, size, start, low,
                            N, True)
    dquery = _walk_keys(dquery, query, dout, row_lse, row_delta, r, queries, keys, band, scoring, size, low, high, N,
                        False)
    dquery = _walk_keys(dquery, query, dout, row_lse, row_delta, r, queries, keys, band, scoring, size, high, end, N,
                        True)
    inside = r < band.queries * queries.group
    _store(dq, _row(queries, r) * size.D, inside, dquery * scoring.scale, size.D, size.BLOCK_D)


# --- entry points ----------------------------------------------------------------------------------------------


@triton.jit
def _mask_slope(row_tile, col_tile, band, queries, keys, scoring, size, lse, delta, M: tl.constexpr, N: tl.constexpr):
    """Return the gradient of a tile of scores `[M, N]` of one head."""
    found = tl.zeros((M, N), tl.float32)
    start, end, _, _ = _keys_seen(row_tile * M, tl.minimum(row_tile * M + M, band.queries), band, None)
    if (col_tile * N < end) & (col_tile * N + N > start):
        r, j = row_tile * M + tl.arange(0, M), col_tile * N + tl.arange(0, N)
        query = _load_query(queries, r, band, size)
        dout, row_lse, row_delta = _load_upstream(queries, r, band, size, lse, delta, scoring)
        found = _slope(query, dout, row_lse, row_delta, r, queries, keys, j, band, scoring, size, True)[0]
    return found


@triton.jit
def _tile(tile, col_tile, split, splits, rows_in_all, first_col, col_s, band, queries, keys, scoring, size, sinks,
          ranges, o, lse, delta, dq, dk, dv, M: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr):
    found = 0.0
    if KIND == "mask":
        found = _mask_slope(tile, col_tile, band, queries, keys, scoring, size, lse, delta, M, N)
    elif KIND == "keys":
        if tile * N < band.keys:
            _backward_keys(tile, first_col, col_s, band, queries, keys, scoring, size, ranges, lse, delta, dk, dv, M, N)
    elif tile * M < band.queries * queries.group:
        if KIND == "forward":
            _forward(tile, split, splits, rows_in_all, band, queries, keys, scoring, size, sinks, ranges, o, lse, M, N)
        else:
            _backward_queries(tile, band, queries, keys, scoring, size, ranges, lse, delta, dq, M, N)
    return found


@triton.jit
def _compute(tile, col_tile, b, head, kv_head, group, split, q, k, v, mask, sinks, slopes, lengths, query_ids,
             key_ids, cu_q, cu_k, table, ranges, draws, o, lse, do, delta, dq, dk, dv, Sq, Sk, splits, rows_in_all,
             factor, scale, cap, left, right, threshold, boost, page_size, pages, q_b, q_h, q_s, q_d, k_b, k_h, k_s,
             k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, do_b, do_h, do_s, do_d, slopes_b, table_b, row_b,
             row_h, row_s, col_b, col_h, col_s, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr,
             EXACT: tl.constexpr, KIND: tl.constexpr):
    """Compute a tile of row b of the batch for `group` heads from `head` on; return the mask's gradient if asked for.

    Offsets and lengths out of range are clamped: their values are not checked on a GPU.
    """
    first_q, first_k, rows, cols = b * 0, b * 0, Sq, Sk
    if cu_q is not None:
        first_q = tl.minimum(tl.maximum(tl.load(cu_q + b), 0), Sq).to(tl.int64)
        rows = (tl.minimum(tl.maximum(tl.load(cu_q + b + 1), first_q), Sq) - first_q).to(tl.int32)
    if cu_k is not None:
        first_k = tl.minimum(tl.maximum(tl.load(cu_k + b), 0), Sk).to(tl.int64)
        cols = (tl.minimum(tl.maximum(tl.load(cu_k + b + 1), first_k), Sk) - first_k).to(tl.int32)
    if lengths is not None:
        cols = tl.minimum(tl.maximum(tl.load(lengths + b), 0), cols).to(tl.int32)
    if table is None:
        k += b * k_b + first_k * k_s
        v += b * v_b + first_k * v_s
    else:
        table += b * table_b
    if mask is not None:
        mask += b * mask_b
    if slopes is not None:
        slopes += b * slopes_b
    if query_ids is not None:
        query_ids += b * Sq
        key_ids += b * Sk
    if do is not None:
        do += b * do_b + first_q * do_s
    lower, upper = _edges(cols - rows, left, right, CAUSAL)
    # Made in the call: a constant that is assigned to a variable would become a number of run time.
    return _tile(
        tile, col_tile, split, splits, rows_in_all, b * col_b + first_k * col_s + kv_head * col_h, col_s,
        Band(rows, cols, cols - rows, lower, upper, left is not None, CAUSAL or right is not None),
        Queries(q + b * q_b + first_q * q_s, q_h, q_s, q_d, do, do_h, do_s, do_d, mask, mask_h, mask_s, mask_d, slopes,
                query_ids, draws, b * row_b + first_q * row_s, row_h, row_s, head, group),
        Keys(k + kv_head * k_h, v + kv_head * v_h, k_b, k_s, k_d, v_b, v_s, v_d, table, page_size, pages, key_ids),
        Scoring(factor, scale, cap, threshold, boost, SCALED, EXACT), Size(D, DV, BLOCK_D, BLOCK_DV), sinks,
        ranges, o, lse, delta, dq, dk, dv, M, N, KIND)


def _name(specialization):
    return f"attention_{specialization.constants['KIND']}"


@triton.jit(repr=_name, do_not_specialize=[
    "H", "Sq", "Sk", "blocks", "splits", "rows_in_all", "left", "right", "threshold", "pages", "row_b", "row_h",
    "col_b", "col_h", "slopes_b", "table_b", "mask_heads", "shared_heads", "shared",
    "column_blocks"])
def attention_kernel(q, k, v, mask, sinks, slopes, lengths, query_ids, key_ids, cu_q, cu_k, table, ranges, draws, o,
                     lse, do, delta, dq, dk, dv, dmask, H, group, Sq, Sk, blocks, splits, rows_in_all, factor, scale,
                     cap, left, right, threshold, boost, page_size, pages, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b,
                     v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, do_b, do_h, do_s, do_d, slopes_b, table_b, row_b,
                     row_h, row_s, col_b, col_h, col_s, mask_heads, shared_heads, shared, column_blocks,
                     D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
                     N: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, EXACT: tl.constexpr,
                     KIND: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Compute one tile of what KIND says.

    That is the output ("forward"), the gradients of keys and values ("keys"), of queries ("queries"), or of a tile of a
    head of the mask ("mask"), summed over the rows of the batch and the heads that share it, over the tile's queries
    unless MASK_ROWS, and over its keys unless MASK_COLS.
    """
    tile = tl.program_id(0) % blocks
    at = (tl.program_id(0) // blocks).to(tl.int64)
    if KIND == "mask":
        row_tile, col_tile = tile // column_blocks, tile % column_blocks
        total = tl.zeros((M, N), tl.float32)
        for t in range(0, shared):
            b, head = at // mask_heads + t // shared_heads, at % mask_heads + t % shared_heads
            total += _compute(
                row_tile, col_tile, b, head, head // group, 1, None, q, k, v, mask, sinks, slopes, lengths, query_ids,
                key_ids, cu_q, cu_k, table, ranges, draws, o, lse, do, delta, dq, dk, dv, Sq, Sk, splits, rows_in_all,
                factor, scale, cap, left, right, threshold, boost, page_size, pages, q_b, q_h, q_s, q_d, k_b, k_h, k_s,
                k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, do_b, do_h, do_s, do_d, slopes_b, table_b,
                row_b, row_h, row_s, col_b, col_h, col_s, D, DV, BLOCK_D, BLOCK_DV, M, N, CAUSAL, SCALED, EXACT, KIND)
        row, rows = row_tile * M + tl.arange(0, M)[:, None], Sq
        col, cols = col_tile * N + tl.arange(0, N)[None, :], Sk
        if not MASK_ROWS:
            total = tl.sum(total, 0, keep_dims=True)
            row, rows = row_tile + tl.arange(0, 1)[:, None], blocks // column_blocks
        if not MASK_COLS:
            total = tl.sum(total, 1, keep_dims=True)
            col, cols = col_tile + tl.arange(0, 1)[None, :], column_blocks
        tl.store(dmask + (at * rows + row) * cols + col, total.to(dmask.dtype.element_ty), (row < rows) & (col < cols))
    else:
        kv_heads = H // group
        split = None
        if splits is not None:
            split = (at % splits).to(tl.int32)
            at = at // splits
        b, kv_head = at // kv_heads, at % kv_heads
        # Rows of queries backwards, keys forwards: the longest causal tiles start first.
        if KIND != "keys":
            tile = blocks - 1 - tile
        if ranges is not None:
            ranges += (b * blocks + tile) * 2
        _compute(
            tile, 0, b, kv_head * group, kv_head, group, split, q, k, v, mask, sinks, slopes, lengths, query_ids,
            key_ids, cu_q, cu_k, table, ranges, draws, o, lse, do, delta, dq, dk, dv, Sq, Sk, splits, rows_in_all,
            factor, scale, cap, left, right, threshold, boost, page_size, pages, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d,
            v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, do_b, do_h, do_s, do_d, slopes_b, table_b, row_b, row_h,
            row_s, col_b, col_h, col_s, D, DV, BLOCK_D, BLOCK_DV, M, N, CAUSAL, SCALED, EXACT, KIND)
