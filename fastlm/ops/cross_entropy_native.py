"""Cross entropy by csrc/loss.h: forward reads the logits once, backward reads them once and writes a gradient once."""

import torch

import fastlm._native as _native
from fastlm.autograd import Differentiable
from fastlm.ops.cpu import cannot_here, unmeasured
from fastlm.ops.cross_entropy import LEAST_LOGITS, check_range, reference
from fastlm.ops.linear_cross_entropy import counts_of
from fastlm.ops.loss_kernels import Logits, LossKernels, Targets, new_sums
from fastlm.ops.tensors import accumulator, adjacent

ACCEPTS = {"1 classes", "127 classes", "128 classes", "129 classes", "many classes", "none", "sum", "ignored",
           "ignored, none", "ignore class 3", "all ignored", "class weights", "everything, none", "everything, sum",
           "everything, mean", "smoothing of one", "outliers", "no rows", "no rows, none", "images",
           "classes last in memory", "every other column", "probabilities"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LEAST_CLASSES = 1000

_kernels = LossKernels(_native)


def cannot(input, target, weight, ignore_index, reduction, label_smoothing):
    if reason := cannot_here(input, DTYPES):
        return reason
    if target.is_floating_point() and target.requires_grad:
        return "the target needs a gradient"
    if target.is_floating_point() and torch.promote_types(target.dtype, input.dtype) is not input.dtype:
        return f"the loss of {input.dtype} and probabilities in {target.dtype} is of the wider dtype"
    if input.size(1) == 0:
        return "there are no classes"
    return None


def loses(input, *rest):
    if unknown := unmeasured(_native):
        return unknown
    if input.dtype is torch.float64:
        return "not yet measured in float64"
    if input.size(1) < LEAST_CLASSES or input.numel() < LEAST_LOGITS:
        return f"slower than torch below {LEAST_CLASSES} classes or {LEAST_LOGITS} logits: benchmarks/LOG.md 2026-11-24"
    return None


def run(input, target, weight, ignore_index, reduction, label_smoothing):
    logits = _rows(input)
    weight = None if weight is None else weight.detach()
    shape = input.shape[:1] + input.shape[2:]
    target = _rows(target.detach().to(input.dtype)) if target.is_floating_point() else target.reshape(-1)
    loss = _cross_entropy((logits, target, weight), ignore_index, reduction, label_smoothing)[0]
    return loss.reshape(shape) if reduction == "none" else loss


def _rows(x):
    x = x.movedim(1, -1)
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def forward(tensors, needs, ignore_index, reduction, smoothing):
    logits, target, weight = tensors
    if not target.is_floating_point():  # a graph or a vmap comes here unchecked
        check_range("cross_entropy: target", target, logits.size(1), ignore_index)
    call = _Rows(logits, target, weight, ignore_index, smoothing)
    sums = new_sums(len(logits), call.dtype, logits.device)
    _kernels.read(call.logits, call.targets, sums)
    highest, total, _, picked, weighted, mass = sums.unbind(1)
    log_total = total.log()
    loss = call.hits * (log_total - (picked - highest))
    if call.spreads:
        loss = loss + (mass * (highest + log_total) - weighted)
    loss = torch.where(call.kept, loss, 0)
    counted = call.counts.sum() if reduction == "mean" else loss.new_ones(())
    result = loss if reduction == "none" else loss.sum() / counted
    return [result.to(logits.dtype), *([sums, counted] if needs[0] else [])]


def backward(grads, saved, tensors, needs, ignore_index, reduction, smoothing):
    logits, target, weight = tensors
    d_logits = None
    if needs[0]:
        sums, counted = saved
        call = _Rows(logits, target, weight, ignore_index, smoothing)
        scale = torch.where(call.kept, grads[0].to(call.dtype) / counted, 0)
        up = (call.hits + sums[:, 5]) * scale
        rows = torch.stack((sums[:, 0], sums[:, 1], up, scale, call.hits * scale), 1)
        d_logits = logits.new_empty(logits.shape)
        _kernels.gradient((call.logits, call.targets), rows, d_logits)
    return [d_logits, *(torch.zeros_like(t) if need else None for t, need in zip(tensors[1:], needs[1:], strict=True))]


class _Rows:
    """What forward and backward both need of rows of logits and their targets."""

    def __init__(self, logits, target, weight, ignore_index, smoothing):
        self.dtype = accumulator(logits.dtype)
        soft, index, kept = None, None, logits.new_ones(len(logits), dtype=torch.bool)
        if target.is_floating_point():
            soft = adjacent(target)
            self.counts, self.hits = kept.to(self.dtype), logits.new_zeros(len(logits), dtype=self.dtype)
        else:
            index, kept = target.contiguous(), target != ignore_index
            self.counts = counts_of(target, weight, ignore_index, self.dtype)
            self.hits = (1 - smoothing) * self.counts
        self.kept, even = kept, smoothing / logits.shape[1]
        self.spreads = soft is not None or even > 0
        weight = weight.to(self.dtype).contiguous() if weight is not None and self.spreads else None
        self.logits = Logits(adjacent(logits))
        self.targets = Targets(index, 0, weight, soft, 1 - smoothing, even)


def _reference(tensors, ignore_index, reduction, smoothing):
    return (reference(*tensors, ignore_index, reduction, smoothing),)


def _fake(tensors, needs, ignore_index, reduction, smoothing):
    logits, *_ = tensors
    dtype = accumulator(logits.dtype)
    loss = logits.new_empty(logits.shape[:1] if reduction == "none" else ())
    saved = [logits.new_empty((logits.shape[0], 6), dtype=dtype), logits.new_empty((), dtype=dtype)]
    return [loss, *saved] if needs[0] else [loss]


_cross_entropy = Differentiable("cross_entropy_native", statics="int ignore_index, str reduction, float smoothing",
                                outputs=1, forward=forward, fake=_fake, backward=backward, reference=_reference)
