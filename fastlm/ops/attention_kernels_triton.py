"""The kernel of attention and varlen_attn in Triton, in four kinds; attention_launch_triton.py launches it.

It finds the row of the batch and the heads of a program, which may lie in packed sequences or pages, and computes a
tile of the result (attention_forward_kernels_triton.py), or of the gradients of keys and values, of queries, or of the
mask (attention_backward_kernels_triton.py), for which it walks the batch and the heads that share the mask. What they
share is in attention_score_kernels_triton.py.
"""

import triton
import triton.language as tl

from fastlm.ops.attention_backward_kernels_triton import backward_keys, backward_queries, mask_slope
from fastlm.ops.attention_forward_kernels_triton import forward_tile
from fastlm.ops.attention_score_kernels_triton import Band, Keys, Queries, Scoring, Size, edges


@triton.jit
def _tile(tile, tile_j, tile_mask, split, splits, rows_in_all, first_col, col_s, band, queries, keys, scoring, size,
          sinks, ranges, o, lse, dlse, sums, delta, dq, dk, dv, M: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr,
          CUT: tl.constexpr):
    found = 0.0
    if KIND == "mask":
        found = mask_slope(tile, tile_j, tile_mask, band, queries, keys, scoring, size, sums, delta, CUT)
    elif KIND == "keys":
        if tile * N < band.keys:
            backward_keys(tile, first_col, col_s, band, queries, keys, scoring, size, ranges, sums, delta, dk, dv, M, N)
    elif tile * M < band.queries * queries.group:
        if KIND == "forward":
            forward_tile(tile, split, splits, rows_in_all, band, queries, keys, scoring, size, sinks, ranges, o, lse,
                         M, N)
        else:
            backward_queries(tile, band, queries, keys, scoring, size, ranges, o, lse, dlse, sums, delta, dq, M, N)
    return found


@triton.jit
def _compute(tile, tile_j, tile_mask, b, head, kv_head, group, split, q, k, v, mask, sinks, slopes, places, lengths,
             query_ids, key_ids, cu_q, cu_k, table, ranges, draws, o, lse, do, dlse, sums, delta, dq, dk, dv, Sq, Sk,
             splits, rows_in_all, factor, scale, cap, left, right, threshold, share, page_size, pages, q_b, q_h, q_s,
             q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, mask_keys, do_b, do_h, do_s,
             do_d, slopes_b, table_b, row_b, row_h, row_s, col_b, col_h, col_s, D: tl.constexpr, DV: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
             SCALED: tl.constexpr, EXACT: tl.constexpr, COARSE: tl.constexpr, NEAR: tl.constexpr, KIND: tl.constexpr,
             EVEN: tl.constexpr, GROUPED: tl.constexpr, CUT_STAGES: tl.constexpr, CUT: tl.constexpr):
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
        if EVEN:
            mask_keys = mask_keys // 16 * 16  # as it is, but now the compiler knows, and loads vectors up to there
    if slopes is not None:
        slopes += b * slopes_b
    if query_ids is not None:
        query_ids += b * Sq
        key_ids += b * Sk
    if do is not None:
        do += b * do_b + first_q * do_s
    lower, upper = edges(cols - rows, left, right, CAUSAL)
    # Made in the call: a constant that is assigned to a variable would become a number of run time.
    return _tile(
        tile, tile_j, tile_mask, split, splits, rows_in_all, b * col_b + first_k * col_s + kv_head * col_h, col_s,
        Band(rows, cols, cols - rows, lower, upper, left is not None, CAUSAL or right is not None),
        Queries(q + b * q_b + first_q * q_s, q_h, q_s, q_d, do, do_h, do_s, do_d, mask, mask_h, mask_s, mask_d,
                mask_keys, slopes, places, query_ids, draws, b * row_b + first_q * row_s, row_h, row_s, head, group,
                GROUPED),
        Keys(k + kv_head * k_h, v + kv_head * v_h, k_b, k_s, k_d, v_b, v_s, v_d, table, page_size, pages, key_ids),
        Scoring(factor, scale, cap, threshold, share, SCALED, EXACT, COARSE, NEAR),
        Size(D, DV, BLOCK_D, BLOCK_DV, CUT_STAGES), sinks, ranges, o, lse, dlse, sums, delta, dq, dk, dv, M, N,
        KIND, CUT)


def _name(specialization):
    return f"attention_{specialization.constants['KIND']}"


@triton.jit(repr=_name, do_not_specialize=[
    "H", "Sq", "Sk", "blocks", "together", "splits", "rows_in_all", "left", "right", "threshold", "pages", "mask_keys",
    "col_b", "col_h", "slopes_b", "table_b", "mask_heads", "shared_heads", "shared", "column_blocks"])
