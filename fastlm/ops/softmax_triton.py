"""Softmax in Triton: rows that fit are read once, longer ones twice with a running maximum and sum.

A tensor is seen as `[outer, cols, rows]` whatever the dimension and strides: a program takes a tile of rows, so that
neighbouring threads read neighbouring memory also where the rows, not the columns, lie side by side.
"""

import math

import torch
import triton
import triton.language as tl

from fastlm.autograd import Differentiable
from fastlm.ops.softmax import reference

INTERPRETED = triton.knobs.runtime.interpret

ACCEPTS = {"row of 1", "row of 127", "row of 128", "row of 129", "row of 1000", "long row", "row in pieces",
           "late values", "outliers", "minus infinity", "no rows", "empty rows", "one number", "first dimension",
           "long first dimension", "middle dimension", "transposed", "every other column"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The largest tiles that a block of 1024 threads (64 registers each) holds without spilling: see tests/test_triton.py.
FORWARD_TILE, BACKWARD_TILE = 32768, 16384


def cannot(x, dim, mask=None, scale=1.0, log=False):
    if mask is not None or scale != 1 or log:
        return "no kernel for masks, scales and logarithms"
    if not (x.is_cuda or INTERPRETED):
        return "needs a GPU"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    return None


def loses(x, dim, mask=None, scale=1.0, log=False):
    return "not yet run on a GPU" if x.is_cuda else "interpreted"


def run(x, dim, mask=None, scale=1.0, log=False):
    return _softmax((x,), dim)[0]


def forward(tensors, needs, dim):
    (x,) = tensors
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        kernel, grid, arguments = plan_forward(view(x, dim), view(y, dim))
        with torch.cuda.device_of(x):
            kernel[grid](**arguments)
    return [y]


def backward(grads, saved, tensors, needs, dim):
    (y,), (dy,) = saved, grads
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        kernel, grid, arguments = plan_backward(*(view(t, dim) for t in (y, dy, dx)))
        with torch.cuda.device_of(y):
            kernel[grid](**arguments)
    return [dx]


def plan_forward(x, y):
    """Return (kernel, grid, arguments) for views `[outer, cols, rows]`."""
    outer, cols, rows = x.shape
    tile = _tile(rows, cols, x.stride(2) < x.stride(1), FORWARD_TILE)
    strides = {f"{name}_{axis}": s for name, t in (("x", x), ("y", y))
               for axis, s in zip(("outer", "col", "row"), t.stride(), strict=True)}
    return forward_kernel, _grid(outer, rows, tile), dict(x=x, y=y, rows=rows, cols=cols, **strides, **tile)


def plan_backward(y, dy, dx):
    """Return (kernel, grid, arguments) for views `[outer, cols, rows]`."""
    outer, cols, rows = y.shape
    tile = _tile(rows, cols, y.stride(2) < y.stride(1), BACKWARD_TILE)
    strides = {f"{name}_{axis}": s for name, t in (("y", y), ("dy", dy), ("dx", dx))
               for axis, s in zip(("outer", "col", "row"), t.stride(), strict=True)}
    return backward_kernel, _grid(outer, rows, tile), dict(y=y, dy=dy, dx=dx, rows=rows, cols=cols, **strides, **tile)


def view(x, dim):
    """View `x` as `[outer, cols, rows]`; only strides that no such view can express cost a copy."""
    if x.dim() == 0:
        return x.reshape(1, 1, 1)
    dim %= x.dim()
    x = x.reshape(math.prod(x.shape[:dim]), x.size(dim), math.prod(x.shape[dim + 1:]))
    return x.permute(2, 1, 0) if x.size(2) == 1 else x


def _tile(rows, cols, rows_adjacent, limit):
    """Choose the tile: whole rows where one fits into `limit` elements, else pieces of 8192 elements."""
    at_least = 32 if rows_adjacent else max(1, 1024 // triton.next_power_of_2(cols))
    height = min(at_least, triton.next_power_of_2(rows))
    width = triton.next_power_of_2(cols)
    whole = height * width <= limit
    if not whole:
        width = 8192 // height
    return {"HEIGHT": height, "WIDTH": width, "WHOLE": whole, "num_warps": min(max(height * width // 1024, 4), 32)}


def _grid(outer, rows, tile):
    return (outer * triton.cdiv(rows, tile["HEIGHT"]),)


@triton.jit
def forward_kernel(x, y, rows, cols, x_outer, x_col, x_row, y_outer, y_col, y_row,
                   HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    blocks = tl.cdiv(rows, HEIGHT)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks * HEIGHT + tl.arange(0, HEIGHT)[:, None]).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    x += outer * x_outer + row * x_row
    y += outer * y_outer + row * y_row
    if WHOLE:
        col = lane.to(tl.int64)
        live = (row < rows) & (lane < cols)
        z = tl.load(x + col * x_col, live, -float("inf")).to(tl.float32)
        e = tl.exp(z - tl.max(z, 1, keep_dims=True))
        tl.store(y + col * y_col, e / tl.sum(e, 1, keep_dims=True), live)
    else:
        highest = tl.full((HEIGHT, 1), -float("inf"), tl.float32)
        total = tl.zeros_like(highest)
        for start in range(0, cols, WIDTH):
            col = (start + lane).to(tl.int64)
            z = tl.load(x + col * x_col, (row < rows) & (col < cols), -float("inf")).to(tl.float32)
            new = tl.maximum(highest, tl.max(z, 1, keep_dims=True))
            base = tl.where(new == -float("inf"), 0.0, new)
            total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base), 1, keep_dims=True)
            highest = new
        for start in range(0, cols, WIDTH):
            col = (start + lane).to(tl.int64)
            live = (row < rows) & (col < cols)
            z = tl.load(x + col * x_col, live, 0.0).to(tl.float32)
            tl.store(y + col * y_col, tl.exp(z - highest) / total, live)


@triton.jit
def backward_kernel(y, dy, dx, rows, cols, y_outer, y_col, y_row, dy_outer, dy_col, dy_row, dx_outer, dx_col, dx_row,
                    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    blocks = tl.cdiv(rows, HEIGHT)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks * HEIGHT + tl.arange(0, HEIGHT)[:, None]).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    y += outer * y_outer + row * y_row
    dy += outer * dy_outer + row * dy_row
    dx += outer * dx_outer + row * dx_row
    if WHOLE:
        col = lane.to(tl.int64)
        live = (row < rows) & (lane < cols)
        p = tl.load(y + col * y_col, live, 0.0).to(tl.float32)
        g = tl.load(dy + col * dy_col, live, 0.0).to(tl.float32)
        tl.store(dx + col * dx_col, p * (g - tl.sum(p * g, 1, keep_dims=True)), live)
    else:
        total = tl.zeros((HEIGHT, 1), tl.float32)
        for start in range(0, cols, WIDTH):
            col = (start + lane).to(tl.int64)
            live = (row < rows) & (col < cols)
            p = tl.load(y + col * y_col, live, 0.0).to(tl.float32)
            total += tl.sum(p * tl.load(dy + col * dy_col, live, 0.0).to(tl.float32), 1, keep_dims=True)
        for start in range(0, cols, WIDTH):
            col = (start + lane).to(tl.int64)
            live = (row < rows) & (col < cols)
            p = tl.load(y + col * y_col, live, 0.0).to(tl.float32)
            g = tl.load(dy + col * dy_col, live, 0.0).to(tl.float32)
            tl.store(dx + col * dx_col, p * (g - total), live)


def _reference(tensors, dim):
    return (reference(*tensors, dim, None, 1.0, False),)


def _fake(tensors, needs, dim):
    return [tensors[0].new_empty(tensors[0].shape)]


_softmax = Differentiable("softmax_triton", statics="int dim", outputs=1, forward=forward, fake=_fake,
                          backward=backward, reference=_reference, reads_results=True)
