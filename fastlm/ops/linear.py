"""linear: y = x Wᵀ + b, what projections, feed-forward layers and small heads are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import check_tensors

LEAST_WEIGHT = 1 << 14  # numbers, from which a kernel may make products of few rows
LEAST = 1 << 23  # multiplications, from which one may make those of many


def small(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return torch's product where the arguments are plain to see."""
    if weight.device == input.device and (bias is None or (bias.numel() == weight.shape[0] and bias.dim() == 1)):
        return F.linear(input, weight, bias)
    return None


def _shortcut(input, weight, bias=None):
    if op.implementations["native"].run is None or (
            weight.numel() < LEAST_WEIGHT and input.numel() * weight.shape[0] < LEAST):
        return small(input, weight, bias)
    return op.at_once(input, weight, bias)


@at_once(_shortcut)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return input · weightᵀ + bias, with the arguments of `torch.nn.functional.linear`.

    Args:
        input: `[*, in]`, floating point.
        weight: `[out, in]`, or `[in]` for a result of `[*]`.
        bias: `[out]`, or `[]` where `weight` is `[in]`.

    Returns:
        A tensor `[*, out]`; of the autocast dtype under autocast, as in torch.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    check_tensors("linear", dict(input=input, weight=weight, bias=bias), ("bias",))
    if input.is_nested:  # has no shape to check
        return op(input, weight, bias)
    if weight.dim() not in (1, 2) or not input.dim():
        raise RuntimeError(f"linear: input has shape {list(input.shape)}, weight {list(weight.shape)}, "
                           "expected [*, in] and [out, in] or [in]")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(f"linear: input has {input.shape[-1]} features, weight takes {weight.shape[-1]}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(f"linear: bias has shape {list(bias.shape)}, expected {list(weight.shape[:-1])}")
    return op(input, weight, bias)


def reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = input @ weight.mT if weight.dim() == 2 else (input * weight).sum(-1)
    return y if bias is None else y + bias


def samples(scale: str, dtype: torch.dtype, device: str):
    def draw(*shape, factor=1.0):
        return (torch.randn(shape, device=device) * factor).to(dtype)

    def call(name, *shape, out=5, bias=True, **options):
        return Sample(name, (draw(*shape, **options), draw(out, shape[-1]), draw(out) if bias else None))

    if scale == "bench":
        for rows, inputs, outputs in ((4096, 512, 2048), (4096, 2048, 512), (1024, 768, 768), (32, 1024, 1024),
                                      (1, 4096, 4096), (4, 512, 50257)):
            yield Sample(f"{rows}x{inputs}x{outputs}", (draw(rows, inputs), draw(outputs, inputs), draw(outputs)))
        return
    for rows, inputs, outputs in ((3, 4, 5), (1, 1, 1), (127, 33, 65), (128, 129, 128), (13, 300, 49)):
        yield call(f"{rows}x{inputs}x{outputs}", rows, inputs, out=outputs)
    yield call("no bias", 2, 7, 18, out=9, bias=False)
    yield call("outliers", 40, 70, factor=100.0)
    yield call("no rows", 0, 6)
    yield call("no features", 3, 0)
    yield Sample("not contiguous", (draw(20, 9, 8).transpose(0, 1)[..., ::2], draw(4, 6).t(), draw(12)[::2]))
    yield Sample("one vector", (draw(12), draw(7, 12), draw(7)))


def cost(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    outputs = input.numel() // max(input.shape[-1], 1) * (weight.shape[0] if weight.dim() == 2 else 1)
    numbers = input.numel() + weight.numel() + outputs + (0 if bias is None else bias.numel())
    return 2 * outputs * input.shape[-1] + outputs, numbers * input.element_size()


op = Op("linear", reference=reference, torch=F.linear, samples=samples, cost=cost, fast=("native",))
