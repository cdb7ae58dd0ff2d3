"""linear_cross_entropy(x, W, t) = cross_entropy(x·Wᵀ + b, t): a language model's last layer and its loss in one.

With p = softmax(x·Wᵀ + b) and q the target distribution, a row's loss is -Σ_c q_c log p_c and the gradient of its
logits is (Σ_c q_c)·p - q. A language model's logits [N, V] are its largest tensor by far; a fast implementation
never holds all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import autocast, autocasts
from fastlm.dispatch import Op, Sample

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
                         weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
                         label_smoothing: float = 0.0, options=None) -> Tensor:
    """Compute `cross_entropy(linear(input, linear_weight, linear_bias), target)` without storing the logits.

    Args:
        input: hidden states `[N, H]` or `[H]`.
        linear_weight: `[V, H]`, or `[V, d_1, …, d_K, H]` for a K-dimensional loss.
        target: class indices `[N]` (`[N, d_1, …, d_K]`; `[]` for an input `[H]`), or class probabilities with V as
            second dimension.
        linear_bias: `[V]` (`[V, d_1, …, d_K]`).
        weight: a factor for each class, `[V]`.
        reduction: "none", "mean" (over the weights of the targets that count) or "sum".
        ignore_index: class indices of this value count nothing; None means -100.
        label_smoothing: in [0, 1]: this share of the target is spread evenly over the classes.
        options: `torch.nn.LinearCrossEntropyOptions`: asks for stock PyTorch's own chunked path (torch 2.13).

    Returns:
        A scalar, or with "none" the losses in `target`'s shape (for class indices). Under autocast float32.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, a label_smoothing outside [0, 1].
        ValueError: a target of another shape, an unknown reduction.
        TypeError: arguments that are no tensors.
        IndexError: on the CPU, a class index outside [0, V) that is not `ignore_index`.
    """
    _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing, options)
    autocasting = autocasts(input.device.type)
    input, linear_weight, linear_bias = autocast(input.device.type, input, linear_weight, linear_bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    if input.dim() == 1 and not target.is_floating_point():
        loss = op(input[None], linear_weight, target[None], linear_bias, weight, reduction, ignore_index,
                  label_smoothing, options)
        loss = loss.squeeze(0) if reduction == "none" else loss
    else:
        loss = op(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options)
    return loss.float() if autocasting and loss.dtype is not torch.float64 else loss


def _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing, options):
    tensors = dict(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    for name, tensor in tensors.items():
        if tensor is None and name in ("linear_bias", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"linear_cross_entropy: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.device != input.device:
            raise RuntimeError(f"linear_cross_entropy: {name} is on {tensor.device}, input on {input.device}")
        if name != "target" and not tensor.is_floating_point():
            raise RuntimeError(f"linear_cross_entropy: {name} must be floating point, got {tensor.dtype}")
    if input.dim() not in (1, 2):
        raise RuntimeError(f"linear_cross_entropy: input must be [N, H] or [H], got {list(input.shape)}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(f"linear_cross_entropy: linear_weight must be [V, …, {input.shape[-1]}] to fit input "
                         f"{list(input.shape)}, got {list(linear_weight.shape)}")
    classes, extra = linear_weight.shape[0], tuple(linear_weight.shape[1:-1])
    batch = tuple(input.shape[:-1])
    if target.is_floating_point():
        expected = (*batch, classes, *extra)
    else:
        expected = (*batch, *extra)
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"linear_cross_entropy: class indices must be int64 or uint8, got {target.dtype}")
    if tuple(target.shape) != expected:
        raise ValueError(f"linear_cross_entropy: target has shape {list(target.shape)}, expected {list(expected)}")
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *extra):
        raise RuntimeError(f"linear_cross_entropy: linear_bias has shape {list(linear_bias.shape)}, "
                         f"expected {[classes, *extra]}")
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.dtype not in (input.dtype, torch.float32)):
        raise RuntimeError(f"linear_cross_entropy: weight is {weight.dtype}{list(weight.shape)}, expected "
                           f"{input.dtype}{[classes]}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"linear_cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    if options is not None and not hasattr(F, "linear_cross_entropy"):
        raise TypeError("linear_cross_entropy: options asks for PyTorch's own chunked path, which torch "
                        f"{torch.__version__} lacks (2.13 has it)")


def reference(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options):
    logits = input @ linear_weight.flatten(0, -2).t()
    if linear_bias is not None:
        logits = logits + linear_bias.flatten()
    logits = logits.unflatten(-1, linear_weight.shape[:-1])
    if target.is_floating_point():
        return F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, target, weight, reduction=reduction, ignore_index=ignore_index,
                           label_smoothing=label_smoothing)


def stock(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options):
    if options is not None:
        ignore = None if target.is_floating_point() else ignore_index
        return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, weight=weight,
                                      reduction=reduction, ignore_index=ignore, label_smoothing=label_smoothing,
                                      options=options)
    if linear_weight.dim() > 2:
        return reference(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                         label_smoothing, options)
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, reduction=reduction,
                           ignore_index=ignore_index, label_smoothing=label_smoothing)


def samples(scale: str, dtype: torch.dtype, device: str):
    def make(n, h, v, bias=False, weight=False, reduction="mean", ignore=0, smoothing=0.0, probabilities=False,
             extra=(), spread=1.0):
        x = (torch.randn(n, h, device=device) * spread).to(dtype)
        w = (torch.randn(v, *extra, h, device=device) / h**0.5).to(dtype)
        if probabilities:
            target = torch.randn(n, v, *extra, device=device).softmax(1).to(dtype)
        else:
            target = torch.randint(v, (n, *extra), device=device)
            target[:ignore] = -100
        b = torch.randn(v, *extra, device=device).to(dtype) if bias else None
        classes = torch.rand(v, device=device).to(dtype) if weight else None
        return x, w, target, b, classes, reduction, -100, smoothing, None

    if scale == "bench":
        for n, h, v in ((1024, 512, 50257), (700, 650, 10000)):
            yield Sample(f"{n}x{h}x{v}", make(n, h, v))
        return
    yield Sample("mean", make(129, 17, 127))
    yield Sample("sum", make(65, 16, 128, reduction="sum"))
    yield Sample("none", make(63, 33, 129, reduction="none"))
    yield Sample("bias", make(40, 24, 50, bias=True))
    yield Sample("class weights", make(40, 24, 50, weight=True, ignore=7))
    yield Sample("ignored targets", make(40, 24, 50, ignore=11))
    yield Sample("all targets ignored", make(5, 8, 9, ignore=5))
    yield Sample("label smoothing", make(40, 24, 50, smoothing=0.1, ignore=3))
    yield Sample("everything", make(70, 20, 31, bias=True, weight=True, smoothing=0.3, ignore=9, reduction="none"))
    yield Sample("several chunks", make(300, 4, 33000, bias=True, smoothing=0.1))
    yield Sample("one class", make(6, 5, 1))
    yield Sample("one row", make(1, 7, 1000))
    yield Sample("no rows", make(0, 7, 10, reduction="sum"))
    yield Sample("outliers", make(30, 16, 200, spread=40.0))
    yield Sample("probabilities", make(12, 8, 20, probabilities=True, weight=True, smoothing=0.1))
    yield Sample("two-dimensional loss", make(6, 8, 10, bias=True, extra=(3,)))
    x, *rest = make(64, 16, 50)
    yield Sample("strided input", (x.t().contiguous().t(), *rest))


def cost(input, linear_weight, target, *options) -> tuple[int, int]:
    n, h = input.shape
    classes = linear_weight.numel() // h
    return 2 * n * h * classes, (input.numel() + linear_weight.numel()) * input.element_size()


op = Op("linear_cross_entropy", reference=reference, torch=stock, fast=("blocked",), samples=samples, cost=cost,
        constants=(4,))
