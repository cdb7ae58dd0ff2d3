"""Softmax, its logarithm, and the masked and scaled one in Triton.

A program takes a tile of rows, so that neighbouring threads read neighbouring memory also where the rows, not the
columns, lie side by side. Rows that fit a tile are read once. Longer ones are shared by programs that hold a part each
and tell each other what it adds to the row's sums: they too are read once. Rows of millions, and rows that lie side by
side, are walked in pieces, twice, with a running maximum and sum; the second walk goes backwards, so that it begins
with what the cache still holds. Where there are fewer tiles than multiprocessors, one launch measures parts of these
rows, a second one writes.
"""

import torch
import triton
import triton.language as tl

from fastlm.autograd import Differentiable, blank
from fastlm.ops.math_kernels_triton import exp
from fastlm.ops.softmax import collapse, gradient
from fastlm.ops.triton_kernels import DTYPES, cannot_here, concurrent, launch, multiprocessors
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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        for plan in plan_forward(x, mask, y, dim, scale, log):
            launch(plan, x)
    return [y]


def backward(grads, saved, tensors, needs, dim, scale, log):
    (dy,), y = grads, tensors[0]
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        for plan in plan_backward(y, dy, dx, dim, scale, log):
            launch(plan, y)
    return [dx, None]


def plan_forward(x, mask, y, dim, scale, log):
    """Return the launches, (kernel, grid, arguments) each."""
    tensors, arguments, parts = _walk(dict(x=x, y=y, mask=mask), dim, FORWARD_TILE)
    arguments |= tensors | dict(scale=float(scale), LOG=log)
    return _launches(forward_kernel, arguments, parts, ("tops", "totals"), x.device)


def plan_backward(y, dy, dx, dim, scale, log):
    """Return the launches, (kernel, grid, arguments) each."""
    tensors, arguments, parts = _walk(dict(y=y, dy=dy, dx=dx), dim, BACKWARD_TILE)
    arguments |= tensors | dict(scale=float(scale), LOG=log)
    return _launches(backward_kernel, arguments, parts, ("dots",), y.device)


