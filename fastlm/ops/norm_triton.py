"""The norms in Triton: one pass forward, a persistent backward that keeps the gradients of weight and bias on the chip.

Rows that fit are read once. Backward shares wider ones among programs that tell each other their parts' sums. Where
programs can't wait for each other, and forward, pieces are walked, twice; the gradients of weight and bias then grow in
a row of memory that belongs to one program, which the cache holds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fastlm.ops.exchange_kernels_triton import exchange, no_words, numbers, word
from fastlm.ops.math_kernels_triton import anew
from fastlm.ops.norm_kernels import ACCEPTS, Norms, mixed
from fastlm.ops.triton_kernels import (
    DTYPES,
    adjacent,
    cannot_here,
    concurrent,
    early,
    launch,
    like,
    multiprocessors,
)
from fastlm.ops.triton_kernels import loses_below as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
# The widest rows that a block holds without spilling, see tests/test_triton.py, the part that it holds of rows that it
# shares with others, and the pieces of rows that are walked.
FORWARD_WIDTH, BACKWARD_WIDTH, PART, PIECE = 32768, 8192, 2048, 4096
SUM_WIDTH = 16  # columns of the parts' sums, of which a program adds up all rows; twice as many of wide ones


class Tile(NamedTuple):
    """What a program of backward takes at a time.

    Attributes:
        height: rows.
        width: columns.
        warps: that compute them.
        each: programs on a multiprocessor, which take one tile after the other.
        stages: tiles that are on their way or computed.
        again: whether what is read is widened once more after an exchange, and waits for it in 16 bits.
    """

    height: int
    width: int
    warps: int
    each: int
    stages: int
    again: bool = False


def cannot(input, residual, weight, bias, shape, eps, centred):
    return cannot_here(input) or mixed(input, residual, weight, bias) or (None if all(shape) else "rows of no numbers")


def loses(input, *rest):
    return loses_here(input)


def forward(x, residual, weight, bias, eps, centred):
    x, residual = adjacent(x), adjacent(residual)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    y = like(x)
    total = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    launch(plan_forward, x, residual, weight, bias, y, total, mean, rstd, eps)
    return y, total, mean, rstd


def backward(dy, dsum, x, weight, mean, rstd, needs):
    dy, dsum, x = adjacent(dy), adjacent(dsum), adjacent(x)
    weight = None if weight is None else weight.contiguous()
    dx = like(x) if needs[0] else None
    split = split_rows(x, mean)
    teams, parts, tile = split
    make = x.new_zeros if parts * tile.width < x.shape[1] else x.new_empty  # pieces are added to what is there
    sums = [make((teams, x.shape[1]), dtype=torch.float32) if dtype else None for dtype in needs[1:]]
    words = no_words(x, x.shape[0], parts) if parts > 1 and needs[0] else None
    launch(plan_backward, dy, dsum, x, weight, mean, rstd, dx, *sums, words, split)
    found = [x.new_empty(x.shape[1], dtype=dtype) if dtype else None for dtype in needs[1:]]
    if any(needs[1:]):
        launch(plan_sum, *sums, *found)
    return dx, *found


class Split(NamedTuple):
    """How programs share the rows: teams of so many programs, one for each part of a row, and their tile."""

    teams: int
    parts: int
    tile: Tile


def split_rows(x, mean):
    """Choose how programs share the rows of x, whose means are known or not needed.

    Each team has a row of float32 sums. More than one on a multiprocessor have eight rows of x at least: their sums are
    few.
    """
    rows, cols = x.shape
    processors, parts = multiprocessors(x.device), 1
    if cols <= BACKWARD_WIDTH:
        tile = backward_tile(triton.next_power_of_2(cols), x.element_size())
    elif concurrent(x.device) and cols <= PART * processors:
        tile = shared_tile(x.element_size(), mean is not None)
        parts = triton.cdiv(cols, tile.width)
    else:
        tile = Tile(1, PIECE, 8, 1, 1)
    most = max(processors, min(tile.each * processors, rows * parts // 8)) // parts
    return Split(max(1, min(triton.cdiv(rows, tile.height), most)), parts, tile)


def backward_tile(width, size):
    """Choose the tile of rows that fit `width` columns, a power of 2, of `size` bytes a number."""
    if width > 2048:
        return Tile(1, width, width // 512, 8192 // width, 3 if size == 2 else 1)
    return Tile(2048 // width, width, 4, 4, 3)


def shared_tile(size, centred):
    """Choose the tile of parts of rows of `size` bytes a number: with a mean, more programs find no registers."""
    return Tile(1, PART, 2, 6, 3, True) if size == 2 and not centred else Tile(1, PART, 4, 4, 3)


def plan_forward(x, residual, weight, bias, y, total, mean, rstd, eps):
    """Return (kernel, grid, arguments) for x and residual `[T, H]`."""
    rows, cols = x.shape
    width = triton.next_power_of_2(cols)
    whole = width <= FORWARD_WIDTH
    height = max(1, 2048 // width) if whole else 1
    width = width if whole else PIECE
    warps = height * width // 1024
    arguments = dict(x=x, x_row=x.stride(0), residual=residual, weight=weight, bias=bias, y=y, total=total, mean=mean,
                     residual_row=0 if residual is None else residual.stride(0), rstd=rstd, rows=rows, cols=cols,
                     eps=eps, HEIGHT=height, WIDTH=width, WHOLE=whole, num_warps=warps)
    return forward_kernel, (triton.cdiv(rows, height),), arguments


def plan_backward(dy, dsum, x, weight, mean, rstd, dx, dweight, dbias, words, split):
    """Return (kernel, grid, arguments); `dweight` and `dbias` are `[teams, H]`, zeros where rows go in pieces."""
    rows, cols = x.shape
    teams, parts, tile = split
    arguments = dict(dy=dy, dy_row=dy.stride(0), dsum=dsum, dsum_row=0 if dsum is None else dsum.stride(0), x=x,
                     x_row=x.stride(0), weight=weight, mean=mean, rstd=rstd, dx=dx, dweight=dweight, dbias=dbias,
                     rows=rows, cols=cols, WIDTH=tile.width, num_warps=tile.warps,
                     # So many that all programs run at once.
                     maxnreg=min(65536 // (32 * tile.warps * tile.each) // 8 * 8, 255),
                     # A row of one number has the gradient 0, w·g less w·g, which have to be rounded alike.
                     enable_fp_fusion=cols > 1)
    if parts * tile.width < cols:
        return backward_pieces_kernel, (teams,), arguments | dict(share=triton.cdiv(rows, max(teams, 1)))
    arguments |= dict(teams=teams, STAGES=tile.stages)
    if parts > 1:
        sooner = words is not None and early(x.device)
        return backward_shared_kernel, (teams * parts,), arguments | dict(
            words=words, parts=parts, EVEN=cols % tile.width == 0, SLOTS=max(32, triton.next_power_of_2(parts)),
            AGAIN=tile.again, EARLY=sooner, launch_pdl=sooner)
    return backward_kernel, (teams,), arguments | dict(blocks=triton.cdiv(rows, tile.height), HEIGHT=tile.height,
                                                       # Short rows lie in several threads: summed in the end.
                                                       SUMS=1 if tile.width >= 1024 else tile.height)


def plan_sum(dweight, dbias, weight_sum, bias_sum):
    """Return (kernel, grid, arguments) for parts `[teams, H]` and their sums `[H]`, of which a pair may be None."""
    teams, cols = (dbias if dweight is None else dweight).shape
    device = (dbias if dweight is None else dweight).device
    sooner = early(device)
    width = SUM_WIDTH if cols <= SUM_WIDTH * 256 else 2 * SUM_WIDTH
    height = min(max(triton.next_power_of_2(teams), 1024 // width), 16384 // width)
    return sum_kernel, (triton.cdiv(cols, width),), dict(
        dweight=dweight, dbias=dbias, weight_sum=weight_sum, bias_sum=bias_sum, teams=teams, cols=cols,
        HEIGHT=height, WIDTH=width, EARLY=sooner, num_warps=max(height * width // 1024, 1), launch_pdl=sooner)


@triton.jit
def _added(x, residual, total, at, residual_at, live):
    """Return x, or the sum with the residual as it is stored, in float32."""
    z = tl.load(x + at, live, 0.0).to(tl.float32)
    if residual is not None:
        z = (z + tl.load(residual + residual_at, live, 0.0).to(tl.float32)).to(total.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def _scaled(z, weight, bias, lane, inside):
    if weight is not None:
        z *= tl.load(weight + lane, inside, 0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + lane, inside, 0.0).to(tl.float32)
    return z


@triton.jit
def forward_kernel(x, x_row, residual, residual_row, weight, bias, y, total, mean, rstd, rows, cols, eps,
                   HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    if WHOLE:
        live = (row < rows) & (lane < cols)
        z = _added(x, residual, total, row * x_row + lane, row * residual_row + lane, live)
        out = row * cols + lane
        if total is not None:
            tl.store(total + out, z, live)
        if mean is not None:
            middle = tl.sum(z, 1, keep_dims=True) / cols
            tl.store(mean + row, middle, row < rows)
            z = tl.where(live, z - middle, 0.0)
        r = 1 / tl.sqrt(tl.sum(z * z, 1, keep_dims=True) / cols + eps)
        tl.store(rstd + row, r, row < rows)
        tl.store(y + out, _scaled(z * r, weight, bias, lane, lane < cols), live)
    else:
        middle = tl.zeros((HEIGHT, 1), tl.float32)
        squares = tl.zeros((HEIGHT, 1), tl.float32)
        for start in range(0, cols, WIDTH):
            col = start + lane
            live = (row < rows) & (col < cols)
            z = _added(x, residual, total, row * x_row + col, row * residual_row + col, live)
            if total is not None:
                tl.store(total + row * cols + col, z, live)
            if mean is not None:  # join the piece's mean and squares with those before it (Chan et al., 1979)
                count = tl.minimum(cols - start, WIDTH)
                own = tl.sum(z, 1, keep_dims=True) / count
                z = tl.where(live, z - own, 0.0)
                away = own - middle
                share = count / (start + count).to(tl.float32)
                squares += away * away * (start * share)
                middle += away * share
            squares += tl.sum(z * z, 1, keep_dims=True)
        r = 1 / tl.sqrt(squares / cols + eps)
        tl.store(rstd + row, r, row < rows)
        if mean is not None:
            tl.store(mean + row, middle, row < rows)
        for start in range(0, cols, WIDTH):
            col = start + lane
            live = (row < rows) & (col < cols)
            z = _added(x, residual, total, row * x_row + col, row * residual_row + col, live)
            tl.store(y + row * cols + col, _scaled((z - middle) * r, weight, bias, col, col < cols), live)


@triton.jit
def _weight(weight, col, inside):
    w = None
    if weight is not None:
        w = tl.load(weight + col, inside, 0.0)
    return w


@triton.jit
def _parts(g, x, w, middle, r):
    """Return the upstream gradient g, the normalised x, and u = w ⊙ g, all float32."""
    g = g.to(tl.float32)
    u = g
    if w is not None:
        u = g * w.to(tl.float32)
    return g, (x.to(tl.float32) - middle) * r, u


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _row_sums(u, normal, mean, AXIS: tl.constexpr):
    """Return Σ u ⊙ normal and Σ u along an axis, the latter 0 where there is no mean."""
    keep: tl.constexpr = AXIS > 0
    if mean is None:
        along = tl.sum(u * normal, AXIS, keep_dims=keep)
        level = tl.full(along.shape, 0.0, tl.float32)
    elif INTERPRETING:  # element by element, it would take minutes
        along, level = tl.sum(u * normal, AXIS, keep_dims=keep), tl.sum(u, AXIS, keep_dims=keep)
    else:  # at once: a block waits for its warps once
        along, level = tl.reduce((u * normal, u), AXIS, _both, keep_dims=keep)
    return along, level


@triton.jit
def _slope(u, normal, along, level, r, cols):
    """Return the gradient of x from a row's sums: r (u - normal · mean(u ⊙ normal) - mean(u))."""
    share = r / cols
    return u * r - (normal * (along * share) + level * share)


