"""A language model's head: products of hidden states `[N, H]` with W `[V, H]`, and their gradients, in blocks of rows.

Of the logits `[N, V]`, its largest tensor by far, only one block exists at a time.
"""

import torch
from torch import Tensor

from fastlm.ops.cpu import on_amx
from fastlm.ops.products import CPUS, mm
from fastlm.ops.tensors import accumulator

# Bytes of a block of logits, and rows it has at least where there are so many: fewer make the products inefficient,
# and each block reads and writes the whole gradient of W. benchmarks/LOG.md 2026-11-24.
BLOCK_BYTES = 104 << 20
FEW_BYTES = 16 << 20  # where products in float32 lose little by fewer rows: benchmarks/LOG.md 2026-11-25 and 27
MIN_ROWS = 256
# On a GPU: half of the rows, from 2048 up to 4096, which take 8 % less time: benchmarks/LOG.md 2026-11-26.
GPU_ROWS = 2048, 4096
# On a GPU rows begin at multiples of ROW numbers, and classes are multiplied by multiples of EVEN: where a size or a
# stride of 16 bits is no multiple of 16 bytes, products take many times as long.
ROW, EVEN = 64, 8
# Where a CPU's products have 16 bits: rows of a block, and what a number of W's gradient takes as a sum over blocks.
HALF_ROWS = 512
SUM_BYTES = 4

LOGITS_ON_AVX2 = 1 << 23

TILE = 4096  # classes at a time, where weights are converted for the products, or these have 16 bits on a CPU


def products_on_cpu(native, x: Tensor) -> torch.dtype:
    """Return the dtype of products for 16-bit hidden states `x` where the kernels are C++: their own where the CPU has
    bfloat16 arithmetic, else float32, because converted tiles beat torch's bfloat16 ones."""
    fast = x.dtype is torch.bfloat16 and native.bf16_arithmetic
    return x.dtype if fast else accumulator(x.dtype)


def few_on_avx2(native, x: Tensor, weight: Tensor) -> str | None:
    """Return that stock is as fast with AVX2, whose products in float32 and float64 are the same: benchmarks/LOG.md
    2026-11-26; None for many logits, for bfloat16, which stock multiplies slowly there, and on other CPUs.
    """
    if native.cpu != "avx2" or x.dtype is torch.bfloat16:
        return None
    few = x.shape[:-1].numel() * weight.size(0) < LOGITS_ON_AVX2
    if few or x.dtype is torch.float64:
        return f"no faster than torch below {LOGITS_ON_AVX2} logits or in float64: benchmarks/LOG.md 2026-11-26"
    return None


