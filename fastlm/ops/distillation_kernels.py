"""linear_distillation block by block: a block of the student's logits and one of the teacher's exist at a time.

With reduction "mean" or "sum" the gradients are made in the forward pass and scaled in backward; with "none" backward
computes the blocks again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.autograd import Differentiable
from fastlm.ops.distillation import check_indices, reference, scatter_topk
from fastlm.ops.head import Head, gradient_dtypes
from fastlm.ops.loss_kernels import DIVERGENCES, Logits
from fastlm.ops.tensors import accumulator

STATICS = ("str divergence, float beta, float temperature, float hard_weight, int ignore_index, str reduction, "
           "bool single")

ACCEPTS = {*DIVERGENCES, *(f"{d}, {form}" for d in DIVERGENCES for form in ("temperature", "hard", "logits, none")),
           "jsd of 0.0", "jsd of 0.1", "jsd of 1.0", "top-k", "top-k, jsd", "sum", "hard only", "all ignored",
           "many classes", "one class", "one row", "no rows", "outliers"}


class Sweep:
    """linear_distillation by kernels for a block of logits.

    Args:
        name: of the operators.
        kernels: has `distil` and `scaled` of `loss_kernels.LossKernels`.
        products: `products(x)` returns the dtype of logits and products for hidden states like x.
    """

    def __init__(self, name: str, kernels, products: Callable[[Tensor], torch.dtype]):
        self.kernels, self.products = kernels, products
        self.function = Differentiable(name, statics=STATICS, outputs=1, forward=self.forward, fake=self.fake,
                                       backward=self.backward, reference=self.reference, spends=True)

    def run(self, *args):
        tensors, options = args[:10], args[10:]
        single = torch.is_autocast_enabled(args[0].device.type) and args[0].dtype is not torch.float64
        return self.function([*tensors[:3], *(t if t is None else t.detach() for t in tensors[3:])], *options,
                             single)[0]

    def forward(self, tensors, needs, divergence, beta, temperature, hard_weight, ignore_index, reduction, single):
        x, target = tensors[0], tensors[9]
        check_indices(target, tensors[8], tensors[1].shape[0], ignore_index)  # a graph or a vmap comes here unchecked
        sums = accumulator(x.dtype)
        now = needs[:3] if reduction != "none" else [False] * 3
        early = self.products(x) is not torch.float16  # which gradients of logits would underflow if scaled down here
        if target is None:  # then the host knows the mean's divisor, and there are fewer small kernels
            kept, share = None, 1 / max(len(x), 1) if reduction == "mean" else 1.0
            scale, rest = x.new_full((len(x),), share if early else 1.0, dtype=sums), 1.0 if early else share
            late = [x.new_full((), rest, dtype=sums)] if any(now) else []
        else:
            kept = target != ignore_index
            total = kept.sum().to(sums) if reduction == "mean" else x.new_ones((), dtype=sums)
            scale = torch.where(kept, 1 / total if early else 1.0, 0)
            late = [torch.ones_like(total) if early else torch.where(total > 0, 1 / total, 0)] if any(now) else []
        loss, grads = self.sweep(tensors, kept, scale, now, divergence, beta, temperature, hard_weight)
        if reduction != "none":
            loss = loss.mean() if kept is None and reduction == "mean" else loss.sum()
            loss = loss if kept is None else loss / total
        return [loss.to(sums if single else x.dtype), *grads, *late]

    def fake(self, tensors, needs, divergence, beta, temperature, hard_weight, ignore_index, reduction, single):
        x, sums = tensors[0], accumulator(tensors[0].dtype)
        loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=sums if single else x.dtype)
        dtypes = gradient_dtypes(x, tensors[1], self.products(x), copies=2)
        now = [t.new_empty(t.shape, dtype=d) for t, need, d in zip(tensors[:3], needs, dtypes, strict=False)
               if reduction != "none" and need]
        return [loss, *now, *([x.new_empty((), dtype=sums)] if now else [])]

    def backward(self, grads, saved, tensors, needs, divergence, beta, temperature, hard_weight, ignore_index,
                 reduction, single, spent):
        x, target = tensors[0], tensors[9]
        upstream = grads[0].to(accumulator(x.dtype))
        if reduction == "none":
            kept = None if target is None else target != ignore_index
            scale = upstream.contiguous() if kept is None else torch.where(kept, upstream, 0)
            _, found = self.sweep(tensors, kept, scale, needs[:3], divergence, beta, temperature, hard_weight)
            found = [g.to(x.dtype) for g in found]
        else:
            *found, late = saved
            factor = upstream * late
            found = [self.kernels.scaled(g, factor, x.dtype, spent) for g in found]
        found = iter(found)
        return [None if not need else next(found) if i < 3 else torch.zeros_like(tensors[i])
                for i, need in enumerate(needs)]

    def reference(self, tensors, divergence, beta, temperature, hard_weight, ignore_index, reduction, single):
        loss = reference(*tensors, divergence, beta, temperature, hard_weight, ignore_index, reduction)
        return (loss.to(accumulator(loss.dtype)) if single else loss,)

    def sweep(self, tensors, kept, scale, needs, divergence, beta, temperature, hard_weight):
        """Return each row's loss, and the gradients of Σ scale·loss for the student's tensors that need one.

        `kept` says which rows count, all where it is None.
        """
        x, weight, bias, _, _, teacher_bias, *_, target = tensors
        dtype = self.products(x)
        native, target = self.kernels.native, None if target is None else target.contiguous()
        head = Head(x, weight, dtype, needs, native, copies=2)
        biases = [None if b is None else b.to(head.sums).contiguous() for b in (bias, teacher_bias)]
        rows = head.block_rows
        buffers = head.blocks(2)
        teach = _teacher(tensors, dtype, native)
        losses = []
        soft_weight = (1 - hard_weight) * temperature**2
        if divergence == "jsd" and beta in (0, 1):  # the mixture is one of the two
            soft_weight = 0.0
        # What β stands for makes the three divergences one formula of their two sums.
        beta = {"forward_kl": 1.0, "reverse_kl": 0.0}.get(divergence, beta)
        for start in range(0, head.rows, max(rows, 1)):
            part = slice(start, min(start + rows, head.rows))
            student = Logits(head.logits(part, buffers[0]), biases[0], 0.0, 1 / temperature)
            teacher = Logits(teach(part, buffers[1]), biases[1], 0.0, 1 / temperature)
            gradient = teacher.z if any(needs) else None  # written over
            loss = self.kernels.distil(student, teacher, target[part] if hard_weight else None, divergence, beta,
                                       soft_weight, hard_weight, scale[part], gradient)
            losses.append(loss if kept is None else torch.where(kept[part], loss, 0))
            if any(needs):
                head.pull(part, gradient)
        losses = losses[0] if len(losses) == 1 else torch.cat(losses) if losses else scale.clone()
        return losses, head.gradients()


def _teacher(tensors, dtype, native):
    """Return a function that writes the teacher's logits of some rows, without bias, into a buffer."""
    _, _, _, teacher, weight, _, logits, topk, indices, _ = tensors
    if teacher is not None:
        return Head(teacher, weight, dtype, native=native).logits
    if logits is not None:
        return lambda part, out: out[: part.stop - part.start].copy_(logits[part])
    return lambda part, out: scatter_topk(topk[part], indices[part], out[: part.stop - part.start])
