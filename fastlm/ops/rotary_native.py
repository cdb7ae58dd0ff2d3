"""Rotary embedding by the kernel of csrc/rows.h."""

import torch

import fastlm._native as _native
from fastlm.ops.cpu import cannot_here, loses_below
from fastlm.ops.rotary import LEAST
from fastlm.ops.rotary_kernels import ACCEPTS, differentiable
from fastlm.ops.tensors import addresses, adjacent

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

DTYPES = (torch.float32, torch.bfloat16)


def cannot(x, cos, sin, interleaved):
    return cannot_here(x, DTYPES)


def loses(x, cos, sin, interleaved):
    return loses_below(_native, (LEAST, LEAST), x, cos, sin)


def turn(x, cos, sin, y, interleaved, inverse):
    x = adjacent(x)
    once = cos.stride(2) == sin.stride(2) == 0
    cos, sin = (_table(t, once) for t in (cos, sin))
    tables = (cos.stride(0) if cos.size(0) > 1 else 0, *cos.stride()[1:3])
    sizes = (*x.shape, cos.size(-1), *x.stride()[:3], *y.stride()[:3], *tables)
    _native.rotary(interleaved, inverse, sizes, addresses(x, y, cos, sin), x.dtype is torch.bfloat16,
                   torch.get_num_threads())


def _table(t, once):
    """Return a table in float32, `once` with the angle of a pair's second column in the place of the first's."""
    if once:
        return t[:, :, :1].float().contiguous().expand(t.shape)
    return t.float().contiguous()


run = differentiable("rotary_native", turn)
