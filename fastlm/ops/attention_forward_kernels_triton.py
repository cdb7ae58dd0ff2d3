"""Attention's forward in Triton: FlashAttention-2's tiling with an online softmax in base 2, and the merge of parts."""

import triton
import triton.language as tl

from fastlm.ops.attention_score_kernels_triton import (
    LN_2,
    LOG2_E,
    afresh,
    align,
    as_score,
    dot,
    drop,
    ends,
    exp_below,
    kept,
    keys_seen,
    load_keys,
    load_mask,
    load_query,
    part,
    place,
    query_and_head,
    row_numbers,
    scores,
    store_rows,
)


@triton.jit
def _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, walk, N: tl.constexpr,
            CUT: tl.constexpr):
    """Add the keys of a walk to the running output, sum and maximum of a tile of queries."""
    i, head = query_and_head(queries, r[:, None])
    first, last = part(walk, CUT)
    for begin in tl.range(first, last, N, num_stages=size.CUT_STAGES if CUT else None):
        begin = place(begin, walk, CUT)
        j = tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, N), N), N)
        mask = load_mask(i, head, j[None, :], queries, band, CUT)
        key, value = load_keys(keys, j, band, size, not CUT)
        s = dot(query, key.T, None, scoring.EXACT)
        s, _ = scores(s, mask, None, i, head, j[None, :], queries, keys, band, scoring, CUT)
        new = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = exp_below(s, base[:, None], scoring)
        shrink = exp_below(highest, base, scoring)
        total = total * shrink + tl.sum(p, 1)
        highest = new
        if queries.draws is None:
            weights = p.to(value.dtype)
        else:
            weights = kept(drop(p, -p, i, head, j[None, :], queries, band, scoring, CUT), value.dtype)
        acc = dot(weights, value, acc * shrink[:, None], scoring.EXACT)
    return acc, total, highest


@triton.jit
def forward_tile(tile, split, splits, rows_in_all, band, queries, keys, scoring, size, sinks, ranges, o, lse,
                 M: tl.constexpr, N: tl.constexpr):
    """Compute the output and log-sum-exp of a tile of rows, over one of `splits` parts of the keys if not None."""
    r = tile * M + tl.arange(0, M)
    first, last = ends(tile, queries, band, M)
    start, end, low, high = keys_seen(first, last, band, ranges)
    highest = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    if sinks is not None:
        highest = as_score(tl.load(sinks + query_and_head(queries, r)[1]).to(tl.float32), scoring)
        if split is not None:
            highest = tl.where(split == 0, highest, -float("inf"))
        total = tl.where(highest == -float("inf"), 0.0, 1.0)
    if split is not None:
        start = start // N * N
        share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), N), splits) * N
        start += split * share
        end = tl.minimum(end, start + share)
    walk = align(start, end, low, high, N)
    query = load_query(queries, *query_and_head(queries, r), band, size, False)
    acc = tl.zeros((M, size.BLOCK_DV), tl.float32)
    acc, total, highest = _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, walk, N, False)
    acc, total, highest = _attend(acc, total, highest, query, r, queries, keys, band, scoring, size, walk, N, True)
    total = tl.where(total == 0.0, 1.0, total)  # of rows that see nothing, whose maximum is -∞
    if not scoring.SCALED:
        highest = highest * (scoring.factor * LN_2)
    i, head = query_and_head(queries, afresh(tile) * M + tl.arange(0, M))
    inside = i < band.queries
    at = row_numbers(queries, i, head)
    if split is not None:
        at += split * rows_in_all
    tl.store(lse + at, highest + tl.log2(total) * LN_2, inside)
    if queries.draws is not None:
        total = total * scoring.share
    acc = acc / total[:, None]
    store_rows(o, at * size.DV, inside, acc, size.DV, size.BLOCK_DV)


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
