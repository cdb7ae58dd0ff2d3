"""Distillation with the losses of csrc/loss.h; 16-bit inputs are multiplied in float32, bfloat16 in itself where
the CPU computes in it."""

from functools import partial

import torch

import fastlm._native as _native
from fastlm.ops.cpu import cannot_here, unmeasured
from fastlm.ops.distillation import LEAST, LEAST_LOGITS, short
from fastlm.ops.distillation_kernels import ACCEPTS, Sweep
from fastlm.ops.head import few_on_avx2, products_on_cpu
from fastlm.ops.linear_cross_entropy import ROW
from fastlm.ops.loss_kernels import LossKernels
from fastlm.ops.tensors import FLOATS

DTYPES = FLOATS


def cannot(student, weight, *rest):
    return cannot_here(student, DTYPES) or (None if weight.shape[0] else "there are no classes")


def loses(student, weight, *rest):
    *_, teacher_logits, _, _, target, divergence, _, _, hard_weight, _, reduction = rest
    if unknown := unmeasured(_native):
        return unknown
    if student.dtype is torch.float16 or (student.dtype is torch.bfloat16 and _native.cpu != "zen5"):
        return "not yet measured in 16 bits"
    rows, inputs = student.shape
    logits = rows * weight.size(0)
    if student.dtype is torch.bfloat16:
        few = rows <= 16 or logits < 1 << 17
    else:
        shorter = short(student, teacher_logits, target, divergence, hard_weight, reduction)
        few = logits < LEAST_LOGITS and logits * inputs < (LEAST if shorter else 1 << 23)
    return f"slower than torch for so few logits: {ROW}" if few else few_on_avx2(_native, student, weight)


_sweep = Sweep("distillation_native", LossKernels(_native), partial(products_on_cpu, _native))
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
