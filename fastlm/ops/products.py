"""Products of matrices on the CPU: by csrc/product.h where that was measured to win, else by torch.

It is handed the extension, so that it imports without it.
"""

from types import ModuleType

import torch
from torch import Tensor

from fastlm.dispatch import assume_constant
from fastlm.ops.tensors import addresses, matmul_precision

CPUS = ("zen5",)  # whose MKL is slower, benchmarks/LOG.md 2026-11-25; on Intel's it was not (2026-11-24)
LEAST_OPERATIONS, LEAST_COLUMNS = 1 << 20, 64
MOST_DEPTH = 1 << 14  # of tiles at a time: what is packed, 512 columns, then has 16 MB
NARROW, CHAIN = 16, 512  # columns, below which MKL adds up in one chain, and how long that may be


def mm(native: ModuleType | None, a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False,
       bias: Tensor | None = None) -> Tensor:
    """Return a·b, plus `bias` or, with `add`, plus what `out` holds, in `out` where one is given.

    Args:
        native: the compiled extension; None: torch multiplies.
        a, b: [M, K] and [K, N] of any strides.
        out: [M, N], rows contiguous, which overlaps none of the others; of the same dtype or, on a CPU, of float32
            beside bfloat16.
        bias: [N], contiguous, of the dtype of `out`.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other.
    """
    if native is not None and is_ours(native, a, b):
        return multiply(native, a, b, out, add=add, bias=bias)
    if native is not None and native.amx and a.dtype is torch.bfloat16 and a.is_cpu and a.shape[1] % 32:
        a = a.contiguous()  # oneDNN's product by AMX reads what lies between the rows, and NaN there stays NaN
    if out is not None and out.dtype is not a.dtype:
        product = torch.mm(a, b)
        return out.add_(product) if add else out.copy_(product) if bias is None else torch.add(product, bias, out=out)
    if a.dtype is torch.float32 and a.is_cpu and b.shape[1] < NARROW and a.shape[1] > CHAIN and bias is None:
        parts = zip(a.split(CHAIN, 1), b.split(CHAIN), strict=True)
        total = torch.stack([torch.mm(*part) for part in parts]).sum(0)
        return total if out is None else out.add_(total) if add else out.copy_(total)
    if add:
        return out.addmm_(a, b)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


@assume_constant
def exact_float32() -> bool:
    """Tell whether products of float32 may not be made of fewer bits, which torch's then are."""
    return matmul_precision("cpu") == "highest"


def is_ours(native: ModuleType, a: Tensor, b: Tensor) -> bool:
    """Tell whether `multiply` is the faster one: float32 as it is, or bfloat16 by AMX, large enough."""
    rows, depth, columns = *a.shape, b.shape[1]
    if not a.is_cpu or columns < LEAST_COLUMNS or rows * depth * columns < LEAST_OPERATIONS:
        return False
    if a.dtype is torch.bfloat16:
        return native.tiles and _by_tiles(rows, depth, columns, a.stride(1) != 1) and _one_stride_is_1(a, b)
    return native.cpu in CPUS and a.dtype is torch.float32 and exact_float32()


def _by_tiles(rows, depth, columns, transposed):
    """Tell whether tiles that we pack beat oneDNN's, to which a transposed first matrix costs half as long again:
    benchmarks/LOG.md 2026-11-27."""
    if rows * columns <= 1 << 16 and depth <= 512:
        return True
    return rows >= 512 and (transposed or depth >= 512)


def _one_stride_is_1(*matrices):
    return all(1 in t.stride() for t in matrices)


def multiply(native: ModuleType, a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False,
             bias: Tensor | None = None) -> Tensor:
    """Do what `mm` does by csrc/product.h, whatever is faster: float32, float64, and bfloat16 by AMX."""
    (rows, depth), columns = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty(rows, columns)
    tensors = (a, b, out) if bias is None else (a, b, out, bias)
    if b.shape[0] != depth or out.shape != (rows, columns) or (bias is not None and bias.shape != (columns,)):
        raise RuntimeError(f"mm: shapes do not fit each other: {', '.join(str(list(t.shape)) for t in tensors)}")
    pairs = a.dtype is torch.bfloat16 and native.tiles
    if not pairs and a.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"mm: no kernel for {a.dtype} on this CPU")
    sums = out.dtype if pairs and out.dtype is torch.float32 else a.dtype
    if [t.dtype for t in tensors] != [a.dtype, a.dtype, sums, sums][: len(tensors)] or not all(
            t.is_cpu for t in tensors):
        raise RuntimeError(f"mm: expected tensors of {a.dtype} on the CPU, got {[t.dtype for t in tensors]}")
    if (columns > 1 and out.stride(1) != 1) or (bias is not None and not bias.is_contiguous()):
        raise RuntimeError("mm: the rows of out and the bias must be contiguous")
    if add and bias is not None:
        raise RuntimeError("mm: a product is added to out or to the bias, not to both")
    if pairs:
        a, b = (t if _one_stride_is_1(t) else t.contiguous() for t in (a, b))
        if depth > MOST_DEPTH:
            return _in_parts(native, a, b, out, add, bias)
    size, threads = out.element_size(), torch.get_num_threads()
    room = native.product_workspace(rows, depth, columns, threads, size, pairs)
    workspace = a.new_empty(room, dtype=torch.uint8)
    native.product((rows, depth, columns, *a.stride(), *b.stride(), out.stride(0)),
                   addresses(a, b, bias, out, workspace), add, threads, size, pairs)
    return out


def _in_parts(native, a, b, out, add, bias):
    """Do what `multiply` does of so many products that their factors are not all packed at a time."""
    sums = out if out.dtype is torch.float32 else out.float() if add else out.new_empty(out.shape, dtype=torch.float32)
    bias = None if bias is None else bias.float()
    for x, w in zip(a.split(MOST_DEPTH, 1), b.split(MOST_DEPTH), strict=True):
        multiply(native, x, w, sums, add=add, bias=bias)
        add, bias = True, None
    return out if sums is out else out.copy_(sums)


def few_rows(native: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·weightᵀ + bias as `[M, N]` by csrc/product.h, which reads the weight where it lies.

    Args:
        native: the compiled extension.
        x: [M, K], float32 or bfloat16.
        weight, bias: [N, K] and [N], of that dtype.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other.
    """
    (rows, depth), columns = x.shape, weight.shape[0]
    if weight.shape != (columns, depth) or (bias is not None and bias.shape != (columns,)):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, bias) if t is not None)
        raise RuntimeError(f"few_rows: shapes do not fit each other: {shapes}")
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.dtype not in (torch.float32, torch.bfloat16) or any(t.dtype != x.dtype or not t.is_cpu for t in tensors):
        raise RuntimeError(f"few_rows: expected float32 or bfloat16 on the CPU, got {[t.dtype for t in tensors]}")
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    if depth > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    y = x.new_empty(rows, columns)
    native.few_rows((rows, depth, columns, weight.stride(0)), addresses(x, weight, bias, y), torch.get_num_threads(),
                    x.element_size())
    return y
