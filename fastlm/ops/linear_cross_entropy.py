"""linear_cross_entropy(x, W, t) = cross_entropy(x·Wᵀ + b, t): a language model's last layer and its loss in one.

With p = softmax(x·Wᵀ + b) and q the target distribution, a row's loss is -Σ_c q_c log p_c and the gradient of its
logits is (Σ_c q_c)·p - q. A language model's logits [N, V] are its largest tensor by far; a fast implementation
never holds all of them. Two terms of large models: a softcap c replaces each logit a by c·tanh(a/c) (Gemma 2), and a
z-loss adds z·lse² with lse = log Σ_c exp(logit_c) to each loss that counts (PaLM, arXiv 2204.02311).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import autocast, autocasts
from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import accumulator, check_tensors, needs_gradient

REDUCTIONS = ("none", "mean", "sum")
LEAST = 1 << 23  # multiplications, below which stock is never the slower one in float32
LEAST_LOGITS, NARROW = 1 << 20, 128  # see `few`
ROW = "benchmarks/LOG.md 2026-11-26, small calls"


class Auxiliary(NamedTuple):
    """What is known of each token beside its loss, in the target's shape; nothing flows back through it.

    `log_prob` is the target's logarithmic probability (0 where it is ignored), `entropy` that of the softmax in nats,
    and `correct` whether no class is more probable than the target.
    """

    log_prob: Tensor
    entropy: Tensor
    correct: Tensor


def _shortcut(input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None,
              label_smoothing=0.0, options=None, z_loss=0.0, softcap=None, return_aux=False, process_group=None):
    if not (options is softcap is process_group is None and z_loss == 0 and not return_aux):
        return None
    if not (input.is_cpu and linear_weight.is_cpu and input.dim() == linear_weight.dim() == 2) or (
            input.dtype is not linear_weight.dtype or input.numel() * linear_weight.size(0) >= LEAST or (
            not 0 <= label_smoothing <= 1) or (
            weight is not None and weight.dtype is not input.dtype) or (
            linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]) or (
            ignore_index is not None and target.is_floating_point())):
        return None
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, reduction=reduction,
                           ignore_index=-100 if ignore_index is None else ignore_index,
                           label_smoothing=label_smoothing)


@at_once(_shortcut)
def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
                         weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
                         label_smoothing: float = 0.0, options=None, z_loss: float = 0.0,
                         softcap: float | None = None, return_aux: bool = False,
                         process_group=None) -> Tensor | tuple[Tensor, Auxiliary]:
    """Compute `cross_entropy(linear(input, linear_weight, linear_bias), target)` without storing the logits.

    Args:
        input: hidden states `[..., H]`.
        linear_weight: `[V, H]`, or `[V, d_1, …, d_K, H]` for a K-dimensional loss of an input `[N, H]`.
        target: class indices `[...]` (`[N, d_1, …, d_K]`), or class probabilities `[..., V]` (`[N, V, d_1, …, d_K]`).
        linear_bias: `[V]` (`[V, d_1, …, d_K]`).
        weight: a factor for each class, `[V]`.
        reduction: "none", "mean" (over the weights of the targets that count) or "sum".
        ignore_index: class indices of this value count nothing; None means -100.
        label_smoothing: in [0, 1]: this share of the target is spread evenly over the classes.
        options: `torch.nn.LinearCrossEntropyOptions`: asks for stock PyTorch's own chunked path (torch 2.13).
        z_loss: z; z·lse² is added to the loss of each target that counts, before the reduction.
        softcap: c > 0; each logit a, bias included, becomes c·tanh(a/c).
        return_aux: also return `Auxiliary`; for class indices.
        process_group: a `torch.distributed` group whose ranks hold the classes in turn: each gives the same input and
            target (classes counted over all ranks), its own rows of `linear_weight`, `linear_bias` and `weight`, and
            gets the loss and gradients that a single process would.

    Returns:
        A scalar, or with "none" the losses in the shape of class indices. Under autocast float32.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, a label_smoothing outside [0, 1].
        ValueError: a target of another shape, an unknown reduction, a softcap that is not positive, options or
            targets that something else asked for does not go with.
        TypeError: arguments that are no tensors.
        IndexError: on the CPU, a class index outside [0, V) that is not `ignore_index`.
    """
    _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing)
    soft = target.is_floating_point()
    if soft and ignore_index is not None:
        raise RuntimeError("linear_cross_entropy: ignore_index does not go with probabilities as target")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"linear_cross_entropy: softcap must be positive or None, got {softcap}")
    if return_aux and soft:
        raise ValueError("linear_cross_entropy: return_aux needs class indices as target, got probabilities")
    _check_options(options, z_loss or softcap or return_aux or process_group is not None)
    _check_group(process_group, linear_weight, soft)
    autocasting = autocasts(input.device.type)
    input, linear_weight, linear_bias = autocast(input.device.type, input, linear_weight, linear_bias)
    target = target if soft else target.long()  # in 8 bits 156 equals -100
    shape = input.shape[:-1]
    if input.dim() != 2:
        input = input.reshape(-1, input.shape[-1])
        target = target.reshape(input.shape[0], *target.shape[len(shape):])
    found = op(input, linear_weight, target, linear_bias, weight, reduction,
               -100 if ignore_index is None else ignore_index, float(label_smoothing), options, float(z_loss),
               float(softcap or 0.0), return_aux, "" if process_group is None else process_group.group_name)
    loss, *aux = found if return_aux else (found,)
    if reduction == "none" and len(shape) != 1:
        loss = loss.reshape(shape)
    loss = loss.float() if autocasting and loss.dtype is not torch.float64 else loss
    if not return_aux:
        return loss
    return loss, Auxiliary(*(a.reshape(shape + a.shape[1:]) for a in aux))


def shift_targets(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the targets of a causal model, `[..., S]`: each position's is the label after it, the last has none.

    Hidden states then enter the loss as they are; shifting them instead, `hidden[..., :-1, :]`, copies them.

    >>> loss = linear_cross_entropy(hidden, weight, shift_targets(labels))

    Args:
        labels: token indices `[..., S]`.
        ignore_index: what the last position gets.
    """
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"shift_targets: labels must be a Tensor [..., S], got {got}")
    return F.pad(labels[..., 1:], (0, min(labels.shape[-1], 1)), value=ignore_index)


