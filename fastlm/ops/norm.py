"""rms_norm and layer_norm over the last dimensions, alone or after the addition of a residual.

RMS:   y = w ⊙ x / sqrt(mean x² + ε)                 (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)
layer: y = w ⊙ (x - mean x) / sqrt(var x + ε) + b    (Ba, Kiros and Hinton, "Layer Normalization", 2016)

With x̂ the normalised row, r the reciprocal root and u = w ⊙ g, the gradient of x is r (u - x̂ mean(u ⊙ x̂)), for layer
norm less r mean u; that of w is Σ g ⊙ x̂ over the rows, that of b Σ g.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.autograd import autocasts
from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import check_tensors

LEAST = 1 << 17  # numbers, below which stock is never the slower one: benchmarks/LOG.md 2026-11-24


def _shortcut(norm):
    def shortcut(input, normalized_shape, weight=None, *rest):
        if input.numel() < LEAST and (weight is None or weight.is_floating_point()):
            return norm(input, normalized_shape, weight, *rest)
        return None
    return at_once(shortcut)


def _added_shortcut(norm):
    def shortcut(input, residual, normalized_shape, weight=None, *rest):
        if input.numel() < LEAST and input.shape == residual.shape and input.is_floating_point() and (
                residual.is_floating_point() and (weight is None or weight.is_floating_point())):
            total = input + residual
            return norm(total, normalized_shape, weight, *rest), total
        return None
    return at_once(shortcut)


@_shortcut(torch.rms_norm)
def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
             eps: float | None = None) -> Tensor:
    """Divide by the root of the mean square over the last dimensions.

    Args:
        input: `[*, *normalized_shape]`, floating point, rows of any stride.
        normalized_shape: sizes of the last dimensions, over which the mean runs.
        weight: `normalized_shape`, a factor for each element; None stands for ones.
        eps: added to the mean square; None: the smallest step of float32 (of float64 for float64 input), as in torch.

    Returns:
        A tensor of `input`'s shape and dtype; float32 under CUDA autocast, as in torch.

    Raises:
        TypeError: an argument is no tensor, or not floating point.
        RuntimeError: a shape does not fit, or the tensors are on different devices.
    """
    args = _checked("rms_norm", input, None, normalized_shape, weight, None, eps)
    return rms_op(*args, False)


@_shortcut(torch.layer_norm)
def layer_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Subtract the mean over the last dimensions and divide by the standard deviation.

    Args:
        input: `[*, *normalized_shape]`, floating point, rows of any stride.
        normalized_shape: sizes of the last dimensions, over which mean and (biased) variance run.
        weight, bias: `normalized_shape`, a factor and a summand for each element; None stands for ones and zeros.
        eps: added to the variance.

    Returns:
        A tensor of `input`'s shape and dtype; float32 under CUDA autocast, as in torch.

    Raises:
        TypeError: an argument is no tensor, or not floating point.
        RuntimeError: a shape does not fit, or the tensors are on different devices.
    """
    args = _checked("layer_norm", input, None, normalized_shape, weight, bias, eps)
    return layer_op(*args, True)


@_added_shortcut(torch.rms_norm)
def add_rms_norm(input: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                 eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(input + residual), input + residual), neither argument changed.

    Args:
        residual: of `input`'s shape. The others are `rms_norm`'s.

    Returns:
        (normed, sum): what the next layer takes, and the residual stream that goes on past it.
    """
    args = _checked("add_rms_norm", input, residual, normalized_shape, weight, None, eps)
    return add_rms_op(*args, False)


@_added_shortcut(torch.layer_norm)
def add_layer_norm(input: Tensor, residual: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                   bias: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return (layer_norm(input + residual), input + residual), neither argument changed.

    Args:
        residual: of `input`'s shape. The others are `layer_norm`'s.

    Returns:
        (normed, sum): what the next layer takes, and the residual stream that goes on past it.
    """
    args = _checked("add_layer_norm", input, residual, normalized_shape, weight, bias, eps)
    return add_layer_op(*args, True)


