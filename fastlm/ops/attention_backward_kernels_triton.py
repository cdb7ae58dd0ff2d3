"""Attention's backward in Triton, without atomics: gradients of keys and values, of queries, and of the mask.

One pass for dk and dv walks the queries, one for dq the keys. The gradient ds is that of the scores after scale, cap,
mask and bias: p ⊙ (dp - delta), delta = Σ o·do - dlse.
"""

import triton
import triton.language as tl

from fastlm.ops.attention_score_kernels_triton import (
    align,
    dot,
    drop,
    ends,
    exp_below,
    keys_seen,
    load_keys,
    load_query,
    load_rows,
    load_upstream,
    queries_seeing,
    query_and_head,
    row_numbers,
    scores,
    store_rows,
)


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
    out = load_rows(o, row * DV, inside, 1, DV, BLOCK_DV)
    dout = load_rows(do, at, inside, do_d, DV, BLOCK_DV)
    products = dot(dout, out.T, None, EXACT)
    sums = tl.sum(tl.where(r[:, None] == r[None, :], products, 0.0), 1)
    tl.store(delta + row, sums - tl.load(dlse + row, inside, 0.0), inside)


@triton.jit
def _walk_queries(dkey, dvalue, key, value, j, queries, keys, band, scoring, size, lse, delta, start, end,
                  M: tl.constexpr, CUT: tl.constexpr, DK: tl.constexpr):
    """Add what rows from `start` to `end` give to the gradients of a tile of keys and values; scores are `[N, M]`."""
    for begin in range(start, end, M):
        r = begin + tl.arange(0, M)
        query = load_query(queries, r, band, size)
        dout, row_lse, row_delta = load_upstream(queries, r, band, size, lse, delta, scoring)
        s = dot(key, query.T, None, scoring.EXACT)
        i, head = query_and_head(queries, r[None, :])
        s, bend = scores(s, i, head, j, queries, keys, band, scoring, CUT, False)
        p = exp_below(s, row_lse[None, :], scoring)
        weights = p
        if queries.draws is not None:
            weights = drop(p, i, head, j, queries, band, scoring)
        dvalue = dot(weights.to(dout.dtype), dout, dvalue, scoring.EXACT)
        if DK:
            dp = dot(value, dout.T, None, scoring.EXACT)
            if queries.draws is not None:
                dp = drop(dp, i, head, j, queries, band, scoring)
            ds = p * (dp - row_delta[None, :]) * bend
            dkey = dot(ds.to(query.dtype), query, dkey, scoring.EXACT)
    return dkey, dvalue


@triton.jit
def backward_keys(tile, first_col, col_s, band, queries, keys, scoring, size, ranges, lse, delta, dk, dv,
                  M: tl.constexpr, N: tl.constexpr):
    """Compute the gradients of a tile of keys and values, whose rows are `first_col` + j·col_s in dk and dv.

    Keys from the last on, and rows of queries from the last on, need no mask: what they give is not stored, or 0.
    """
    j = tile * N + tl.arange(0, N)
    key, value = load_keys(keys, j, band, size, False)
    start, end, low, high = queries_seeing(tile * N, tile * N + N, band, ranges)
    start, low, high, end = align(start * queries.group, end * queries.group, low * queries.group,
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
        store_rows(dk, at * size.D, j < band.keys, dkey * scoring.scale, size.D, size.BLOCK_D)
    if dv is not None:
        store_rows(dv, at * size.DV, j < band.keys, dvalue, size.DV, size.BLOCK_DV)


@triton.jit
def _slope(query, dout, lse, delta, r, queries, keys, j, band, scoring, size, CUT: tl.constexpr):
    """Return the gradient of a tile of scores `[M, N]`, the cap's derivative, and the keys."""
    i, head = query_and_head(queries, r[:, None])
    key, value = load_keys(keys, j, band, size, not CUT)
    s = dot(query, key.T, None, scoring.EXACT)
    s, bend = scores(s, i, head, j[None, :], queries, keys, band, scoring, CUT, not CUT)
    p = exp_below(s, lse[:, None], scoring)
    dp = dot(dout, value.T, None, scoring.EXACT)
    if queries.draws is not None:
        dp = drop(dp, i, head, j[None, :], queries, band, scoring)
    return p * (dp - delta[:, None]), bend, key


@triton.jit
def _walk_keys(dquery, query, dout, lse, delta, r, queries, keys, band, scoring, size, start, end, N: tl.constexpr,
               CUT: tl.constexpr):
    """Add what the keys from `start` to `end` give to the gradient of a tile of queries."""
    for begin in range(start, end, N):
        j = tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, N), N), N)
        ds, bend, key = _slope(query, dout, lse, delta, r, queries, keys, j, band, scoring, size, CUT)
        dquery = dot((ds * bend).to(key.dtype), key, dquery, scoring.EXACT)
    return dquery


@triton.jit
def backward_queries(tile, band, queries, keys, scoring, size, ranges, lse, delta, dq, M: tl.constexpr,
                     N: tl.constexpr):
    """Compute the gradient of a tile of rows of queries."""
    r = tile * M + tl.arange(0, M)
    first, last = ends(tile, queries, band, M)
    start, end, low, high = keys_seen(first, last, band, ranges)
    start, low, high, end = align(start, end, low, high, N)
    query = load_query(queries, r, band, size)
    dout, row_lse, row_delta = load_upstream(queries, r, band, size, lse, delta, scoring)
    dquery = tl.zeros((M, size.BLOCK_D), tl.float32)
    if band.LOWER:
        dquery = _walk_keys(dquery, query, dout, row_lse, row_delta, r, queries, keys, band, scoring, size, start, low,
                            N, True)
    dquery = _walk_keys(dquery, query, dout, row_lse, row_delta, r, queries, keys, band, scoring, size, low, high, N,
                        False)
    dquery = _walk_keys(dquery, query, dout, row_lse, row_delta, r, queries, keys, band, scoring, size, high, end, N,
                        True)
    inside = r < band.queries * queries.group
    store_rows(dq, row_numbers(queries, r) * size.D, inside, dquery * scoring.scale, size.D, size.BLOCK_D)


@triton.jit
def mask_slope(row_tile, col_tile, band, queries, keys, scoring, size, lse, delta, M: tl.constexpr, N: tl.constexpr):
    """Return the gradient of a tile of scores `[M, N]` of one head."""
    found = tl.zeros((M, N), tl.float32)
    start, end, _, _ = keys_seen(row_tile * M, tl.minimum(row_tile * M + M, band.queries), band, None)
    if (col_tile * N < end) & (col_tile * N + N > start):
        r, j = row_tile * M + tl.arange(0, M), col_tile * N + tl.arange(0, N)
        query = load_query(queries, r, band, size)
        dout, row_lse, row_delta = load_upstream(queries, r, band, size, lse, delta, scoring)
        found = _slope(query, dout, row_lse, row_delta, r, queries, keys, j, band, scoring, size, True)[0]
    return found
