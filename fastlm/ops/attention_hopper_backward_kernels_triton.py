"""Attention's backward pass for Hopper in Gluon: five products; a warp copies (TMA), 2 warp groups compute (wgmma).

A block has 128 keys, 64 for each warp group, which makes dk and dv in registers; tiles of M queries go by, of all heads
that share the keys, made up to whole tiles by queries that see nothing. The scores are made transposed, `[64 keys, M
queries]`, so that p and ds are operands in registers of dv += p·do and dk += ds·q. For dq both groups put ds into
shared memory, and each multiplies all of it by the keys for its half of the tile of dq: half of the columns where M is
64, half of the rows where it is 128. It is added up in float32 in global memory, in no fixed order, as blocks of
`[64, 64]` in the order of the accumulator's registers, so that a warp adds to adjacent words.

ring     slot of tile number n = n % STAGES for queries with their log-sum-exp (q_full) and upstream gradients with
         delta (do_full): armed by the producer with the bytes of the copies. empty[slot]: 2 arrivals, one from each
         group, when its products with tile n are complete. The producer waits for the end of phase (n // STAGES) - 1.
ds       number m is that of tile m - LAG; where LAG is 1, number 0 is zeros, which may be added anywhere. Buffer m % 2.
         ds_full[m % 2]: 2 arrivals, one from each group, when it has stored its part. ds_empty[m % 2]: 2 arrivals, when
         its product with number m is complete. A group stores number m after both have multiplied number m - 2, and
         multiplies number m - LAG after it has stored number m.
deadlock One order of all events: tile n copied, then both groups' S(n), store(n), dq(n - LAG), free(n). The copy of n
         waits for free(n - STAGES); S(n) for the copy; store(n) for dq(n - 2); dq(n - LAG) for store(n - LAG).
"""

from typing import NamedTuple

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastlm.ops.attention_hopper_kernels_triton import LOG2_E, MINUS_INFINITY, MIX, advance, position, reach_of


class Inputs(NamedTuple):
    """Descriptors of queries, upstream gradients, their numbers and random bits, an additive mask, keys and values, or
    places of these in shared memory.
    """

    q: gl.tensor
    do: gl.tensor
    sums: gl.tensor
    delta: gl.tensor
    draws: gl.tensor
    mask: gl.tensor
    k: gl.tensor
    v: gl.tensor


class Scratch(NamedTuple):
    """Shared memory for ds `[2 numbers x 2 groups, 64, M]`; it and the keys in tiles of `[64, 64]`."""

    ds: gl.tensor
    ds_tiles: gl.tensor
    k_tiles: gl.tensor


class Barriers(NamedTuple):
    """The barriers, as above."""

    kv_full: gl.tensor
    q_full: gl.tensor
    do_full: gl.tensor
    empty: gl.tensor
    ds_full: gl.tensor
    ds_empty: gl.tensor


class Sizes(NamedTuple):
    """The arguments of `hopper_backward_kernel` of these names."""

    blocks: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    queries: gl.tensor
    keys: gl.tensor
    right: gl.tensor
    wide: gl.tensor
    mask_b: gl.tensor
    mask_h: gl.tensor


class Span(NamedTuple):
    """The tiles of queries [first, last) that see some of the keys.

    Those from begin to end, which are walked first, may need a mask, or with ALiBi be on both sides of the diagonal.
    """

    first: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    last: gl.tensor


class Features(NamedTuple):
    """Arguments of `hopper_backward_kernel` of these names, which mean something with ALIBI and with DROPOUT."""

    slopes: gl.tensor
    slopes_b: gl.tensor
    longest_q: gl.tensor
    longest_k: gl.tensor
    threshold: gl.tensor
    share: gl.tensor


# --- who does what ---------------------------------------------------------------------------------------------


@gluon.jit
def block_of(sizes, MASK: gl.constexpr):
    """Return (first key, row of the batch, head of keys) of a program: groups of `wide` heads, in them the first keys
    first. Rows of a batch that may share a mask are together.
    """
    number = gl.program_id(0)
    part = number // (sizes.blocks * sizes.wide)
    all_heads = gl.num_programs(0) // sizes.blocks
    width = gl.minimum(sizes.wide, all_heads - part * sizes.wide)
    number -= part * sizes.blocks * sizes.wide
    head = part * sizes.wide + number % width
    key = number // width * 128
    if MASK:
        rows = all_heads // sizes.heads
        return key, head % rows, head // rows
    return key, head // sizes.heads, head % sizes.heads


