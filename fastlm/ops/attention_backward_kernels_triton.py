"""Attention's backward in Triton, without atomics: gradients of keys and values, of queries, and of the mask.

One pass for dq walks the keys, one for dk and dv the queries. The gradient ds is that of the scores after scale, cap,
mask and bias: p ⊙ (dp - delta), delta = Σ o·do - dlse. Dropout keeps a share of p and divides o by the share: there ds
is (kept p ⊙ dp - p ⊙ share·delta) / share, and the division is left to the end.
"""

import triton
import triton.language as tl

from fastlm.ops.attention_score_kernels_triton import (
    LOG2_E,
    afresh,
    align,
    dot,
    drop,
    ends,
    kept,
    keys_seen,
    load_keys,
    load_mask,
    load_number,
    load_query,
    load_rows,
    load_upstream,
    part,
    place,
    queries_seeing,
    query_and_head,
    row_numbers,
    scores,
    store_rows,
    weights_of,
)


@triton.jit(do_not_specialize=["rows_in_all", "Y", "Z", "do_x", "do_y"])
def delta_kernel(o, do, lse, dlse, sums, delta, rows_in_all, share, Y, Z, do_x, do_y, do_z, do_d, DV: tl.constexpr,
                 M: tl.constexpr, BLOCK_DV: tl.constexpr, EXACT: tl.constexpr):
    """Write what `find_delta` returns of each row.

    Rows count over dimensions X, Y, Z, of which `do` has its own strides.
    """
    r = tl.arange(0, M)
    row = tl.program_id(0).to(tl.int64) * M + r
    inside = row < rows_in_all
    at = row // Z // Y * do_x + row // Z % Y * do_y + row % Z * do_z
    out = load_rows(o, row * DV, inside, 1, DV, BLOCK_DV)
    dout = load_rows(do, at, inside, do_d, DV, BLOCK_DV)
    found, row_delta = find_delta(out, dout, lse, dlse, row, inside, share, M, EXACT)
    tl.store(sums + row, found, inside)
    tl.store(delta + row, row_delta, inside)


@triton.jit
def find_delta(out, dout, lse, dlse, row, inside, share, M: tl.constexpr, EXACT: tl.constexpr):
    """Return, of M rows, the log-sum-exp for `weights_of`, and delta, times dropout's share.

    The log-sum-exp is in base 2 unless EXACT, and +∞ where nothing is seen. Delta, Σ_d o·do - dlse, is the diagonal of
    a product, so that it is rounded as do·v is: where a query sees one key, o is v and the gradient exactly 0.
    """
    r = tl.arange(0, M)
    products = dot(dout, out.T, None, EXACT)
    delta = tl.sum(tl.where(r[:, None] == r[None, :], products, 0.0), 1) - tl.load(dlse + row, inside, 0.0)
    if share is not None:
        delta = delta * share
    sums = tl.load(lse + row, inside, -float("inf"))
    sums = tl.where(sums == -float("inf"), float("inf"), sums)
    if not EXACT:
        sums = sums * LOG2_E
    return sums, delta


@triton.jit
def _walk_queries(dkey, dvalue, key, value, j, queries, keys, band, scoring, size, sums, delta, walk, M: tl.constexpr,
                  CUT: tl.constexpr, DK: tl.constexpr):
    """Add what the queries of a walk give to the gradients of a tile of keys and values; scores are `[N, M]`.

    The heads that share the keys are walked one after the other, for a tile of one head is loaded as vectors.
    """
    first, last = part(walk, CUT)
    tiles = tl.cdiv(tl.maximum(last - first, 0), M)
    if queries.GROUPED:
        last = first + tiles * queries.group * M
    for begin in tl.range(first, last, M, num_stages=size.CUT_STAGES if CUT else None):
        head = queries.head
        if queries.GROUPED:
            t = (begin - first) // M
            head += t // tiles
            begin = first + t % tiles * M
        begin = place(begin, walk, CUT)
        i = tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, M), M), M)
        across = i[None, :]
        mask = load_mask(across, head, j, queries, band, CUT)
        query = load_query(queries, i, head, band, size, not CUT)
        dout = load_upstream(queries, i, head, band, size, not CUT)
        away = None
        if queries.places is not None and not CUT:  # made of i they would wait in registers
            away = tl.load(queries.places + i)[None, :] - (j - band.ahead).to(tl.float32)
        s = dot(key, query.T, None, scoring.EXACT)
        s, bend = scores(s, mask, away, across, head, j, queries, keys, band, scoring, CUT)
        p = weights_of(s, load_number(sums, queries, i, head, band, float("inf"), not CUT)[None, :], scoring)
        if queries.draws is None:
            weights = p.to(dout.dtype)
        else:
            p = drop(p, -p, across, head, j, queries, band, scoring, CUT)
            weights = kept(p, dout.dtype)
        p *= bend
        dvalue = dot(weights, dout, dvalue, scoring.EXACT)
        if DK:
            dp = dot(value, dout.T, None, scoring.EXACT)
            row_delta = load_number(delta, queries, i, head, band, 0.0, not CUT)
            if queries.draws is None:
                ds = p * (dp - row_delta[None, :])
            else:  # one number says what a weight is and whether it is kept
                ds = tl.maximum(p, 0.0) * dp - tl.abs(p) * row_delta[None, :]
            dkey = dot(ds.to(query.dtype), query, dkey, scoring.EXACT)
    return dkey, dvalue


