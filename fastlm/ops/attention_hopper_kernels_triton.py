"""Attention's forward pass for Hopper in Gluon: a warp copies (TMA), 2 or 3 warp groups take turns to compute (wgmma).

Each block is persistent over tiles of GROUPS x 64 query rows. Everybody computes the same list of tiles and, for each,
the same range of key blocks (`tile_of`, `span`), walked from the last to the first. So all counts agree, which is what
the barriers rest on:

ring     slot of block number n (counted over all tiles) = n % STAGES; K and V have a ring each.
         *_full[slot]: armed by the producer with the bytes of the copy (1 arrival + bytes). Its phase n // STAGES ends
         when block n has landed; a consumer waits for parity (n // STAGES) & 1.
         empty[slot]: GROUPS arrivals, one from each consumer, when its products with K block n and V block n - 1 are
         complete (the arrival is by one thread, after a barrier of the warp group). The producer waits for the end of
         phase (n // STAGES) - 1, parity ((n // STAGES) & 1) ^ 1 (passes at once on a fresh barrier), and then writes K
         block n (over n - STAGES) and V block n - 1 (over n - 1 - STAGES).
         Neither side can be two phases ahead: the producer needs every consumer's arrival for the slot's last use, and
         a consumer needs the producer's copy.
queries  q_full[w], q_empty[w] (1 arrival): tile number t of the block likewise, a ring of one slot for each consumer.
         q_empty[w] is arrived at once after the last Q.K of the tile is complete.
turns    turns[w] (1 arrival): consumer w takes turn number k (one for each key block but a tile's first; the same count
         for all consumers) after consumer w - 1 has issued its products of turn k, for w = 0 after the last consumer
         has issued those of turn k - 1 (parity (k & 1) ^ 1, passing at once for k = 0; the others: parity k & 1).
         w arrives at turns[(w + 1) % GROUPS] once it has issued its own. Arrival k + 1 at a barrier comes after all
         consumers' turns k, hence after the wait for arrival k: no overrun.
deadlock Let n be a tile's blocks, f the first, l the last one. Consumers do F(f): Q.K(f); then turns C(n), n = f ..
         l - 1: Q.K(n + 1), P.V(n); then E(l): P.V(l), store. empty(n + 1) is arrived in C(n), empty(f) in F(f) (after
         E(f - 1), so V(f - 1) is covered too), Q after C(l - 1). The producer loads Q K(f), then K(n + 1) V(n) for n =
         f .. l - 1, then V(l), then the next tile's. One order of all events: Q(tile), K(f), F(f) [w = 0, 1, ..], then
         K(n + 1), V(n), C(n) [w = 0, 1, ..] for n = f .. l - 1, then V(l), Q(next), K(next f), E(l), F(next f), ...
         Every wait is for something earlier in it: K(n + 1) and V(n) for empty(n + 1 - STAGES), arrived in C(n -
         STAGES) or F(n + 1 - STAGES), which is at most F(n); Q(next) for C(l - 1) or F(f); C(n) of w for K(n + 1),
         V(n), C(n - 1), and C(n) of w - 1 or the last turn before; E(l) for V(l); F for Q and K(f). So some event can
         always happen.
registers An asynchronous product reads the weights from registers, so they go through its wait: they live until then.

While the products of one consumer run, the others compute exponentials; within one, Q.K of the next key block is issued
before P.V of this one. So each product that is waited for has another behind it.
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

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
MINUS_INFINITY = gl.constexpr(float("-inf"))
MIX = gl.constexpr(0x9E3779B9 - (1 << 32))  # as a signed number of 32 bits


class Tensors(NamedTuple):
    """Queries, keys, values and output: their descriptors, or their places in shared memory."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    o: gl.tensor


class Barriers(NamedTuple):
    """The barriers, as above."""

    q_full: gl.tensor
    q_empty: gl.tensor
    k_full: gl.tensor
    v_full: gl.tensor
    empty: gl.tensor
    turns: gl.tensor


