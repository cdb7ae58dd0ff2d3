"""Cross entropy in Triton: forward reads the logits once, backward reads them once and writes their gradient once.

A program takes a row of logits in pieces and keeps a running maximum and sum, so a vocabulary may have any size.
The maximum and the logarithm of the sum are saved apart: their sum, the log-sum-exp, rounds away what large logits
differ by. The host never waits for the device: sums and the mean's divisor stay there.
"""

import torch
import triton
import triton.language as tl

from fastlm.autograd import Differentiable
from fastlm.ops.cross_entropy import reference
from fastlm.ops.math_kernels_triton import exp
from fastlm.ops.triton_kernels import DTYPES, cannot_here, launch, like
from fastlm.ops.triton_kernels import loses as loses_here

__all__ = ["ACCEPTS", "DTYPES", "cannot", "loses", "run"]

ACCEPTS = {"1 classes", "127 classes", "128 classes", "129 classes", "many classes", "none", "sum", "ignored",
           "ignored, none", "ignore class 3", "all ignored", "class weights", "everything, none", "everything, sum",
           "everything, mean", "smoothing of one", "outliers", "minus infinity", "no rows", "no rows, none", "images",
           "classes last in memory", "every other column"}
PIECE = 8192


def cannot(input, target, weight, ignore_index, reduction, label_smoothing):
    if target.is_floating_point():
        return "targets are probabilities"
    if input.size(1) == 0:
        return "there are no classes"
    return cannot_here(input)


def loses(input, *rest):
    return loses_here(input)


