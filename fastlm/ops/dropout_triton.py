"""dropout_add in Triton: one pass in each direction, and no mask in memory.

The mask is drawn by Philox from a seed and each element's number. The seed comes from torch's generator of the device,
so `torch.manual_seed` decides, and a checkpoint that restores the generator draws the same mask again.
"""

import torch
import triton
import triton.language as tl

from fastlm.autograd import Differentiable, blank
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch, like
from fastlm.ops.triton_kernels import loses_below as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

ACCEPTS = {"1 kept", "127 kept", "128 kept", "129 kept", "9001 kept", "all dropped", "strided rows", "no numbers"}
BLOCK = 1024  # numbers that each of a draw's four words decides on


def cannot(x, residual, p):
    if residual.dtype is not x.dtype:
        return f"x is {x.dtype}, residual is {residual.dtype}"
    return cannot_here(x)


def loses(x, residual, p):
    return loses_here(x)


def run(x, residual, p):
    seed = torch.randint(2**62, (1,), device=x.device)
    return _dropout_add((x, residual, seed), p)[0]


def forward(tensors, needs, p):
    x, residual, seed = tensors
    return [_masked(x, residual, seed, p)]


def backward(grads, saved, tensors, needs, p):
    return [_masked(grads[0], None, tensors[2], p) if needs[0] else None, None, None]


def _masked(x, residual, seed, p):
    y = like(x)
    launch(plan, x.contiguous(), None if residual is None else residual.contiguous(), seed, y, p)
    return y


def plan(x, residual, seed, y, p):
    """Return (kernel, grid, arguments) for contiguous tensors."""
    # What is drawn is a whole number of 32 bits.
    return kernel, (triton.cdiv(x.numel(), 4 * BLOCK),), dict(
        x=x, residual=residual, seed=seed, y=y, numbers=x.numel(), least=min(round(p * 2**32), 2**32 - 1) - 2**31,
        scale=1 / (1 - p) if p < 1 else 0.0, BLOCK=BLOCK, num_warps=4 if residual is None else 8)


@triton.jit
def _four(x, at, numbers, BLOCK: tl.constexpr):
    return (tl.load(x + at, at < numbers, 0.0), tl.load(x + at + BLOCK, at + BLOCK < numbers, 0.0),
            tl.load(x + at + 2 * BLOCK, at + 2 * BLOCK < numbers, 0.0),
            tl.load(x + at + 3 * BLOCK, at + 3 * BLOCK < numbers, 0.0))


@triton.jit
def kernel(x, residual, seed, y, numbers, least, scale, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = block * 4 * BLOCK + lane
    # All are read before the first is written, which no compiler lets them pass.
    z = _four(x, at, numbers, BLOCK)
    if residual is not None:
        r = _four(residual, at, numbers, BLOCK)
    # Seven rounds pass all tests of randomness (Salmon et al., 2011); ten take longer than the memory does.
    draws = tl.randint4x(tl.load(seed), block * BLOCK + lane, 7)
    for i in tl.static_range(4):
        found = tl.where(draws[i].to(tl.int32, bitcast=True) >= least, z[i].to(tl.float32) * scale, 0.0)
        if residual is not None:
            found += r[i].to(tl.float32)
        tl.store(y + at + i * BLOCK, found, at + i * BLOCK < numbers)


def _gradient(grads, tensors, needs, p):
    """Mask the upstream gradient as x was masked."""
    return [_dropout_add((grads[0], None, tensors[2]), p)[0] if needs[0] else None]


def _keep(tensors, *_):
    x, residual, seed = tensors
    return [blank(x), None if residual is None else blank(residual), seed]


_dropout_add = Differentiable(
    "dropout_add_triton", statics="float p", outputs=1, forward=forward, backward=backward, gradient=_gradient,
    fake=lambda tensors, *_: [tensors[0].new_empty(tensors[0].shape)], borrowed={1: lambda grads, found: grads[0]},
    keep=_keep)