class Sizes(NamedTuple):
    """The arguments of `hopper_kernel` of these names."""

    blocks: gl.tensor
    tiles: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    queries: gl.tensor
    keys: gl.tensor
    left: gl.tensor
    right: gl.tensor
    wide: gl.tensor


# --- who does what ---------------------------------------------------------------------------------------------


@gluon.jit
def pick(turn):
    """Number the tile that this block takes in its n-th turn: there and back, so that long and short ones even out."""
    here = gl.program_id(0)
    many = gl.num_programs(0)
    return turn * many + gl.where(turn % 2 == 1, many - 1 - here, here)


@gluon.jit
def tile_of(number, sizes):
    """Return (row block, row of the batch, head) of a tile.

    Tiles go in groups of `wide` heads, in each of them the last row blocks first: of causal ones those are the longest.
    """
    part = number // (sizes.blocks * sizes.wide)
    width = gl.minimum(sizes.wide, sizes.tiles // sizes.blocks - part * sizes.wide)
    number -= part * sizes.blocks * sizes.wide
    head = part * sizes.wide + number % width
    return sizes.blocks - 1 - number // width, head // sizes.heads, head % sizes.heads


@gluon.jit
def reach_of(batch, head, count, heads, sizes, features, scale, RIGHT: gl.constexpr):
    """Return a distance from which on ALiBi makes all weights of `count` heads less than 2⁻¹²⁶, for which exp2 gives 0.

    A log-sum-exp is at least the score with the key at the query's own place, or the nearest one that it sees. So a
    weight is at most exp2 of twice the largest score, less the bias to that key; and no score is larger than the
    longest query times the longest key. Everybody must find the same number: no product is followed by a sum, which
    compilers may fuse in one place and not in another.
    """
    reach = 0
    for g in range(count):
        at = batch * heads + head + g
        slope = gl.load(features.slopes + (batch * features.slopes_b + head + g)) * LOG2_E
        squares = gl.load(features.longest_q + at) * gl.load(features.longest_k + at // sizes.group)
        far = (gl.sqrt(scale * scale * squares * 4.1) + 130.0) / slope
        far = gl.where(slope > 0, gl.minimum(far, 4194304.0), 4194304.0)
        reach = gl.maximum(reach, far.to(gl.int32) + 1)
    if RIGHT:
        reach += gl.maximum(sizes.keys - sizes.queries - sizes.right, 0)
    return gl.where(sizes.keys < sizes.queries, 4194304, reach)


@gluon.jit
def span(row, batch, head, sizes, features, scale, M: gl.constexpr, N: gl.constexpr, RIGHT: gl.constexpr,
         LEFT: gl.constexpr, ALIBI: gl.constexpr):
    """Return a tile's key blocks [first, last), of which [inner, outer) need no mask. The very last one always gets it.

    There is always one, also where its rows see nothing.
    """
    end = sizes.keys
    whole = sizes.keys
    if RIGHT:
        end = gl.maximum(gl.minimum(end, row + M + sizes.right), 1)
        whole = gl.maximum(gl.minimum(whole, row + sizes.right + 1), 0)
    last = (end + N - 1) // N
    first = 0
    inner = 0
    if LEFT:
        first = gl.minimum(gl.maximum(row - sizes.left, 0) // N, last - 1)
        inner = (gl.maximum(row + M - 1 - sizes.left, 0) + N - 1) // N
    if ALIBI:
        own = row + sizes.keys - sizes.queries
        reach = reach_of(batch, head, 1, sizes.heads, sizes, features, scale, RIGHT)
        last = gl.minimum(last, gl.maximum(own + M - 1 + reach, 0) // N + 1)
        first = gl.minimum(gl.maximum(first, gl.maximum(own - reach, 0) // N), last - 1)
    outer = gl.maximum(gl.minimum(whole // N, last - 1), first)
    inner = gl.minimum(gl.maximum(inner, first), outer)
    return first, inner, outer, last


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    slot += 1
    over = slot == STAGES
    return gl.where(over, 0, slot), gl.where(over, phase ^ 1, phase)


class Features(NamedTuple):
    """Arguments of `hopper_kernel` of these names, which mean something with ALIBI and with DROPOUT."""

    slopes: gl.tensor
    slopes_b: gl.tensor
    longest_q: gl.tensor
    longest_k: gl.tensor
    draws: gl.tensor
    threshold: gl.tensor
    share: gl.tensor


class Rows(NamedTuple):
    """What the features need of a tile: its head's slope in the unit of the scores, its rows' random bits."""

    slope: gl.tensor
    plus: gl.tensor
    times: gl.tensor


# --- the warp that copies --------------------------------------------------------------------------------------


@gluon.jit
def produce(descriptors, memory, barriers, sizes, features, scale, N: gl.constexpr, GROUPS: gl.constexpr,
            STAGES: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, ALIBI: gl.constexpr):
    slot = 0
    phase = 0
    turn = 0
    tile = pick(turn)
    while tile < sizes.tiles:
        block, batch, head = tile_of(tile, sizes)
        kv_head = head // sizes.group
        row = block * GROUPS * 64
        first, _, _, last = span(row, batch, head, sizes, features, scale, GROUPS * 64, N, RIGHT, LEFT, ALIBI)
        for w in gl.static_range(GROUPS):
            mbarrier.wait(barriers.q_empty.index(w), (turn & 1) ^ 1)
            mbarrier.expect(barriers.q_full.index(w), descriptors.q.block_type.nbytes)
            tma.async_copy_global_to_shared(descriptors.q, [batch, head, row + w * 64, 0], barriers.q_full.index(w),
                                            memory.q.index(w))
        mbarrier.expect(barriers.k_full.index(slot), descriptors.k.block_type.nbytes)
        tma.async_copy_global_to_shared(descriptors.k, [batch, kv_head, (last - 1) * N, 0], barriers.k_full.index(slot),
                                        memory.k.index(slot))
        for i in range(last - first):
            v_slot = slot
            slot, phase = advance(slot, phase, STAGES)
            column = (last - 1 - i) * N
            mbarrier.wait(barriers.empty.index(slot), phase ^ 1)
            if i < last - first - 1:
                mbarrier.expect(barriers.k_full.index(slot), descriptors.k.block_type.nbytes)
                tma.async_copy_global_to_shared(descriptors.k, [batch, kv_head, column - N, 0],
                                                barriers.k_full.index(slot), memory.k.index(slot))
            mbarrier.expect(barriers.v_full.index(v_slot), descriptors.v.block_type.nbytes)
            tma.async_copy_global_to_shared(descriptors.v, [batch, kv_head, column, 0], barriers.v_full.index(v_slot),
                                            memory.v.index(v_slot))
        turn += 1
        tile = pick(turn)


# --- the warp groups that compute ------------------------------------------------------------------------------


@gluon.jit
def masked(s, row, column, sizes, N: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr):
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout))[:, None]
    columns = column + gl.arange(0, N, gl.SliceLayout(0, s.type.layout))[None, :]
    keep = columns < sizes.keys
    if RIGHT:
        keep = keep & (columns <= rows + sizes.right)
    if LEFT:
        keep = keep & (columns >= rows - sizes.left)
    return gl.where(keep, s, MINUS_INFINITY)


@gluon.jit
def position(x):
    """Return integers below 2²² as floats plus 1.5·2²³: see `_position` of attention_score_kernels_triton.py."""
    return (x + 0x4B400000).to(gl.float32, bitcast=True)


@gluon.jit
def biased(s, row, column, rows, sizes, N: gl.constexpr):
    """Return scores with ALiBi's bias, if there is one."""
    if rows.slope is not None:
        i = position(row + (sizes.keys - sizes.queries) + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout)))
        j = position(column + gl.arange(0, N, gl.SliceLayout(0, s.type.layout)))
        s = s - rows.slope * gl.abs(i[:, None] - j[None, :])
    return s


@gluon.jit
def dropped(e, column, rows, features, N: gl.constexpr):
    """Return the weights that dropout keeps, else 0: see `drop` of attention_score_kernels_triton.py."""
    if rows.times is not None:
        k = column * MIX + gl.arange(0, N, gl.SliceLayout(0, e.type.layout)) * MIX
        k = gl.inline_asm_elementwise("{.reg .b32 h; shr.u32 h, $1, 15; xor.b32 $0, $1, h;}", "=r,r", [k], gl.int32,
                                      True, 1)
        number = rows.plus[:, None] + rows.times[:, None] * k[None, :]
        e = gl.inline_asm_elementwise(
            "{.reg .pred above; setp.gt.s32 above, $1, $2; selp.f32 $0, $3, 0f00000000, above;}", "=f,r,r,f",
            [number, features.threshold, e], gl.float32, True, 1)
    return e


@gluon.jit
def added(e, N: gl.constexpr):
    """Sum the rows by thread only: the four threads of a row are added at the end of a tile."""
    return gl.sum(gl.sum(gl.reshape(e, [64, N // 8, 4, 2]), 1), 2)


@gluon.jit
def packed(e, N: gl.constexpr, dtype: gl.constexpr):
    """Put two weights into one 32-bit register: carried through a loop as 16-bit values, each pair would cost two."""
    low, high = gl.split(gl.reshape(e, [64, N // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)


@gluon.jit
def unpacked(p, N: gl.constexpr, dtype: gl.constexpr, P: gl.constexpr):
    if dtype == gl.bfloat16:
        low, high = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [p], (gl.bfloat16, gl.bfloat16),
                                              True, 1)
    else:
        low, high = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [p], (gl.float16, gl.float16),
                                              True, 1)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [64, N]), P, assert_trivial=True)


@gluon.jit
def walk(count, block, state, q, memory, barriers, sizes, features, rows, row, scale, MASKED: gl.constexpr,
         W: gl.constexpr, S: gl.constexpr, O: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
         RIGHT: gl.constexpr, LEFT: gl.constexpr):
    """Take `count` key blocks from `block` down: products for the next one during the softmax of the last one."""
    acc, pair, top, total, k_slot, k_phase, v_slot, v_phase, taken = state
    D: gl.constexpr = acc.shape[1]
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    for i in range(count):
        p = unpacked(pair, N, q.dtype, P)
        mbarrier.wait(barriers.k_full.index(k_slot), k_phase)
        if W == 0:
            mbarrier.wait(barriers.turns.index(W), (taken & 1) ^ 1)
        else:
            mbarrier.wait(barriers.turns.index(W), taken & 1)
        s = warpgroup_mma(q, memory.k.index(k_slot).reshape([N, D]).permute((1, 0)), gl.zeros([64, N], gl.float32, S),
                          use_acc=False, is_async=True)
        mbarrier.wait(barriers.v_full.index(v_slot), v_phase)
        new = warpgroup_mma(p, memory.v.index(v_slot).reshape([N, D]), acc, is_async=True)
        mbarrier.arrive(barriers.turns.index((W + 1) % GROUPS), count=1)
        taken += 1
        s = warpgroup_mma_wait(1, deps=(s,))
        s = biased(s, row, (block - i) * N, rows, sizes, N)
        if MASKED:
            s = masked(s, row, (block - i) * N, sizes, N, RIGHT, LEFT)
        higher = gl.maximum(top, gl.max(s, 1))
        safe = higher
        if MASKED:
            safe = gl.where(higher == MINUS_INFINITY, 0.0, higher)
        base = safe * scale
        fade = gl.exp2(top * scale - base)
        e = gl.exp2(s * scale - base[:, None])
        total = total * gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None]
        total += added(e, N)
        e = dropped(e, (block - i) * N, rows, features, N)
        top = higher
        if GROUPS == 2:  # a loop that is never entered, over which ptxas does not move the next wait into the softmax
            never = i + sizes.wide
            while never < 0:
                mbarrier.arrive(barriers.turns.index(W), count=1)
                never += 1
        acc, p = warpgroup_mma_wait(0, deps=(new, p))
        pair = packed(e, N, q.dtype)
        mbarrier.arrive(barriers.empty.index(k_slot), count=1)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
        v_slot = k_slot
        v_phase = k_phase
        k_slot, k_phase = advance(k_slot, k_phase, STAGES)
    return acc, pair, top, total, k_slot, k_phase, v_slot, v_phase, taken


@gluon.jit
def consume(W: gl.constexpr, o_desc, lse, memory, barriers, sizes, features, scale, D: gl.constexpr, N: gl.constexpr,
            GROUPS: gl.constexpr, STAGES: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, ALIBI: gl.constexpr,
            DROPOUT: gl.constexpr):
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    q = memory.q.index(W).reshape([64, D])
    k_slot = 0
    k_phase = 0
    taken = 0
    turn = 0
    tile = pick(turn)
    while tile < sizes.tiles:
        block, batch, head = tile_of(tile, sizes)
        row = (block * GROUPS + W) * 64
        first, inner, outer, last = span(block * GROUPS * 64, batch, head, sizes, features, scale, GROUPS * 64, N,
                                         RIGHT, LEFT, ALIBI)

        slope = None
        plus = None
        times = None
        if ALIBI:
            slope = gl.load(features.slopes + (batch * features.slopes_b + head)) * (LOG2_E / scale)
        if DROPOUT:
            r = row + gl.arange(0, 64, gl.SliceLayout(1, S))
            bits = gl.load(features.draws + ((batch * sizes.heads + head).to(gl.int64) * sizes.queries + r),
                           r < sizes.queries, 0)
            plus = bits.to(gl.int32)
            times = (bits >> 32).to(gl.int32)
        rows = Rows(slope, plus, times)

        # The first key block (the last in memory), always masked.
        mbarrier.wait(barriers.q_full.index(W), turn & 1)
        mbarrier.wait(barriers.k_full.index(k_slot), k_phase)
        s = warpgroup_mma(q, memory.k.index(k_slot).reshape([N, D]).permute((1, 0)), gl.zeros([64, N], gl.float32, S),
                          use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(barriers.empty.index(k_slot), count=1)
        s = biased(s, row, (last - 1) * N, rows, sizes, N)
        s = masked(s, row, (last - 1) * N, sizes, N, RIGHT, LEFT)
        top = gl.max(s, 1)
        base = gl.where(top == MINUS_INFINITY, 0.0, top) * scale
        e = gl.exp2(s * scale - base[:, None])
        total = added(e, N)
        e = dropped(e, (last - 1) * N, rows, features, N)
        pair = packed(e, N, q.dtype)
        acc = gl.zeros([64, D], gl.float32, O)
        v_slot = k_slot
        v_phase = k_phase
        k_slot, k_phase = advance(k_slot, k_phase, STAGES)

        state = (acc, pair, top, total, k_slot, k_phase, v_slot, v_phase, taken)
        if RIGHT:  # else outer = last - 1
            state = walk(last - 1 - outer, last - 2, state, q, memory, barriers, sizes, features, rows, row, scale,
                         True, W, S, O, N, GROUPS, STAGES, RIGHT, LEFT)
        state = walk(outer - inner, outer - 1, state, q, memory, barriers, sizes, features, rows, row, scale, False, W,
                     S, O, N, GROUPS, STAGES, RIGHT, LEFT)
        if LEFT:
            state = walk(inner - first, inner - 1, state, q, memory, barriers, sizes, features, rows, row, scale, True,
                         W, S, O, N, GROUPS, STAGES, RIGHT, LEFT)
        acc, pair, top, total, k_slot, k_phase, v_slot, v_phase, taken = state
        mbarrier.arrive(barriers.q_empty.index(W), count=1)

        # The last V.
        p = unpacked(pair, N, q.dtype, P)
        mbarrier.wait(barriers.v_full.index(v_slot), v_phase)
        new = warpgroup_mma(p, memory.v.index(v_slot).reshape([N, D]), acc, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S), assert_trivial=True)
        seen = total != 0  # NaN is passed on
        r = row + gl.arange(0, 64, gl.SliceLayout(1, S))
        value = gl.where(seen, top * scale * LN_2 + gl.log(total), MINUS_INFINITY)
        gl.store(lse + ((batch * sizes.heads + head).to(gl.int64) * sizes.queries + r), value, r < sizes.queries)
        if DROPOUT:
            total = total * features.share
        inverse = gl.where(seen, 1.0 / total, 0.0)
        acc, p = warpgroup_mma_wait(0, deps=(new, p))
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
        tma.store_wait(0)  # the copy of the tile before has read memory.o
        gl.thread_barrier()
        memory.o.index(W).reshape([64, D]).store(acc.to(q.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], memory.o.index(W))
        turn += 1
        tile = pick(turn)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slopes_b", "threshold", "share", "scale", "blocks", "tiles", "heads", "group", "queries",
                              "keys", "left", "right", "wide"])
def hopper_kernel(q_desc, k_desc, v_desc, o_desc, lse, slopes, slopes_b, longest_q, longest_k, draws, threshold,
                  share, scale, blocks, tiles, heads, group, queries, keys, left, right, wide, D: gl.constexpr,
                  N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, RIGHT: gl.constexpr,
                  LEFT: gl.constexpr, ALIBI: gl.constexpr, DROPOUT: gl.constexpr, REGISTERS: gl.constexpr):
    """Compute the output and log-sum-exp; query i sees key j where -left ≤ j - i if LEFT, j - i ≤ right if RIGHT.

    Descriptors are of [B, H, S, D], in blocks of 64 rows of queries and output, N of keys and values. `scale` has the
    factor log2(e). Each head of keys has `group` heads of queries.
    """
    q_mem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, 64, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, N, D], v_desc.layout)
    o_mem = gl.allocate_shared_memory(o_desc.dtype, [GROUPS, 1, 1, 64, D], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    descriptors = Tensors(q_desc, k_desc, v_desc, o_desc)
    memory = Tensors(q_mem, k_mem, v_mem, o_mem)
    barriers = Barriers(q_full, q_empty, k_full, v_full, empty, turns)
    sizes = Sizes(blocks, tiles, heads, group, queries, keys, left, right, wide)
    features = Features(slopes, slopes_b, longest_q, longest_k, draws, threshold, share)
    if GROUPS == 2:
        gl.warp_specialize([
            (consume, (0, o_desc, lse, memory, barriers, sizes, features, scale, D, N, GROUPS, STAGES, RIGHT, LEFT,
                       ALIBI, DROPOUT)),
            (consume, (1, o_desc, lse, memory, barriers, sizes, features, scale, D, N, GROUPS, STAGES, RIGHT, LEFT,
                       ALIBI, DROPOUT)),
            (produce, (descriptors, memory, barriers, sizes, features, scale, N, GROUPS, STAGES, RIGHT, LEFT, ALIBI)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (consume, (0, o_desc, lse, memory, barriers, sizes, features, scale, D, N, GROUPS, STAGES, RIGHT, LEFT,
                       ALIBI, DROPOUT)),
            (consume, (1, o_desc, lse, memory, barriers, sizes, features, scale, D, N, GROUPS, STAGES, RIGHT, LEFT,
                       ALIBI, DROPOUT)),
            (consume, (2, o_desc, lse, memory, barriers, sizes, features, scale, D, N, GROUPS, STAGES, RIGHT, LEFT,
                       ALIBI, DROPOUT)),
            (produce, (descriptors, memory, barriers, sizes, features, scale, N, GROUPS, STAGES, RIGHT, LEFT, ALIBI)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])