def _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing):
    tensors = dict(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    check_tensors("linear_cross_entropy", tensors, ("linear_bias", "weight"), RuntimeError, ("target",))
    if input.dim() == 0:
        raise RuntimeError("linear_cross_entropy: input must be [..., H], got a scalar")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(f"linear_cross_entropy: linear_weight must be [V, …, {input.shape[-1]}] to fit input "
                           f"{list(input.shape)}, got {list(linear_weight.shape)}")
    classes, extra = linear_weight.shape[0], tuple(linear_weight.shape[1:-1])
    if extra and input.dim() != 2:
        raise RuntimeError(f"linear_cross_entropy: input must be [N, H] for a linear_weight "
                           f"{list(linear_weight.shape)}, got {list(input.shape)}")
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


def _check_options(options, more):
    if options is None:
        return
    if not hasattr(F, "linear_cross_entropy"):
        raise TypeError("linear_cross_entropy: options asks for PyTorch's own chunked path, which torch "
                        f"{torch.__version__} lacks (2.13 has it)")
    if more:
        raise ValueError("linear_cross_entropy: options asks for PyTorch's own chunked path, which has no z_loss, "
                         "softcap, return_aux or process_group")


def _check_group(group, linear_weight, soft):
    if group is None:
        return
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"linear_cross_entropy: process_group must be a torch.distributed ProcessGroup, got "
                        f"{type(group).__name__}")
    if soft or linear_weight.dim() > 2:
        raise ValueError("linear_cross_entropy: with a process_group the target must be class indices [...] and "
                         f"linear_weight [V, H], got {list(linear_weight.shape)}"
                         + (" and probabilities" if soft else ""))


