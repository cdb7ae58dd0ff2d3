"""What attention's kernels share: tiles in memory, who sees whom, and the scores.

The rows of a tile are queries of the G heads that share a head of keys: row r is query r // G of the group's head
r % G. So few queries with many heads still fill a tile, and keys are read once for the group. All that bars keys by
position is one band, lower ≤ j - i ≤ upper. Tiles that its edges or the end of the keys cut are walked in a loop of
their own, after those between, which compare no positions and are loaded ahead (after, because ptxas runs products
one by one if they add to what another loop has summed). An argument that is None is a feature that is off, and costs
nothing.
"""

from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
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
    """What all scores depend on; `factor` is what exp2 multiplies them by: log2(e), times scale or cap unless SCALED.

    Dropout keeps the weights whose random numbers are above `threshold`, a `share` of them. Where NEAR, positions are
    below 2²².
    """

    factor: tl.tensor
    scale: tl.tensor
    cap: tl.tensor
    threshold: tl.tensor
    share: tl.tensor
    SCALED: tl.constexpr
    EXACT: tl.constexpr
    COARSE: tl.constexpr
    NEAR: tl.constexpr


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

    `places` are the numbers 0, 1, … as floats. What has one row for each query and head (output, log-sum-exp, delta,
    dq) is contiguous and shares row numbers.
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
    mask_keys: tl.tensor
    slopes: tl.tensor
    places: tl.tensor
    documents: tl.tensor
    draws: tl.tensor
    row: tl.tensor
    row_h: tl.tensor
    row_s: tl.tensor
    head: tl.tensor
    group: tl.tensor
    GROUPED: tl.constexpr


class Walk(NamedTuple):
    """A range of keys or rows in tiles: from `low` to `high` whole ones, before and after them those that are cut."""

    start: tl.tensor
    low: tl.tensor
    high: tl.tensor
    end: tl.tensor


class Size(NamedTuple):
    """Widths of keys and values, and of the tiles that hold them; and how far ahead the loads of cut tiles are."""

    D: tl.constexpr
    DV: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr
    CUT_STAGES: tl.constexpr


# --- tiles in memory -------------------------------------------------------------------------------------------


