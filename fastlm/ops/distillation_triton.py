"""Distillation on a GPU: the library's products a block of rows at a time, and one Triton kernel between them.

A program takes a row of both logits and walks over its classes, in pieces so that they may be any number: once for the
two log-sum-exps, once for the divergence, and once more for the gradient where that needs the divergence first.
"""

import torch
import triton
import triton.language as tl

from fastlm.ops.distillation_kernels import ACCEPTS, Sweep
from fastlm.ops.loss_kernels import DIVERGENCES
from fastlm.ops.math_kernels_triton import exp
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch, loses

PIECE = 2048


def cannot(student, weight, *rest):
    return cannot_here(student) or (None if weight.shape[0] else "there are no classes")


def plan(student, teacher, target, kind, beta, soft, hard, scale, loss, out):
    """Return (kernel, grid, arguments) of `distil` in loss_kernels.py."""
    rows, classes = student.z.shape
    piece = min(triton.next_power_of_2(classes), PIECE)
    return rows_kernel, (rows,), dict(
        student=student.z, student_row=student.z.stride(0), student_bias=student.bias, teacher=teacher.z,
        teacher_row=teacher.z.stride(0), teacher_bias=teacher.bias, inverse=float(student.scale), target=target,
        beta=float(beta), soft=float(soft), hard=float(hard), scale=scale, loss=loss, out=out,
        out_row=0 if out is None else out.stride(0), classes=classes, KIND=DIVERGENCES.index(kind), PIECE=piece,
        num_warps=4, sanitize_overflow=False)


class Kernels:
    """`distil` of `loss_kernels.LossKernels`, in Triton."""

    native = None  # torch makes the products

    def distil(self, student, teacher, target, kind, beta, soft, hard, scale, out):
        loss = torch.empty_like(scale)
        launch(plan, student, teacher, target, kind, beta, soft, hard, scale, loss, out)
        return loss


@triton.jit
def _load(z, bias, col, classes):
    """Return logits, -∞ beyond the last class."""
    inside = col < classes
    u = tl.load(z + col, inside, -float("inf")).to(tl.float32)
    if bias is not None:
        u += tl.load(bias + col, inside, 0.0)
    return u


@triton.jit
def _add(top, total, u):
    """Add the exponentials of `u` to `total`, which is in units of exp(top)."""
    new = tl.maximum(top, tl.max(u, 0))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * exp(top - base) + tl.sum(exp(u - base), 0)


@triton.jit
def _over_mixture(log_p, log_q, beta):
    """Return log(q/m) and log(p/m), m = β·q + (1 - β)·p, both from the logarithm of m over the larger of p and q."""
    gap = log_q - log_p
    less = exp(-tl.abs(gap))
    above = tl.log(tl.where(gap > 0, beta + (1 - beta) * less, (1 - beta) + beta * less))
    return tl.where(gap > 0, -above, gap - above), tl.where(gap > 0, -gap - above, -above)


@triton.jit
def rows_kernel(student, student_row, student_bias, teacher, teacher_row, teacher_bias, inverse, target, beta, soft,
                hard, scale, loss, out, out_row, classes, KIND: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    s_top = tl.full((), -float("inf"), tl.float32)
    t_top = tl.full((), -float("inf"), tl.float32)
    h_top = tl.full((), -float("inf"), tl.float32)
    s_total = tl.zeros((), tl.float32)
    t_total = tl.zeros((), tl.float32)
    h_total = tl.zeros((), tl.float32)
    picked = tl.zeros((), tl.float32)
    h_share = tl.zeros((), tl.float32)
    y = tl.full((), -1, tl.int32)
    if target is not None:
        t = tl.load(target + row)
        y = tl.where((t >= 0) & (t < classes), t, -1).to(tl.int32)
    for start in range(0, classes, PIECE):
        col = start + tl.arange(0, PIECE)
        u = _load(student, student_bias, col, classes)
        s_top, s_total = _add(s_top, s_total, u * inverse)
        t_top, t_total = _add(t_top, t_total, _load(teacher, teacher_bias, col, classes) * inverse)
        if target is not None:
            h_top, h_total = _add(h_top, h_total, u)
    if target is not None:
        picked = tl.where(y < 0, 0.0, _load(student, student_bias, tl.where(y < 0, classes, y), classes))
        h_share = 1 / h_total
    s_log, t_log = tl.log(s_total), tl.log(t_total)
    factor = tl.zeros((), tl.float32)
    up = tl.zeros((), tl.float32)
    if out is not None:
        out += row * out_row
        factor = tl.load(scale + row) * soft * inverse
        up = tl.load(scale + row) * hard
    of_q = tl.zeros((), tl.float32)
    of_p = tl.zeros((), tl.float32)
    for start in range(0, classes, PIECE):
        col = start + tl.arange(0, PIECE)
        u = _load(student, student_bias, col, classes)
        log_p = u * inverse - s_top - s_log
        log_q = _load(teacher, teacher_bias, col, classes) * inverse - t_top - t_log
        p, q = exp(log_p), exp(log_q)
        q_over, p_over = log_q - log_p, log_p - log_q
        if KIND == 2:
            q_over, p_over = _over_mixture(log_p, log_q, beta)
        if KIND != 1:
            of_q += tl.sum(tl.where(beta > 0, tl.where(q > 0, q * q_over, 0.0), 0.0), 0)
        if KIND != 0:
            of_p += tl.sum(tl.where(beta < 1, tl.where(p > 0, p * p_over, 0.0), 0.0), 0)
        if KIND == 0 and out is not None:
            g = factor * (p - q)
            if target is not None:
                g += up * (exp(u - h_top) * h_share - tl.where(col == y, 1.0, 0.0))
            g = tl.where((factor != 0) | (up != 0), g, 0.0)
            tl.store(out + col, g.to(out.dtype.element_ty), col < classes)
    found = soft * (beta * of_q + (1 - beta) * of_p)
    if target is not None:
        found += hard * (tl.log(h_total) - (picked - h_top))
    tl.store(loss + row, found)
    if KIND != 0 and out is not None:
        for start in range(0, classes, PIECE):
            col = start + tl.arange(0, PIECE)
            u = _load(student, student_bias, col, classes)
            log_p = u * inverse - s_top - s_log
            log_q = _load(teacher, teacher_bias, col, classes) * inverse - t_top - t_log
            p = exp(log_p)
            p_over = log_p - log_q
            part = factor
            if KIND == 2:
                _, p_over = _over_mixture(log_p, log_q, beta)
                part = factor * (1 - beta)
            g = tl.where(part != 0, tl.where(p > 0, part * p * (p_over - of_p), 0.0), 0.0)
            if target is not None:
                g += up * (exp(u - h_top) * h_share - tl.where(col == y, 1.0, 0.0))
            g = tl.where((factor != 0) | (up != 0), g, 0.0)
            tl.store(out + col, g.to(out.dtype.element_ty), col < classes)


_sweep = Sweep("distillation_triton", Kernels(), lambda x: x.dtype)
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
