"""dropout_add: residual + x ⊙ m / (1 - p), where each element of m is 0 with probability p, else 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import check_tensors

LEAST = 1 << 17  # numbers, for which no kernel is launched


def _shortcut(x, residual, p=0.5, training=True):
    if x.numel() < LEAST and x.shape == residual.shape and residual.is_floating_point() and x.is_floating_point() and (
            0 <= p <= 1):
        return residual + torch.dropout(x, p if training else 0.0, True)
    return None


@at_once(_shortcut)
def dropout_add(x: Tensor, residual: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Return residual + dropout(x), neither argument changed.

    The mask follows `torch.manual_seed` and is the same in forward and backward, also where a checkpoint runs forward
    again. On the CPU it is the one that `torch.nn.functional.dropout` would draw.

    Args:
        x, residual: `[*]`, of one shape, floating point.
        p: probability of a zero, 0 to 1.
        training: without it nothing is dropped.

    Raises:
        TypeError: a tensor is none, or not floating point.
        ValueError: `p` is no probability, or the shapes differ.
        RuntimeError: the tensors are on different devices.
    """
    check_tensors("dropout_add", dict(x=x, residual=residual), floating=TypeError)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_add: p is {p}, expected a probability, 0 to 1")
    if residual.shape != x.shape:
        raise ValueError(f"dropout_add: residual has shape {list(residual.shape)}, x has {list(x.shape)}")
    return op(x, residual, float(p) if training else 0.0)


def reference(x: Tensor, residual: Tensor, p: float) -> Tensor:
    return residual + F.dropout(x, p)


def samples(scale: str, dtype: torch.dtype, device: str):
    def call(name, p, *shape, wide=0):
        x, residual = (torch.randn(*shape[:-1], shape[-1] + wide, device=device).to(dtype)[..., :shape[-1]]
                       for _ in range(2))
        return Sample(name, (x, residual, p))

    # Masks that leave no choice: a kernel on the GPU draws its own, see tests/cases/test_dropout.py.
    if scale == "bench":
        yield call("2048x1024 kept", 0.0, 2048, 1024)
        return
    for size in (1, 127, 128, 129, 9001):
        yield call(f"{size} kept", 0.0, size)
    yield call("all dropped", 1.0, 3, 65)
    yield call("strided rows", 0.0, 2, 5, 64, wide=7)
    yield call("no numbers", 0.0, 0, 16)


def cost(x: Tensor, residual: Tensor, p: float) -> tuple[int, int]:
    return 3 * x.numel(), 3 * x.numel() * x.element_size()


op = Op("dropout_add", reference=reference, torch=reference, samples=samples, cost=cost, fast=("triton",),
        files="dropout")
