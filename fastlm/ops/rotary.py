"""rotary_embedding: rotate pairs (a, b) of each head's columns by the angle of their position.

a' = a cos - b sin, b' = b cos + a sin (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
2021, equation 34). A pair lies R/2 columns apart (GPT-NeoX, Llama), or side by side when interleaved (RoFormer, GPT-J).
The gradient of x is the rotation by the opposite angle.
"""

import torch
from torch import Tensor

from fastlm.dispatch import Op, Sample, at_once
from fastlm.ops.tensors import check_tensors, readable

LEAST = 1 << 16  # numbers, below which stock is never the slower one: benchmarks/LOG.md 2026-11-23


def _shortcut(x, cos, sin):
    """Rotate whole heads by angles `[S, D/2]`."""
    half = x.size(3) // 2
    if x.numel() < LEAST and cos.shape == sin.shape == (x.size(2), half) and x.size(3) == 2 * half and (
            x.dim() == 4 and x.dtype is cos.dtype is sin.dtype and x.is_floating_point()):
        a, b = x.chunk(2, 3)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 3)
    return None


@at_once(_shortcut)
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
                     positions: Tensor | None = None, rotary_dim: int | None = None) -> Tensor:
    """Rotate the first R columns of each head by the angles of its position; the columns from R on stay as they are.

    Args:
        x: queries or keys `[B, H, S, D]`, of any strides.
        cos, sin: the angles' cosines and sines, of any floating dtype, in one of these shapes:
            `[S, R/2]`, one for each pair, as flash-attn has them;
            `[S, R]`, one for each column, as transformers has them;
            `[B, S, R/2]` or `[B, S, R]`, where each sequence has positions of its own (1 stands for any B);
            and the latter with a dimension of 1 for the heads, `[B, 1, S, ...]`.
            A width of at most D/2 is R/2, a greater one is R; `rotary_dim` says otherwise.
        interleaved: pair column 2i with 2i + 1; else column i with i + R/2.
        positions: integers `[S]` or `[B, S]`. With them cos and sin are tables `[N, R/2]` or `[N, R]` of N positions,
            of which these rows are taken.
        rotary_dim: R, an even number up to D: needed where a table `[S, R]` is at most half as wide as a head.

    Returns:
        A tensor of `x`'s shape and dtype, whatever cos's; 16-bit inputs are rounded once, at the end, by the kernels.

    Raises:
        TypeError: an argument is no tensor, or not floating point (`positions`: not integers).
        ValueError: a shape or `rotary_dim` does not fit.
        IndexError: a position is not in the tables (on the CPU; on CUDA values are never read by the host).
        RuntimeError: the tensors are on different devices.
    """
    check_tensors("rotary_embedding", dict(x=x, cos=cos, sin=sin), floating=TypeError)
    if x.dim() != 4:
        raise ValueError(f"rotary_embedding: x has shape {list(x.shape)}, expected [B, H, S, D]")
    if cos.shape != sin.shape:
        raise ValueError(f"rotary_embedding: sin has shape {list(sin.shape)}, cos has {list(cos.shape)}")
    if positions is not None:
        cos, sin = _rows(cos, positions), _rows(sin, positions)
    rotary_dim = _rotary_dim(x, cos, rotary_dim)
    return op(x, _table(cos, x, rotary_dim, interleaved), _table(sin, x, rotary_dim, interleaved), interleaved)


def _rows(table, positions):
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype is torch.bool:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"rotary_embedding: positions must be a Tensor of integers, got {got}")
    if positions.dim() not in (1, 2) or table.dim() != 2:
        raise ValueError(f"rotary_embedding: positions has shape {list(positions.shape)} and cos {list(table.shape)}, "
                         "expected [S] or [B, S], and [N, R/2] or [N, R]")
    if positions.device != table.device:
        raise RuntimeError(f"rotary_embedding: positions is on {positions.device}, cos is on {table.device}")
    if readable(positions):
        wrong = positions[(positions < 0) | (positions >= table.size(0))]
        if wrong.numel():
            raise IndexError(f"rotary_embedding: positions holds {wrong[0].item()}, expected 0 to {table.size(0) - 1}")
    return torch.nn.functional.embedding(positions.long(), table)


