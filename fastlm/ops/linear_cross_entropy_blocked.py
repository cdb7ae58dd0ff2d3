"""Linear cross-entropy in plain PyTorch, a block of rows at a time, with one buffer for a block's logits.

With reduction "mean" or "sum" the gradients are made in the forward pass, while a block's probabilities are at hand,
and backward only scales them. With "none" each row's upstream gradient is still unknown there, so backward
computes the blocks again.
"""

import torch

from fastlm.autograd import Differentiable
from fastlm.ops.linear_cross_entropy import reference

ACCEPTS = {"mean", "sum", "none", "bias", "class weights", "ignored targets", "all targets ignored", "label smoothing",
           "everything", "several chunks", "one class", "one row", "no rows", "outliers", "strided input"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A block has at least so many rows, to keep the products efficient, and more where that many bytes hold more
# (float32 logits). benchmarks/LOG.md 2026-11-23.
MIN_ROWS = 256
BLOCK_BYTES = 32 << 20


def cannot(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options):
    if options is not None:
        return "options asks for PyTorch's own chunked path"
    if target.is_floating_point():
        return "targets are class probabilities"
    if linear_weight.dim() > 2:
        return "the loss has more than one dimension"
    if linear_weight.dtype != input.dtype or (linear_bias is not None and linear_bias.dtype != input.dtype):
        return "input, linear_weight and linear_bias differ in dtype"
    return None


def loses(input, *rest):
    if input.is_cuda:
        return "not yet run on a GPU"
    if input.dtype in (torch.bfloat16, torch.float16):
        return "slower than torch in 16 bits, though smaller: benchmarks/LOG.md 2026-11-23"
    return None


def run(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options):
    tensors = (input, linear_weight, target, linear_bias, None if weight is None else weight.detach())
    # Under autocast stock takes the loss of 16-bit logits in float32.
    single = torch.is_autocast_enabled(input.device.type) and input.dtype is not torch.float64
    return _linear_cross_entropy(tensors, reduction, ignore_index, label_smoothing, single)[0]


def forward(tensors, needs, reduction, ignore_index, smoothing, single):
    x, weight, target, _, class_weight = tensors
    _check_targets(target, weight.shape[0], ignore_index)
    counts = _counts(target, class_weight, ignore_index, _accumulator(x))
    total = counts.sum() if reduction == "mean" else counts.new_ones(())
    now = needs if reduction != "none" else [False] * len(needs)
    # A row that counts nothing must give zero, not 0/0, when every row is ignored.
    scale = torch.where(target != ignore_index, 1 / total, 0)
    losses, grads = _sweep(tensors, scale, now, ignore_index, smoothing)
    loss = losses if reduction == "none" else losses.sum() / total
    return [loss.to(_accumulator(x) if single else x.dtype), *grads]


def fake(tensors, needs, reduction, ignore_index, smoothing, single):
    x, weight, target, bias, _ = tensors
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=_accumulator(x) if single else x.dtype)
    now = reduction != "none"
    return [loss, *(t.new_empty(t.shape) for t, i in ((x, 0), (weight, 1), (bias, 3)) if now and needs[i])]


def backward(grads, saved, tensors, needs, reduction, ignore_index, smoothing, single):
    x, _, target, _, _ = tensors
    if reduction == "none":
        scale = torch.where(target != ignore_index, grads[0].to(_accumulator(x)), 0)
        _, found = _sweep(tensors, scale, needs, ignore_index, smoothing)
    else:
        found = [(g * grads[0]).to(g.dtype) for g in saved]
    found = iter(found)
    return [next(found) if needs[i] else None for i in range(len(tensors))]


def _check_targets(target, classes, ignore_index):
    """Raise where a class index is out of range; on CUDA reading it would wait for the device."""
    if target.is_cuda:
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bad.any():
        raise IndexError(f"linear_cross_entropy: target {target[bad][0].item()} is out of bounds for {classes} classes")


