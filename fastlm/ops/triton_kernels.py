"""What the Triton files share: whether a launch is possible here, and how it is made.

It imports Triton where a kernel file does so for it; `plan` functions return (kernel, grid, arguments), which
tests/test_triton.py compiles without a GPU.
"""

import os

import torch
from torch import Tensor

from fastlm.ops.gpu import unmeasured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = 1 << 20


def cannot_here(x: Tensor) -> str | None:
    """Return why no kernel can take `x`."""
    if not (x.is_cuda or INTERPRETED):
        return "needs a GPU"
    return None if x.dtype in DTYPES else f"no kernel for {x.dtype}"


def loses(x: Tensor, *rest) -> str | None:
    """Return why a kernel that could run is not the default."""
    return unmeasured(x) if x.is_cuda else "interpreted"


def loses_below(x: Tensor, *rest) -> str | None:
    """Return the same for what only reads and writes: few numbers take the GPU less than Python takes to launch."""
    if x.is_cuda and x.numel() < LEAST:
        return f"below {LEAST} numbers the launch takes longer than the work"
    return loses(x)


def launch(plan: tuple, like: Tensor) -> None:
    """Run a (kernel, grid, arguments) on the device of `like`, on PyTorch's current stream there."""
    kernel, grid, arguments = plan
    if all(grid):
        with torch.cuda.device_of(like):
            kernel[grid](**arguments)


def multiprocessors(device: torch.device) -> int:
    """Return how many blocks can run at once: an H100's number where nothing can be launched."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if device.type == "cpu" else 132


def concurrent(device: torch.device) -> bool:
    """Return whether programs run at the same time, so that one may wait for another: interpreted ones don't."""
    return device.type != "cpu" and not INTERPRETED


def generation(device: torch.device) -> int:
    """Return ten times the compute capability of a GPU: a Hopper's where nothing can be launched."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return 90


def adjacent(t: Tensor | None) -> Tensor | None:
    """Return `t` with the elements of its last dimension side by side, which costs a copy where they are not."""
    return t if t is None or t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()