@gluon.jit
def span_of(key, batch, kv_head, sizes, features, scale, M: gl.constexpr, RIGHT: gl.constexpr, ALIBI: gl.constexpr):
    last = (sizes.queries + M - 1) // M
    first = 0
    begin = 0
    end = 0
    if RIGHT:
        first = gl.minimum(gl.maximum(key - sizes.right, 0) // M, last)
        begin = first
        end = (gl.maximum(key + 127 - sizes.right, 0) + M - 1) // M
    if ALIBI:
        same = key - (sizes.keys - sizes.queries)
        reach = reach_of(batch, kv_head * sizes.group, sizes.group, sizes.heads * sizes.group, sizes, features, scale,
                         RIGHT)
        last = gl.minimum(gl.maximum(same + 127 + reach, 0) // M + 1, last)
        first = gl.minimum(gl.maximum(gl.maximum(same - reach, 0) // M, first), last)
        begin = gl.minimum(gl.maximum(begin, first), last)
        if not RIGHT:
            begin = gl.minimum(gl.maximum(gl.maximum(same, 0) // M, first), last)
        end = gl.maximum(end, gl.maximum(same + 127 + M, 0) // M)
    partial = key + 128 > sizes.keys
    begin = gl.where(partial, first, begin)
    end = gl.minimum(gl.where(partial, last, end), last)
    return Span(first, begin, gl.maximum(end, begin), last)


@gluon.jit
def tile_at(n, span, key, M: gl.constexpr, ALIBI: gl.constexpr, TURN: gl.constexpr):
    """Return the n-th tile of a walk; with TURN, blocks of keys of a head are at different ones."""
    i = span.first + n
    if ALIBI:  # else begin is first, or all are walked at once
        cut = span.end - span.begin
        i = gl.where(n < cut, span.begin + n, gl.where(i - cut < span.begin, i - cut, i))
    if TURN:
        count = span.last - span.first
        i += key // 128 * (128 // M) % count
        i = gl.where(i >= span.last, i - count, i)
    return i


# --- the warp that copies --------------------------------------------------------------------------------------


@gluon.jit
def produce(descriptors, memory, barriers, sizes, features, scale, M: gl.constexpr, STAGES: gl.constexpr,
            RIGHT: gl.constexpr, ALIBI: gl.constexpr, DROPOUT: gl.constexpr, MASK: gl.constexpr, TURN: gl.constexpr):
    key, batch, kv_head = block_of(sizes, MASK)
    mbarrier.expect(barriers.kv_full.index(0), 4 * descriptors.k.block_type.nbytes)
    for w in gl.static_range(2):
        tma.async_copy_global_to_shared(descriptors.k, [batch, kv_head, key + w * 64, 0], barriers.kv_full.index(0),
                                        memory.k.index(w))
        tma.async_copy_global_to_shared(descriptors.v, [batch, kv_head, key + w * 64, 0], barriers.kv_full.index(0),
                                        memory.v.index(w))
    span = span_of(key, batch, kv_head, sizes, features, scale, M, RIGHT, ALIBI)
    tiles = (sizes.queries + M - 1) // M
    rows = gl.num_programs(0) // sizes.blocks * sizes.group * tiles * M
    BYTES: gl.constexpr = descriptors.q.block_type.nbytes + M * (4 + 8 * DROPOUT + 256 * MASK)
    slot = 0
    phase = 0
    for g in range(sizes.group):
        head = kv_head * sizes.group + g
        number = batch * sizes.heads * sizes.group + head
        for n in range(span.last - span.first):
            tile = tile_at(n, span, key, M, ALIBI, TURN)
            at = (number * tiles + tile) * M
            sums = at
            if ALIBI:  # with what the side of the diagonal adds
                below = tile * M >= key - (sizes.keys - sizes.queries)
                sums = at + gl.where(n < span.end - span.begin, 0, gl.where(below, rows, 2 * rows))
            mbarrier.wait(barriers.empty.index(slot), phase ^ 1)
            mbarrier.expect(barriers.q_full.index(slot), BYTES)
            tma.async_copy_global_to_shared(descriptors.q, [batch, head, tile * M, 0], barriers.q_full.index(slot),
                                            memory.q.index(slot))
            tma.async_copy_global_to_shared(descriptors.sums, [sums], barriers.q_full.index(slot),
                                            memory.sums.index(slot))
            if DROPOUT:
                tma.async_copy_global_to_shared(descriptors.draws, [number * sizes.queries + tile * M],
                                                barriers.q_full.index(slot), memory.draws.index(slot))
            if MASK:
                for w in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        descriptors.mask, [batch * sizes.mask_b, head * sizes.mask_h, tile * M, key + w * 64],
                        barriers.q_full.index(slot), memory.mask.index(slot * 2 + w))
            mbarrier.expect(barriers.do_full.index(slot), descriptors.do.block_type.nbytes + M * 4)
            tma.async_copy_global_to_shared(descriptors.do, [batch, head, tile * M, 0], barriers.do_full.index(slot),
                                            memory.do.index(slot))
            tma.async_copy_global_to_shared(descriptors.delta, [at], barriers.do_full.index(slot),
                                            memory.delta.index(slot))
            slot, phase = advance(slot, phase, STAGES)


# --- the warp groups that compute ------------------------------------------------------------------------------


@gluon.jit
def masked(s, key, row, sizes, M: gl.constexpr, RIGHT: gl.constexpr):
    keys = key + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout))[:, None]
    keep = keys < sizes.keys
    if RIGHT:
        rows = row + gl.arange(0, M, gl.SliceLayout(0, s.type.layout))[None, :]
        keep = keep & (keys <= rows + sizes.right)
    return gl.where(keep, s, MINUS_INFINITY)


@gluon.jit
def biased(s, slope, key, row, sizes, M: gl.constexpr):
    """Return scores in base 2 with ALiBi's bias."""
    j = position(key - (sizes.keys - sizes.queries) + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout)))
    i = position(row + gl.arange(0, M, gl.SliceLayout(0, s.type.layout)))
    return s - slope * gl.abs(i[None, :] - j[:, None])


@gluon.jit
def apart(s, slope, key, row, sizes):
    """Return scores in base 2, less the log-sum-exp, with what ALiBi's bias has of the keys: see `prepare_kernel`.

    Keys are all before the queries, or all after them. So the bias is slope · (j - i), or the negative of it.
    """
    start = key - (sizes.keys - sizes.queries) - row
    j = start + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout))
    return s + (gl.where(start > 0, -slope, slope) * j.to(gl.float32))[:, None]


