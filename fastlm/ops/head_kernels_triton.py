"""What the heads' kernels share on a GPU: gradients scaled once their factor is known, rows of logits and their rim."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.triton_kernels import launch, multiprocessors

PIECE = 4096
PROGRAMS = 8  # on a multiprocessor


def width(z: Tensor) -> int:
    """Return how many numbers of each row of a block of logits may be read and written: a multiple of 16 where the room
    between rows allows it. A load of whole vectors is known to be one then, whatever the number of classes is."""
    wide = -(-z.shape[1] // 16) * 16
    return wide if z.stride(0) % 16 == 0 and z.stride(0) >= wide else z.shape[1]


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, spent: bool) -> Tensor:
    """Return factor·gradient in `dtype`, in place where nothing else reads the gradient (`spent`).

    The host does not know the factor; where it is 1, as that of a mean's gradient mostly is, nothing is read or written
    in place. A sum in float32 is read once and written in 16 bits.
    """
    own = spent and gradient.dtype is dtype
    out = gradient if own else torch.empty_like(gradient, dtype=dtype)
    launch(plan_scale, gradient, factor, out, own)
    return out


def plan_scale(gradient, factor, out, own):
    """Return (kernel, grid, arguments)."""
    count = gradient.numel()
    programs = min(triton.cdiv(count, PIECE), PROGRAMS * multiprocessors(gradient.device))
    return scale_kernel, (programs,), dict(gradient=gradient, factor=factor, out=out, count=count, programs=programs,
                                           OWN=own, PIECE=PIECE, num_warps=8)


@triton.jit
def scale_kernel(gradient, factor, out, count, programs, OWN: tl.constexpr, PIECE: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if (not OWN) | (by != 1.0):
        for piece in range(tl.program_id(0), tl.cdiv(count, PIECE), programs):
            at = piece * tl.full((), PIECE, tl.int64) + tl.arange(0, PIECE)
            x = tl.load(gradient + at, at < count, 0.0).to(tl.float32) * by
            tl.store(out + at, x.to(out.dtype.element_ty), at < count)
