"""softmax(x)_i = exp(x_i - max x) / Σ_j exp(x_j - max x) along one dimension, and its logarithm.

The masked and scaled one takes scale·x, and only the elements that a mask keeps. Where p is the result, the gradient
is scale·p ⊙ (g - Σ_j g_j p_j), that of the logarithm g - p Σ_j g_j: backward needs the results alone.
"""

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from fastlm.autograd import autocasts
from fastlm.dispatch import Op, Sample, at_once

LEAST = 1 << 14  # numbers, below which stock is never the slower one: benchmarks/LOG.md 2026-11-24


def _shortcut(stock):
    def shortcut(input, dim, dtype=None):
        if not input.numel() or not (input.is_cpu or input.numel() < LEAST):  # the only kernels are a GPU's
            return None
        return stock(input, dim) if dtype is None else stock(input, dim, dtype)
    return at_once(shortcut)


@_shortcut(torch.softmax)
def softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise `input` to probabilities along `dim`.

    Args:
        input: any shape, floating point (or any dtype when `dtype` is given).
        dim: the dimension that sums to one; None is deprecated, and 0 or 1 by the number of dimensions, as in torch.
        dtype: cast the input to this dtype first; the result has it too.

    Returns:
        A tensor of `input`'s shape. Under CUDA autocast it is float32, as `torch.softmax` is.

    Raises:
        TypeError: `input` is no tensor, or not floating point and no `dtype` is given.
        IndexError: `dim` is out of range.
    """
    dim = _implicit_dim("softmax", input, dim)
    return op(_checked("softmax", input, dim, dtype), dim)


@_shortcut(torch.log_softmax)
def log_softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return the logarithm of the softmax of `input` along `dim`, exact also where the probabilities round to zero.

    Arguments, dtype and errors are those of `softmax`.
    """
    dim = _implicit_dim("log_softmax", input, dim)
    return log_op(_checked("log_softmax", input, dim, dtype), dim, None, 1.0, True)


def _masked_shortcut(input, mask, dim=-1, *, scale=1.0):
    if input.numel() >= LEAST or mask.dtype is not torch.bool or mask.shape != input.shape[-mask.dim():]:
        return None
    return stock(input, dim, mask, scale) if input.is_floating_point() else None


@at_once(_masked_shortcut)
def masked_softmax(input: Tensor, mask: Tensor | None = None, dim: int = -1, *, scale: float = 1.0,
                   dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the elements of scale·`input` that `mask` keeps to probabilities along `dim`.

    Args:
        input: any shape, floating point (or any dtype when `dtype` is given): attention scores `[B, H, S, K]`.
        mask: boolean, of a shape that broadcasts to `input`'s; True keeps an element, False gives it probability zero,
            as in `scaled_dot_product_attention`. None keeps all.
        dim: the dimension that sums to one.
        scale: factor of `input`, for attention 1/√D.
        dtype: as in `softmax`.

    Returns:
        A tensor of `input`'s shape. Where nothing is kept, probabilities and gradients are zero, not NaN.

    Raises:
        TypeError: `input` or `mask` is no tensor, or of a wrong dtype.
        ValueError: `mask` does not broadcast to `input`.
        IndexError: `dim` is out of range.
        RuntimeError: the tensors are on different devices.
    """
    input = _checked("masked_softmax", input, dim, dtype)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masked_softmax: mask must be a boolean Tensor (True keeps), got {got}")
        if mask.device != input.device:
            raise RuntimeError(f"masked_softmax: mask is on {mask.device}, input is on {input.device}")
        fits = zip(reversed(mask.shape), reversed(input.shape), strict=False)
        if mask.dim() > input.dim() or any(m not in (1, n) for m, n in fits):
            raise ValueError(f"masked_softmax: mask has shape {list(mask.shape)}, which does not broadcast to input's "
                             f"{list(input.shape)}")
        mask = mask.expand(input.shape)
    return masked_op(input, dim, mask, float(scale), False)


def _implicit_dim(name, input, dim):
    if dim is not None or not isinstance(input, Tensor):
        return dim
    if not torch.compiler.is_compiling():  # which cannot trace a warning
        warnings.warn(f"{name} without dim is deprecated: pass the dimension that sums to one", stacklevel=3)
    return 0 if input.dim() in (0, 1, 3) else 1


def _checked(name, input, dim, dtype):
    """Return `input` in the dtype to compute in."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a Tensor, got {type(input).__name__}")
    if not -max(input.dim(), 1) <= dim < max(input.dim(), 1):
        raise IndexError(f"{name}: dim {dim} is out of range for an input of {input.dim()} dimensions")
    if dtype is None and input.is_cuda and autocasts("cuda") and input.dtype is not torch.float64:
        dtype = torch.float32
    if dtype is not None:
        input = input.to(dtype)
    if not input.is_floating_point():
        raise TypeError(f"{name}: input must be floating point, got {input.dtype} (pass dtype= to convert it)")
    return input


def reference(x: Tensor, dim: int, mask: Tensor | None = None, scale: float = 1.0, log: bool = False) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    x = x * scale
    if mask is not None:  # rows that keep nothing stay finite here, and are zeros below
        x = x.masked_fill(~mask & mask.any(dim, keepdim=True), -torch.inf)
    shifted = x - x.detach().amax(dim, keepdim=True)
    if log:
        return shifted - shifted.exp().sum(dim, keepdim=True).log()
    p = shifted.exp() / shifted.exp().sum(dim, keepdim=True)
    return p if mask is None else p.masked_fill(~mask, 0)