@gluon.jit
def signed(p, key, bits, features):
    """Return weights, those that dropout drops negated: see `drop` of attention_score_kernels_triton.py."""
    k = key * MIX + gl.arange(0, 64, gl.SliceLayout(1, p.type.layout)) * MIX
    k = gl.inline_asm_elementwise("{.reg .b32 h; shr.u32 h, $1, 15; xor.b32 $0, $1, h;}", "=r,r", [k], gl.int32, True,
                                  1)
    number = bits.to(gl.int32)[None, :] + (bits >> 32).to(gl.int32)[None, :] * k[:, None]
    return gl.inline_asm_elementwise(
        "{.reg .pred above; setp.gt.s32 above, $1, $2; selp.f32 $0, $3, $4, above;}", "=f,r,r,f,f",
        [number, features.threshold, p, -p], gl.float32, True, 1)


@gluon.jit
def positive(p, dtype: gl.constexpr):
    """Return weights as numbers of a type, 0 where they are negative."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.bfloat16, True, 2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], gl.float16, True, 2)


@gluon.jit
def add_block(total, block, dq):
    """Add a tile `[64, C]` to the block of this number, in the order of its registers."""
    C: gl.constexpr = dq.shape[1]
    r = gl.arange(0, 64, gl.SliceLayout(1, dq.type.layout))
    c = gl.arange(0, C, gl.SliceLayout(0, dq.type.layout))
    at = (r // 16 * 128 + r % 8 * 16)[:, None] + (c // 8 * 512 + c % 8 // 2 * 4)[None, :]
    at = (total + (block.to(gl.int64) * (64 * C) + at)).to(gl.int64)
    gl.inline_asm_elementwise(
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; red.global.add.v4.f32 [$4], {$8, $9, $10, $11};",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [at, dq], gl.int32, False, 4)


@gluon.jit
def multiply_slopes(number, W: gl.constexpr, scratch, Q: gl.constexpr, M: gl.constexpr, D: gl.constexpr,
                    C: gl.constexpr):
    """Start the product of ds of this number with the keys: a half of a tile of dq."""
    dq = gl.zeros([64, C], gl.float32, Q)
    if M == 64:
        first = number % 2 * 2
        dq = warpgroup_mma(scratch.ds_tiles.index(first).permute((1, 0)), scratch.k_tiles.index(W), dq, use_acc=False,
                           is_async=True)
        dq = warpgroup_mma(scratch.ds_tiles.index(first + 1).permute((1, 0)), scratch.k_tiles.index(D // 64 + W), dq,
                           is_async=True)
    else:
        first = number % 2 * 4 + W
        dq = warpgroup_mma(scratch.ds_tiles.index(first).permute((1, 0)), scratch.k_tiles.index(0), dq, use_acc=False,
                           is_async=True)
        dq = warpgroup_mma(scratch.ds_tiles.index(first + 2).permute((1, 0)), scratch.k_tiles.index(1), dq,
                           is_async=True)
    return dq


@gluon.jit
def multiply_queries(k, slot, phase, there, memory, barriers, S: gl.constexpr, M: gl.constexpr, D: gl.constexpr):
    """Start the product of the keys with the tile of queries in a slot, for which it waits if it is to be `there`."""
    mbarrier.wait(barriers.q_full.index(slot), phase, pred=there)
    return warpgroup_mma(k, memory.q.index(slot).reshape([M, D]).permute((1, 0)), gl.zeros([64, M], gl.float32, S),
                         use_acc=False, is_async=True)


@gluon.jit
def walk(state, total, memory, scratch, barriers, sizes, features, slope, scale, block, span, head, CUT: gl.constexpr,
         W: gl.constexpr, M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
         RIGHT: gl.constexpr, ALIBI: gl.constexpr, DROPOUT: gl.constexpr, MASK: gl.constexpr, TURN: gl.constexpr):
    """Take the tiles of queries of a head from `span.begin` to `span.end` if CUT, else the others."""
    dk, dv, next_s, slot, phase, number, before = state
    cut = span.end - span.begin
    count = span.last - span.first
    tiles = (sizes.queries + M - 1) // M
    key = block + W * 64
    dtype: gl.constexpr = memory.q.dtype
    EARLY: gl.constexpr = M == 64  # else registers do not suffice for dp beside p
    AHEAD: gl.constexpr = not EARLY  # but for the next tile's scores
    C: gl.constexpr = D // 2 if M == 64 else D
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    Q: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    k = memory.k.index(W).reshape([64, D])
    v = memory.v.index(W).reshape([64, D])
    for n in range(0 if CUT else cut, cut if CUT else count):
        tile = tile_at(n, span, block, M, ALIBI, TURN)
        row = tile * M
        q = memory.q.index(slot).reshape([M, D])
        do = memory.do.index(slot).reshape([M, D])
        if AHEAD:
            s = next_s
        else:
            s = multiply_queries(k, slot, phase, True, memory, barriers, S, M, D)
        mbarrier.wait(barriers.do_full.index(slot), phase)
        if EARLY:
            dp = warpgroup_mma(v, do.permute((1, 0)), gl.zeros([64, M], gl.float32, S), use_acc=False, is_async=True)
        sums = memory.sums.index(slot).load(gl.SliceLayout(0, S))
        s = warpgroup_mma_wait(1 if EARLY else 0, deps=(s,))
        s = s * scale
        if MASK:
            mask = memory.mask.index(slot * 2 + W).reshape([M, 64]).permute((1, 0)).load(S)
            s = s + mask.to(gl.float32) * LOG2_E
        if ALIBI and CUT:
            s = biased(s, slope, key, row, sizes, M)
        if CUT:
            s = masked(s, key, row, sizes, M, RIGHT)
        s = s - sums[None, :]
        if ALIBI and not CUT:
            s = apart(s, slope, key, row, sizes)
        p = gl.exp2(s)
        if DROPOUT:
            p = signed(p, key, memory.draws.index(slot).load(gl.SliceLayout(0, S)), features)
            weights = positive(p, dtype)
        else:
            weights = p.to(dtype)
        weights = gl.convert_layout(weights, P, assert_trivial=True)
        if not EARLY:
            dp = warpgroup_mma(v, do.permute((1, 0)), gl.zeros([64, M], gl.float32, S), use_acc=False, is_async=True)
        new_dv = warpgroup_mma(weights, do, dv, is_async=True)
        if EARLY:
            delta = memory.delta.index(slot).load(gl.SliceLayout(0, S))
            dp = warpgroup_mma_wait(1, deps=(dp,))
        else:
            dp, dv, weights = warpgroup_mma_wait(0, deps=(dp, new_dv, weights))
            delta = memory.delta.index(slot).load(gl.SliceLayout(0, S))
        if DROPOUT:  # one number says what a weight is and whether it is kept
            ds = (gl.maximum(p, 0.0) * dp - gl.abs(p) * delta[None, :]).to(dtype)
        else:
            ds = (p * (dp - delta[None, :])).to(dtype)
        mbarrier.wait(barriers.ds_empty.index(number % 2), (number // 2 & 1) ^ 1)
        scratch.ds.index(number % 2 * 2 + W).store(ds)
        fence_async_shared()
        mbarrier.arrive(barriers.ds_full.index(number % 2), count=1)
        ready = number - LAG
        mbarrier.wait(barriers.ds_full.index(ready % 2), ready // 2 & 1)
        dq = multiply_slopes(ready, W, scratch, Q, M, D, C)
        ds = gl.convert_layout(ds, P, assert_trivial=True)
        new_dk = warpgroup_mma(ds, q, dk, is_async=True)
        if EARLY:
            dq, dv, weights = warpgroup_mma_wait(1, deps=(dq, new_dv, weights))
        else:
            dq = warpgroup_mma_wait(1, deps=(dq,))
        mbarrier.arrive(barriers.ds_empty.index(ready % 2), count=1)
        if LAG == 0:
            before = head * tiles + tile
        add_block(total, before * 2 + W, dq)
        next_slot, next_phase = advance(slot, phase, STAGES)
        if AHEAD:
            next_s = multiply_queries(k, next_slot, next_phase, number < count * sizes.group, memory, barriers, S, M,
                                      D)
        dk, ds = warpgroup_mma_wait(1 if AHEAD else 0, deps=(new_dk, ds))
        mbarrier.arrive(barriers.empty.index(slot), count=1)
        number += 1
        before = head * tiles + tile
        slot = next_slot
        phase = next_phase
    return dk, dv, next_s, slot, phase, number, before


@gluon.jit
def consume(W: gl.constexpr, dk_desc, dv_desc, total, memory, scratch, barriers, sizes, features, scale, dk_scale,
            D: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, RIGHT: gl.constexpr,
            ALIBI: gl.constexpr, DROPOUT: gl.constexpr, MASK: gl.constexpr, TURN: gl.constexpr):
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    C: gl.constexpr = D // 2 if M == 64 else D
    Q: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    AHEAD: gl.constexpr = M == 128
    block, batch, kv_head = block_of(sizes, MASK)
    span = span_of(block, batch, kv_head, sizes, features, scale, M, RIGHT, ALIBI)
    if LAG == 1:
        scratch.ds.index(W).store(gl.zeros([64, M], memory.q.dtype, S))
        fence_async_shared()
        mbarrier.arrive(barriers.ds_full.index(0), count=1)
    mbarrier.wait(barriers.kv_full.index(0), 0)
    s = 0
    if AHEAD:
        s = multiply_queries(memory.k.index(W).reshape([64, D]), 0, 0, span.first < span.last, memory, barriers, S, M,
                             D)
    state = (gl.zeros([64, D], gl.float32, O), gl.zeros([64, D], gl.float32, O), s, 0, 0, LAG, 0)
    for g in range(sizes.group):
        head = kv_head * sizes.group + g
        slope = 0.0
        if ALIBI:
            slope = gl.load(features.slopes + (batch * features.slopes_b + head)) * LOG2_E
        head += batch * sizes.heads * sizes.group
        for cut in gl.static_range(2):
            state = walk(state, total, memory, scratch, barriers, sizes, features, slope, scale, block, span, head,
                         cut == 0, W, M, D, STAGES, LAG, RIGHT, ALIBI, DROPOUT, MASK, TURN)
    dk, dv, s, _, _, number, before = state
    if AHEAD:
        s = warpgroup_mma_wait(0, deps=(s,))
    if LAG == 1:
        number -= 1
        mbarrier.wait(barriers.ds_full.index(number % 2), number // 2 & 1)
        dq = multiply_slopes(number, W, scratch, Q, M, D, C)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add_block(total, before * 2 + W, dq)
    if DROPOUT:
        dv = dv * (1 / features.share)
    stage = memory.v.index(W)
    stage.reshape([64, D]).store(dv.to(memory.q.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, block + W * 64, 0], stage)
    tma.store_wait(0)
    gl.thread_barrier()
    stage.reshape([64, D]).store((dk * dk_scale).to(memory.q.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, block + W * 64, 0], stage)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slopes_b", "threshold", "share", "scale", "dk_scale", "blocks", "heads", "group",
                              "queries", "keys", "right", "wide", "mask_b", "mask_h"])
def hopper_backward_kernel(q_desc, do_desc, sums_desc, delta_desc, draws_desc, mask_desc, k_desc, v_desc, dk_desc,
                           dv_desc, total, slopes, slopes_b, longest_q, longest_k, threshold, share, scale, dk_scale,
                           blocks, heads, group, queries, keys, right, wide, mask_b, mask_h, D: gl.constexpr,
                           M: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, RIGHT: gl.constexpr,
                           ALIBI: gl.constexpr, DROPOUT: gl.constexpr, MASK: gl.constexpr, TURN: gl.constexpr):
    """Compute dk and dv, and add dq over the scale to blocks of float32; query i sees key j where j - i ≤ right if
    RIGHT.

    Descriptors are of [B, H, S, D], in blocks of M rows of queries and 64 of keys, of [B·H·Sq] for the random bits, and
    of what `prepare_kernel` makes. `heads` are those of keys. `scale` has the factor log2(e).
    """
    q_mem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    do_mem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, M, D], do_desc.layout)
    sums_mem = gl.allocate_shared_memory(gl.float32, [STAGES, M], sums_desc.layout)
    delta_mem = gl.allocate_shared_memory(gl.float32, [STAGES, M], delta_desc.layout)
    draws_mem = sums_mem
    if DROPOUT:
        draws_mem = gl.allocate_shared_memory(gl.int64, [STAGES, M], draws_desc.layout)
    mask_mem = sums_mem
    if MASK:
        mask_mem = gl.allocate_shared_memory(mask_desc.dtype, [2 * STAGES, 1, 1, M, 64], mask_desc.layout)
    k_mem = gl.allocate_shared_memory(k_desc.dtype, [2, 1, 1, 64, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(v_desc.dtype, [2, 1, 1, 64, D], v_desc.layout)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ds_mem = gl.allocate_shared_memory(q_desc.dtype, [4, 64, M], FLAT)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    fence_async_shared()
    descriptors = Inputs(q_desc, do_desc, sums_desc, delta_desc, draws_desc, mask_desc, k_desc, v_desc)
    memory = Inputs(q_mem, do_mem, sums_mem, delta_mem, draws_mem, mask_mem, k_mem, v_mem)
    scratch = Scratch(ds_mem, ds_mem._reinterpret(q_desc.dtype, [4 * M // 64, 64, 64], FLAT),
                      k_mem._reinterpret(q_desc.dtype, [2 * D // 64, 64, 64], FLAT))
    barriers = Barriers(kv_full, q_full, do_full, empty, ds_full, ds_empty)
    sizes = Sizes(blocks, heads, group, queries, keys, right, wide, mask_b, mask_h)
    features = Features(slopes, slopes_b, longest_q, longest_k, threshold, share)
    gl.warp_specialize([
        (consume, (0, dk_desc, dv_desc, total, memory, scratch, barriers, sizes, features, scale, dk_scale, D, M,
                   STAGES, LAG, RIGHT, ALIBI, DROPOUT, MASK, TURN)),
        (consume, (1, dk_desc, dv_desc, total, memory, scratch, barriers, sizes, features, scale, dk_scale, D, M,
                   STAGES, LAG, RIGHT, ALIBI, DROPOUT, MASK, TURN)),
        (produce, (descriptors, memory, barriers, sizes, features, scale, M, STAGES, RIGHT, ALIBI, DROPOUT, MASK,
                   TURN)),
    ], [4, 1], [240, 24])
