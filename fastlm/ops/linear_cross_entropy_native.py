"""Linear cross-entropy with the losses of csrc/loss.h; 16-bit inputs are multiplied in float32, bfloat16 in itself
where the CPU computes in it."""

import torch

import fastlm._native as _native
from fastlm.ops.cpu import unmeasured
from fastlm.ops.head import few_on_avx2
from fastlm.ops.linear_cross_entropy import ROW, few
from fastlm.ops.linear_cross_entropy_kernels import ACCEPTS, Sweep, refuses
from fastlm.ops.loss_kernels import LossKernels

LEAST_LOGITS = 4_000_000  # in bfloat16, where the CPU computes in it
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cannot(input, *rest):
    if input.is_cuda:
        return "runs on the CPU"
    return refuses(input, *rest)


def loses(input, linear_weight, *rest):
    group = rest[-1]
    if group:
        return None
    if unknown := unmeasured(_native):
        return unknown
    if input.dtype is torch.bfloat16 and _native.bf16_arithmetic and _native.cpu != "zen5":
        return "not yet measured with bfloat16 arithmetic on this CPU"
    if input.dtype is torch.float16:
        return "not yet measured in float16"
    if input.dtype is torch.bfloat16 and _native.bf16_arithmetic:
        few_logits = input.size(0) * linear_weight.size(0) < LEAST_LOGITS
        return f"slower than torch below {LEAST_LOGITS} logits: {ROW}" if few_logits else None
    return few(input, linear_weight) or few_on_avx2(_native, input, linear_weight)


def _products(x):
    # Where the CPU has no bfloat16 arithmetic, products of converted tiles beat torch's bfloat16 ones.
    fast = x.dtype is torch.bfloat16 and _native.bf16_arithmetic
    return x.dtype if fast or x.dtype is torch.float64 else torch.float32


_sweep = Sweep("linear_cross_entropy_native", LossKernels(_native), _products)
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
