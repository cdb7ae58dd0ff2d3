"""cross_entropy: -w_y log softmax(x)_y for a target class y, -Σ_c t_c w_c log softmax(x)_c for probabilities t.

Label smoothing ε mixes in (ε/C) Σ_c -w_c log softmax(x)_c. The mean divides by Σ w_y over the targets that are
not ignored (by the number of targets where they are probabilities). With W = Σ_c w_c, one loss has the gradient
((1-ε) w_y + ε W/C) softmax(x) - (1-ε) w_y onehot(y) - (ε/C) w.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as legacy

from fastlm.autograd import autocasts
from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import check_tensors, readable

LEAST_LOGITS = 4_000_000  # on the CPU: benchmarks/LOG.md 2026-11-24


def _shortcut(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
              label_smoothing=0.0):
    if not 0 < input.numel() < LEAST_LOGITS or not input.is_cpu or not 0 <= label_smoothing <= 1:
        return None
    if weight is not None and weight.dtype is not input.dtype:
        return None
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


@at_once(_shortcut)
def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None,
                  size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
                  reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of unnormalised logits and targets.

    Args:
        input: logits `[C]`, `[N, C]` or `[N, C, d1, ...]`.
        target: class indices (int64 or uint8, `input`'s shape without C), or probabilities of `input`'s shape.
        weight: `[C]`, a factor for each class, of `input`'s dtype; no gradient flows to it.
        size_average, reduce: deprecated in torch; they override `reduction`.
        ignore_index: targets of this index add neither loss nor gradient.
        reduction: "none" (one loss a target), "mean" or "sum".
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or with "none" a tensor of the targets' shape; of `input`'s dtype, float32 under autocast.

    Raises:
        TypeError: `input`, `target` or `weight` is no tensor.
        ValueError: `reduction` is unknown, or batch sizes differ.
        IndexError: a target is out of range (on the CPU; on CUDA values are never read by the host).
        RuntimeError: any other shape, dtype or device does not fit.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    input, target, weight = _checked(input, target, weight, ignore_index)
    batched = input.dim() > 1
    if not batched:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    loss = op(input, target, weight, ignore_index, reduction, float(label_smoothing))
    return loss if batched or reduction != "none" else loss.squeeze(0)


def _checked(input, target, weight, ignore_index):
    check_tensors("cross_entropy", dict(input=input, target=target, weight=weight), ("weight",))
    if input.dim() == 0 or not input.is_floating_point():
        raise RuntimeError(f"cross_entropy: input is {input.dtype}{list(input.shape)}, expected floating "
                           "logits [C], [N, C] or [N, C, d1, ...]")
    classes = input.size(min(1, input.dim() - 1))
    if autocasts(input.device.type):
        input, weight = (x if x is None or x.dtype is torch.float64 else x.float() for x in (input, weight))
    if weight is not None and (weight.shape != (classes,) or weight.dtype != input.dtype):
        raise RuntimeError(f"cross_entropy: weight is {weight.dtype}{list(weight.shape)}, expected "
                           f"{input.dtype}[{classes}]")
    if target.shape == input.shape:
        return input, _probabilities(target, ignore_index), weight
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"cross_entropy: target is {target.dtype}, expected class indices (torch.int64 or "
                           f"torch.uint8), or probabilities of input's shape {list(input.shape)}")
    expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape != expected:
        kind = ValueError if target.shape[:1] != expected[:1] else RuntimeError
        raise kind(f"cross_entropy: target has shape {list(target.shape)}, expected {list(expected)} for an input "
                   f"of shape {list(input.shape)}")
    target = target.long()
    check_range("cross_entropy: target", target, classes, ignore_index)
    return input, target, weight


def _probabilities(target, ignore_index):
    if not target.is_floating_point():
        raise RuntimeError(f"cross_entropy: target is {target.dtype} of input's shape, expected floating "
                           "probabilities")
    if ignore_index >= 0:
        raise RuntimeError(f"cross_entropy: ignore_index is {ignore_index}, which probabilities as targets do not "
                           "support")
    return target


def check_range(name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError where a target that the host may read is no class and not `ignore_index`."""
    if not readable(target):
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        ignored = "" if 0 <= ignore_index < classes else f" or ignore_index {ignore_index}"
        raise IndexError(f"{name}{where} is {target[tuple(where)].item()}, expected 0 to {classes - 1}{ignored}")