def _sweep(tensors, scale, needs, ignore_index, smoothing):
    """Return each row's loss, and the gradients of Σ scale·loss for the inputs that need one.

    The block of logits is overwritten by its probabilities, then by the gradient of its logits; `scale` [N] is
    applied to the narrow operands of the products instead of to the block.
    """
    x, weight, target, bias, class_weight = tensors
    dtype = _accumulator(x)
    (n, hidden), classes = x.shape, weight.shape[0]
    rows = min(max(n, 1), max(MIN_ROWS, BLOCK_BYTES // (4 * max(classes, 1))))
    logits = x.new_empty(rows, classes)
    block = logits if dtype == x.dtype else torch.empty(rows, classes, dtype=dtype, device=x.device)
    even = _even_share(class_weight, smoothing, classes, dtype)
    counts = _counts(target, class_weight, ignore_index, dtype)
    index = torch.where(target != ignore_index, target, 0).long()

    losses = torch.zeros(n, dtype=dtype, device=x.device)
    d_x = x.new_empty(n, hidden) if needs[0] else None
    d_weight = torch.zeros(classes, hidden, dtype=dtype, device=x.device) if needs[1] else None
    d_bias = torch.zeros(classes, dtype=dtype, device=x.device) if needs[3] else None
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        z, p = logits[: part.stop - start], block[: part.stop - start]
        if bias is None:
            torch.mm(x[part], weight.t(), out=z)
        else:
            torch.addmm(bias, x[part], weight.t(), out=z)
        if p is not z:
            p.copy_(z)
        hard, onehot = (1 - smoothing) * counts[part], index[part, None]
        loss = _soften(p, hard, onehot, even)
        losses[part] = torch.where(target[part] != ignore_index, loss, 0)
        if any(needs):
            factor = scale[part] if even is not None else scale[part] * hard
            _logits_gradient(p, hard, onehot, even)
            if p is not z:
                z.copy_(p)
            _accumulate(z, x[part], weight, factor, None if d_x is None else d_x[part], d_weight, d_bias)
    found = [None if d is None else d.to(x.dtype) for d in (d_x, d_weight, d_bias)]
    return losses, [d for d in found if d is not None]


def _soften(z, hard, onehot, even):
    """Turn logits [R, V] into probabilities in place; return Σ -q·log p of each row, [R].

    log Σ exp z = max z - log max p: the largest probability is at least 1/V, so its logarithm is exact, and softmax
    with two maxima is three times faster on a CPU than log_softmax with exp (benchmarks/LOG.md 2026-11-23).
    """
    top, at_target = z.amax(1), z.gather(1, onehot).squeeze(1)
    weighted = None if even is None else z @ even
    lse = top - torch.softmax(z, 1, out=z).amax(1).log()
    loss = hard * (lse - at_target)
    return loss if even is None else loss + even.sum() * lse - weighted


def _logits_gradient(p, hard, onehot, even):
    """Turn probabilities [R, V] into (Σ q)·p - q in place; without `even`, into that over `hard`: p - onehot."""
    if even is None:
        p.scatter_add_(1, onehot, p.new_full(onehot.shape, -1))
    else:
        p.mul_((hard + even.sum())[:, None]).sub_(even).scatter_add_(1, onehot, -hard[:, None])


def _accumulate(d_logits, x, weight, factor, d_x, d_weight, d_bias):
    """Add a block's share to the gradients; `factor` [R] scales the narrow operands, not the block [R, V]."""
    if d_x is not None:
        torch.mm(d_logits, weight, out=d_x)
        d_x.mul_(factor[:, None])
    if d_weight is not None:
        x = (x * factor[:, None]).to(x.dtype)
        if d_weight.dtype == x.dtype:
            d_weight.addmm_(d_logits.t(), x)
        else:
            d_weight += d_logits.t() @ x
    if d_bias is not None:
        d_bias += d_logits.t().to(d_bias.dtype) @ factor


def _counts(target, class_weight, ignore_index, dtype):
    """Return how much each row's target counts, [N]: its class weight, or 1, and 0 where it is ignored."""
    valid = target != ignore_index
    if class_weight is None:
        return valid.to(dtype)
    return class_weight.to(dtype)[torch.where(valid, target, 0).long()] * valid


def _even_share(class_weight, smoothing, classes, dtype):
    """Return what label smoothing adds to the target of each class, [V], or None."""
    if smoothing == 0:
        return None
    share = torch.full((classes,), smoothing / classes, dtype=dtype)
    return share if class_weight is None else class_weight.to(dtype) * share.to(class_weight.device)


def _accumulator(x):
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _reference(tensors, reduction, ignore_index, smoothing, single):
    x, weight, target, bias, class_weight = tensors
    loss = reference(x, weight, target, bias, class_weight, reduction, ignore_index, smoothing, None)
    return (loss.to(_accumulator(x)) if single else loss,)


_linear_cross_entropy = Differentiable(
    "linear_cross_entropy", statics="str reduction, int ignore_index, float smoothing, bool single", outputs=1,
    forward=forward, fake=fake, backward=backward, reference=_reference)