def attention_kernel(q, k, v, mask, sinks, slopes, places, lengths, query_ids, key_ids, cu_q, cu_k, table, ranges,
                     draws, o, lse, do, dlse, sums, delta, dq, dk, dv, dmask, H, group, Sq, Sk, blocks, together,
                     splits, rows_in_all, factor, scale, cap, left, right, threshold, share, page_size, pages, q_b, q_h,
                     q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, mask_keys, do_b,
                     do_h, do_s, do_d, slopes_b, table_b, row_b, row_h, row_s, col_b, col_h, col_s, mask_heads,
                     shared_heads, shared, column_blocks, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
                     SCALED: tl.constexpr, EXACT: tl.constexpr, COARSE: tl.constexpr, NEAR: tl.constexpr,
                     KIND: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, CUT_STAGES: tl.constexpr,
                     MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Compute one tile of what KIND says.

    That is the output ("forward"), the gradients of keys and values ("keys"), of queries ("queries"), or of a tile of a
    head of the mask ("mask"), summed over the rows of the batch and the heads that share it, over the tile's queries
    unless MASK_ROWS, and over its keys unless MASK_COLS. Programs of `together` rows of the batch, which share a mask,
    follow each other.
    """
    tile = tl.program_id(0) // together % blocks
    at = (tl.program_id(0) // together // blocks).to(tl.int64)
    if KIND == "mask":
        row_tile, col_tile = tile // column_blocks, tile % column_blocks
        row, rows = row_tile * M + tl.arange(0, M), Sq
        col, cols = col_tile * N + tl.arange(0, N), Sk
        # Of the batch and the heads that share the mask, its tile is read once, and what the band bars is barred there.
        CUT: tl.constexpr = lengths is not None or query_ids is not None
        at_mask = mask + at // mask_heads * mask_b + at % mask_heads * mask_h
        at_mask += row.to(tl.int64)[:, None] * mask_s + col.to(tl.int64)[None, :] * mask_d
        limit = mask_keys
        if EVEN:
            limit = mask_keys // 16 * 16
        given = tl.load(at_mask, (row < Sq)[:, None] & (col < limit)[None, :], 0.0)
        if lengths is None:
            ahead = Sk - Sq
            lower, upper = edges(ahead, left, right, CAUSAL)
            seen = (col < Sk)[None, :]
            away = col[None, :] - row[:, None]
            if left is not None:
                seen &= away >= lower
                shared = tl.where(col_tile * N + N > row_tile * M + lower, shared, 0)
            if CAUSAL or right is not None:
                seen &= away <= upper
                shared = tl.where(col_tile * N < row_tile * M + M + upper, shared, 0)
            given = tl.where(seen, given, -float("inf"))
        total = tl.zeros((M, N), tl.float32)
        for t in range(0, shared):
            b, head = at // mask_heads + t // shared_heads, at % mask_heads + t % shared_heads
            total += _compute(
                row, col, given, b, head, head // group, 1, None, q, k, v, mask, sinks, slopes, places, lengths,
                query_ids, key_ids, cu_q, cu_k, table, ranges, draws, o, lse, do, dlse, sums, delta, dq, dk, dv, Sq, Sk,
                splits, rows_in_all, factor, scale, cap, left, right, threshold, share, page_size, pages, q_b, q_h, q_s,
                q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, mask_keys, do_b, do_h,
                do_s, do_d, slopes_b, table_b, row_b, row_h, row_s, col_b, col_h, col_s, D, DV, BLOCK_D, BLOCK_DV, M, N,
                CAUSAL, SCALED, EXACT, COARSE, NEAR, KIND, EVEN, GROUPED, CUT_STAGES, CUT)
        if draws is not None:
            total = total / share
        if not MASK_ROWS:
            total = tl.sum(total, 0, keep_dims=True)
            row, rows = row_tile + tl.arange(0, 1), blocks // column_blocks
        if not MASK_COLS:
            total = tl.sum(total, 1, keep_dims=True)
            col, cols = col_tile + tl.arange(0, 1), column_blocks
        tl.store(dmask + (at * rows + row[:, None]) * cols + col[None, :], total.to(dmask.dtype.element_ty),
                 (row < rows)[:, None] & (col < cols)[None, :])
    else:
        kv_heads = H // group
        split = None
        if splits is not None:
            split = (at % splits).to(tl.int32)
            at = at // splits
        b, kv_head = at // kv_heads + tl.program_id(0) % together, at % kv_heads
        # Rows of queries backwards, keys forwards: the longest causal tiles start first.
        if KIND != "keys":
            tile = blocks - 1 - tile
        if ranges is not None:
            ranges += (b * blocks + tile) * 4
        _compute(
            tile, None, None, b, kv_head * group, kv_head, group, split, q, k, v, mask, sinks, slopes, places, lengths,
            query_ids, key_ids, cu_q, cu_k, table, ranges, draws, o, lse, do, dlse, sums, delta, dq, dk, dv, Sq, Sk,
            splits, rows_in_all, factor, scale, cap, left, right, threshold, share, page_size, pages, q_b, q_h, q_s,
            q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_s, mask_d, mask_keys, do_b, do_h, do_s,
            do_d, slopes_b, table_b, row_b, row_h, row_s, col_b, col_h, col_s, D, DV, BLOCK_D, BLOCK_DV, M, N, CAUSAL,
            SCALED, EXACT, COARSE, NEAR, KIND, EVEN, GROUPED, CUT_STAGES, False)
