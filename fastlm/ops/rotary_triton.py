"""Rotary embedding in Triton: one pass, tensors of any strides, the angles read once for the heads of a program."""

import triton
import triton.language as tl

from fastlm.ops.rotary_kernels import ACCEPTS, differentiable
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch
from fastlm.ops.triton_kernels import loses_below as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]


def cannot(x, cos, sin, interleaved):
    return cannot_here(x)


def loses(x, cos, sin, interleaved):
    return loses_here(x)


def turn(x, cos, sin, y, interleaved, inverse):
    launch(plan, x, cos, sin, y, interleaved, inverse)


def plan(x, cos, sin, y, interleaved, inverse):
    """Return (kernel, grid, arguments): a program takes one position and a tile of heads."""
    batch, heads, steps, dim = x.shape
    half = cos.size(-1)
    width = triton.next_power_of_2(max(half, dim - 2 * half, 1))
    height = min(triton.next_power_of_2(heads), max(1, 2048 // width))
    strides = {f"{name}_{axis}": s for name, t in (("x", x), ("y", y))
               for axis, s in zip(("batch", "head", "step", "col"), t.stride(), strict=True)}
    strides |= {f"{name}_{axis}": s for name, t in (("cos", cos), ("sin", sin))
                for axis, s in zip(("batch", "step", "second", "col"), t.stride(), strict=True)}
    if cos.size(0) == 1:
        strides |= {"cos_batch": 0, "sin_batch": 0}
    tiles = triton.cdiv(heads, height)
    return kernel, (batch * steps * tiles,), dict(
        x=x, cos=cos, sin=sin, y=y, heads=heads, steps=steps, tiles=tiles, half=half, rest=dim - 2 * half, **strides,
        INTERLEAVED=interleaved, INVERSE=inverse, HEIGHT=height, WIDTH=width,
        num_warps=min(max(height * width // 512, 1), 8))


@triton.jit
def kernel(x, cos, sin, y, heads, steps, tiles, half, rest, x_batch, x_head, x_step, x_col, y_batch, y_head, y_step,
           y_col, cos_batch, cos_step, cos_second, cos_col, sin_batch, sin_step, sin_second, sin_col,
           INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    tile = tl.program_id(0) % tiles
    step = (tl.program_id(0) // tiles % steps).to(tl.int64)
    batch = (tl.program_id(0) // tiles // steps).to(tl.int64)
    head = (tile * HEIGHT + tl.arange(0, HEIGHT)[:, None]).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :].to(tl.int64)
    x += batch * x_batch + step * x_step + head * x_head
    y += batch * y_batch + step * y_step + head * y_head
    cos += batch * cos_batch + step * cos_step + lane * cos_col
    sin += batch * sin_batch + step * sin_step + lane * sin_col
    inside = lane < half
    live = (head < heads) & inside
    first = lane
    second = lane + half
    if INTERLEAVED:
        first = 2 * lane
        second = 2 * lane + 1
    a = tl.load(x + first * x_col, live, 0.0).to(tl.float32)
    b = tl.load(x + second * x_col, live, 0.0).to(tl.float32)
    cos_a = tl.load(cos, inside, 0.0).to(tl.float32)
    cos_b = tl.load(cos + cos_second, inside, 0.0).to(tl.float32)
    sin_a = tl.load(sin, inside, 0.0).to(tl.float32)
    sin_b = tl.load(sin + sin_second, inside, 0.0).to(tl.float32)
    if INVERSE:
        tl.store(y + first * y_col, a * cos_a + b * sin_b, live)
        tl.store(y + second * y_col, b * cos_b - a * sin_a, live)
    else:
        tl.store(y + first * y_col, a * cos_a - b * sin_a, live)
        tl.store(y + second * y_col, b * cos_b + a * sin_b, live)
    beyond = (head < heads) & (lane < rest)
    tl.store(y + (2 * half + lane) * y_col, tl.load(x + (2 * half + lane) * x_col, beyond, 0.0), beyond)


run = differentiable("rotary_triton", turn)
