"""CrossEntropyLoss and LinearCrossEntropyLoss as in torch.nn, and LinearDistillationLoss, through fastlm's ops."""

import math

from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from fastlm import ops


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Compute the cross-entropy of logits and targets, with the arguments of `torch.nn.CrossEntropyLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` `[N, C, ...]` against classes `[N, ...]` or probabilities `[N, C, ...]`."""
        return ops.cross_entropy(input, target, weight=self.weight, ignore_index=self.ignore_index,
                                 reduction=self.reduction, label_smoothing=self.label_smoothing)


class LinearCrossEntropyLoss(_WeightedLoss):
    """Project to logits and compute their cross-entropy, with the arguments of torch 2.13's class of this name.

    The logits of all rows never exist at once. Older versions of torch lack the class; there it is this one.

    Args:
        in_features: width of the input.
        num_classes: C.
        out_features: further dimensions of a loss over `[N, C, *out_features]` logits.
        bias: add a learned bias to the logits.
        reduction: "mean", "sum" or "none".
        weight: `[C]`, a factor for each class.
        ignore_index: target that does not count; None stands for -100.
        label_smoothing: share of the uniform distribution in each target, 0 to 1.
        options: torch's `LinearCrossEntropyOptions`.
        z_loss, softcap, return_aux, process_group: of `ops.linear_cross_entropy`, beyond torch's; with a process group
            `num_classes` and `weight` are those of this rank.

    Raises:
        RuntimeError: `weight` has not the shape `[C]`, or `label_smoothing` lies outside 0 to 1.
    """

    def __init__(self, in_features: int, num_classes: int, *, out_features: tuple[int, ...] = (), bias: bool = False,
                 device=None, dtype=None, reduction: str = "mean", weight: Tensor | None = None,
                 ignore_index: int | None = None, label_smoothing: float = 0.0, options=None,
                 z_loss: float = 0.0, softcap: float | None = None, return_aux: bool = False, process_group=None):
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"LinearCrossEntropyLoss: weight has shape {list(weight.shape)}, "
                               f"expected [{num_classes}]")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"LinearCrossEntropyLoss: label_smoothing must be between 0 and 1, "
                               f"got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.z_loss, self.softcap, self.return_aux, self.process_group = z_loss, softcap, return_aux, process_group
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, ops.Auxiliary]:
        """Return the loss of `input` `[..., in_features]`, and with `return_aux` also `ops.Auxiliary`.

        Args:
            target: classes `[...]` (`[N, *out_features]`) or probabilities `[..., C]` (`[N, C, *out_features]`).
        """
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            weight = weight.unflatten(0, (self.num_classes, *self.out_features))
            bias = None if bias is None else bias.unflatten(0, (self.num_classes, *self.out_features))
        return ops.linear_cross_entropy(
            input, weight, target, linear_bias=bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
            z_loss=self.z_loss, softcap=self.softcap, return_aux=self.return_aux, process_group=self.process_group)

    def extra_repr(self) -> str:
        names = ("num_classes", "out_features", "bias", "reduction", "ignore_index", "label_smoothing", "options")
        values = {name: getattr(self, name, None) for name in names} | {"bias": self.linear.bias is not None}
        more = {"z_loss": self.z_loss, "softcap": self.softcap, "return_aux": self.return_aux,
                "process_group": self.process_group}
        values |= {name: value for name, value in more.items() if value}
        return f"in_features={self.linear.in_features}, " + ", ".join(f"{k}={v}" for k, v in values.items())


class LinearDistillationLoss(nn.Module):
    """Compute the loss of a student's head against a teacher's: `ops.linear_distillation` with its options kept.

    The heads stay where they are, in the two models, and are given at each call.

    Args:
        divergence, beta, temperature, hard_weight, ignore_index, reduction: as in `ops.linear_distillation`.
    """

    def __init__(self, divergence: str = "forward_kl", *, beta: float = 0.5, temperature: float = 1.0,
                 hard_weight: float = 0.0, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__()
        self.divergence, self.beta, self.temperature = divergence, beta, temperature
        self.hard_weight, self.ignore_index, self.reduction = hard_weight, ignore_index, reduction

    def forward(self, student_input: Tensor, student_weight: Tensor, target: Tensor | None = None, *,
                student_bias: Tensor | None = None, teacher_input: Tensor | None = None,
                teacher_weight: Tensor | None = None, teacher_bias: Tensor | None = None,
                teacher_logits: Tensor | None = None,
                teacher_topk: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the loss of `student_input` `[..., Hs]`; the teacher in one of its three forms."""
        return ops.linear_distillation(
            student_input, student_weight, student_bias=student_bias, target=target, teacher_input=teacher_input,
            teacher_weight=teacher_weight, teacher_bias=teacher_bias, teacher_logits=teacher_logits,
            teacher_topk=teacher_topk, divergence=self.divergence, beta=self.beta, temperature=self.temperature,
            hard_weight=self.hard_weight, ignore_index=self.ignore_index, reduction=self.reduction)

    def extra_repr(self) -> str:
        names = ("divergence", "beta", "temperature", "hard_weight", "ignore_index", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
