"""CrossEntropyLoss and LinearCrossEntropyLoss: torch.nn's, through fastlm's ops."""

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

    Raises:
        RuntimeError: `weight` has not the shape `[C]`, or `label_smoothing` lies outside 0 to 1.
    """

    def __init__(self, in_features: int, num_classes: int, *, out_features: tuple[int, ...] = (), bias: bool = False,
                 device=None, dtype=None, reduction: str = "mean", weight: Tensor | None = None,
                 ignore_index: int | None = None, label_smoothing: float = 0.0, options=None):
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"LinearCrossEntropyLoss: weight has shape {list(weight.shape)}, "
                               f"expected [{num_classes}]")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"LinearCrossEntropyLoss: label_smoothing must be between 0 and 1, "
                               f"got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` `[N, in_features]` or `[in_features]`.

        Args:
            target: classes `[N, *out_features]` or probabilities `[N, C, *out_features]`.
        """
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            weight = weight.unflatten(0, (self.num_classes, *self.out_features))
            bias = None if bias is None else bias.unflatten(0, (self.num_classes, *self.out_features))
        return ops.linear_cross_entropy(
            input, weight, target, linear_bias=bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options)

    def extra_repr(self) -> str:
        names = ("num_classes", "out_features", "bias", "reduction", "ignore_index", "label_smoothing", "options")
        values = {name: getattr(self, name, None) for name in names} | {"bias": self.linear.bias is not None}
        return f"in_features={self.linear.in_features}, " + ", ".join(f"{k}={v}" for k, v in values.items())