def reference(input, target, weight, ignore_index, reduction, label_smoothing):
    classes = input.size(1)
    log_probs = input.log_softmax(1)
    factors = input.new_ones(classes) if weight is None else weight.detach()
    weighted = log_probs * factors.view(-1, *[1] * (input.dim() - 2))
    if target.is_floating_point():
        target = target * (1 - label_smoothing) + label_smoothing / max(classes, 1)
        loss, total = -(weighted * target).sum(1), input[:, :1].numel()
    else:
        kept = target != ignore_index
        target = target.where(kept, 0)
        picked = factors[target].where(kept, 0)
        loss = -weighted.gather(1, target.unsqueeze(1)).squeeze(1)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing / classes * weighted.sum(1)
        loss, total = loss.where(kept, 0), picked.sum()
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / total


def stock(input, target, weight, ignore_index, reduction, label_smoothing):
    weight = None if weight is None else weight.detach()
    return F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction,
                           label_smoothing=label_smoothing)


def samples(scale: str, dtype: torch.dtype, device: str):
    def logits(*shape, gain=1.0):
        return (gain * torch.randn(shape, device=device)).to(dtype)

    def classes(x, ignored=0.0, index=-100):
        target = torch.randint(max(x.size(1), 1), (x.size(0), *x.shape[2:]), device=device)
        return target.masked_fill(torch.rand(target.shape, device=device) < ignored, index)

    def call(name, x, target=None, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        target = classes(x) if target is None else target
        return Sample(name, (x, target, weight, ignore_index, reduction, label_smoothing))

    if scale == "bench":
        for rows, cols in ((1024, 10000), (1024, 50257), (512, 131072)):
            yield call(f"{rows}x{cols}", logits(rows, cols))
        return
    for cols in (1, 2, 127, 128, 129, 1000):
        yield call(f"{cols} classes", logits(3, cols))
    yield call("many classes", logits(2, 9001), label_smoothing=0.1)
    for reduction in ("none", "sum"):
        yield call(reduction, logits(5, 65), reduction=reduction)
    x = logits(7, 65)
    yield call("ignored", x, classes(x, 0.5))
    yield call("ignored, none", x, classes(x, 0.5), reduction="none", label_smoothing=0.2)
    yield call("ignore class 3", logits(7, 5), ignore_index=3)
    yield call("all ignored", x, torch.full((7,), -100, device=device))
    weight = torch.rand(65, device=device).to(dtype)
    yield call("class weights", x, classes(x, 0.3), weight)
    for reduction in ("none", "sum", "mean"):
        yield call(f"everything, {reduction}", x, classes(x, 0.3, 5), weight, 5, reduction, 0.1)
    yield call("smoothing of one", x, label_smoothing=1.0)
    yield call("outliers", logits(6, 129, gain=50.0))
    yield call("minus infinity", logits(4, 65).index_fill(1, torch.arange(3, device=device), -torch.inf),
               torch.arange(60, 64, device=device))
    yield call("no rows", logits(0, 16))
    yield call("no rows, none", logits(0, 16), reduction="none")
    yield call("images", logits(2, 9, 3, 4), label_smoothing=0.1)
    yield call("classes last in memory", logits(2, 6, 33).transpose(1, 2))
    yield call("every other column", logits(4, 130)[:, ::2])
    yield call("probabilities", x, torch.rand(7, 65, device=device).softmax(1).to(dtype), label_smoothing=0.1)


def cost(input, target, weight, ignore_index, reduction, label_smoothing) -> tuple[int, int]:
    moved = sum(t.numel() * t.element_size() for t in (input, target, weight) if t is not None)
    return 4 * input.numel(), moved + (target.numel() if reduction == "none" else 1) * input.element_size()


op = Op("cross_entropy", reference=reference, torch=stock, fast=("triton", "native"), samples=samples,
        cost=cost, constants=(1, 2))  # where probabilities as target need a gradient, stock runs