@triton.jit
def backward_kernel(dy, dy_row, dsum, dsum_row, x, x_row, weight, mean, rstd, dx, dweight, dbias, rows, cols, blocks,
                    teams, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr):
    """Take every `teams`-th block of HEIGHT whole rows, and keep the sums of weight and bias meanwhile."""
    team = tl.program_id(0)
    lane = tl.arange(0, WIDTH)[None, :]
    dw = tl.zeros((SUMS, WIDTH), tl.float32)
    db = tl.zeros((SUMS, WIDTH), tl.float32)
    w = _weight(weight, lane, lane < cols)
    for block in tl.range(team, blocks, teams, num_stages=STAGES):
        row = block * HEIGHT + tl.arange(0, HEIGHT)[:, None].to(tl.int64)
        here = row < rows
        live = here & (lane < cols)
        r = tl.load(rstd + row, here, 0.0)
        middle = 0.0
        if mean is not None:
            middle = tl.load(mean + row, here, 0.0)
        # Beyond a row g is 0, and with it u: what is normal there is added nowhere.
        g, normal, u = _parts(tl.load(dy + row * dy_row + lane, live, 0.0), tl.load(x + row * x_row + lane, live, 0.0),
                              w, middle, r)
        if dx is not None:
            along, level = _row_sums(u, normal, mean, 1)
            d = _slope(u, normal, along, level, r, cols)
            if dsum is not None:
                d += tl.load(dsum + row * dsum_row + lane, live, 0.0).to(tl.float32)
            tl.store(dx + row * cols + lane, d, live)
        if dweight is not None:
            dw += g * normal if SUMS == HEIGHT else tl.sum(g * normal, 0, keep_dims=True)
        if dbias is not None:
            db += g if SUMS == HEIGHT else tl.sum(g, 0, keep_dims=True)
    own = team.to(tl.int64) * cols + lane
    if dweight is not None:
        tl.store(dweight + own, tl.sum(dw, 0, keep_dims=True), lane < cols)
    if dbias is not None:
        tl.store(dbias + own, tl.sum(db, 0, keep_dims=True), lane < cols)