def _checked(name, input, residual, normalized_shape, weight, bias, eps):
    """Return the op's arguments but the last: tensors in the dtype to compute in, the shape, eps resolved."""
    tensors = dict(input=input, residual=residual, weight=weight, bias=bias)
    optional = ("weight", "bias") if name.startswith("add") else ("weight", "bias", "residual")
    check_tensors(name, tensors, optional, TypeError)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or (not input.is_nested and tuple(input.shape[-len(shape):]) != shape):  # nested: no shape to check
        raise RuntimeError(f"{name}: input has shape {list(input.shape)}, expected [*, {str(list(shape))[1:]} for "
                           f"normalized_shape {list(shape)}")
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(f"{name}: residual has shape {list(residual.shape)}, input has {list(input.shape)}")
    for key in ("weight", "bias"):
        if tensors[key] is not None and tuple(tensors[key].shape) != shape:
            raise RuntimeError(f"{name}: {key} has shape {list(tensors[key].shape)}, expected {list(shape)}")
    if input.is_cuda and autocasts("cuda") and name in ("rms_norm", "layer_norm"):
        input, weight, bias = (t if t is None or t.dtype is torch.float64 else t.float()
                               for t in (input, weight, bias))
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    return input, residual, weight, bias, shape, float(eps)


def reference(input, residual, weight, bias, shape, eps, centred):
    dims = tuple(range(-len(shape), 0))
    x = input if residual is None else input + residual
    y = x - x.mean(dims, keepdim=True) if centred else x
    y = y * (y.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    y = (y if bias is None else y + bias).to(x.dtype)
    return y if residual is None else (y, x)


def stock(input, residual, weight, bias, shape, eps, centred):
    x = input if residual is None else input + residual
    y = F.layer_norm(x, shape, weight, bias, eps) if centred else F.rms_norm(x, shape, weight, eps)
    return y if residual is None else (y, x)


def samples(scale: str, dtype: torch.dtype, device: str, centred: bool, added: bool):
    def call(name, *shape, dims=1, weight=True, bias=centred, eps=1e-5, scale=1.0, shift=0.0, wide=0):
        def tensor(*size):
            return torch.randn(size, device=device).to(dtype)

        def rows():
            padded = tensor(*shape[:-1], shape[-1] + wide)[..., :shape[-1]] if shape else tensor()
            return padded if scale == 1 and shift == 0 else padded * scale + shift

        x, inner = rows(), shape[len(shape) - dims:]
        return Sample(name, (x, rows() if added else None, tensor(*inner) if weight else None,
                             tensor(*inner) if bias else None, inner, eps, centred))

    if scale == "bench":
        for shape in ((2048, 1024), (2048, 4096), (64, 4096), (512, 512)):
            yield call("x".join(map(str, shape)), *shape)
        return
    for cols in (127, 1, 2, 128, 129, 1000):
        yield call(f"rows of {cols}", 3, cols)
    yield call("wide rows", 2, 9001)
    yield call("rows in pieces", 2, 34001)
    yield call("many rows", 300, 64)
    yield call("two dimensions", 3, 5, 4, 6, dims=2)
    yield call("all dimensions", 4, 6, dims=2)
    yield call("without weight", 3, 65, weight=False, bias=False)
    yield call("strided rows", 2, 5, 64, wide=64)
    yield call("odd strides", 4, 37, wide=5)
    yield call("outliers", 5, 64, scale=50.0)
    yield call("far from zero", 5, 64, shift=20.0)
    yield call("tiny", 5, 64, scale=1e-3)
    yield call("no rows", 0, 16)
    if centred:
        yield call("weight alone", 3, 65, bias=False)
        yield call("bias alone", 3, 65, weight=False)


def cost(input, residual, weight, bias, shape, eps, centred) -> tuple[int, int]:
    streams = 2 if residual is None else 4
    small = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    return 8 * input.numel(), streams * input.numel() * input.element_size() + small


def rows(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View `t` as `[T, H]`, H elements to a mean; only strides that no such view can express cost a copy."""
    return t.reshape(math.prod(t.shape[:t.dim() - len(shape)]), math.prod(shape))


def _family(name, centred, added):
    return Op(name, reference=reference, torch=stock, cost=cost, files="norm", fast=("triton", "native"),
              samples=partial(samples, centred=centred, added=added))


rms_op, layer_op = _family("rms_norm", False, False), _family("layer_norm", True, False)
add_rms_op, add_layer_op = _family("add_rms_norm", False, True), _family("add_layer_norm", True, True)
