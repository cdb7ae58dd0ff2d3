"""Linear cross-entropy on a GPU: the library's products a block of rows at a time, and two Triton kernels between them.

One reads a block of logits once, one reads it again and overwrites it with its gradient; a program takes a row, in
pieces, so that the classes may be any number. The host never waits for the device.
"""

import triton
import triton.language as tl

from fastlm.ops.head_kernels_triton import scaled, width
from fastlm.ops.linear_cross_entropy_kernels import ACCEPTS, Sweep, refuses
from fastlm.ops.math_kernels_triton import exp
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch
from fastlm.ops.triton_kernels import loses as loses_here

PIECE = 8192


def cannot(input, *rest):
    return cannot_here(input) or refuses(input, *rest)


def loses(input, *rest):
    if rest[-1] and input.is_cuda:  # classes that ranks share: stock has nothing for them
        return None
    return loses_here(input)


def plan_read(logits, targets, sums, entropy):
    """Return (kernel, grid, arguments) of `read` in loss_kernels.py."""
    shared = _shared(logits, targets)
    # As in cross_entropy_triton.py: few threads that have much in flight.
    shared["num_warps"] = max(shared["PIECE"] * logits.z.element_size() // 4096, 4)
    return read_kernel, (len(logits.z),), shared | dict(sums=sums, ENTROPY=entropy)


def plan_gradient(logits, targets, rows, out):
    """Return (kernel, grid, arguments) of `gradient` in loss_kernels.py."""
    arguments = dict(rows=rows, out=out, out_row=out.stride(0), wide=min(width(logits.z), width(out)))
    return gradient_kernel, (len(logits.z),), _shared(logits, targets) | arguments


def _shared(logits, targets):
    classes = logits.z.shape[1]
    piece = min(triton.next_power_of_2(classes), PIECE)
    soft = targets.soft
    return dict(z=logits.z, z_row=logits.z.stride(0), bias=logits.bias, softcap=float(logits.softcap or 1.0),
                target=targets.index, first=targets.first, weight=targets.weight, soft=soft,
                soft_row=0 if soft is None else soft.stride(0), share=float(targets.share), even=float(targets.even),
                classes=classes, wide=width(logits.z), CAPPED=logits.softcap > 0,
                SPREAD=soft is not None or targets.even > 0, PIECE=piece, num_warps=min(max(piece // 512, 4), 16),
                sanitize_overflow=False)


class Kernels:
    """`read` and `gradient` of `loss_kernels.LossKernels`, in Triton."""

    native = None  # torch makes the products
    scaled = staticmethod(scaled)

    def read(self, logits, targets, sums, entropy=False):
        launch(plan_read, logits, targets, sums, entropy)
        return logits, targets

    def gradient(self, state, rows, out):
        launch(plan_gradient, *state, rows, out)


@triton.jit
def _tanh(x):
    t = exp(-2 * tl.abs(x))
    y = (1 - t) / (1 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _target(target, row, first, classes):
    """Return a row's target as a column of these classes, -1 where it is none of them."""
    y = tl.full((), -1, tl.int32)
    if target is not None:
        t = tl.load(target + row) - first
        y = tl.where((t >= 0) & (t < classes), t, -1).to(tl.int32)
    return y


@triton.jit
def _load(z, bias, col, classes, wide, softcap, CAPPED: tl.constexpr):
    """Return logits, -∞ beyond the last class, and what their softcap multiplies gradients with.

    Up to `wide` there is something to read.
    """
    inside = col < classes
    u = tl.load(z + col, col < wide, 0.0).to(tl.float32)
    slope = tl.full(u.shape, 1.0, tl.float32)
    if bias is not None:
        u += tl.load(bias + col, inside, 0.0)
    if CAPPED:
        bounded = _tanh(u / softcap)
        slope = 1 - bounded * bounded
        u = bounded * softcap
    return tl.where(inside, u, -float("inf")), slope


@triton.jit
def _spread(weight, soft, col, classes, share, even):
    """Return weight · (share · soft + even), 0 beyond the last class."""
    inside = col < classes
    t = tl.where(inside, even, 0.0)
    if soft is not None:
        t += share * tl.load(soft + col, inside, 0.0).to(tl.float32)
    if weight is not None:
        t *= tl.load(weight + col, inside, 0.0)
    return t


@triton.jit
def read_kernel(z, z_row, bias, softcap, target, first, weight, soft, soft_row, share, even, sums, classes, wide,
                CAPPED: tl.constexpr, SPREAD: tl.constexpr, ENTROPY: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_row
    if soft is not None:
        soft += row * soft_row
    y = _target(target, row, first, classes)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    moment = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    mass = tl.zeros((), tl.float32)
    for start in range(0, classes, PIECE):
        col = start + tl.arange(0, PIECE)
        u, _ = _load(z, bias, col, classes, wide, softcap, CAPPED)
        new = tl.maximum(top, tl.max(u, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        shrink = exp(top - base)
        e = exp(u - base)
        if ENTROPY:
            kept = tl.where(shrink > 0, shrink * (moment + (top - base) * total), 0.0)
            moment = kept + tl.sum(tl.where(e > 0, e * (u - base), 0.0), 0)
        total = total * shrink + tl.sum(e, 0)
        top = new
        if SPREAD:
            t = _spread(weight, soft, col, classes, share, even)
            weighted += tl.sum(tl.where(t == 0, 0.0, t * u), 0)
            mass += tl.sum(t, 0)
    own, _ = _load(z, bias, tl.where(y < 0, wide, y), classes, wide, softcap, CAPPED)
    picked = tl.where(y < 0, 0.0, own)
    sums += row * 6
    tl.store(sums, top)
    tl.store(sums + 1, total)
    tl.store(sums + 2, moment)
    tl.store(sums + 3, picked)
    tl.store(sums + 4, weighted)
    tl.store(sums + 5, mass)


@triton.jit
def gradient_kernel(z, z_row, bias, softcap, target, first, weight, soft, soft_row, share, even, rows, out, out_row,
                    classes, wide, CAPPED: tl.constexpr, SPREAD: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_row
    out += row * out_row
    if soft is not None:
        soft += row * soft_row
    y = _target(target, row, first, classes)
    rows += row * 5
    top, total = tl.load(rows), tl.load(rows + 1)
    up, down, hit = tl.load(rows + 2), tl.load(rows + 3), tl.load(rows + 4)
    counts = (up != 0) | (down != 0) | (hit != 0)
    for start in range(0, classes, PIECE):
        col = start + tl.arange(0, PIECE)
        u, slope = _load(z, bias, col, classes, wide, softcap, CAPPED)
        g = exp(u - top) * (up / total) - tl.where(col == y, hit, 0.0)
        if SPREAD:
            g -= down * _spread(weight, soft, col, classes, share, even)
        g = tl.where(counts, g * slope, 0.0)
        tl.store(out + col, g.to(out.dtype.element_ty), col < wide)


_sweep = Sweep("linear_cross_entropy_triton", Kernels(), lambda x: x.dtype)
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