@triton.jit
def load_rows(base, offset, inside, stride_d, D: tl.constexpr, BLOCK: tl.constexpr):
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
def store_rows(base, offset, inside, tile, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(base + offset[:, None] + column[None, :], tile.to(base.dtype.element_ty),
             inside[:, None] & (column < D)[None, :])


@triton.jit
def load_keys(source, j, band, size, WHOLE: tl.constexpr):
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
    key = load_rows(source.k, at_k, inside, source.k_d, size.D, size.BLOCK_D)
    value = load_rows(source.v, at_v, inside, source.v_d, size.DV, size.BLOCK_DV)
    return key, value


@triton.jit
def afresh(x):
    """Return the number x, hidden from the compiler: what is made of it is made anew, and waits in no registers."""
    if not INTERPRETING:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
    return x


@triton.jit
def query_and_head(source, r):
    """Return the query and the head of rows r."""
    return r // source.group, source.head + r % source.group


@triton.jit
def row_numbers(source, i, head):
    """Return the row numbers of queries i of a head in the output and what is laid out like it."""
    return source.row + i.to(tl.int64) * source.row_s + head * source.row_h


@triton.jit
def load_query(source, i, head, band, size, WHOLE: tl.constexpr):
    """Load queries i of a head; WHOLE promises that all are there."""
    inside = None
    if not WHOLE:
        inside = i < band.queries
    at = i.to(tl.int64) * source.q_s + head * source.q_h
    return load_rows(source.q, at, inside, source.q_d, size.D, size.BLOCK_D)


@triton.jit
def load_upstream(source, i, head, band, size, WHOLE: tl.constexpr):
    """Load the gradients of the outputs of queries i; WHOLE promises that all are there."""
    inside = None
    if not WHOLE:
        inside = i < band.queries
    at = i.to(tl.int64) * source.do_s + head * source.do_h
    return load_rows(source.do, at, inside, source.do_d, size.DV, size.BLOCK_DV)


@triton.jit
def load_number(numbers, source, i, head, band, beyond, WHOLE: tl.constexpr):
    """Load a number of queries i each, `beyond` where there is none; WHOLE promises that all are there."""
    row = row_numbers(source, i, head)
    if WHOLE:
        found = tl.load(numbers + row)
    else:
        found = tl.load(numbers + row, i < band.queries, beyond)
    return found


# --- who sees whom ---------------------------------------------------------------------------------------------


@triton.jit
def edges(ahead, left, right, CAUSAL: tl.constexpr):
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
def ends(tile, queries, band, M: tl.constexpr):
    """Return the first query of a tile of rows, and the one after its last."""
    return tile * M // queries.group, tl.minimum((tile * M + M - 1) // queries.group + 1, band.queries)


@triton.jit
def _within(start, end, low, high, ranges):
    """Return what is left of two ranges within those that `documents_kernel` has found."""
    return (tl.maximum(start, tl.load(ranges)), tl.minimum(end, tl.load(ranges + 1)),
            tl.maximum(low, tl.load(ranges + 2)), tl.minimum(high, tl.load(ranges + 3)))


@triton.jit
def keys_seen(first, last, band, ranges):
    """Return the range of keys that queries from `first` to `last` see, and the range that every one of them sees."""
    start, end, low, high = first * 0, band.keys, first * 0, band.keys
    if band.LOWER:
        start = tl.maximum(first + band.lower, 0)
        low = last - 1 + band.lower
    if band.UPPER:
        end = tl.minimum(end, last + band.upper)
        high = tl.minimum(high, first + band.upper + 1)
    if ranges is not None:
        start, end, low, high = _within(start, end, low, high, ranges)
    return start, end, low, high


@triton.jit
def queries_seeing(first, last, band, ranges):
    """Return the range of queries that see keys from `first` to `last`, and the range of those that see every one."""
    start, end, low, high = first * 0, band.queries, first * 0, band.queries
    if band.UPPER:
        start = tl.maximum(first - band.upper, 0)
        low = last - 1 - band.upper
    if band.LOWER:
        end = tl.minimum(end, last - band.lower)
        high = tl.minimum(high, first - band.lower + 1)
    if ranges is not None:
        start, end, low, high = _within(start, end, low, high, ranges)
    end = tl.where(first < band.keys, end, 0)
    high = tl.where(last <= band.keys, high, 0)
    return start, end, low, high


@triton.jit
def align(start, end, low, high, STEP: tl.constexpr):
    """Return a Walk in tiles of STEP over a range, of which from `low` to `high` everybody sees everything.

    All but the end are products with STEP, from which the compiler learns what it need not add in 64 bits.
    """
    start = start // STEP * STEP
    low = tl.minimum(tl.cdiv(tl.maximum(low, start), STEP), tl.cdiv(tl.maximum(end, start), STEP)) * STEP
    high = tl.maximum(tl.maximum(tl.minimum(high, end), 0) // STEP * STEP, low)
    return Walk(start, low, high, end)


@triton.jit
def part(walk, CUT: tl.constexpr):
    """Return the range of a loop over the whole tiles of a walk, or over its CUT ones, which `place` then maps."""
    first, last = walk.low, walk.high
    if CUT:
        first, last = walk.start, walk.end - (walk.high - walk.low)
    return first, last


@triton.jit
def place(begin, walk, CUT: tl.constexpr):
    """Return where a tile begins: the CUT ones lie around the whole ones."""
    if CUT:
        begin += tl.where(begin < walk.low, 0, walk.high - walk.low)
    return begin


@triton.jit(do_not_specialize=["S", "others_S", "blocks", "group"])
def documents_kernel(ids, others, ranges, S, others_S, blocks, group, M: tl.constexpr, STEP: tl.constexpr):
    """Write two ranges of `others` for each tile of M rows of `ids` `[B, S]`.

    The first holds all that share a document with it. The second is the same where all rows and all others in it are of
    one document, so that nobody need compare; else it is empty.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks
    at = tl.minimum(tile * M // group + tl.arange(0, M), tl.minimum((tile * M + M - 1) // group, S - 1))
    own = tl.load(ids + b * S + at)
    low, high = tl.min(own, 0), tl.max(own, 0)
    count = tl.zeros((STEP,), tl.int32)
    first, last = count + others_S, count
    for begin in range(0, others_S, STEP):
        there = begin + tl.arange(0, STEP)
        other = tl.load(others + b * others_S + there, there < others_S, 0)
        shared = (there < others_S) & (other >= low) & (other <= high)
        first = tl.minimum(first, tl.where(shared, there, others_S))
        last = tl.maximum(last, tl.where(shared, there + 1, 0))
        count += shared.to(tl.int32)
    start, end = tl.min(first, 0), tl.max(last, 0)
    alike = (low == high) & (tl.sum(count, 0) == end - start)
    ranges += tl.program_id(0) * 4
    tl.store(ranges, start)
    tl.store(ranges + 1, end)
    tl.store(ranges + 2, tl.where(alike, start, 0))
    tl.store(ranges + 3, tl.where(alike, end, 0))


# --- scores ----------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """Return acc + a b; float32 in IEEE arithmetic if it is to be EXACT, else in TF32."""
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exp_below(s, base, scoring):
    """Return 2^((s - base)·factor); where it need not be EXACT, with the product and the sum in one instruction."""
    if scoring.EXACT:
        x = (s - base) * scoring.factor
    else:
        x = s * scoring.factor - base * scoring.factor
    return tl.exp2(x)


@triton.jit
def weights_of(s, sums, scoring):
    """Return the softmax of scores from what `delta_kernel` makes of the log-sum-exp."""
    if scoring.EXACT:
        x = (s - sums) * scoring.factor
    else:
        x = s * scoring.factor - sums
    return tl.exp2(x)


@triton.jit
def as_score(x, scoring):
    """Return a logit in the unit of the scores. A product there and back again would round it."""
    if not scoring.SCALED:
        x = x * (LOG2_E / scoring.factor)
    return x


@triton.jit
def drop(x, otherwise, i, head, j, queries, band, scoring, CUT: tl.constexpr):
    """Return x where dropout keeps the weight, and elsewhere `otherwise`; who calls divides by the share that is kept.

    A weight's random number is a + b·k: a and b, which is odd, are the halves of its row's random bits, and k is the
    key's position, mixed. So any two weights of a row are independent, as those of different rows are, for one product
    a weight; a Philox for each would take longer than the products of the tile. `dropped` of attention_launch_triton.py
    does the same.
    """
    row = row_numbers(queries, i, head)
    if CUT:
        bits = tl.load(queries.draws + row, i < band.queries, 0)
    else:
        bits = tl.load(queries.draws + row)
    k = j.to(tl.uint32)
    if INTERPRETING:
        k = k * 0x9E3779B9
        k = k ^ (k >> 15)
    else:  # LLVM would keep the products of all columns in registers
        k = tl.inline_asm_elementwise(
            "{.reg .b32 m, h; mul.lo.u32 m, $1, 0x9E3779B9; shr.u32 h, m, 15; xor.b32 $0, m, h;}", "=r,r", [k],
            tl.uint32, True, 1)
    number = (bits.to(tl.uint32) + (bits >> 32).to(tl.uint32) * k).to(tl.int32, bitcast=True)
    if INTERPRETING:
        x = tl.where(number > scoring.threshold, x, otherwise)
    else:  # LLVM would pack the comparisons into words, and unpack them again
        x = tl.inline_asm_elementwise(
            "{.reg .pred above; setp.gt.s32 above, $1, $2; selp.f32 $0, $3, $4, above;}", "=f,r,r,f,f",
            [number, scoring.threshold, x, otherwise], tl.float32, True, 1)
    return x


@triton.jit
def kept(p, dtype: tl.constexpr):
    """Return weights that `drop` has negated where it drops them, as numbers of a type: 0 there."""
    if INTERPRETING or dtype == tl.float32:
        found = tl.where(p < 0, 0.0, p).to(dtype)
    elif dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise("cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], tl.bfloat16, True, 2)
    else:
        found = tl.inline_asm_elementwise("cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], tl.float16, True, 2)
    return found


@triton.jit
def _tanh(x, scoring):
    """Return tanh x: EXACT as float32 is, by a series where 1 - exp(-2x) would cancel; or to 2e-7; or, if COARSE, to
    one part in 2000, a quarter of a unit of bfloat16, in one instruction.
    """
    if scoring.EXACT:
        a = tl.abs(x)
        e = tl.exp2(a * (-2 * LOG2_E))
        y = a * a
        series = 2.1869488536155203e-2 + y * (-8.863235529902197e-3 + y * 3.592128036572481e-3)
        series = -0.3333333333333333 + y * (0.13333333333333333 + y * (-5.396825396825397e-2 + y * series))
        t = tl.where(a < 0.4, a + a * y * series, (1 - e) / (1 + e))
        t = tl.where(x < 0, -t, t)
    elif INTERPRETING:
        t = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    elif scoring.COARSE:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        t = tl.exp2(x * (2 * LOG2_E)) + 1
        t = 1 - 2 * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [t], tl.float32, True, 1)
    return t


@triton.jit
def _position(x):
    """Return integers between -2²² and 2²² as floats, plus 1.5·2²³.

    To set the bits takes one addition; to convert them would take the unit that exp2 needs.
    """
    return (x + 0x4B400000).to(tl.float32, bitcast=True)


@triton.jit
def load_mask(i, head, j, queries, band, CUT: tl.constexpr):
    """Load the mask, if there is one, at queries i and keys j; unless CUT, all are there."""
    found = None
    if queries.mask is not None:
        at = queries.mask + (head * queries.mask_h + i.to(tl.int64) * queries.mask_s) + j.to(tl.int64) * queries.mask_d
        if CUT:
            found = tl.load(at, (i < band.queries) & (j < queries.mask_keys), 0)
        else:
            found = tl.load(at)
    return found


@triton.jit
def scores(s, mask, away, i, head, j, queries, keys, band, scoring, CUT: tl.constexpr):
    """Return the scores made of the products s, -∞ where query i may not see key j, and the cap's derivative.

    i, head and j broadcast to the shape of s; `mask` is what `load_mask` found for them, `away` None or the distances
    i + ahead - j. Unless SCALED, the scale or the cap is left to `factor`. Positions and documents are compared in
    tiles that are CUT only.
    """
    bend = 1.0
    if scoring.cap is not None:
        s = _tanh(s * (scoring.scale / scoring.cap), scoring)
        bend = 1.0 - s * s
        if scoring.SCALED:
            s = s * scoring.cap
    elif scoring.SCALED:
        s = s * scoring.scale
    if queries.slopes is not None:
        slope = as_score(tl.load(queries.slopes + head).to(tl.float32), scoring)
        if away is None:
            if scoring.NEAR:
                away = _position(i + band.ahead) - _position(j)
            else:
                away = (i + band.ahead - j).to(tl.float32)
        s -= slope * tl.abs(away)
    if mask is not None:
        if mask.dtype == tl.int1:
            s = tl.where(mask, s, -float("inf"))
        else:
            s += mask.to(tl.float32)
    if CUT:
        seen = j < band.keys
        if queries.documents is not None:
            own = tl.load(queries.documents + i, i < band.queries, 0)
            seen &= own == tl.load(keys.documents + j, j < band.keys, 0)
        if band.LOWER:
            seen &= j - i >= band.lower
        if band.UPPER:
            seen &= j - i <= band.upper
        s = tl.where(seen, s, -float("inf"))
    return s, bend