@triton.jit
def backward_shared_kernel(dy, dy_row, dsum, dsum_row, x, x_row, weight, mean, rstd, dx, dweight, dbias, words, rows,
                           cols, teams, parts, WIDTH: tl.constexpr, EVEN: tl.constexpr, SLOTS: tl.constexpr,
                           STAGES: tl.constexpr, AGAIN: tl.constexpr, EARLY: tl.constexpr):
    """Do the same with rows that `parts` neighbouring programs share, which tell each other their parts' sums."""
    team, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    col = part * WIDTH + tl.arange(0, WIDTH)
    inside = tl.full((WIDTH,), 1, tl.int1) if EVEN else col < cols
    dw = tl.zeros((WIDTH,), tl.float32)
    db = tl.zeros((WIDTH,), tl.float32)
    w = _weight(weight, col, inside)
    if EARLY:
        gdc_wait()
    for i in tl.range(team, rows, teams, num_stages=STAGES):
        row = tl.cast(i, tl.int64)
        r = tl.load(rstd + row)
        middle = 0.0
        if mean is not None:
            middle = tl.load(mean + row)
        upstream, input = tl.load(dy + row * dy_row + col, inside, 0.0), tl.load(x + row * x_row + col, inside, 0.0)
        g, normal, u = _parts(upstream, input, w, middle, r)
        if dx is not None:
            along, level = _row_sums(u, normal, mean, 0)
            # No sum is the NaN whose bits are all set, so no word is 0.
            found = exchange(words + row * parts, part, ~word(along, level), -1, parts, SLOTS)
            along, level = numbers(~found)
            if AGAIN:
                again = w
                if w is not None:
                    again = anew(w)
                g, normal, u = _parts(anew(upstream), anew(input), again, middle, r)
            d = _slope(u, normal, tl.sum(along, 0), tl.sum(level, 0), r, cols)
            if dsum is not None:
                d += tl.load(dsum + row * dsum_row + col, inside, 0.0).to(tl.float32)
            tl.store(dx + row * cols + col, d, inside)
        if dweight is not None:
            dw += g * normal
        if dbias is not None:
            db += g
    own = team.to(tl.int64) * cols + col
    if dweight is not None:
        tl.store(dweight + own, dw, inside)
    if dbias is not None:
        tl.store(dbias + own, db, inside)