@triton.jit
def backward_keys(tile, first_col, col_s, band, queries, keys, scoring, size, ranges, sums, delta, dk, dv,
                  M: tl.constexpr, N: tl.constexpr):
    """Compute the gradients of a tile of keys and values, whose rows are `first_col` + j·col_s in dk and dv."""
    j = tile * N + tl.arange(0, N)
    key, value = load_keys(keys, j, band, size, False)
    start, end, low, high = queries_seeing(tile * N, tile * N + N, band, ranges)
    walk = align(start, end, low, high, M)
    dkey = tl.zeros((N, size.BLOCK_D), tl.float32)
    dvalue = tl.zeros((N, size.BLOCK_DV), tl.float32)
    DK: tl.constexpr = dk is not None
    dkey, dvalue = _walk_queries(dkey, dvalue, key, value, j[:, None], queries, keys, band, scoring, size, sums, delta,
                                 walk, M, False, DK)
    dkey, dvalue = _walk_queries(dkey, dvalue, key, value, j[:, None], queries, keys, band, scoring, size, sums, delta,
                                 walk, M, True, DK)
    j = afresh(tile) * N + tl.arange(0, N)
    at = first_col + j.to(tl.int64) * col_s
    scale = scoring.scale
    if queries.draws is not None:
        scale = scale / scoring.share
        dvalue = dvalue / scoring.share
    if dk is not None:
        store_rows(dk, at * size.D, j < band.keys, dkey * scale, size.D, size.BLOCK_D)
    if dv is not None:
        store_rows(dv, at * size.DV, j < band.keys, dvalue, size.DV, size.BLOCK_DV)


@triton.jit
def _slopes(query, dout, sums, delta, mask, r, queries, keys, j, band, scoring, size, CUT: tl.constexpr,
            WHOLE: tl.constexpr):
    """Return the gradient of a tile of scores `[M, N]`, the cap's derivative, and the keys; WHOLE as in load_keys."""
    i, head = query_and_head(queries, r[:, None])
    key, value = load_keys(keys, j, band, size, WHOLE)
    s = dot(query, key.T, None, scoring.EXACT)
    s, bend = scores(s, mask, None, i, head, j[None, :], queries, keys, band, scoring, CUT)
    p = weights_of(s, sums[:, None], scoring)
    dp = dot(dout, value.T, None, scoring.EXACT)
    if queries.draws is None:
        ds = p * (dp - delta[:, None])
    else:
        ds = drop(p, 0.0, i, head, j[None, :], queries, band, scoring, not WHOLE) * dp - p * delta[:, None]
    return ds, bend, key


@triton.jit
def _walk_keys(dquery, query, dout, sums, delta, r, queries, keys, band, scoring, size, walk, N: tl.constexpr,
               CUT: tl.constexpr):
    """Add what the keys of a walk give to the gradient of a tile of queries."""
    first, last = part(walk, CUT)
    for begin in tl.range(first, last, N, num_stages=size.CUT_STAGES if CUT else None):
        begin = place(begin, walk, CUT)
        j = tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, N), N), N)
        i, head = query_and_head(queries, r[:, None])
        mask = load_mask(i, head, j[None, :], queries, band, CUT)
        ds, bend, key = _slopes(query, dout, sums, delta, mask, r, queries, keys, j, band, scoring, size, CUT, not CUT)
        dquery = dot((ds * bend).to(key.dtype), key, dquery, scoring.EXACT)
    return dquery


@triton.jit
def backward_queries(tile, band, queries, keys, scoring, size, ranges, o, lse, dlse, sums, delta, dq, M: tl.constexpr,
                     N: tl.constexpr):
    """Compute the gradient of a tile of rows of queries; unless `o` is None, write first what `delta_kernel` does."""
    r = tile * M + tl.arange(0, M)
    first, last = ends(tile, queries, band, M)
    start, end, low, high = keys_seen(first, last, band, ranges)
    walk = align(start, end, low, high, N)
    i, head = query_and_head(queries, r)
    query = load_query(queries, i, head, band, size, False)
    dout = load_upstream(queries, i, head, band, size, False)
    if o is None:
        row_sums = load_number(sums, queries, i, head, band, float("inf"), False)
        row_delta = load_number(delta, queries, i, head, band, 0.0, False)
    else:
        row, inside = row_numbers(queries, i, head), i < band.queries
        out = load_rows(o, row * size.DV, inside, 1, size.DV, size.BLOCK_DV)
        row_sums, row_delta = find_delta(out, dout, lse, dlse, row, inside, scoring.share, M, scoring.EXACT)
        tl.store(sums + row, row_sums, inside)
        tl.store(delta + row, row_delta, inside)
    dquery = tl.zeros((M, size.BLOCK_D), tl.float32)
    dquery = _walk_keys(dquery, query, dout, row_sums, row_delta, r, queries, keys, band, scoring, size, walk, N, False)
    dquery = _walk_keys(dquery, query, dout, row_sums, row_delta, r, queries, keys, band, scoring, size, walk, N, True)
    i, head = query_and_head(queries, afresh(tile) * M + tl.arange(0, M))
    scale = scoring.scale
    if queries.draws is not None:
        scale = scale / scoring.share
    store_rows(dq, row_numbers(queries, i, head) * size.D, i < band.queries, dquery * scale, size.D, size.BLOCK_D)


