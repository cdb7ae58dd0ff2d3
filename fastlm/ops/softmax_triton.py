"""Softmax, its logarithm, and the masked and scaled one in Triton.

A program takes a tile of rows, so that neighbouring threads read neighbouring memory also where the rows, not the
columns, lie side by side. Rows that fit a tile are read once. Longer ones are shared by programs that hold a part each
and tell each other what it adds to the row's sums: they too are read once. What comes in 16 bits is held in 16: so more
programs fit on a multiprocessor, and more of the memory's numbers are on their way. Rows of millions, and rows that lie
side by side, are walked in pieces, twice, with a running maximum and sum; the second walk goes backwards, so that it
begins with what the cache still holds. Where there are fewer tiles than multiprocessors, one launch measures parts of
these rows, a second one writes.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fastlm.autograd import Differentiable, blank
from fastlm.ops.exchange_kernels_triton import exchange_once, no_words, numbers, word
from fastlm.ops.math_kernels_triton import anew, exp
from fastlm.ops.softmax import collapse, gradient
from fastlm.ops.triton_kernels import DTYPES, cannot_here, concurrent, early, launch, like, multiprocessors
from fastlm.ops.triton_kernels import loses_below as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

ACCEPTS = {"row of 1", "row of 127", "row of 128", "row of 129", "row of 1000", "long row", "row in pieces",
           "late values", "outliers", "minus infinity", "no rows", "empty rows", "one number", "first dimension",
           "long first dimension", "middle dimension", "transposed", "every other column", "five dimensions", "no mask",
           "by key", "by head", "by query and key", "by query", "few kept", "nothing kept", "negative scale"}

# The largest tiles that a block of 1024 threads (64 registers each) holds without spilling, see tests/test_triton.py,
# the pieces of longer rows, and rows that programs share, in parts of this many numbers at least and at most.
FORWARD_TILE, BACKWARD_TILE, PIECE, LONG, PART = 32768, 16384, 8192, 16384, (8192, 16384)


def cannot(x, dim, mask=None, scale=1.0, log=False):
    return cannot_here(x)


def loses(x, dim, mask=None, scale=1.0, log=False):
    return loses_here(x)


def run(x, dim, mask=None, scale=1.0, log=False):
    return _softmax((x, mask), dim, scale, log)[0]


def forward(tensors, needs, dim, scale, log):
    x, mask = tensors
    y = like(x)
    for args in launches((x, y, mask), dim, FORWARD_TILE, 2):
        launch(plan_forward, *args, scale, log)
    return [y]


def backward(grads, saved, tensors, needs, dim, scale, log):
    (dy,), y = grads, tensors[0]
    dx = like(y)
    for args in launches((y, dy, dx), dim, BACKWARD_TILE, 1):
        launch(plan_backward, *args, scale, log)
    return [dx, None]


def launches(tensors, dim, limit, sums):
    """Yield what `plan_forward` and `plan_backward` get of each launch of three tensors, of which the first is read.

    That is one, or where parts of rows are walked in pieces two: the first measures what the second needs, in so many
    `sums` of each part.
    """
    first = tensors[0]
    if not first.numel():
        return
    if first.dim() == 0:
        tensors = [None if t is None else t.reshape(1) for t in tensors]
    walk = _walk_of(tensors, dim, limit)
    if walk is None:  # no such view expresses the strides
        tensors = [None if t is None else t.contiguous() for t in tensors]
        walk = _walk_of(tensors, dim, limit)
    words, parts_of_sums, stages = None, [None] * sums, ("both",)
    if walk.parts > 1 and walk.tile["WHOLE"]:
        words = no_words(first, walk.tiles, walk.parts)
    elif walk.parts > 1:
        shape, stages = (walk.tiles * walk.tile["HEIGHT"], walk.parts), ("measure", "write")
        parts_of_sums = [first.new_empty(shape, dtype=torch.float32) for _ in range(sums)]
    for stage in stages:
        yield *tensors, words, *parts_of_sums, dim, stage


def plan_forward(x, y, mask, words, tops, totals, dim, stage, scale, log):
    """Return (kernel, grid, arguments)."""
    return _plan(forward_kernel, dict(x=x, y=y, mask=mask), FORWARD_TILE, dim, stage, words,
                 dict(tops=tops, totals=totals), scale=None if scale == 1 else float(scale), LOG=log)


def plan_backward(y, dy, dx, words, dots, dim, stage, scale, log):
    """Return (kernel, grid, arguments)."""
    return _plan(backward_kernel, dict(y=y, dy=dy, dx=dx), BACKWARD_TILE, dim, stage, words, dict(dots=dots),
                 scale=float(scale), LOG=log)


def _plan(kernel, tensors, limit, dim, stage, words, sums, **given):
    walk = _walk_of(tensors.values(), dim, limit)
    for name, steps in zip(tensors, walk.steps, strict=True):
        given |= zip((f"{name}_{axis}" for axis in ("outer", "inner", "row", "col")), steps, strict=True)
    sooner = words is not None and early(tensors["y"].device)
    fitted = {}  # in 16 bits, by times on an H200
    if tensors["y"].element_size() == 2:
        if kernel is forward_kernel and walk.tile["WIDTH"] == LONG:
            fitted = dict(num_warps=LONG // 2048)
        elif kernel is backward_kernel and words is not None and not given["LOG"]:
            fitted = dict(maxnreg=112)
    return kernel, (walk.tiles * walk.parts,), given | sums | tensors | walk.tile | fitted | dict(
        words=words, inner=walk.inner, rows=walk.rows, cols=walk.cols, share=walk.share, parts=walk.parts, STAGE=stage,
        SLOTS=triton.next_power_of_2(walk.parts), EARLY=sooner, launch_pdl=sooner)


class Walk(NamedTuple):
    """How tensors are walked that are seen as `[outer, inner, rows, cols]`."""

    inner: int
    rows: int
    cols: int
    steps: list[tuple[int, int, int, int]]  # the strides of each tensor
    tile: dict
    tiles: int
    parts: int  # of a row
    share: int  # pieces in a part


def _walk_of(tensors, dim, limit):
    first, *_ = tensors
    return _walk(first.shape, tuple(None if t is None else t.stride() for t in tensors), dim % first.dim(), limit,
                 multiprocessors(first.device), concurrent(first.device))


@functools.lru_cache(256)
def _walk(sizes, strides, dim, limit, processors, together) -> Walk | None:
    """Choose how to walk tensors of these sizes and strides, None where no view of four dimensions has them."""
    batch = [i for i in range(len(sizes)) if i != dim]
    groups = collapse([sizes[i] for i in batch], *([0 if s is None else s[i] for i in batch] for s in strides))
    if len(groups) > 3:
        return None
    outer, inner, rows = [(1, (0,) * len(strides))] * (3 - len(groups)) + groups
    cols = sizes[dim]
    steps = [(outer[1][i], inner[1][i], rows[1][i], 0 if s is None else s[dim]) for i, s in enumerate(strides)]
    tile = _tile(rows[0], cols, rows[1][0] < strides[0][dim] and rows[0] > 1, limit)
    pieces = triton.cdiv(cols, tile["WIDTH"])
    tiles = outer[0] * inner[0] * triton.cdiv(rows[0], tile["HEIGHT"])
    parts = 1 if tile["WHOLE"] else max(1, min(processors // tiles, pieces, 256))
    # Programs that wait for each other must all run: the least that do is one on each multiprocessor.
    part = max(PART[0], triton.next_power_of_2(triton.cdiv(cols, processors)))
    if cols > LONG and tile["HEIGHT"] == 1 and part <= PART[1] and together:
        parts = triton.cdiv(cols, part)
        tile = dict(HEIGHT=1, WIDTH=part, WHOLE=True, EVEN=cols % part == 0, num_warps=part // 2048)
    return Walk(inner[0], rows[0], cols, steps, tile, tiles, parts, triton.cdiv(pieces, parts))


def _tile(rows, cols, rows_adjacent, limit):
    """Choose the tile: whole rows where one fits into `limit` elements, else pieces."""
    width = triton.next_power_of_2(cols)
    at_least = 32 if rows_adjacent else max(1, 1024 // width)
    height = min(at_least, triton.next_power_of_2(rows))
    whole = height * width <= limit
    width = width if whole else PIECE // height
    return {"HEIGHT": height, "WIDTH": width, "WHOLE": whole, "EVEN": width == cols and rows % height == 0,
            "num_warps": min(max(height * width // 1024, 2 if height == 1 else 4), 32)}


@triton.jit
def _place(inner, rows, parts, HEIGHT: tl.constexpr):
    """Return a program's outer and inner index, its rows `[HEIGHT, 1]`, its tile and its part of the columns."""
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    blocks = tl.cdiv(rows, HEIGHT)
    batch = tile // blocks
    row = tile % blocks * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    return (batch // inner).to(tl.int64), (batch % inner).to(tl.int64), row.to(tl.int64), tile.to(tl.int64), part


@triton.jit
def _read(x, mask, x_col, mask_col, col, live):
    """Return numbers as they are in memory, and which are kept."""
    col = col.to(tl.int64)
    keep = live
    if mask is not None:
        keep = live & (tl.load(mask + col * mask_col, live, 0) != 0)
    return tl.load(x + col * x_col, live, 0.0), keep


@triton.jit
def _scores(v, keep, scale):
    """Return scaled scores, -inf where none is kept."""
    z = v.to(tl.float32)
    if scale is not None:
        z *= scale
    return tl.where(keep, z, -float("inf"))


@triton.jit
def _base(top):
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _narrow(e, dtype: tl.constexpr):
    """Return numbers from 0 to 1 in 16 bits where a result has as many, rounded less than it."""
    if dtype == tl.float16:  # which ends where the result does
        e = (e * 32768).to(tl.float16)
    elif dtype == tl.bfloat16:  # float32 without its sign, the highest bit of its exponent, and 14 bits at its end
        e = (e.to(tl.uint32, bitcast=True) >> 14).to(tl.uint16)
    return e


@triton.jit
def _wide(e, dtype: tl.constexpr):
    if dtype == tl.float16:
        e = e.to(tl.float32) * (1 / 32768)
    elif dtype == tl.bfloat16:  # in the middle of what it was; 0 is what no result tells from it
        e = (e.to(tl.uint32) << 14 | 0x2000).to(tl.float32, bitcast=True)
    return e


@triton.jit
def _result(z, e, factor, mask, top, total, dtype: tl.constexpr, LOG: tl.constexpr):
    """Return the result for scores z, whose share in `total` is e · factor."""
    if LOG:
        level = tl.log(total)
        if dtype == tl.float32:
            result = z - _base(top) - level
        else:  # one difference, which a row in registers has room for; what is lost is far below a score's last bit
            result = z - (_base(top) + level)
    else:
        share = factor / total
        if mask is not None:  # where nothing is kept
            share = tl.where(total == 0, 0.0, share)
        result = e * share
    return result


@triton.jit
def forward_kernel(x, y, mask, words, tops, totals, scale, inner, rows, cols, share, parts, x_outer, x_inner, x_row,
                   x_col, y_outer, y_inner, y_row, y_col, mask_outer, mask_inner, mask_row, mask_col,
                   HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
                   LOG: tl.constexpr, STAGE: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr):
    o, i, row, tile, part = _place(inner, rows, parts, HEIGHT)
    lane = tl.arange(0, WIDTH)[None, :]
    x += o * x_outer + i * x_inner + row * x_row
    y += o * y_outer + i * y_inner + row * y_row
    if mask is not None:
        mask += o * mask_outer + i * mask_inner + row * mask_row
    if WHOLE:
        col = part * WIDTH + lane
        live = tl.full((HEIGHT, WIDTH), 1, tl.int1) if EVEN else (row < rows) & (col < cols)
        v, keep = _read(x, mask, x_col, mask_col, col, live)
        top = tl.max(_scores(v, keep, scale), 1, keep_dims=True)
        z = _scores(anew(v), keep, scale)
        e = exp(z - _base(top))
        total = tl.sum(e, 1, keep_dims=True)
        if not LOG:
            e = anew(_narrow(e, v.dtype))
        factor = exp(top - top)  # 1, and none where a row is -inf throughout
        if words is not None:  # a part whose highest is 0 has a total of at least 1: its word is not 0
            if EARLY:
                gdc_wait()
            idle = -(0x00800000 << 32)  # -inf and 0
            found = exchange_once(words + tile * parts, part, word(top, total), idle, parts, SLOTS)
            each, sums = numbers(found)
            own = top
            top = tl.max(each, 1, keep_dims=True)
            factor = exp(own - _base(top))
            total = tl.sum(sums * exp(each - _base(top)), 1, keep_dims=True)
        if LOG:
            z = _scores(anew(v), keep, scale)
        else:
            e = _wide(e, v.dtype)
        at = col.to(tl.int64)
        tl.store(y + at * y_col, _result(z, e, factor, mask, top, total, v.dtype, LOG), live)
        if mask is not None:  # noqa: SIM102 - the first is known to the compiler
            if tl.max(tl.max((total != total).to(tl.int32), 1), 0) > 0:  # what is no number stays where it is kept
                tl.store(y + at * y_col, 0.0, live & (tl.load(mask + at * mask_col, live, 1) == 0))
    else:
        first = part * share * WIDTH
        slot = (tile * HEIGHT + tl.arange(0, HEIGHT)[:, None]) * parts
        top = tl.full((HEIGHT, 1), -float("inf"), tl.float32)
        total = tl.zeros((HEIGHT, 1), tl.float32)
        if STAGE != "write":
            for piece in range(0, share):
                col = first + piece * WIDTH + lane
                v, keep = _read(x, mask, x_col, mask_col, col, (row < rows) & (col < cols))
                z = _scores(v, keep, scale)
                new = tl.maximum(top, tl.max(z, 1, keep_dims=True))
                total = total * exp(top - _base(new)) + tl.sum(exp(z - _base(new)), 1, keep_dims=True)
                top = new
        else:
            for n in range(0, parts):
                other = tl.load(tops + slot + n)
                new = tl.maximum(top, other)
                total = (total * exp(top - _base(new))
                         + tl.load(totals + slot + n) * exp(other - _base(new)))
                top = new
        if STAGE == "measure":
            tl.store(tops + slot + part, top)
            tl.store(totals + slot + part, total)
        else:
            for back in range(0, share):
                col = first + (share - 1 - back) * WIDTH + lane
                live = (row < rows) & (col < cols)
                v, keep = _read(x, mask, x_col, mask_col, col, live)
                z = _scores(v, keep, scale)
                e = exp(z - _base(top))
                result = _result(z, e, 1.0, mask, top, total, v.dtype, LOG)
                tl.store(y + col.to(tl.int64) * y_col, result if mask is None else tl.where(keep, result, 0.0), live)


@triton.jit
def _pair(y, dy, y_col, dy_col, col, live):
    """Return a piece of the result and of its gradient, as they are in memory."""
    col = col.to(tl.int64)
    return tl.load(y + col * y_col, live, 0.0), tl.load(dy + col * dy_col, live, 0.0)


@triton.jit
def _dot(p, g, LOG: tl.constexpr):
    """Return what a row's gradients share: Σ g of the logarithm, else Σ p g."""
    g = g.to(tl.float32)
    if not LOG:
        g = p.to(tl.float32) * g
    return tl.sum(g, 1, keep_dims=True)


@triton.jit
def _slope(p, g, dot, scale, LOG: tl.constexpr):
    p, g = p.to(tl.float32), g.to(tl.float32)
    if LOG:
        d = g - exp(p) * dot
    else:
        d = p * (g - dot) * scale
    return d


@triton.jit
def backward_kernel(y, dy, dx, words, dots, scale, inner, rows, cols, share, parts, y_outer, y_inner, y_row, y_col,
                    dy_outer, dy_inner, dy_row, dy_col, dx_outer, dx_inner, dx_row, dx_col, HEIGHT: tl.constexpr,
                    WIDTH: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, LOG: tl.constexpr,
                    STAGE: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr):
    o, i, row, tile, part = _place(inner, rows, parts, HEIGHT)
    lane = tl.arange(0, WIDTH)[None, :]
    y += o * y_outer + i * y_inner + row * y_row
    dy += o * dy_outer + i * dy_inner + row * dy_row
    dx += o * dx_outer + i * dx_inner + row * dx_row
    if WHOLE:
        col = part * WIDTH + lane
        live = (row < rows) & (col < cols)
        if EVEN and (LOG or words is not None):  # a whole row would take more registers without
            live = tl.full((HEIGHT, WIDTH), 1, tl.int1)
        p, g = _pair(y, dy, y_col, dy_col, col, live)
        dot = _dot(p, g, LOG)
        if words is not None:
            if EARLY:
                gdc_wait()
            own = word(tl.full((1, 1), 1.0, tl.float32), dot)
            found = exchange_once(words + tile * parts, part, own, 1 << 32, parts, SLOTS)
            dot = tl.sum(numbers(found)[1], 1, keep_dims=True)
        tl.store(dx + col.to(tl.int64) * dx_col, _slope(anew(p), anew(g), dot, scale, LOG), live)
    else:
        first = part * share * WIDTH
        slot = (tile * HEIGHT + tl.arange(0, HEIGHT)[:, None]) * parts
        dot = tl.zeros((HEIGHT, 1), tl.float32)
        if STAGE != "write":
            for piece in range(0, share):
                col = first + piece * WIDTH + lane
                p, g = _pair(y, dy, y_col, dy_col, col, (row < rows) & (col < cols))
                dot += _dot(p, g, LOG)
        else:
            for n in range(0, parts):
                dot += tl.load(dots + slot + n)
        if STAGE == "measure":
            tl.store(dots + slot + part, dot)
        else:
            for back in range(0, share):
                col = first + (share - 1 - back) * WIDTH + lane
                live = (row < rows) & (col < cols)
                p, g = _pair(y, dy, y_col, dy_col, col, live)
                tl.store(dx + col.to(tl.int64) * dx_col, _slope(p, g, dot, scale, LOG), live)


def _fake(tensors, *_):
    return [tensors[0].new_empty(tensors[0].shape)]


def _keep(tensors, outputs, *_):
    return [outputs[0], None if tensors[1] is None else blank(tensors[1])]


def _gradient(grads, tensors, needs, dim, scale, log):
    return [gradient(grads[0], tensors[0], dim, scale, log)]


_softmax = Differentiable("softmax_triton", statics="int dim, float scale, bool log", outputs=1, forward=forward,
                          fake=_fake, backward=backward, keep=_keep, gradient=_gradient)
