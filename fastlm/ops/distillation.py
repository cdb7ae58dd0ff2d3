"""linear_distillation: teach a student's last layer the distribution of a teacher, without storing either's logits.

With p = softmax(student's logits / T), q = softmax(teacher's logits / T) and KL(a‖b) = Σ_c a_c log(a_c / b_c), a row's
soft loss is T² times
forward_kl: KL(q‖p); reverse_kl: KL(p‖q); jsd: β·KL(q‖m) + (1 - β)·KL(p‖m), m = β·q + (1 - β)·p (arXiv 2306.13649).
A row's loss is (1 - hard_weight)·soft + hard_weight·cross-entropy(student's logits, target).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import autocast, autocasts
from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.cross_entropy import check_range
from fastlm.ops.linear_cross_entropy import REDUCTIONS
from fastlm.ops.loss_kernels import DIVERGENCES
from fastlm.ops.tensors import check_tensors, readable

LEAST_LOGITS, LEAST = 1 << 16, 1 << 25  # logits and multiplications, below both of which `_forward_kl` is no slower


def _shortcut(student_input, student_weight, *, teacher_input=None, teacher_weight=None, teacher_logits=None,
              teacher_topk=None, divergence="forward_kl", beta=0.5, temperature=1.0, target=None, hard_weight=0.0,
              ignore_index=-100, reduction="mean", student_bias=None, teacher_bias=None):
    if not (teacher_input is teacher_weight is teacher_topk is target is teacher_bias is None) or hard_weight != 0 or (
            divergence != "forward_kl" or reduction not in ("mean", "sum") or not 0 <= beta <= 1
            or not 0 < temperature < math.inf or autocasts("cpu")):
        return None
    (rows, inputs), classes = student_input.shape, student_weight.shape[0]
    logits = rows * classes
    if logits >= LEAST_LOGITS or logits * inputs >= LEAST or teacher_logits.shape != (rows, classes) or not (
            student_input.is_cpu and student_input.dtype is teacher_logits.dtype is torch.float32) or (
            student_bias is not None and student_bias.shape != (classes,)):
        return None
    return _forward_kl(F.linear(student_input, student_weight, student_bias), teacher_logits, temperature, reduction)


@at_once(_shortcut)
def linear_distillation(student_input: Tensor, student_weight: Tensor, *, teacher_input: Tensor | None = None,
                        teacher_weight: Tensor | None = None, teacher_logits: Tensor | None = None,
                        teacher_topk: tuple[Tensor, Tensor] | None = None, divergence: str = "forward_kl",
                        beta: float = 0.5, temperature: float = 1.0, target: Tensor | None = None,
                        hard_weight: float = 0.0, ignore_index: int = -100, reduction: str = "mean",
                        student_bias: Tensor | None = None, teacher_bias: Tensor | None = None) -> Tensor:
    """Return the divergence of a student's next-token distribution from a teacher's, mixed with the targets' loss.

    The teacher is given by its hidden states and weight, by its logits, or by its most probable classes. Gradients
    flow to the student's input, weight and bias; to the teacher none.

    Args:
        student_input: `[..., Hs]`.
        student_weight: `[V, Hs]`.
        teacher_input, teacher_weight: `[..., Ht]` and `[V, Ht]`; Ht may differ from Hs.
        teacher_logits: `[..., V]`.
        teacher_topk: logarithmic probabilities and class indices, both `[..., k]`; the teacher's distribution is that
            of the k classes, renormalised. Not for reverse_kl, which is infinite where the teacher has no probability.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: in [0, 1]; the teacher's share of the mixture, for "jsd".
        temperature: T > 0, divides both logits of the soft loss.
        target: class indices `[...]`; rows whose target is `ignore_index` count nothing at all.
        hard_weight: in [0, 1]: the share of the targets' cross-entropy.
        reduction: "none", "mean" (over the rows that count) or "sum".
        student_bias, teacher_bias: `[V]`.

    Returns:
        A scalar, or with "none" losses `[...]`; of `student_input`'s dtype, float32 under autocast.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: not exactly one form of teacher; an unknown divergence or reduction; beta, temperature or
            hard_weight out of range; hard_weight without target; shapes that do not fit.
        RuntimeError: dtypes or devices that do not fit.
        IndexError: on the CPU, a target or a teacher's index out of range.
    """
    topk, indices = _pair(teacher_topk)
    tensors = dict(student_input=student_input, student_weight=student_weight, student_bias=student_bias,
                   teacher_input=teacher_input, teacher_weight=teacher_weight, teacher_bias=teacher_bias,
                   teacher_logits=teacher_logits, teacher_topk=topk, indices=indices, target=target)
    _check_values(divergence, beta, temperature, hard_weight, reduction)
    _check_tensors(tensors)
    _check_shapes(**tensors)
    if hard_weight and target is None:
        raise ValueError(f"linear_distillation: hard_weight is {hard_weight}, but there is no target")
    if divergence == "reverse_kl" and topk is not None:
        raise ValueError("linear_distillation: reverse_kl is infinite for a teacher_topk, which has no probability for "
                         "the other classes: use forward_kl or jsd")
    shape, classes = student_input.shape[:-1], student_weight.shape[0]
    device = student_input.device.type
    floats = [t for name, t in tensors.items() if name not in ("indices", "target")]
    student, weight, bias, *teacher = autocast(device, *floats)
    teacher = [t if t is None else t.detach() for t in teacher]
    rows = {0: student, 3: teacher[0], 6: teacher[3], 7: teacher[4], 8: indices, 9: target}
    args = [student, weight, bias, *teacher, indices, target]
    for i, t in rows.items():
        if t is not None:
            args[i] = t.reshape(shape.numel(), *t.shape[len(shape):])
    check_indices(args[9], args[8], classes, ignore_index)
    loss = op(*args, divergence, float(beta), float(temperature), float(hard_weight), ignore_index, reduction)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return loss.float() if autocasts(device) and loss.dtype is not torch.float64 else loss


def check_indices(target, indices, classes, ignore_index):
    """Raise IndexError where a target or an index of the teacher that may be read is no class."""
    for name, index, ignored in (("target", target, ignore_index), ("teacher_topk's indices", indices, 0)):
        if index is not None:
            check_range(f"linear_distillation: {name}", index, classes, ignored)


def _pair(teacher_topk):
    if teacher_topk is None:
        return None, None
    if not isinstance(teacher_topk, tuple | list) or len(teacher_topk) != 2:
        raise TypeError("linear_distillation: teacher_topk must be a pair (log_probs, indices)")
    return teacher_topk


def _check_values(divergence, beta, temperature, hard_weight, reduction):
    for name, value, known in (("divergence", divergence, DIVERGENCES), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise ValueError(f"linear_distillation: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, value in (("beta", beta), ("hard_weight", hard_weight)):
        if not 0 <= value <= 1:
            raise ValueError(f"linear_distillation: {name} must be in [0, 1], got {value}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"linear_distillation: temperature must be positive, got {temperature}")


def _check_tensors(tensors):
    check_tensors("linear_distillation", tensors, tuple(tensors)[2:], RuntimeError, ("indices", "target"))
    for name, tensor in (("teacher_topk's indices", tensors["indices"]), ("target", tensors["target"])):
        if tensor is not None and tensor.dtype is not torch.int64:
            raise RuntimeError(f"linear_distillation: {name} must be int64, got {tensor.dtype}")
    for side in ("student", "teacher"):
        first = tensors[f"{side}_input"]
        for name in ("weight", "bias"):
            tensor = tensors[f"{side}_{name}"]
            if first is not None and tensor is not None and tensor.dtype is not first.dtype:
                raise RuntimeError(f"linear_distillation: {side}_{name} is {tensor.dtype}, {side}_input {first.dtype}")
    forms = [tensors[name] is not None for name in ("teacher_input", "teacher_logits", "teacher_topk")]
    if sum(forms) != 1:
        raise ValueError("linear_distillation: give the teacher as teacher_input and teacher_weight, as teacher_logits "
                         f"or as teacher_topk: exactly one, got {sum(forms)}")
    for name in ("teacher_weight", "teacher_bias"):
        if tensors[name] is not None and not forms[0]:
            raise ValueError(f"linear_distillation: {name} without teacher_input")
    if forms[0] and tensors["teacher_weight"] is None:
        raise ValueError("linear_distillation: teacher_input without teacher_weight")


def _check_shapes(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias,
                  teacher_logits, teacher_topk, indices, target):
    if student_input.dim() == 0 or student_weight.dim() != 2 or student_weight.shape[1] != student_input.shape[-1]:
        raise ValueError("linear_distillation: expected student_input [..., Hs] and student_weight [V, Hs], got "
                         f"{list(student_input.shape)} and {list(student_weight.shape)}")
    batch, classes = tuple(student_input.shape[:-1]), student_weight.shape[0]
    width = () if teacher_input is None else teacher_input.shape[-1:]
    k = () if teacher_topk is None else teacher_topk.shape[-1:]
    expected = dict(student_bias=(student_bias, (classes,)), teacher_input=(teacher_input, (*batch, *width)),
                    teacher_weight=(teacher_weight, (classes, *width)), teacher_bias=(teacher_bias, (classes,)),
                    teacher_logits=(teacher_logits, (*batch, classes)), teacher_topk=(teacher_topk, (*batch, *k)),
                    indices=(indices, (*batch, *k)), target=(target, batch))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            name = "teacher_topk's indices" if name == "indices" else name
            raise ValueError(f"linear_distillation: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if teacher_topk is not None and not (k and k[0]):
        raise ValueError("linear_distillation: teacher_topk names no class")


def reference(student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_logits, topk, indices, target,
              divergence, beta, temperature, hard_weight, ignore_index, reduction):
    logits = F.linear(student, weight, bias)
    if teacher is not None:
        teacher_logits = F.linear(teacher, teacher_weight, teacher_bias)
    elif topk is not None:
        teacher_logits = scatter_topk(topk, indices, topk.new_empty(logits.shape))
    teacher_logits = teacher_logits.detach().to(logits.dtype)
    log_p, log_q = ((a if temperature == 1 else a / temperature).log_softmax(-1) for a in (logits, teacher_logits))
    if divergence == "forward_kl":
        soft = _kl(log_q, log_p)
    elif divergence == "reverse_kl":
        soft = _kl(log_p, log_q)
    elif beta in (0, 1):
        soft = 0 * log_p.sum(-1)
    else:
        # From the larger of the two: logaddexp(log q + log β, …) would round β and 1 - β to what is not 1 in sum. Of
        # equal ones either does: clamp has a gradient at 0, which abs has not.
        gap = log_q - log_p
        log_m = torch.where(gap > 0, log_q + (beta + (1 - beta) * (-gap.clamp(min=0)).exp()).log(),
                            log_p + (1 - beta + beta * gap.clamp(max=0).exp()).log())
        soft = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    factor = (1 - hard_weight) * temperature**2
    loss = soft if factor == 1 else factor * soft
    if hard_weight:
        loss = loss + hard_weight * F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    if target is None:
        return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()
    kept = target != ignore_index
    loss = loss.where(kept, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


def stock(student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_logits, topk, indices, target,
          divergence, beta, temperature, hard_weight, ignore_index, reduction):
    """Compute the definition, with fewer operators where they do. No value is read in a graph or on a GPU."""
    found = None
    if short(student, teacher_logits, target, divergence, hard_weight, reduction) and readable(student):
        found = _forward_kl(F.linear(student, weight, bias), teacher_logits, temperature, reduction)
    return found if found is not None else reference(
        student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_logits, topk, indices, target, divergence,
        beta, temperature, hard_weight, ignore_index, reduction)


def short(student, teacher_logits, target, divergence, hard_weight, reduction) -> bool:
    """Tell whether `_forward_kl` is the loss."""
    return divergence == "forward_kl" and teacher_logits is not None and target is None and hard_weight == 0 and (
        reduction != "none" and student.is_cpu and student.dtype is teacher_logits.dtype is torch.float32)


def _forward_kl(logits, teacher_logits, temperature, reduction):
    """Return T² times the sum or mean of KL(q‖p) over the rows, None where it is not a number.

    Then classes without probability may have to be left out: 0 times the logarithm of 0 is none.
    """
    if not logits.shape[0]:
        return None
    teacher_logits = teacher_logits.detach()
    if temperature != 1:
        logits, teacher_logits = logits / temperature, teacher_logits / temperature
    log_q = teacher_logits.log_softmax(1)
    q, factor = log_q.exp(), temperature**2 / (logits.shape[0] if reduction == "mean" else 1)
    q = q if factor == 1 else q.mul_(factor)
    loss = torch.dot(q.view(-1), (log_q - logits.log_softmax(1)).view(-1))
    return None if math.isnan(loss.item()) else loss


def _kl(log_a, log_b):
    """Return Σ a·(log a - log b) over the last dimension; what has no probability adds nothing."""
    a = log_a.exp()
    return (a * (log_a - log_b)).where(a != 0, 0).sum(-1)


def scatter_topk(log_probs, indices, out):
    """Write logits of the classes that a teacher names into `out` `[N, V]`, minus infinity elsewhere."""
    return out.fill_(-torch.inf).scatter_(1, indices, log_probs.to(out.dtype))


def samples(scale: str, dtype: torch.dtype, device: str):
    def make(n, h, v, form="hidden", divergence="forward_kl", beta=0.5, temperature=1.0, hard=0.0, ignore=None,
             bias=False, reduction="mean", width=None, k=5, spread=1.0):
        width = width or h + 3
        x, w = torch.randn(n, h, device=device) * spread, torch.randn(v, h, device=device) / h**0.5
        t, tw = torch.randn(n, width, device=device), torch.randn(v, width, device=device) / width**0.5
        b, tb = (torch.randn(v, device=device).to(dtype) if bias else None for _ in range(2))
        x, w, t, tw = (a.to(dtype) for a in (x, w, t, tw))
        target = None
        if hard or ignore is not None:
            target = torch.randint(v, (n,), device=device)
            target[:ignore or 0] = -100
        hidden, logits, topk, indices = (t, tw, tb), None, None, None
        if form == "logits":
            hidden, logits = (None,) * 3, 2 * torch.randn(n, v, device=device).to(dtype)
        elif form == "topk":
            hidden = (None,) * 3
            topk = torch.randn(n, k, device=device).sub(2).to(dtype)
            indices = torch.rand(n, v, device=device).argsort(1)[:, :k]
        return (x, w, b, *hidden, logits, topk, indices, target, divergence, beta, temperature, hard, -100, reduction)

    if scale == "bench":
        yield Sample("1024x512x50257, teacher 1024", make(1024, 512, 50257, width=1024))
        return
    for divergence in DIVERGENCES:
        yield Sample(divergence, make(33, 16, 129, divergence=divergence))
        yield Sample(f"{divergence}, temperature", make(20, 16, 70, divergence=divergence, temperature=2.5, bias=True))
        yield Sample(f"{divergence}, hard", make(20, 16, 70, divergence=divergence, hard=0.3, temperature=2.0,
                                                 ignore=4))
        yield Sample(f"{divergence}, logits, none", make(20, 16, 70, "logits", divergence, reduction="none", hard=0.5,
                                                         ignore=3))
    for beta in (0.0, 0.1, 1.0):
        yield Sample(f"jsd of {beta}", make(20, 16, 70, divergence="jsd", beta=beta))
    yield Sample("top-k", make(20, 16, 70, "topk", temperature=1.5, hard=0.2))
    yield Sample("top-k, jsd", make(20, 16, 70, "topk", "jsd", beta=0.3))
    yield Sample("top-k, jsd of 1", make(20, 16, 70, "topk", "jsd", beta=1.0))  # 0, though infinite for p
    yield Sample("sum", make(20, 16, 70, reduction="sum", ignore=5))
    yield Sample("hard only", make(20, 16, 70, hard=1.0, ignore=5))
    yield Sample("all ignored", make(5, 16, 70, hard=0.5, ignore=5))
    yield Sample("many classes", make(3, 4, 4200, bias=True))
    yield Sample("one class", make(6, 5, 1, hard=0.5))
    yield Sample("one row", make(1, 7, 129))
    yield Sample("no rows", make(0, 7, 10, reduction="sum"))
    yield Sample("outliers", make(20, 16, 129, spread=30.0))


def cost(student, weight, bias, teacher, teacher_weight, *rest) -> tuple[int, int]:
    flops, moved = 2 * student.numel() * weight.shape[0], (student.numel() + weight.numel()) * student.element_size()
    if teacher is not None:
        flops += 2 * teacher.numel() * teacher_weight.shape[0]
        moved += (teacher.numel() + teacher_weight.numel()) * teacher.element_size()
    elif rest[1] is not None:
        moved += rest[1].numel() * rest[1].element_size()
    return flops, moved


op = Op("distillation", reference=reference, torch=stock, fast=("triton", "native"), samples=samples, cost=cost,
        constants=(3, 4, 5, 6, 7))
