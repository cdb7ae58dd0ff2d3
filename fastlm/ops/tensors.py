"""What the ops ask of the tensors that they are given."""

from typing import Any

import torch
from torch import Tensor

from fastlm.autograd import plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(op: str, tensors: dict[str, Any], optional: tuple[str, ...] = (),
                  floating: type[Exception] | None = None, other: tuple[str, ...] = ()) -> None:
    """Raise where one of an op's named arguments is no tensor, or not on the first one's device.

    Args:
        optional: names of those that may be None.
        floating: what to raise where one is not floating point; None: nothing.
        other: names of those that may be of any dtype all the same.
    """
    first = device = None
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
        if floating is not None and not x.is_floating_point() and name not in other:
            raise floating(f"{op}: {name} must be floating point, got {x.dtype}")
        if first is None:
            first, device = name, x.device
        elif x.device != device:
            raise RuntimeError(f"{op}: {name} is on {x.device}, {first} is on {device}")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Tell whether a gradient is wanted for one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def readable(x: Tensor) -> bool:
    """Tell whether the values of `x` may be looked at: not on a GPU, nor while they are traced or mapped over."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and plain((x,))


PRECISIONS = {"ieee": "highest", "none": "highest", "tf32": "high", "bf16": "medium"}


def matmul_precision(device: str) -> str:
    """Return what `torch.get_float32_matmul_precision` does, for products on "cpu" or "cuda".

    That raises once somebody has set it by torch's newer names, such as `torch.backends.fp32_precision`.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        return PRECISIONS[backend.matmul.fp32_precision]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: float64 for itself, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def adjacent(t: Tensor) -> Tensor:
    """Return `t` with the elements of its last dimension side by side, which costs a copy where they are not."""
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return where the tensors lie, 0 for None. The caller keeps them until the kernel is done."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)
