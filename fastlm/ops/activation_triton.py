"""gelu and the gated units in Triton: one pass in each direction."""

import triton
import triton.language as tl

from fastlm.ops.activation_kernels import ACCEPTS, differentiable
from fastlm.ops.math_kernels_triton import exp, normal_tail, sigmoid
from fastlm.ops.triton_kernels import DTYPES, adjacent, cannot_here, launch
from fastlm.ops.triton_kernels import loses_below as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

BLOCK = 2048


def cannot(gate, up, kind):
    if up is not None and up.dtype is not gate.dtype:
        return f"gate is {gate.dtype}, up is {up.dtype}"
    return cannot_here(gate)


def loses(gate, up, kind):
    return loses_here(gate)


def forward(gate, up, y, kind):
    launch(plan_forward, adjacent(gate), adjacent(up), y, kind)


def backward(dy, gate, up, dgate, dup, kind):
    launch(plan_backward, dy.contiguous(), adjacent(gate), adjacent(up), dgate, dup, kind)


def plan_forward(gate, up, y, kind):
    """Return (kernel, grid, arguments) for `[T, H]`, y contiguous."""
    arguments, grid = _shape(gate, up)
    return forward_kernel, grid, dict(gate=gate, up=up, y=y, KIND=kind) | arguments


def plan_backward(dy, gate, up, dgate, dup, kind):
    """Return (kernel, grid, arguments) for `[T, H]`, all contiguous but gate and up."""
    arguments, grid = _shape(gate, up)
    return backward_kernel, grid, dict(dy=dy, gate=gate, up=up, dgate=dgate, dup=dup, KIND=kind) | arguments


def _shape(gate, up):
    """Walk rows of any stride, or where all rows lie together one row of everything."""
    rows, cols = gate.shape
    strides = [t.stride(0) if t is not None else cols for t in (gate, up)]
    if rows == 1 or strides == [cols, cols]:
        rows, cols = 1, rows * cols
    blocks = triton.cdiv(cols, BLOCK)
    return dict(gate_row=strides[0], up_row=strides[1], cols=cols, blocks=blocks, BLOCK=BLOCK,
                num_warps=4), (rows * blocks,)


@triton.jit
def _gate(a, KIND: tl.constexpr):
    """Return the gate's value and its derivative, in float32 for an `a` of any dtype."""
    exact: tl.constexpr = a.dtype == tl.float32
    a = a.to(tl.float32)
    if KIND == "silu":
        s = sigmoid(a)
        value = a * s
        slope = s + value * (1 - s)
    elif KIND == "gelu":
        e = exp(-0.5 * a * a)
        if exact:
            cdf = 0.5 * (1 + tl.erf(a * 0.7071067811865476))
        else:  # what is rounded to 16 bits has no use for more, which would take longer than the memory does
            tail = normal_tail(a, e)
            cdf = tl.where(a < 0, tail, 1 - tail)
        value = a * cdf
        slope = cdf + a * 0.3989422804014327 * e
    else:
        z = 1.5957691216057308 * (a + 0.044715 * a * a * a)
        s = sigmoid(z)
        value = a * s
        slope = s + 1.5957691216057308 * value * sigmoid(-z) * (1 + 0.134145 * a * a)  # 1 - s would lose digits
    return value, slope


@triton.jit
def forward_kernel(gate, up, y, gate_row, up_row, cols, blocks, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = col < cols
    value, _ = _gate(tl.load(gate + row * gate_row + col, live, 0.0), KIND)
    if up is not None:
        value *= tl.load(up + row * up_row + col, live, 0.0).to(tl.float32)
    tl.store(y + row * cols + col, value, live)


@triton.jit
def backward_kernel(dy, gate, up, dgate, dup, gate_row, up_row, cols, blocks, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = col < cols
    g = tl.load(dy + row * cols + col, live, 0.0).to(tl.float32)
    if up is not None:  # read before anything is written, which no compiler lets it pass
        u = tl.load(up + row * up_row + col, live, 0.0).to(tl.float32)
    value, slope = _gate(tl.load(gate + row * gate_row + col, live, 0.0), KIND)
    if up is not None:
        tl.store(dup + row * cols + col, g * value, live)
        slope *= u
    tl.store(dgate + row * cols + col, g * slope, live)


run = differentiable("gated_triton", forward, backward)
