"""Distillation on a GPU: the library's products a block of rows at a time, and one Triton kernel between them.

A program takes a row of both logits and walks over its classes, in pieces so that they may be any number: once for the
two log-sum-exps, once for the divergence, and once more for the gradient where that needs the divergence first. Every
other walk goes backwards and begins with what the caches still hold. Each thread keeps its own maximum and sums until
the end of a walk, so that nothing waits for anything on the way. Logarithms are of base 2, which costs a multiplication
less at each exponential.
"""

import torch
import triton
import triton.language as tl

from fastlm.ops.distillation_kernels import ACCEPTS, Sweep
from fastlm.ops.head_kernels_triton import scaled, width
from fastlm.ops.loss_kernels import DIVERGENCES
from fastlm.ops.math_kernels_triton import exp
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch, loses

PIECE = 4096  # 16 numbers of 16 bits for each thread: benchmarks/LOG.md 2026-11-26


def cannot(student, weight, *rest):
    return cannot_here(student) or (None if weight.shape[0] else "there are no classes")


def plan(student, teacher, target, kind, beta, soft, hard, scale, loss, out):
    """Return (kernel, grid, arguments) of `distil` in loss_kernels.py."""
    rows, classes = student.z.shape
    each = 16 // student.z.element_size()  # numbers that a thread reads at once
    piece = min(max(triton.next_power_of_2(classes), 128 * each), PIECE)
    return rows_kernel, (rows,), dict(
        student=student.z, student_row=student.z.stride(0), student_bias=student.bias, teacher=teacher.z,
        teacher_row=teacher.z.stride(0), teacher_bias=teacher.bias, inverse=float(student.scale), target=target,
        beta=float(beta), soft=float(soft), hard=float(hard), scale=scale, loss=loss, out=out,
        out_row=0 if out is None else out.stride(0), classes=classes,
        wide=min(width(z) for z in (student.z, teacher.z, out) if z is not None), KIND=DIVERGENCES.index(kind),
        LANES=piece // each, EACH=each, num_warps=max(piece // 512, 4), sanitize_overflow=False)


class Kernels:
    """`distil` and `scaled` of `loss_kernels.LossKernels`, in Triton."""

    native = None  # torch makes the products
    scaled = staticmethod(scaled)

    def distil(self, student, teacher, target, kind, beta, soft, hard, scale, out):
        loss = torch.empty_like(scale)
        launch(plan, student, teacher, target, kind, beta, soft, hard, scale, loss, out)
        return loss


@triton.jit
def _load(z, bias, col, classes, wide):
    """Return logits; from the last class to `wide` -∞ must lie there, as it is found further on."""
    u = tl.load(z + col, col < wide, -float("inf")).to(tl.float32)
    if bias is not None:
        u += tl.load(bias + col, col < classes, 0.0)
    return u


@triton.jit
def _base(top):
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _add(total, top, base, u, rate):
    """Add the exponentials of `u` `[LANES, EACH]` to each lane's total, in units of 2^(top·rate) and then of base."""
    return total * tl.exp2((top - base) * rate) + tl.sum(tl.exp2((u - base[:, None]) * rate), 1)


@triton.jit
def _over_mixture(log_p, log_q, beta):
    """Return log(q/m) and log(p/m), m = β·q + (1 - β)·p, both from the logarithm of m over the larger of p and q."""
    gap = log_q - log_p
    less = tl.exp2(-tl.abs(gap))
    above = tl.log2(tl.where(gap > 0, beta + (1 - beta) * less, (1 - beta) + beta * less))
    return tl.where(gap > 0, -above, gap - above), tl.where(gap > 0, -gap - above, -above)


@triton.jit
def _hard(g, u, top, up, share, col, y):
    """Add the gradient of the cross-entropy."""
    return g + up * (exp(u - top) * share - tl.where(col == y, 1.0, 0.0))


@triton.jit
def rows_kernel(student, student_row, student_bias, teacher, teacher_row, teacher_bias, inverse, target, beta, soft,
                hard, scale, loss, out, out_row, classes, wide, KIND: tl.constexpr, LANES: tl.constexpr,
                EACH: tl.constexpr):
    LOG_2: tl.constexpr = 0.6931471805599453
    rate = inverse * (1 / LOG_2)
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    rim = classes + tl.arange(0, 16)
    tl.store(student + rim, -float("inf"), rim < wide)
    tl.store(teacher + rim, -float("inf"), rim < wide)
    tl.debug_barrier()
    lane = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    pieces = tl.cdiv(classes, LANES * EACH)
    s_tops = tl.full((LANES,), -float("inf"), tl.float32)
    t_tops = tl.full((LANES,), -float("inf"), tl.float32)
    s_totals = tl.zeros((LANES,), tl.float32)
    t_totals = tl.zeros((LANES,), tl.float32)
    h_totals = tl.zeros((LANES,), tl.float32)
    for piece in range(0, pieces):
        col = piece * (LANES * EACH) + lane
        u = _load(student, student_bias, col, classes, wide)
        v = _load(teacher, teacher_bias, col, classes, wide)
        new = tl.maximum(s_tops, tl.max(u, 1))
        s_totals = _add(s_totals, s_tops, _base(new), u, rate)
        if target is not None:
            h_totals = _add(h_totals, s_tops, _base(new), u, 1 / LOG_2)
        s_tops = new
        new = tl.maximum(t_tops, tl.max(v, 1))
        t_totals = _add(t_totals, t_tops, _base(new), v, rate)
        t_tops = new
    s_top, t_top = tl.max(s_tops, 0), tl.max(t_tops, 0)
    s_log = tl.log2(tl.sum(s_totals * tl.exp2((s_tops - _base(s_top)) * rate), 0))
    t_log = tl.log2(tl.sum(t_totals * tl.exp2((t_tops - _base(t_top)) * rate), 0))
    h_total = tl.full((), 1.0, tl.float32)
    y = tl.full((), -1, tl.int32)
    if target is not None:
        h_total = tl.sum(h_totals * exp(s_tops - _base(s_top)), 0)
        t = tl.load(target + row)
        y = tl.where((t >= 0) & (t < classes), t, -1).to(tl.int32)
    h_share = 1 / h_total
    factor = tl.zeros((), tl.float32)
    up = tl.zeros((), tl.float32)
    if out is not None:
        out += row * out_row
        factor = tl.load(scale + row) * soft * inverse
        up = tl.load(scale + row) * hard
    of_q = tl.zeros((LANES,), tl.float32)
    of_p = tl.zeros((LANES,), tl.float32)
    for back in range(0, pieces):
        col = (pieces - 1 - back) * (LANES * EACH) + lane
        u = _load(student, student_bias, col, classes, wide)
        log_p = (u - s_top) * rate - s_log
        log_q = (_load(teacher, teacher_bias, col, classes, wide) - t_top) * rate - t_log
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        q_over, p_over = log_q - log_p, log_p - log_q
        if KIND == 2:
            q_over, p_over = _over_mixture(log_p, log_q, beta)
        if KIND != 1:
            of_q += tl.sum(tl.where(q == 0, 0.0, q * q_over), 1)
        if KIND != 0:
            of_p += tl.sum(tl.where(p == 0, 0.0, p * p_over), 1)
        if KIND == 0 and out is not None:
            g = factor * (p - q)
            if target is not None:
                g = _hard(g, u, s_top, up, h_share, col, y)
            g = tl.where((factor != 0) | (up != 0), g, 0.0)
            tl.store(out + col, g.to(out.dtype.element_ty), col < wide)
    q_sum, p_sum = tl.sum(of_q, 0), tl.sum(of_p, 0)
    found = tl.zeros((), tl.float32)
    if KIND != 1:
        found += tl.where(beta > 0, beta * q_sum, 0.0)
    if KIND != 0:
        found += tl.where(beta < 1, (1 - beta) * p_sum, 0.0)
    found *= soft * LOG_2
    if target is not None:
        picked = tl.load(student + y, y >= 0, 0.0).to(tl.float32)
        if student_bias is not None:
            picked += tl.load(student_bias + y, y >= 0, 0.0)
        found += hard * (tl.log(h_total) - (tl.where(y < 0, 0.0, picked) - s_top))
    tl.store(loss + row, found)
    if KIND != 0 and out is not None:
        for piece in range(0, pieces):
            col = piece * (LANES * EACH) + lane
            u = _load(student, student_bias, col, classes, wide)
            log_p = (u - s_top) * rate - s_log
            log_q = (_load(teacher, teacher_bias, col, classes, wide) - t_top) * rate - t_log
            p = tl.exp2(log_p)
            p_over = log_p - log_q
            part = factor * LOG_2
            if KIND == 2:
                _, p_over = _over_mixture(log_p, log_q, beta)
                part *= 1 - beta
            g = tl.where(part != 0, tl.where(p == 0, 0.0, part * p * (p_over - p_sum)), 0.0)
            if target is not None:
                g = _hard(g, u, s_top, up, h_share, col, y)
            g = tl.where((factor != 0) | (up != 0), g, 0.0)
            tl.store(out + col, g.to(out.dtype.element_ty), col < wide)


_sweep = Sweep("distillation_triton", Kernels(), lambda x: x.dtype)
run = _sweep.run

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]
