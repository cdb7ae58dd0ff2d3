"""linear_cross_entropy block by block: what its implementations share; each brings the kernels for a block of logits.

With reduction "mean" or "sum" the gradients are made in the forward pass, while a block's logits are at hand, and
backward only scales them. With "none" each row's upstream gradient is still unknown there, so backward computes the
blocks again. Where a process group's ranks share the classes, a row's numbers are added up over them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.autograd import Differentiable, autocasts
from fastlm.ops.head import Head, gradient_dtypes
from fastlm.ops.linear_cross_entropy import counts_of, reference
from fastlm.ops.loss_kernels import Logits, Targets, new_sums
from fastlm.ops.tensors import accumulator

ACCEPTS = {"mean", "sum", "none", "bias", "class weights", "ignored targets", "all targets ignored", "label smoothing",
           "z-loss", "softcap", "auxiliary", "everything, none", "everything, mean", "everything, sum",
           "many classes", "one class", "one row", "no rows", "outliers", "probabilities",
           "probabilities, none", "strided input"}


def refuses(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options,
            *more) -> str | None:
    """Return why no sweep over blocks can take the call."""
    if options is not None:
        return "options asks for PyTorch's own chunked path"
    if target.is_floating_point() and target.requires_grad:
        return "the target needs a gradient"
    if target.is_floating_point() and not autocasts(input.device.type) and \
            torch.promote_types(target.dtype, input.dtype) is not input.dtype:
        return f"the loss of {input.dtype} and probabilities in {target.dtype} is of the wider dtype"
    if linear_weight.dim() > 2:
        return "the loss has more than one dimension"
    if linear_weight.dtype != input.dtype or (linear_bias is not None and linear_bias.dtype != input.dtype):
        return "input, linear_weight and linear_bias differ in dtype"
    if linear_weight.shape[0] == 0:
        return "there are no classes"
    return None


class Sweep:
    """linear_cross_entropy by kernels for a block of logits.

    Args:
        name: of the operators.
        kernels: has `read`, `gradient` and `scaled` of `loss_kernels.LossKernels`.
        products: `products(x)` returns the dtype of logits and products for hidden states like x.
    """

    def __init__(self, name: str, kernels, products: Callable[[Tensor], torch.dtype]):
        self.kernels, self.products = kernels, products
        self.function = Differentiable(
            name, statics="str reduction, int ignore_index, float smoothing, float z_loss, float softcap, bool aux, "
            "bool single, str group", outputs=4, forward=self.forward, fake=self.fake, backward=self.backward,
            reference=self.reference, spends=True)

    def run(self, input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options,
            z_loss, softcap, return_aux, group):
        target = target.detach() if target.is_floating_point() else target.long()
        tensors = (input, linear_weight, target, linear_bias, None if weight is None else weight.detach())
        # Under autocast stock takes the loss of 16-bit logits in float32.
        single = torch.is_autocast_enabled(input.device.type) and input.dtype is not torch.float64
        loss, *aux = self.function(tensors, reduction, ignore_index, label_smoothing, z_loss, softcap, return_aux,
                                   single, group)
        if not return_aux:
            return loss
        log_prob, entropy, correct = (a.detach() for a in aux)
        return loss, log_prob, entropy, correct > 0

    def forward(self, tensors, needs, reduction, ignore_index, smoothing, z_loss, softcap, aux, single, group):
        x, *_ = tensors
        blocks = Blocks(self, tensors, ignore_index, smoothing, z_loss, softcap, aux, group)
        now = needs if reduction != "none" else [False] * len(needs)
        total = blocks.counts.sum() if reduction == "mean" else blocks.counts.new_ones(())
        # Gradients of logits in float16 are not scaled down to where they underflow; the float32 sums are.
        early = blocks.dtype is not torch.float16
        losses, grads = blocks.run(1 / total if early else torch.ones_like(total), now)
        loss = losses if reduction == "none" else losses.sum() / total
        # Where every target is ignored the gradients are zero, not zero times infinity.
        late = [torch.ones_like(total) if early else torch.where(blocks.kept.any(), 1 / total, 0)] if any(now) else []
        return [loss.to(blocks.sums if single else x.dtype), *blocks.aux, *grads, *late]

    def fake(self, tensors, needs, reduction, ignore_index, smoothing, z_loss, softcap, aux, single, group):
        x, weight, _, bias, _ = tensors
        sums, rows = accumulator(x.dtype), x.shape[:1]
        loss = x.new_empty(rows if reduction == "none" else (), dtype=sums if single else x.dtype)
        found = [loss, *(x.new_empty(rows if aux else (0,), dtype=sums) for _ in range(3))]
        made = zip((x, weight, bias), (needs[0], needs[1], needs[3]), gradient_dtypes(x, weight, self.products(x)),
                   strict=True)
        now = [t.new_empty(t.shape, dtype=d) for t, need, d in made if reduction != "none" and need]
        return [*found, *now, *([x.new_empty((), dtype=sums)] if now else [])]

    def backward(self, grads, saved, tensors, needs, reduction, ignore_index, smoothing, z_loss, softcap, aux, single,
                 group, spent):
        x, *_ = tensors
        upstream = grads[0].to(accumulator(x.dtype))
        if reduction == "none":
            blocks = Blocks(self, tensors, ignore_index, smoothing, z_loss, softcap, False, group)
            _, found = blocks.run(upstream, needs)
            found = [g.to(x.dtype) for g in found]
        else:
            *found, late = saved
            factor = upstream * late
            found = [self.kernels.scaled(g, factor, x.dtype, spent) for g in found]
        found = iter(found)
        return [next(found) if need and i in (0, 1, 3) else None if not need else torch.zeros_like(tensors[i])
                for i, need in enumerate(needs)]

    def reference(self, tensors, reduction, ignore_index, smoothing, z_loss, softcap, aux, single, group):
        x, weight, target, bias, class_weight = tensors
        loss = reference(x, weight, target, bias, class_weight, reduction, ignore_index, smoothing, None, z_loss,
                         softcap, False, group)
        unused = x.new_zeros(x.shape[0] if aux else 0, dtype=accumulator(x.dtype))
        return loss.to(accumulator(x.dtype)) if single else loss, unused, unused, unused


class Blocks:
    """One call's rows, block by block; `counts` is how much each counts, `aux` what was asked beside its loss."""

    def __init__(self, owner: Sweep, tensors, ignore_index, smoothing, z_loss, softcap, aux, group):
        self.x, self.weight, target, bias, class_weight = tensors
        self.kernels, self.dtype = owner.kernels, owner.products(self.x)
        self.sums = accumulator(self.dtype)
        self.smoothing, self.z_loss, self.softcap, self.wants_aux = smoothing, z_loss, softcap, aux
        self.group = _resolve(group)
        self.first, classes = _shard(self.group, self.weight)
        self.bias = None if bias is None else bias.to(self.sums).contiguous()
        self.soft = target if target.is_floating_point() else None
        self.even = smoothing / classes
        self.class_weight = None
        if class_weight is not None and (self.even or self.soft is not None):
            self.class_weight = class_weight.to(self.sums).contiguous()
        rows, device = self.x.shape[0], self.x.device
        if self.soft is not None:
            self.index, self.kept = None, torch.ones(rows, dtype=torch.bool, device=device)
            self.counts = self.kept.to(self.sums)
            self.hits = torch.zeros_like(self.counts)
        else:
            check_targets(target, classes, ignore_index)
            self.index, self.kept = target.contiguous(), target != ignore_index
            self.counts = self.count(class_weight, ignore_index)
            self.hits = (1 - smoothing) * self.counts
        self.aux = [torch.zeros(rows if aux else 0, dtype=self.sums, device=device) for _ in range(3)]

    def count(self, class_weight, ignore_index):
        if self.group is None or class_weight is None:
            return counts_of(self.index, class_weight, ignore_index, self.sums)
        local = self.index - self.first
        mine = (local >= 0) & (local < class_weight.numel())
        counts = counts_of(local.where(mine, -1), class_weight, -1, self.sums)
        torch.distributed.all_reduce(counts, group=self.group)
        return counts * self.kept

    def run(self, scale: Tensor, needs) -> tuple[Tensor, list[Tensor]]:
        """Return each row's loss, and the gradients of Σ scale·loss for the inputs that need one, in the sums' dtype.

        `scale` is one number or one a row; rows that are ignored have no gradient whatever it is.
        """
        head = Head(self.x, self.weight, self.dtype, (needs[0], needs[1], needs[3]), self.kernels.native)
        losses = torch.empty(head.rows, dtype=self.sums, device=self.x.device)
        scale = torch.where(self.kept, scale, 0)
        rows = head.block_rows
        (buffer,) = head.blocks(1)
        for start in range(0, head.rows, max(rows, 1)):
            part = slice(start, min(start + rows, head.rows))
            logits = Logits(head.logits(part, buffer), self.bias, self.softcap)
            targets = self.targets(part)
            sums = new_sums(part.stop - part.start, self.sums, self.x.device)
            state = self.kernels.read(logits, targets, sums, self.wants_aux)
            self.add_up(sums)
            mass, lse = self.finish(part, sums, losses)
            if any(needs):
                kept = self.kept[part].to(self.sums)
                up = self.hits[part] + kept * (mass + 2 * self.z_loss * lse)
                factors = torch.stack((up, kept, self.hits[part]), 1) * scale[part, None]
                self.kernels.gradient(state, torch.cat((sums[:, :2], factors), 1), logits.z)
                head.pull(part, logits.z)
        if self.group is not None and needs[0]:
            torch.distributed.all_reduce(head.d_x, group=self.group)
        return losses, head.gradients()

    def targets(self, part):
        soft = None
        if self.soft is not None:
            soft = self.soft[part].to(self.dtype)
            soft = soft if soft.stride(1) == 1 else soft.contiguous()
        return Targets(None if self.index is None else self.index[part], self.first, self.class_weight, soft,
                       1 - self.smoothing, self.even)

    def finish(self, part, sums, losses):
        """Write the losses of the rows in `part`, and what else is asked; return Σ t and the log-sum-exp."""
        highest, total, moment, picked, weighted, mass = sums.unbind(1)
        log_total = total.log()
        lse = highest + log_total
        loss = self.z_loss * lse.square() if self.z_loss else torch.zeros_like(lse)  # the square may overflow
        if self.index is not None:
            loss = loss + self.hits[part] * (log_total - (picked - highest))
        if self.even or self.soft is not None:
            loss = loss + (mass * lse - weighted)
        kept = self.kept[part]
        losses[part] = torch.where(kept, loss, 0)
        if self.wants_aux:
            self.aux[0][part] = torch.where(kept, picked - highest - log_total, 0)
            self.aux[1][part] = log_total - moment / total
            self.aux[2][part] = (kept & (picked >= highest)).to(self.sums)
        return mass, lse

    def add_up(self, sums):
        """Make the sums of this rank's classes those of all ranks' classes, in place."""
        if self.group is None:
            return
        highest = sums[:, 0].clone()
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self.group)
        step = sums[:, 0] - highest
        shrink = step.exp()
        sums[:, 2] = torch.where(shrink > 0, shrink * (sums[:, 2] + step * sums[:, 1]), 0)
        sums[:, 1] *= shrink
        rest = sums[:, 1:].contiguous()
        torch.distributed.all_reduce(rest, group=self.group)
        sums[:, 0], sums[:, 1:] = highest, rest


def check_targets(target, classes, ignore_index):
    """Raise where a class index is out of range; on CUDA, where reading it would wait, the device asserts it."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if target.is_cuda:
        torch._assert_async(~bad.any(), "linear_cross_entropy: target out of range")
    elif bad.any():
        raise IndexError(f"linear_cross_entropy: target {target[bad][0].item()} is out of bounds for {classes} classes")


def _resolve(group):
    return torch.distributed.distributed_c10d._resolve_process_group(group) if group else None


def _shard(group, weight):
    """Return the first class that this rank has, and how many all ranks have."""
    if group is None:
        return 0, weight.shape[0]
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=weight.device)
    sizes[group.rank()] = weight.shape[0]
    torch.distributed.all_reduce(sizes, group=group)
    sizes = sizes.tolist()
    return sum(sizes[: group.rank()]), sum(sizes)