@triton.jit
def mask_slope(r, j, mask, band, queries, keys, scoring, size, sums, delta, CUT: tl.constexpr):
    """Return the gradient of the scores of one head at rows r and keys j, given the mask there.

    Unless CUT, it is -∞ where a query may not see a key.
    """
    query = load_query(queries, r, queries.head, band, size, False)
    dout = load_upstream(queries, r, queries.head, band, size, False)
    row_sums = load_number(sums, queries, r, queries.head, band, float("inf"), False)
    row_delta = load_number(delta, queries, r, queries.head, band, 0.0, False)
    return _slopes(query, dout, row_sums, row_delta, mask, r, queries, keys, j, band, scoring, size, CUT, False)[0]


# --- before and after the kernel of attention_hopper_backward_kernels_triton.py --------------------------------


@triton.jit(do_not_specialize=["queries", "tiles", "heads", "do_b", "do_h", "slopes_b"])
def prepare_kernel(o, do, lse, dlse, sums, delta, total, slopes, share, queries, tiles, heads, do_b, do_h, do_s,
                   slopes_b, D: tl.constexpr, M: tl.constexpr):
    """Write what `find_delta` returns of M rows, which a head has in `tiles`, of the last as if they saw nothing.

    And fill their part of `total` with zeros. With ALiBi, two further planes of `sums` have the bias of each row to the
    first row of its tile, where keys are before it and where they are after it.
    """
    r = tl.arange(0, M)
    tile = tl.program_id(0)
    number, i = tile // tiles, tile % tiles * M + r
    head = number % heads
    row = number.to(tl.int64) * queries + i
    inside = i < queries
    out = load_rows(o, row * D, inside, 1, D, D)
    upstream = do + (number // heads).to(tl.int64) * do_b + head.to(tl.int64) * do_h
    dout = load_rows(upstream, i.to(tl.int64) * do_s, inside, 1, D, D)
    found, row_delta = find_delta(out, dout, lse, dlse, row, inside, share, M, False)
    at = tile.to(tl.int64) * M
    tl.store(sums + at + r, found)
    tl.store(delta + at + r, row_delta)
    tl.store(total + at * D + tl.arange(0, M * D), tl.zeros((M * D,), tl.float32))
    if slopes is not None:
        bias = tl.load(slopes + number // heads * slopes_b + head) * LOG2_E * r.to(tl.float32)
        rows = tl.num_programs(0).to(tl.int64) * M
        tl.store(sums + rows + at + r, found + bias)
        tl.store(sums + 2 * rows + at + r, found - bias)


@triton.jit(do_not_specialize=["rows", "tiles", "heads", "x_b", "x_h"])
def longest_kernel(x, found, rows, tiles, heads, x_b, x_h, x_s, D: tl.constexpr, M: tl.constexpr):
    """Raise the number of a head, which is positive, to the largest sum of squares of M of its rows."""
    number, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M + tl.arange(0, M)
    base = x + (number // heads).to(tl.int64) * x_b + (number % heads).to(tl.int64) * x_h
    tile = load_rows(base, i.to(tl.int64) * x_s, i < rows, 1, D, D).to(tl.float32)
    squares = tl.sum(tile * tile, 1)
    squares = tl.where(squares == squares, squares, float("inf"))
    tl.atomic_max(found + number, tl.max(squares, 0), sem="relaxed")


@triton.jit(do_not_specialize=["scale", "queries"])
def unfold_kernel(total, dq, scale, queries, D: tl.constexpr, M: tl.constexpr):
    """Write M rows of dq, times scale, from two blocks of attention_hopper_backward_kernels_triton.py."""
    tiles = tl.cdiv(queries, M)
    tile = tl.program_id(0)
    block = tl.load(total + tile.to(tl.int64) * (M * D) + tl.arange(0, M * D)).reshape(2, 8, 4, 8, 4, 2, 2)
    # half, 8 columns, warp, row, 2 columns, 8 rows, column
    if M == 64:
        rows = block.permute(2, 5, 3, 0, 1, 4, 6).reshape(M, D)
    else:
        rows = block.permute(0, 2, 5, 3, 1, 4, 6).reshape(M, D)
    i = tile % tiles * M + tl.arange(0, M)
    at = (tile // tiles).to(tl.int64) * queries + i
    tl.store(dq + at[:, None] * D + tl.arange(0, D)[None, :], (rows * scale).to(dq.dtype.element_ty),
             (i < queries)[:, None])
