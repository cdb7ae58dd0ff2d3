"""What the callers of csrc/rows.h share: checks, and what crosses into C++."""

import torch
from torch import Tensor

from fastlm.ops.cpu import unmeasured

MEASURED = ("intel", "zen5", "avx2")  # CPUs timed in benchmarks/LOG.md
ROW = "benchmarks/LOG.md 2026-11-23, 25 and 26"


def cannot_here(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return why a kernel for the CPU cannot take `x`."""
    if x.is_cuda:
        return "runs on the CPU alone"
    return None if x.dtype in dtypes else f"no kernel for {x.dtype}"


def loses_below(native, least: tuple[int, int], *tensors: Tensor | None) -> str | None:
    """Return why stock is the better choice for the first tensor, None where a measured row says that it is not.

    Args:
        least: how many numbers it must have, without gradients and with them; 0: never enough.
    """
    x = tensors[0]
    if unknown := unmeasured(native, *MEASURED):
        return unknown
    if x.dtype is torch.bfloat16 and native.bf16_arithmetic and native.cpu != "zen5":
        return "not yet measured on a CPU with bfloat16 arithmetic"
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    enough = least[1] if trains else least[0]
    if not enough:
        return f"slower than torch: {ROW}"
    return f"slower than torch below {enough} numbers: {ROW}" if x.numel() < enough else None


def adjacent(t: Tensor) -> Tensor:
    """Return `t` with the elements of its last dimension side by side, which costs a copy where they are not."""
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def address(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return where the tensors lie, 0 for None. The caller keeps them until the kernel is done."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
