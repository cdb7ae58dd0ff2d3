"""softmax(x)_i = exp(x_i - max x) / Σ_j exp(x_j - max x) along one dimension.

Its gradient is p ⊙ (g - Σ_j g_j p_j), so backward needs the probabilities alone.
"""

import warnings

import torch
from torch import Tensor

from fastlm.dispatch import Op, Sample


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
    if not isinstance(input, Tensor):
        raise TypeError(f"softmax: input must be a Tensor, got {type(input).__name__}")
    if dim is None:
        if not torch.compiler.is_compiling():  # which cannot trace a warning
            warnings.warn("softmax without dim is deprecated: pass the dimension that sums to one", stacklevel=2)
        dim = 0 if input.dim() in (0, 1, 3) else 1
    if not -max(input.dim(), 1) <= dim < max(input.dim(), 1):
        raise IndexError(f"softmax: dim {dim} is out of range for an input of {input.dim()} dimensions")
    if dtype is None and input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype is not torch.float64:
        dtype = torch.float32
    if dtype is not None:
        input = input.to(dtype)
    if not input.is_floating_point():
        raise TypeError(f"softmax: input must be floating point, got {input.dtype} (pass dtype= to convert it)")
    return op(input, dim)


def reference(x: Tensor, dim: int) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    shifted = (x - x.detach().amax(dim, keepdim=True)).exp()
    return shifted / shifted.sum(dim, keepdim=True)


def samples(scale: str, dtype: torch.dtype, device: str):
    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    if scale == "bench":
        for rows, cols in ((4096, 1024), (256, 32000), (64, 131072)):
            yield Sample(f"{rows}x{cols}", (randn(rows, cols), -1))
        return
    for cols in (1, 2, 127, 128, 129, 1000):
        yield Sample(f"row of {cols}", (randn(3, cols), -1))
    yield Sample("long row", (randn(2, 9001), -1))
    yield Sample("row in pieces", (randn(2, 40001), -1))
    early = torch.arange(40001, device=device) < 9000
    yield Sample("late values", (randn(1, 40001).masked_fill(early, -torch.inf), -1))
    yield Sample("outliers", (randn(5, 257) * 50, -1))
    yield Sample("minus infinity", (randn(4, 65).masked_fill(torch.eye(4, 65, device=device).bool(), -torch.inf), -1))
    yield Sample("no rows", (randn(0, 16), -1))
    yield Sample("empty rows", (randn(4, 0), -1))
    yield Sample("one number", (randn(), 0))
    yield Sample("first dimension", (randn(33, 3, 2), 0))
    yield Sample("long first dimension", (randn(1100, 2, 5), 0))
    yield Sample("middle dimension", (randn(3, 33, 2), 1))
    yield Sample("transposed", (randn(65, 7).t(), -1))
    yield Sample("every other column", (randn(7, 130)[:, ::2], -1))


def cost(x: Tensor, dim: int) -> tuple[int, int]:
    return 5 * x.numel(), 2 * x.numel() * x.element_size()


op = Op("softmax", reference=reference, torch=torch.softmax, fast=("triton",), samples=samples, cost=cost)