def block_rows(x: Tensor, weight: Tensor, dtype: torch.dtype, copies: int = 1, grows: bool = False,
               few: int = 0) -> int:
    """Return how many rows a block has: few enough to save memory, and blocks as even as can be.

    Args:
        x, weight: `[N, H]` and `[V, H]`.
        dtype: of the logits.
        copies: how many blocks of logits exist at a time.
        grows: whether W needs a gradient.
        few: where products lose little by fewer rows, how many they still want; else 0.
    """
    rows, row_bytes = x.shape[0], copies * weight.shape[0] * dtype.itemsize
    if dtype is torch.bfloat16 and grows and rows * row_bytes <= SUM_BYTES * weight.numel():
        most = rows  # one block is no larger than the sum it spares
    elif x.is_cuda:
        least, most = GPU_ROWS
        most = max(least, min(rows // 2, most // copies))
    elif dtype.itemsize > 2:
        most = max(few or MIN_ROWS, (FEW_BYTES if few else BLOCK_BYTES) // max(row_bytes, 1))
    else:
        most = max(HALF_ROWS, BLOCK_BYTES // max(row_bytes, 1))
    blocks = -(-rows // max(most, 1))
    return -(-rows // max(blocks, 1))


def gradient_dtypes(x: Tensor, weight: Tensor, dtype: torch.dtype, copies: int = 1) -> tuple[torch.dtype, ...]:
    """Return what the gradients of x, W and the bias are summed in, with the arguments of `block_rows`.

    It is float32 or float64. But W's has the dtype of bfloat16 products where one block has all rows: a single product
    rounds once. In float16 what is not yet scaled down might overflow.
    """
    sums = accumulator(dtype)
    whole = dtype is torch.bfloat16 and block_rows(x, weight, dtype, copies, True) >= x.shape[0]
    return sums, dtype if whole else sums, sums


class Head:
    """The products of x `[N, H]` and W `[V, H]`, and what flows back through them.

    Args:
        x, weight: their dtype may be lower than `dtype`, which the products are computed in.
        needs: whether the gradients of x, W and the bias `[V]` are wanted.
        native: the compiled extension where it may make the products.
        copies: how many blocks of logits exist at a time.
    """

    def __init__(self, x: Tensor, weight: Tensor, dtype: torch.dtype, needs=(False, False, False), native=None,
                 copies: int = 1):
        self.x, self.weight, self.dtype, self.needs, self.native = x, weight, dtype, needs, native
        (self.rows, self.hidden), self.classes = x.shape, weight.shape[0]
        self.sums = accumulator(dtype)
        self.first = True
        few = 0
        if native is not None and dtype is torch.float32:
            few = MIN_ROWS if native.cpu in CPUS else 2 * MIN_ROWS if on_amx(native) else 0
        self.block_rows = block_rows(x, weight, dtype, copies, needs[1], few)
        shapes = (self.rows, self.hidden), (self.classes, self.hidden), (self.classes,)
        dtypes = gradient_dtypes(x, weight, dtype, copies)
        self.d_x, self.d_weight, self.d_bias = (
            torch.empty(shape, dtype=d, device=x.device) if need and self.rows else
            torch.zeros(shape, dtype=d, device=x.device) if need else None
            for need, shape, d in zip(needs, shapes, dtypes, strict=True))

    def blocks(self, copies: int) -> Tensor:
        """Return room for as many blocks of logits, `[copies, block_rows, V]`."""
        width = -(-self.classes // ROW) * ROW if self.x.is_cuda else self.classes
        room = torch.empty(copies, self.block_rows, width, dtype=self.dtype, device=self.x.device)
        return room[..., : self.classes]

    def tiles(self):
        """Yield (slice of the classes, their weights in the products' dtype)."""
        if self.weight.dtype is self.dtype:
            for part in self.parts():
                yield part, self.weight[part]
            return
        buffer = torch.empty(min(TILE, self.classes), self.hidden, dtype=self.dtype, device=self.weight.device)
        for part in _slices(self.classes, TILE):
            yield part, buffer[: part.stop - part.start].copy_(self.weight[part])

    def parts(self):
        """Return slices of the classes. On a CPU, what products of 16 bits leave to be added in float32 then stays in
        cache, and oneDNN takes half of the time for a transposed gradient (benchmarks/LOG.md 2026-11-25). On a GPU the
        few classes beyond a multiple of EVEN are multiplied alone.
        """
        if self.dtype.itemsize > 2:
            return _slices(self.classes, self.classes)
        return _slices(self.classes, self.classes // EVEN * EVEN or self.classes if self.x.is_cuda else TILE)

    def logits(self, part: slice, out: Tensor) -> Tensor:
        """Write the logits of the rows in `part`, without bias, into the first rows of `out` and return those."""
        x, out = self.x[part].to(self.dtype), out[: part.stop - part.start]
        for columns, weight in self.tiles():
            mm(self.native, x, weight.t(), out[:, columns])
        return out

    def pull(self, part: slice, gradient: Tensor) -> None:
        """Add what the gradient of the logits of the rows in `part` sends back."""
        x, first = self.x[part].to(self.dtype), self.first
        self.first = False
        if self.d_x is not None:
            for columns, weight in self.tiles():
                self.add_product(self.d_x[part], gradient[:, columns], weight, columns.start == 0)
        if self.d_weight is not None:
            for columns in self.parts():
                self.add_product(self.d_weight[columns], gradient[:, columns].t(), x, first)
        if self.d_bias is not None:
            total = gradient.sum(0, dtype=self.sums)
            self.d_bias.copy_(total) if first else self.d_bias.add_(total)

    def add_product(self, out, a, b, first):
        """out = a·b, plus out but for the first time; a and b may have 16 bits and out 32."""
        if out.is_cuda and out.dtype is not a.dtype:
            torch.mm(a, b, out_dtype=out.dtype, out=out) if first else torch.addmm(
                out, a, b, out_dtype=out.dtype, out=out)
        else:
            mm(self.native, a, b, out, add=not first)

    def gradients(self) -> list[Tensor]:
        """Return those of the gradients of x, W and the bias that are wanted."""
        return [d for d in (self.d_x, self.d_weight, self.d_bias) if d is not None]


def _slices(size, step):
    return [slice(start, min(start + step, size)) for start in range(0, size, max(step, 1))]


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, spent: bool) -> Tensor:
    """Return factor·gradient in `dtype`, in place where nothing else reads the gradient (`spent`)."""
    if spent and not factor.is_cuda and factor == 1:  # on CUDA the host must not wait for a value
        return gradient.to(dtype)
    return (gradient.mul_(factor) if spent else gradient * factor).to(dtype)
