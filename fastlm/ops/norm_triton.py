"""The norms in Triton: one pass forward, a persistent backward that keeps the gradients of weight and bias on the chip.

Rows that fit are read once. Wider ones are walked in pieces, twice; their gradients of weight and bias grow in a row
of memory that belongs to one program, which the cache holds.
"""

import torch
import triton
import triton.language as tl

from fastlm.ops.norm_kernels import ACCEPTS, Norms, mixed
from fastlm.ops.triton_kernels import DTYPES, adjacent, cannot_here, launch, like, multiprocessors
from fastlm.ops.triton_kernels import loses_below as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

# The widest rows that a block holds without spilling, see tests/test_triton.py, and the pieces of wider ones.
FORWARD_WIDTH, BACKWARD_WIDTH, PIECE = 32768, 16384, 4096
TILE = 1024  # numbers that a program of backward takes at a time, where rows are shorter


def cannot(input, residual, weight, bias, shape, eps, centred):
    return cannot_here(input) or mixed(input, residual, weight, bias)


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
    count = programs(x)
    make = x.new_empty if x.shape[1] <= BACKWARD_WIDTH else x.new_zeros  # pieces are added to what is there
    parts = [make((count, x.shape[1]), dtype=torch.float32) if dtype else None for dtype in needs[1:]]
    launch(plan_backward, dy, dsum, x, weight, mean, rstd, dx, *parts, count)
    sums = [x.new_empty(x.shape[1], dtype=dtype) if dtype else None for dtype in needs[1:]]
    if any(needs[1:]):
        launch(plan_sum, *parts, *sums)
    return dx, *sums