def run(input, target, weight, ignore_index, reduction, label_smoothing):
    logits = input.movedim(1, -1)
    logits = logits.reshape(target.numel(), logits.size(-1))
    weight = None if weight is None else weight.detach()
    loss = _cross_entropy((logits, target.reshape(-1), weight), ignore_index, reduction, label_smoothing)[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def forward(tensors, needs, ignore_index, reduction, smoothing):
    logits, target, weight = tensors
    rows = target.numel()
    saved = [logits.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    if reduction == "mean":  # sums of both at once, at addresses that are aligned
        both = logits.new_empty(2, rows + -rows % 4, dtype=torch.float32)[:, :rows]
        counts, losses = both.unbind()
    else:
        counts, losses = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    launch(plan_forward, logits, target, weight, _weight_sum(weight, smoothing), losses, counts, *saved, ignore_index,
           smoothing)
    if reduction == "none":
        loss = losses.to(logits.dtype)
    elif reduction == "sum":
        loss = losses.sum().to(logits.dtype)
    else:
        count, total = both.sum(1).unbind()
        loss = torch.div(total, count, out=logits.new_empty(()))
        saved.append(count)
    return [loss, *saved] if needs[0] else [loss]


def backward(grads, saved, tensors, needs, ignore_index, reduction, smoothing):
    logits, target, weight = tensors
    highest, log_sum, *total = saved
    dlogits = None
    if needs[0]:
        dlogits = like(logits)
        launch(plan_backward, logits, target, weight, _weight_sum(weight, smoothing), highest, log_sum, grads[0],
               total[0] if total else None, dlogits, ignore_index, smoothing)
    return [dlogits, None, torch.zeros_like(weight) if needs[2] else None]


def _weight_sum(weight, smoothing):
    """Return the sum of the class weights, which only smoothing asks for."""
    return weight.sum(dtype=torch.float32) if weight is not None and smoothing > 0 else None


def plan_forward(logits, target, weight, weight_sum, losses, counts, highest, log_sum, ignore_index, smoothing):
    """Return (kernel, grid, arguments)."""
    shared = _shared(logits, target, weight, weight_sum, ignore_index, smoothing)
    # Few threads that have much in flight, 128 bytes each: a reduction costs more of them more.
    shared["num_warps"] = max(shared["PIECE"] * logits.element_size() // 4096, 4)
    return forward_kernel, (target.numel(),), shared | dict(losses=losses, counts=counts, highest=highest,
                                                            log_sum=log_sum)


def plan_backward(logits, target, weight, weight_sum, highest, log_sum, dloss, total, dlogits, ignore_index,
                  smoothing):
    """Return (kernel, grid, arguments); `total` is what a mean divides by."""
    arguments = dict(highest=highest, log_sum=log_sum, dloss=dloss, dloss_row=dloss.stride(0) if dloss.dim() else 0,
                     total=total, dx=dlogits)
    arguments |= _shared(logits, target, weight, weight_sum, ignore_index, smoothing)
    return backward_kernel, (target.numel(),), arguments


def _shared(logits, target, weight, weight_sum, ignore_index, smoothing):
    classes = logits.size(1)
    piece = min(triton.next_power_of_2(classes), PIECE)
    # debug makes the assertion that a target is in range real, as in stock PyTorch.
    return dict(x=logits, x_row=logits.stride(0), x_col=logits.stride(1), target=target, target_row=target.stride(0),
                weight=weight, weight_col=0 if weight is None else weight.stride(0), weight_sum=weight_sum,
                classes=classes, ignore_index=ignore_index, smoothing=float(smoothing), SMOOTH=smoothing > 0,
                PIECE=piece, num_warps=min(max(piece // 512, 4), 16), debug=True, sanitize_overflow=False)


@triton.jit
def _target(target, target_row, row, weight, weight_col, classes, ignore_index):
    """Return a row's target (0 where it is ignored), whether it counts, and its class weight (0 where it does not)."""
    y = tl.load(target + row * target_row)
    kept = y != ignore_index
    inside = (y >= 0) & (y < classes)
    tl.device_assert(inside | (y == ignore_index), "cross_entropy: target out of range")
    y = tl.where(kept & inside, y, 0)
    share = kept.to(tl.float32)
    if weight is not None:
        share = tl.where(kept, tl.load(weight + y * weight_col).to(tl.float32), 0.0)
    return y, kept, share


@triton.jit
def _spread(weight_sum, classes, smoothing):
    """Return (ε/C) Σ_c w_c."""
    share = smoothing
    if weight_sum is not None:
        share = smoothing / classes * tl.load(weight_sum)
    return share


@triton.jit
def forward_kernel(x, x_row, x_col, target, target_row, weight, weight_col, weight_sum, losses, counts, highest,
                   log_sum, classes, ignore_index, smoothing, SMOOTH: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    y, kept, share = _target(target, target_row, row, weight, weight_col, classes, ignore_index)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, classes, PIECE):
        col = start + tl.arange(0, PIECE)
        z = tl.load(x + col.to(tl.int64) * x_col, col < classes, -float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(z, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * exp(top - base) + tl.sum(exp(z - base), 0)
        top = new
        if SMOOTH:
            if weight is not None:
                z *= tl.load(weight + col.to(tl.int64) * weight_col, col < classes, 0.0).to(tl.float32)
            weighted += tl.sum(tl.where(col < classes, z, 0.0), 0)
    log_total = tl.log(total)
    loss = share * (log_total - (tl.load(x + y * x_col).to(tl.float32) - top))
    if SMOOTH:
        spread = _spread(weight_sum, classes, smoothing)
        loss = (1 - smoothing) * loss + spread * (log_total + top) - smoothing / classes * weighted
    tl.store(losses + row, tl.where(kept, loss, 0.0))
    tl.store(counts + row, share)
    tl.store(highest + row, top)
    tl.store(log_sum + row, log_total)


@triton.jit
def backward_kernel(x, x_row, x_col, target, target_row, weight, weight_col, weight_sum, highest, log_sum, dloss,
                    dloss_row, total, dx, classes, ignore_index, smoothing, SMOOTH: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    dx += row * classes
    y, kept, share = _target(target, target_row, row, weight, weight_col, classes, ignore_index)
    upstream = tl.load(dloss + row * dloss_row).to(tl.float32)
    if total is not None:
        upstream = upstream / tl.load(total)
    hit = share
    mass = share
    if SMOOTH:
        hit = share * (1 - smoothing)
        mass = hit + _spread(weight_sum, classes, smoothing)
    top, log_total = tl.load(highest + row), tl.load(log_sum + row)
    for start in range(0, classes, PIECE):
        col = start + tl.arange(0, PIECE)
        z = tl.load(x + col.to(tl.int64) * x_col, col < classes, 0.0).to(tl.float32)
        g = mass * exp(z - top - log_total) - tl.where(col == y.to(tl.int32), hit, 0.0)
        if SMOOTH:
            rest = smoothing / classes
            if weight is not None:
                rest *= tl.load(weight + col.to(tl.int64) * weight_col, col < classes, 0.0).to(tl.float32)
            g -= rest
        g = tl.where(kept, g * upstream, 0.0)
        tl.store(dx + col, g.to(dx.dtype.element_ty), col < classes)


def _reference(tensors, ignore_index, reduction, smoothing):
    return (reference(*tensors, ignore_index, reduction, smoothing),)


def _fake(tensors, needs, ignore_index, reduction, smoothing):
    logits, target, _ = tensors
    rows = logits.new_empty(target.shape, dtype=torch.float32)
    loss = logits.new_empty(target.shape if reduction == "none" else ())
    saved = [rows, torch.empty_like(rows), *([rows.new_empty(())] if reduction == "mean" else [])]
    return [loss, *saved] if needs[0] else [loss]


_cross_entropy = Differentiable("cross_entropy_triton", statics="int ignore_index, str reduction, float smoothing",
                                outputs=1, forward=forward, fake=_fake, backward=backward, reference=_reference)