def _rotary_dim(x, cos, rotary_dim):
    """Return R."""
    head_dim, width = x.size(3), cos.size(-1) if cos.dim() else 0
    if rotary_dim is None:
        rotary_dim = 2 * width if 2 * width <= head_dim else width
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_embedding: rotary_dim is {rotary_dim}, expected an even number up to x's head_dim "
                         f"{head_dim}")
    return rotary_dim


def _table(table, x, rotary_dim, interleaved):
    """View a table as `[B or 1, S, 2, R/2]`: an angle for the first and for the second column of each pair."""
    batch, _, seq_len, _ = x.shape
    width = table.size(-1) if table.dim() else 0
    found = table.squeeze(1) if table.dim() == 4 and table.size(1) == 1 else table
    found = found.unsqueeze(0) if found.dim() == 2 else found
    if found.dim() != 3 or found.size(0) not in (1, batch) or found.size(1) != seq_len or (
            width not in (rotary_dim, rotary_dim // 2)):
        raise ValueError(f"rotary_embedding: cos and sin have shape {list(table.shape)}, expected [S, R/2], [S, R], "
                         f"[B, S, R/2] or [B, S, R] with B {batch}, S {seq_len}, R {rotary_dim}")
    if width < rotary_dim:
        return found.unsqueeze(2).expand(-1, -1, 2, -1)
    return found.unflatten(2, (-1, 2)).transpose(2, 3) if interleaved else found.unflatten(2, (2, -1))


def pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second columns of the R/2 pairs, as views `[B, H, S, R/2]`."""
    if interleaved:
        return x[..., 0:2 * half:2], x[..., 1:2 * half:2]
    return x[..., :half], x[..., half:2 * half]


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.size(-1)
    a, b = pairs(x, half, interleaved)
    (cos_a, cos_b), (sin_a, sin_b) = cos.unsqueeze(1).unbind(-2), sin.unsqueeze(1).unbind(-2)
    rotated = (a * cos_a - b * sin_a).to(x.dtype), (b * cos_b + a * sin_b).to(x.dtype)
    rotated = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat([rotated, x[..., 2 * half:]], -1)


def samples(scale: str, dtype: torch.dtype, device: str):
    def call(name, shape, width, *, batch=1, full=False, interleaved=False, table=None, transposed=False):
        b, h, s, d = shape
        x = torch.randn(b, s, h, d, device=device).to(dtype).transpose(1, 2) if transposed else torch.randn(
            shape, device=device).to(dtype)
        angles = torch.randn(batch, s, 2 if full else 1, width, device=device).expand(-1, -1, 2, -1)
        return Sample(name, (x, *(f(angles).to(table or dtype) for f in (torch.cos, torch.sin)), interleaved))

    if scale == "bench":
        for shape in ((4, 8, 512, 64), (1, 32, 4096, 128)):
            for interleaved in (False, True):
                yield call("x".join(map(str, shape)) + " interleaved" * interleaved, shape, shape[-1] // 2,
                           interleaved=interleaved, transposed=True)
        return
    for half in (8, 1, 33, 64):
        yield call(f"heads of {2 * half}", (2, 3, 5, 2 * half), half)
    for interleaved in (False, True):
        kind = "interleaved " * interleaved
        yield call(f"{kind}whole", (2, 2, 7, 16), 8, interleaved=interleaved, transposed=True)
        yield call(f"{kind}angles by column", (2, 2, 7, 16), 8, full=True, interleaved=interleaved)
        yield call(f"{kind}part of a head", (2, 2, 7, 19), 6, interleaved=interleaved, transposed=True)
        yield call(f"{kind}positions by sequence", (3, 2, 5, 12), 6, batch=3, interleaved=interleaved)
    yield call("float32 angles", (2, 2, 7, 16), 8, table=None if dtype is torch.float64 else torch.float32)
    yield call("one position", (1, 4, 1, 64), 32)
    yield call("long", (1, 2, 300, 32), 16)
    yield call("no positions", (2, 2, 0, 8), 4)
    yield call("nothing rotated", (2, 2, 3, 8), 0)


def cost(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[int, int]:
    rotated = x[..., :2 * cos.size(-1)].numel()
    return 3 * rotated or x.numel(), 2 * x.numel() * x.element_size() + cos.numel() * cos.element_size()


op = Op("rotary_embedding", reference=reference, torch=reference, samples=samples, cost=cost,
        fast=("triton", "native"), files="rotary")