def programs(x):
    """Return how many programs share the rows of x.

    Each has a row of float32 sums. More than one on a multiprocessor have eight rows of x at least: their sums are few.
    """
    rows, cols = x.shape
    most = max(multiprocessors(x.device), min(_each(cols) * multiprocessors(x.device), rows // 8))
    return max(1, min(triton.cdiv(rows, _height(cols)), most))


def _each(cols):
    """Return how many programs a multiprocessor runs, of which one computes while others load."""
    return max(1, min(8, 8192 // triton.next_power_of_2(cols)))


def _height(cols):
    return max(1, TILE // triton.next_power_of_2(cols))


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


def plan_backward(dy, dsum, x, weight, mean, rstd, dx, dweight, dbias, programs):
    """Return (kernel, grid, arguments); `dweight` and `dbias` are `[programs, H]`, zeros where rows are wide."""
    rows, cols = x.shape
    width = triton.next_power_of_2(cols)
    whole = width <= BACKWARD_WIDTH
    height = _height(cols)
    width = width if whole else PIECE
    warps = min(max(width // 512, 4), 16 if x.element_size() == 2 else 32)
    # Of the narrowest and of the widest rows, which fill the registers, the next come into shared memory meanwhile.
    stages = 3 if width <= 1024 else 2 if width == BACKWARD_WIDTH and x.element_size() == 2 else 1
    # Without fusion of products and sums: a row of one number has the gradient 0, w·g less w·g, rounded alike.
    arguments = dict(dy=dy, dy_row=dy.stride(0), dsum=dsum, dsum_row=0 if dsum is None else dsum.stride(0), x=x,
                     x_row=x.stride(0), weight=weight, mean=mean, rstd=rstd, dx=dx, dweight=dweight, dbias=dbias,
                     rows=rows, cols=cols, share=triton.cdiv(rows, max(programs * height, 1)), HEIGHT=height,
                     WIDTH=width, WHOLE=whole, HELD=1024 < width <= 8192, STAGES=stages, num_warps=warps,
                     maxnreg=min(65536 // (32 * warps * _each(cols)), 255), enable_fp_fusion=False)
    return backward_kernel, (programs,), arguments


def plan_sum(dweight, dbias, weight_sum, bias_sum):
    """Return (kernel, grid, arguments) for parts `[programs, H]` and their sums `[H]`, of which a pair may be None."""
    programs, cols = (dbias if dweight is None else dweight).shape
    height = min(triton.next_power_of_2(programs), 1024)
    return sum_kernel, (triton.cdiv(cols, 8),), dict(
        dweight=dweight, dbias=dbias, weight_sum=weight_sum, bias_sum=bias_sum, programs=programs, cols=cols,
        HEIGHT=height, WIDTH=8, num_warps=max(height // 128, 1))


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
def _parts(dy, x, w, dy_at, x_at, live, middle, r):
    """Return the upstream gradient g, the normalised x, and u = w ⊙ g."""
    g = tl.load(dy + dy_at, live, 0.0).to(tl.float32)
    normal = tl.where(live, (tl.load(x + x_at, live, 0.0).to(tl.float32) - middle) * r, 0.0)
    u = g
    if w is not None:
        u = g * w.to(tl.float32)
    return g, normal, u


@triton.jit
def _weight(weight, lane, inside):
    w = None
    if weight is not None:
        w = tl.load(weight + lane, inside, 0.0)
    return w


@triton.jit
def backward_kernel(dy, dy_row, dsum, dsum_row, x, x_row, weight, mean, rstd, dx, dweight, dbias, rows, cols, share,
                    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, HELD: tl.constexpr,
                    STAGES: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    own = program * cols
    dw = tl.zeros((HEIGHT, WIDTH), tl.float32)
    db = tl.zeros((HEIGHT, WIDTH), tl.float32)
    if WHOLE and HELD:
        w = _weight(weight, lane, lane < cols)
    for i in tl.range(0, share, num_stages=STAGES):
        row = (program * share + i) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
        here = row < rows
        r = tl.load(rstd + row, here, 0.0)
        middle = 0.0
        if mean is not None:
            middle = tl.load(mean + row, here, 0.0)
        if WHOLE:
            live = here & (lane < cols)
            if not HELD:
                w = _weight(weight, lane, lane < cols)
            g, normal, u = _parts(dy, x, w, row * dy_row + lane, row * x_row + lane, live, middle, r)
            if dx is not None:
                d = u - normal * (tl.sum(u * normal, 1, keep_dims=True) / cols)
                if mean is not None:
                    d -= tl.sum(u, 1, keep_dims=True) / cols
                d *= r
                if dsum is not None:
                    d += tl.load(dsum + row * dsum_row + lane, live, 0.0).to(tl.float32)
                tl.store(dx + row * cols + lane, d, live)
            if dweight is not None:
                dw += g * normal
            if dbias is not None:
                db += g
        else:
            along = tl.zeros((HEIGHT, 1), tl.float32)
            level = tl.zeros((HEIGHT, 1), tl.float32)
            if dx is not None:
                for start in range(0, cols, WIDTH):
                    col = start + lane
                    live = here & (col < cols)
                    w = _weight(weight, col, live)
                    g, normal, u = _parts(dy, x, w, row * dy_row + col, row * x_row + col, live, middle, r)
                    along += tl.sum(u * normal, 1, keep_dims=True)
                    if mean is not None:
                        level += tl.sum(u, 1, keep_dims=True)
            for start in range(0, cols, WIDTH):
                col = start + lane
                live = here & (col < cols)
                w = _weight(weight, col, live)
                g, normal, u = _parts(dy, x, w, row * dy_row + col, row * x_row + col, live, middle, r)
                if dx is not None:
                    d = (u - normal * (along / cols) - level / cols) * r
                    if dsum is not None:
                        d += tl.load(dsum + row * dsum_row + col, live, 0.0).to(tl.float32)
                    tl.store(dx + row * cols + col, d, live)
                if dweight is not None:
                    tl.store(dweight + own + col, tl.load(dweight + own + col, live, 0.0) + g * normal, live)
                if dbias is not None:
                    tl.store(dbias + own + col, tl.load(dbias + own + col, live, 0.0) + g, live)
    if WHOLE:
        lane = tl.arange(0, WIDTH)
        if dweight is not None:
            tl.store(dweight + own + lane, tl.sum(dw, 0), lane < cols)
        if dbias is not None:
            tl.store(dbias + own + lane, tl.sum(db, 0), lane < cols)


@triton.jit
def _sum(parts, sums, programs, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, programs, HEIGHT):
        row = (start + tl.arange(0, HEIGHT)[:, None]).to(tl.int64)
        total += tl.load(parts + row * cols + col[None, :], (row < programs) & (col < cols)[None, :], 0.0)
    tl.store(sums + col, tl.sum(total, 0), col < cols)


@triton.jit
def sum_kernel(dweight, dbias, weight_sum, bias_sum, programs, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    if dweight is not None:
        _sum(dweight, weight_sum, programs, cols, HEIGHT, WIDTH)
    if dbias is not None:
        _sum(dbias, bias_sum, programs, cols, HEIGHT, WIDTH)


run = Norms("norm_triton", forward, backward).run
