"""The norms by the kernels of csrc/rows.h."""

import torch

import fastlm._native as _native
from fastlm.ops.cpu import cannot_here, loses_below, on_amx
from fastlm.ops.norm import LEAST
from fastlm.ops.norm_kernels import ACCEPTS, Norms, mixed
from fastlm.ops.tensors import addresses, adjacent

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

DTYPES = (torch.float32, torch.bfloat16)


def cannot(input, residual, weight, bias, shape, eps, centred):
    return cannot_here(input, DTYPES) or mixed(input, residual, weight, bias)


def loses(input, residual, weight, bias, shape, eps, centred):
    """RMS norm is a chain of calls in torch; layer norm one good kernel, to which only the addition leaves a gain."""
    least, half = (LEAST, LEAST), input.dtype is torch.bfloat16
    if centred and _native.cpu == "avx2":
        least = (0, 0)
    elif centred and _native.cpu == "zen5":
        least = (1 << 20, 1 << 20) if half else (0, 0)
    elif centred and half and on_amx(_native):
        least = (1 << 20, 1 << 20)
    elif centred:
        least = (0, 1 << 21 if half else 0) if residual is None else (1 << 20, 1 << 20)
    return loses_below(_native, least, input, residual, weight, bias)


def forward(x, residual, weight, bias, eps, centred):
    x, residual = adjacent(x), None if residual is None else adjacent(residual)
    weight, bias = _single(weight), _single(bias)
    y = x.new_empty(x.shape)
    total = None if residual is None else torch.empty_like(y)
    mean = _numbers(x, x.shape[0]) if centred else None
    rstd = _numbers(x, x.shape[0])
    sizes = (*x.shape, x.stride(0), 0 if residual is None else residual.stride(0))
    _native.norm_forward(sizes, addresses(x, residual, weight, bias, y, total, mean, rstd), eps,
                         x.dtype is torch.bfloat16, torch.get_num_threads())
    return y, total, mean, rstd


def backward(dy, dsum, x, weight, mean, rstd, needs):
    dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
    x, weight, threads = adjacent(x), _single(weight), torch.get_num_threads()
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight, dbias = (_numbers(x, x.shape[1]) if need else None for need in needs[1:])
    workspace = _numbers(x, threads, 4, x.shape[1]) if any(needs[1:]) else None
    buffers = (x, dy, dsum, weight, mean, rstd, dx, dweight, dbias, workspace)
    _native.norm_backward((*x.shape, x.stride(0)), addresses(*buffers), x.dtype is torch.bfloat16, threads)
    return dx, dweight, dbias


def _numbers(x, *shape):
    return x.new_empty(shape, dtype=torch.float32)


def _single(t):
    return None if t is None else t.float().contiguous()


run = Norms("norm_native", forward, backward).run