def loss_of_logits(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, return_aux):
    """Return the loss of logits `[N, V, …]` before their softcap, and where asked the fields of `Auxiliary`."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weight = None if weight is None else weight.to(logits.dtype)  # torch's takes no other
    soft = target.is_floating_point()
    options = {} if soft else dict(ignore_index=ignore_index)
    options["label_smoothing"] = label_smoothing
    if not z_loss:
        loss = F.cross_entropy(logits, target, weight, reduction=reduction, **options)
    else:
        losses = F.cross_entropy(logits, target, weight, reduction="none", **options)
        loss = losses + z_loss * logits.logsumexp(1).square()
        loss = loss if soft else loss.where(target != ignore_index, 0)  # not a factor of 0: a mean of no rows has 1 / 0
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / (losses.numel() if soft else counts_of(target, weight, ignore_index, losses.dtype).sum())
    if not return_aux:
        return loss
    with torch.no_grad():
        log_probs = logits.to(accumulator(logits.dtype)).log_softmax(1)
        kept = target != ignore_index
        picked = log_probs.gather(1, target.long().where(kept, 0).unsqueeze(1)).squeeze(1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs.where(probs > 0, 0)).sum(1)
        return loss, picked.where(kept, 0), entropy, kept & (picked >= log_probs.amax(1))


def counts_of(target, weight, ignore_index, dtype):
    """Return how much each target counts: its class weight, or 1, and 0 where it is ignored."""
    kept = target != ignore_index
    if weight is None:
        return kept.to(dtype)
    return weight.to(dtype)[target.long().where(kept, 0)] * kept


def few(input: Tensor, linear_weight: Tensor, fast_products: bool) -> str | None:
    """Return that there is too little to multiply for Python to be worth while, None where there is not.

    With `fast_products` torch multiplies as fast as ours: then logits must be many where no gradient is wanted, or
    where a row is so narrow that losses take longer than products.
    """
    (rows, inputs), classes = input.shape, linear_weight.size(0)
    least = LEAST if rows <= 16 else 2 * LEAST
    if rows * inputs * classes < least:
        return f"slower than torch below {least} multiplications: {ROW}"
    few = rows * classes < LEAST_LOGITS * (1 if inputs >= NARROW else 2)
    if fast_products and few and (inputs < NARROW or not needs_gradient(input, linear_weight)):
        return "slower than torch for few logits without gradients, or of few inputs: LOG 2026-11-27, fifth session"
    return None


def reference(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options,
              z_loss, softcap, return_aux, group):
    _refuse_group(group)
    logits = input @ linear_weight.flatten(0, -2).t()
    if linear_bias is not None:
        logits = logits + linear_bias.flatten()
    logits = logits.unflatten(-1, linear_weight.shape[:-1])
    return loss_of_logits(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, return_aux)


def stock(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options, z_loss,
          softcap, return_aux, group):
    _refuse_group(group)
    if options is not None:
        ignore = None if target.is_floating_point() else ignore_index
        return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, weight=weight,
                                      reduction=reduction, ignore_index=ignore, label_smoothing=label_smoothing,
                                      options=options)
    if linear_weight.dim() > 2:
        return reference(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                         label_smoothing, options, z_loss, softcap, return_aux, group)
    return loss_of_logits(F.linear(input, linear_weight, linear_bias), target, weight, reduction, ignore_index,
                          label_smoothing, z_loss, softcap, return_aux)


def _refuse_group(group):
    if group:
        raise NotImplementedError("linear_cross_entropy: a process_group needs one of the blocked implementations, in "
                                  "its first derivative")


def samples(scale: str, dtype: torch.dtype, device: str):
    def make(n, h, v, bias=False, weight=False, reduction="mean", ignore=0, smoothing=0.0, probabilities=False,
             extra=(), spread=1.0, z_loss=0.0, softcap=0.0, aux=False):
        x = (torch.randn(n, h, device=device) * spread).to(dtype)
        w = (torch.randn(v, *extra, h, device=device) / h**0.5).to(dtype)
        if probabilities:
            target = torch.randn(n, v, *extra, device=device).softmax(1).to(dtype)
        else:
            target = torch.randint(v, (n, *extra), device=device)
            target[:ignore] = -100
        b = torch.randn(v, *extra, device=device).to(dtype) if bias else None
        classes = torch.rand(v, device=device).to(dtype) if weight else None
        return x, w, target, b, classes, reduction, -100, smoothing, None, z_loss, softcap, aux, ""

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
    yield Sample("z-loss", make(40, 24, 50, z_loss=0.01, ignore=3))
    yield Sample("softcap", make(40, 24, 50, softcap=2.0, bias=True))
    yield Sample("auxiliary", make(40, 24, 50, aux=True, ignore=3))
    for reduction in REDUCTIONS:
        yield Sample(f"everything, {reduction}", make(70, 20, 31, bias=True, weight=True, smoothing=0.3, ignore=9,
                                                      reduction=reduction, z_loss=0.02, softcap=5.0, aux=True))
    yield Sample("many classes", make(3, 4, 9001, bias=True, smoothing=0.1))
    yield Sample("one class", make(6, 5, 1))
    yield Sample("one row", make(1, 7, 129))
    yield Sample("no rows", make(0, 7, 10, reduction="sum"))
    yield Sample("outliers", make(30, 16, 200, spread=40.0))
    yield Sample("probabilities", make(12, 8, 20, probabilities=True, weight=True, smoothing=0.1))
    yield Sample("probabilities, none", make(12, 8, 20, probabilities=True, bias=True, reduction="none", z_loss=0.1,
                                             softcap=3.0))
    yield Sample("two-dimensional loss", make(6, 8, 10, bias=True, extra=(3,), z_loss=0.1))
    x, *rest = make(64, 16, 50)
    yield Sample("strided input", (x.t().contiguous().t(), *rest))


def cost(input, linear_weight, target, *options) -> tuple[int, int]:
    n, h = input.shape
    classes = linear_weight.numel() // h
    return 2 * n * h * classes, (input.numel() + linear_weight.numel()) * input.element_size()


# Where probabilities as target need a gradient, stock runs.
op = Op("linear_cross_entropy", reference=reference, torch=stock, fast=("triton", "native", "blocked"),
        samples=samples, cost=cost, constants=(2, 4))