def stock(x: Tensor, dim: int, mask: Tensor | None = None, scale: float = 1.0, log: bool = False) -> Tensor:
    if log:
        return torch.log_softmax(x, dim)
    x = x if scale == 1 else x * scale
    if mask is None:
        return torch.softmax(x, dim)
    # Softmax of a row without a kept element is NaN: the second fill makes it, and its gradient, zero.
    return x.masked_fill(~mask, -torch.inf).softmax(dim).masked_fill(~mask, 0)


def gradient(dy: Tensor, y: Tensor, dim: int, scale: float, log: bool = False) -> Tensor:
    """Return the gradient of x from that of the result y."""
    if log:
        return dy - y.exp() * dy.sum(dim, keepdim=True)
    return y * (dy - (dy * y).sum(dim, keepdim=True)) * scale


def collapse(sizes, *strides) -> list[tuple[int, tuple[int, ...]]]:
    """Merge neighbouring dimensions that several tensors can walk as one; return (size, strides) of what is left."""
    found = []
    for size, *steps in reversed(list(zip(sizes, *strides, strict=True))):
        if size == 1:
            continue
        if found and all(s == found[-1][0] * t for s, t in zip(steps, found[-1][1], strict=True)):
            found[-1] = (found[-1][0] * size, found[-1][1])
        else:
            found.append((size, tuple(steps)))
    return found[::-1]


def samples(scale: str, dtype: torch.dtype, device: str, log: bool = False):
    def call(name, x, dim=-1):
        return Sample(name, (x, dim, None, 1.0, True) if log else (x, dim))

    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    if scale == "bench":
        for rows, cols in ((4096, 1024), (256, 32000), (64, 131072)):
            yield call(f"{rows}x{cols}", randn(rows, cols))
        return
    for cols in (1, 2, 127, 128, 129, 1000):
        yield call(f"row of {cols}", randn(3, cols))
    yield call("long row", randn(2, 9001))
    yield call("row in pieces", randn(2, 40001))
    early = torch.arange(40001, device=device) < 9000
    yield call("late values", randn(1, 40001).masked_fill(early, -torch.inf))
    yield call("outliers", randn(5, 257) * 50)
    yield call("minus infinity", randn(4, 65).masked_fill(torch.eye(4, 65, device=device).bool(), -torch.inf))
    yield call("no rows", randn(0, 16))
    yield call("empty rows", randn(4, 0))
    yield call("one number", randn(), 0)
    yield call("first dimension", randn(33, 3, 2), 0)
    yield call("long first dimension", randn(1100, 2, 5), 0)
    yield call("middle dimension", randn(3, 33, 2), 1)
    yield call("transposed", randn(65, 7).t())
    yield call("every other column", randn(7, 130)[:, ::2])
    yield call("five dimensions", randn(2, 3, 5, 2, 4).transpose(0, 3), 2)


def masked_samples(scale: str, dtype: torch.dtype, device: str):
    def call(name, shape, mask_shape, dim=-1, scale=0.125, keep=0.7):
        x = torch.randn(shape, device=device).to(dtype)
        mask = None if mask_shape is None else (torch.rand(mask_shape, device=device) < keep).expand(shape)
        return Sample(name, (x, dim, mask, scale, False))

    if scale == "bench":
        yield call("8x512x512 causal rows", (8, 512, 512), (512, 512))
        yield call("4x8x512x512 padding", (4, 8, 512, 512), (4, 1, 1, 512))
        yield call("64x32000", (64, 32000), (64, 32000))
        return
    for cols in (1, 127, 129, 1000):
        yield call(f"row of {cols}", (3, cols), (3, cols))
    yield call("no mask", (3, 65), None)
    yield call("by key", (2, 3, 5, 33), (2, 1, 1, 33))
    yield call("by head", (2, 3, 5, 33), (3, 1, 33))
    yield call("by query and key", (2, 3, 5, 33), (2, 1, 5, 33))
    yield call("by query", (2, 3, 5, 33), (5, 1))
    yield call("first dimension", (33, 3, 2), (33, 1, 2), 0)
    yield call("few kept", (9, 65), (9, 65), keep=0.01)
    yield call("nothing kept", (3, 65), (3, 65), keep=-1.0)
    yield call("negative scale", (3, 65), (3, 65), scale=-2.0)
    yield call("row in pieces", (2, 40001), (2, 40001))
    yield call("no rows", (0, 16), (16,))
    yield call("empty rows", (4, 0), (4, 0))


def cost(x: Tensor, dim: int, mask: Tensor | None = None, scale: float = 1.0, log: bool = False) -> tuple[int, int]:
    masked = 0 if mask is None else math.prod(n for n, s in zip(mask.shape, mask.stride(), strict=True) if s)
    return 5 * x.numel(), 2 * x.numel() * x.element_size() + masked


_family = partial(Op, reference=reference, torch=stock, cost=cost, files="softmax")
op = _family("softmax", samples=samples, fast=("triton",))
log_op = _family("log_softmax", samples=partial(samples, log=True), fast=("triton",))
masked_op = _family("masked_softmax", samples=masked_samples, fast=("triton", "native"))