@triton.jit
def backward_pieces_kernel(dy, dy_row, dsum, dsum_row, x, x_row, weight, mean, rstd, dx, dweight, dbias, rows, cols,
                           share, WIDTH: tl.constexpr):
    """Walk each of `share` rows twice, and add to the sums of weight and bias in memory."""
    team = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    own = team * cols
    for i in range(0, share):
        row = team * share + i + tl.zeros((1, 1), tl.int64)
        here = row < rows
        r = tl.load(rstd + row, here, 0.0)
        middle = 0.0
        if mean is not None:
            middle = tl.load(mean + row, here, 0.0)
        along = tl.zeros((1, 1), tl.float32)
        level = tl.zeros((1, 1), tl.float32)
        if dx is not None:
            for start in range(0, cols, WIDTH):
                col = start + lane
                live = here & (col < cols)
                w = _weight(weight, col, live)
                _, normal, u = _parts(tl.load(dy + row * dy_row + col, live, 0.0),
                                      tl.load(x + row * x_row + col, live, 0.0), w, middle, r)
                one, other = _row_sums(u, normal, mean, 1)
                along += one
                level += other
        for start in range(0, cols, WIDTH):
            col = start + lane
            live = here & (col < cols)
            w = _weight(weight, col, live)
            g, normal, u = _parts(tl.load(dy + row * dy_row + col, live, 0.0),
                                  tl.load(x + row * x_row + col, live, 0.0), w, middle, r)
            if dx is not None:
                d = _slope(u, normal, along, level, r, cols)
                if dsum is not None:
                    d += tl.load(dsum + row * dsum_row + col, live, 0.0).to(tl.float32)
                tl.store(dx + row * cols + col, d, live)
            if dweight is not None:
                tl.store(dweight + own + col, tl.load(dweight + own + col, live, 0.0) + g * normal, live)
            if dbias is not None:
                tl.store(dbias + own + col, tl.load(dbias + own + col, live, 0.0) + g, live)


@triton.jit
def _sum(parts, sums, teams, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, teams, HEIGHT):
        row = (start + tl.arange(0, HEIGHT)[:, None]).to(tl.int64)
        total += tl.load(parts + row * cols + col[None, :], (row < teams) & (col < cols)[None, :], 0.0)
    tl.store(sums + col, tl.sum(total, 0), col < cols)


@triton.jit
def sum_kernel(dweight, dbias, weight_sum, bias_sum, teams, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
               EARLY: tl.constexpr):
    if EARLY:  # launched before the kernel that makes the parts has ended: wait until what it wrote is there
        gdc_wait()
    if dweight is not None:
        _sum(dweight, weight_sum, teams, cols, HEIGHT, WIDTH)
    if dbias is not None:
        _sum(dbias, bias_sum, teams, cols, HEIGHT, WIDTH)


run = Norms("norm_triton", forward, backward).run