def _walk(tensors, dim, limit):
    """Return (tensors, arguments that say how to walk them, parts of a row).

    All are seen as `[outer, inner, rows, cols]`; only strides that no such view can express cost a copy.
    """
    first, *_ = tensors.values()
    if first.dim() == 0:
        tensors = {name: None if t is None else t.reshape(1) for name, t in tensors.items()}
        first, *_ = tensors.values()
    dim %= first.dim()
    batch = [i for i in range(first.dim()) if i != dim]

    def groups():
        strides = ([0 if t is None else t.stride(i) for i in batch] for t in tensors.values())
        return collapse([first.size(i) for i in batch], *strides)

    if len(groups()) > 3:
        tensors = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    none = (0,) * len(tensors)
    outer, inner, rows = [(1, none)] * (3 - len(groups())) + groups()
    cols = first.size(dim)
    arguments = dict(inner=inner[0], rows=rows[0], cols=cols)
    for i, (name, t) in enumerate(tensors.items()):
        steps = (outer[1][i], inner[1][i], rows[1][i], 0 if t is None else t.stride(dim))
        arguments |= zip((f"{name}_{axis}" for axis in ("outer", "inner", "row", "col")), steps, strict=True)
    tile = _tile(rows[0], cols, rows[1][0] < first.stride(dim) and rows[0] > 1, limit)
    pieces = triton.cdiv(cols, tile["WIDTH"])
    tiles = outer[0] * inner[0] * triton.cdiv(rows[0], tile["HEIGHT"])
    parts = 1 if tile["WHOLE"] else max(1, min(multiprocessors(first.device) // tiles, pieces, 256))
    # Programs that wait for each other must all run: the least that do is one on each multiprocessor.
    part = max(PART[0], triton.next_power_of_2(triton.cdiv(cols, multiprocessors(first.device))))
    if cols > LONG and tile["HEIGHT"] == 1 and part <= PART[1] and concurrent(first.device):
        parts = triton.cdiv(cols, part)
        tile = dict(HEIGHT=1, WIDTH=part, WHOLE=True, num_warps=part // 2048)
    return tensors, arguments | tile | dict(share=triton.cdiv(pieces, parts), tiles=tiles), parts


def _tile(rows, cols, rows_adjacent, limit):
    """Choose the tile: whole rows where one fits into `limit` elements, else pieces."""
    width = triton.next_power_of_2(cols)
    at_least = 32 if rows_adjacent else max(1, 1024 // width)
    height = min(at_least, triton.next_power_of_2(rows))
    whole = height * width <= limit
    width = width if whole else PIECE // height
    return {"HEIGHT": height, "WIDTH": width, "WHOLE": whole, "num_warps": min(max(height * width // 1024, 4), 32)}


def _launches(kernel, arguments, parts, partial, device):
    """Return one launch, or where parts of rows are walked in pieces two: the first measures what the second needs."""
    tiles = arguments.pop("tiles")
    arguments |= dict(parts=parts, words=None, SLOTS=triton.next_power_of_2(parts)) | dict.fromkeys(partial)
    if parts == 1:
        return [(kernel, (tiles,), arguments | dict(STAGE="both"))]
    if arguments["WHOLE"]:
        words = torch.zeros(tiles, parts, dtype=torch.int64, device=device)
        return [(kernel, (tiles * parts,), arguments | dict(STAGE="both", words=words))]
    shape = (tiles * arguments["HEIGHT"], parts)
    arguments |= {name: torch.empty(shape, dtype=torch.float32, device=device) for name in partial}
    return [(kernel, (tiles * parts,), arguments | dict(STAGE=stage)) for stage in ("measure", "write")]


@triton.jit
def _place(inner, rows, parts, HEIGHT: tl.constexpr):
    """Return a program's outer and inner index, its rows `[HEIGHT, 1]`, its tile and its part of the columns."""
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    blocks = tl.cdiv(rows, HEIGHT)
    batch = tile // blocks
    row = tile % blocks * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    return (batch // inner).to(tl.int64), (batch % inner).to(tl.int64), row.to(tl.int64), tile.to(tl.int64), part


@triton.jit
def _word(high, low):
    """Return the bits of two numbers `[1, 1]` as one, which is written and read at once."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return high.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low


@triton.jit
def _numbers(words):
    return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True), words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _exchange(words, part, word, idle, parts, SLOTS: tl.constexpr):
    """Publish a program's word, which is not 0, and wait for those of all parts of its row, `[1, SLOTS]`.

    The parts of a row are neighbours, and programs start in order, so those that one waits for run or are next to.
    """
    slot = tl.arange(0, SLOTS)[None, :]
    tl.atomic_xchg(words + part + tl.zeros((1, 1), tl.int32), word, sem="relaxed")
    found = tl.load(words + slot, slot < parts, idle, volatile=True)
    while tl.min((found != 0).to(tl.int32)) == 0:
        found = tl.load(words + slot, slot < parts, idle, volatile=True)
    return found


@triton.jit
def _scores(x, mask, x_col, mask_col, col, live, scale):
    """Return scaled scores, -inf where none is kept, and what is kept."""
    col = col.to(tl.int64)
    z = tl.load(x + col * x_col, live, 0.0).to(tl.float32) * scale
    keep = live
    if mask is not None:
        keep = live & (tl.load(mask + col * mask_col, live, 0) != 0)
    return tl.where(keep, z, -float("inf")), keep


@triton.jit
def _base(top):
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _result(z, e, factor, keep, mask, top, total, LOG: tl.constexpr):
    """Return the result for scores z, whose share in `total` is e · factor."""
    if LOG:
        result = z - _base(top) - tl.log(total)
    else:
        result = e * (factor / total)
        if mask is not None:  # also where nothing is kept
            result = tl.where(keep, result, 0.0)
    return result


@triton.jit
def forward_kernel(x, y, mask, words, tops, totals, scale, inner, rows, cols, share, parts, x_outer, x_inner, x_row,
                   x_col, y_outer, y_inner, y_row, y_col, mask_outer, mask_inner, mask_row, mask_col,
                   HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, LOG: tl.constexpr,
                   STAGE: tl.constexpr, SLOTS: tl.constexpr):
    o, i, row, tile, part = _place(inner, rows, parts, HEIGHT)
    lane = tl.arange(0, WIDTH)[None, :]
    x += o * x_outer + i * x_inner + row * x_row
    y += o * y_outer + i * y_inner + row * y_row
    if mask is not None:
        mask += o * mask_outer + i * mask_inner + row * mask_row
    if WHOLE:
        col = part * WIDTH + lane
        live = (row < rows) & (col < cols)
        z, keep = _scores(x, mask, x_col, mask_col, col, live, scale)
        top = tl.max(z, 1, keep_dims=True)
        e = exp(z - _base(top))
        total = tl.sum(e, 1, keep_dims=True)
        factor = tl.full((HEIGHT, 1), 1.0, tl.float32)
        if SLOTS > 1:  # a part whose highest is 0 has a total of at least 1: its word is not 0
            idle = -(0x00800000 << 32)  # -inf and 0
            found = _exchange(words + tile * parts, part, _word(top, total), idle, parts, SLOTS)
            each, sums = _numbers(found)
            own = top
            top = tl.max(each, 1, keep_dims=True)
            factor = exp(own - _base(top))
            total = tl.sum(sums * exp(each - _base(top)), 1, keep_dims=True)
        tl.store(y + col.to(tl.int64) * y_col, _result(z, e, factor, keep, mask, top, total, LOG), live)
    else:
        first = part * share * WIDTH
        slot = (tile * HEIGHT + tl.arange(0, HEIGHT)[:, None]) * parts
        top = tl.full((HEIGHT, 1), -float("inf"), tl.float32)
        total = tl.zeros((HEIGHT, 1), tl.float32)
        if STAGE != "write":
            for piece in range(0, share):
                col = first + piece * WIDTH + lane
                z, _ = _scores(x, mask, x_col, mask_col, col, (row < rows) & (col < cols), scale)
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
                z, keep = _scores(x, mask, x_col, mask_col, col, live, scale)
                e = exp(z - _base(top))
                tl.store(y + col.to(tl.int64) * y_col, _result(z, e, 1.0, keep, mask, top, total, LOG), live)


@triton.jit
def _pair(y, dy, y_col, dy_col, col, live):
    """Return a piece of the result and of its gradient."""
    col = col.to(tl.int64)
    return tl.load(y + col * y_col, live, 0.0).to(tl.float32), tl.load(dy + col * dy_col, live, 0.0).to(tl.float32)


@triton.jit
def _dot(p, g, LOG: tl.constexpr):
    """Return what a row's gradients share: Σ g of the logarithm, else Σ p g."""
    if not LOG:
        g = p * g
    return tl.sum(g, 1, keep_dims=True)


@triton.jit
def _slope(p, g, dot, scale, LOG: tl.constexpr):
    if LOG:
        d = g - exp(p) * dot
    else:
        d = p * (g - dot) * scale
    return d


@triton.jit
def backward_kernel(y, dy, dx, words, dots, scale, inner, rows, cols, share, parts, y_outer, y_inner, y_row, y_col,
                    dy_outer, dy_inner, dy_row, dy_col, dx_outer, dx_inner, dx_row, dx_col, HEIGHT: tl.constexpr,
                    WIDTH: tl.constexpr, WHOLE: tl.constexpr, LOG: tl.constexpr, STAGE: tl.constexpr,
                    SLOTS: tl.constexpr):
    o, i, row, tile, part = _place(inner, rows, parts, HEIGHT)
    lane = tl.arange(0, WIDTH)[None, :]
    y += o * y_outer + i * y_inner + row * y_row
    dy += o * dy_outer + i * dy_inner + row * dy_row
    dx += o * dx_outer + i * dx_inner + row * dx_row
    if WHOLE:
        col = part * WIDTH + lane
        live = (row < rows) & (col < cols)
        p, g = _pair(y, dy, y_col, dy_col, col, live)
        dot = _dot(p, g, LOG)
        if SLOTS > 1:
            word = _word(tl.full((1, 1), 1.0, tl.float32), dot)
            found = _exchange(words + tile * parts, part, word, 1 << 32, parts, SLOTS)
            dot = tl.sum(_numbers(found)[1], 1, keep_dims=True)
        tl.store(dx + col.to(tl.int64) * dx_col, _slope(p, g, dot, scale, LOG), live)
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
