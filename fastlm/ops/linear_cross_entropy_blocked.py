"""Linear cross-entropy in plain PyTorch, a block of rows at a time."""

import torch

from fastlm.ops.linear_cross_entropy import few
from fastlm.ops.linear_cross_entropy_kernels import ACCEPTS, Sweep
from fastlm.ops.linear_cross_entropy_kernels import refuses as cannot
from fastlm.ops.loss_kernels import PlainKernels
from fastlm.ops.tensors import FLOATS

DTYPES = FLOATS


def loses(input, *rest):
    group = rest[-1]
    if group:
        return None
    if input.is_cuda:
        return "on a GPU the Triton kernels are for this"
    if input.dtype in (torch.bfloat16, torch.float16):
        return "slower than torch in 16 bits, though smaller: benchmarks/LOG.md 2026-11-23"
    return few(input, rest[0], True)


def _products(x):
    return torch.float32 if not x.is_cuda and x.dtype is not torch.float64 else x.dtype


_sweep = Sweep("linear_cross_entropy", PlainKernels(), _products)
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
