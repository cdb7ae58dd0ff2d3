"""Linear cross-entropy with the losses of csrc/loss.h; 16-bit inputs are multiplied in float32, bfloat16 in itself
where the CPU computes in it."""

from functools import partial

import torch

import fastlm._native as _native
from fastlm.ops.cpu import cannot_here, on_amx, unmeasured
from fastlm.ops.head import few_on_avx2, products_on_cpu
from fastlm.ops.linear_cross_entropy import ROW, few
from fastlm.ops.linear_cross_entropy_kernels import ACCEPTS, Sweep, refuses
from fastlm.ops.loss_kernels import LossKernels
from fastlm.ops.tensors import FLOATS

DTYPES = FLOATS
LEAST_LOGITS = {"zen5": 4_000_000, "intel": 7_000_000}  # in bfloat16, where the CPU computes in it; Intel's with AMX


def cannot(input, *rest):
    return cannot_here(input, DTYPES) or refuses(input, *rest)


def loses(input, linear_weight, *rest):
    group = rest[-1]
    if group:
        return None
    if unknown := unmeasured(_native):
        return unknown
    if input.dtype is torch.bfloat16 and _native.bf16_arithmetic and not (
            _native.cpu == "zen5" or on_amx(_native)):
        return "not yet measured with bfloat16 arithmetic on this CPU"
    if input.dtype is torch.float16:
        return "not yet measured in float16"
    if input.dtype is torch.bfloat16 and _native.bf16_arithmetic:
        least = LEAST_LOGITS[_native.cpu]
        few_logits = input.size(0) * linear_weight.size(0) < least
        return f"slower than torch below {least} logits: {ROW}" if few_logits else None
    return few(input, linear_weight, _native.cpu == "intel") or few_on_avx2(_native, input, linear_weight)


_sweep = Sweep("linear_cross_entropy_native", LossKernels(_native), partial(products_on_cpu, _native))
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
