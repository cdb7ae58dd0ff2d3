"""quantized_linear for few rows in Triton: a program takes a block of outputs and widens its weight in registers.

Many rows are the work of a GEMM: there stock dequantizes first.
"""

import torch
import triton
import triton.language as tl

from fastlm.ops.quantized_linear import MODES, differentiable, reference, round_rows

INTERPRETED = triton.knobs.runtime.interpret

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACCEPTS = {f"{mode} {name}" for mode in MODES for name in ("one row", "odd sizes", "one output", "no rows",
                                                           "outliers", "transposed")}
ACCEPTS |= {"groups of 32", "groups of 128"}

MOST_ROWS = 16  # the height of a tensor core's tile


def cannot(x, weight, scale, bias, mode, group_size):
    if not (x.is_cuda or INTERPRETED):
        return "needs a GPU"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if x.shape[0] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows are a GEMM's work"
    return None


def loses(x, *args):
    return "not yet run on a GPU" if x.is_cuda else "interpreted"


def run(*args):
    return _kernels(args[:4], *args[4:])[0]


def forward(tensors, needs, mode, group_size):
    x, weight, scale, bias = tensors
    if not x.numel() or not weight.numel():
        return [reference(x, weight, scale, bias, mode, group_size)]
    row_scale = None
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if mode == "int8_dynamic":
        values, row_scale = round_rows(x.float())
        x = values.to(torch.int8)
    weight, scale, bias = (None if t is None else t.contiguous() for t in (weight, scale, bias))
    kernel, grid, arguments = plan(x.contiguous(), weight, scale, row_scale, bias, y, mode, group_size)
    with torch.cuda.device_of(x):
        kernel[grid](**arguments)
    return [y]


def plan(x, weight, scale, row_scale, bias, y, mode, group_size):
    """Return (kernel, grid, arguments); `row_scale` `[M, 1]` and an int8 x are for "int8_dynamic"."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    int4, group_bytes = mode == "int4", group_size // 2
    most = 128 if x.dtype is not torch.float32 else 32 if int4 else 64  # more would spill
    arguments = dict(x=x, weight=weight, scale=scale, row_scale=row_scale, bias=bias, y=y, rows=rows, inputs=inputs,
                     outputs=outputs, row_bytes=weight.shape[1], groups=scale.shape[1] if int4 else 1,
                     ROWS=MOST_ROWS, COLS=32, BYTES=min(group_bytes, most) if int4 else most, INT4=int4,
                     GROUP_BYTES=group_bytes, num_warps=4)
    return kernel, (triton.cdiv(outputs, 32),), arguments


@triton.jit
def kernel(x, weight, scale, row_scale, bias, y, rows, inputs, outputs, row_bytes, groups,
           ROWS: tl.constexpr, COLS: tl.constexpr, BYTES: tl.constexpr, INT4: tl.constexpr,
           GROUP_BYTES: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    lane = tl.arange(0, BYTES)
    dynamic: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros((ROWS, COLS), tl.int32 if dynamic else tl.float32)
    x += row.to(tl.int64) * inputs
    weight += col[None, :].to(tl.int64) * row_bytes
    for start in range(0, row_bytes, BYTES):
        byte = start + lane
        w = tl.load(weight + byte[:, None], (byte < row_bytes)[:, None] & (col < outputs)[None, :], 0)
        if INT4:
            even = 2 * byte
            s = tl.load(scale + col.to(tl.int64) * groups + start // GROUP_BYTES, col < outputs, 0.0)[None, :]
            low = ((w & 15).to(tl.float32) - 8).to(x.dtype.element_ty)
            high = ((w >> 4).to(tl.float32) - 8).to(x.dtype.element_ty)
            x_low = tl.load(x + even[None, :], (row < rows) & (even < inputs)[None, :], 0.0)
            x_high = tl.load(x + even[None, :] + 1, (row < rows) & (even + 1 < inputs)[None, :], 0.0)
            part = tl.dot(x_low, low, input_precision="ieee")
            acc += tl.dot(x_high, high, part, input_precision="ieee") * s
        else:
            a = tl.load(x + byte[None, :], (row < rows) & (byte < inputs)[None, :], 0)
            if dynamic:
                acc = tl.dot(a, w, acc, out_dtype=tl.int32)
            else:  # every integer is exact in 16 bits too
                acc += tl.dot(a, w.to(x.dtype.element_ty), input_precision="ieee")
    result = acc.to(tl.float32)
    if not INT4:
        result *= tl.load(scale + col, col < outputs, 0.0)[None, :]
    if dynamic:
        result *= tl.load(row_scale + row, row < rows, 0.0)
    if bias is not None:
        result += tl.load(bias + col, col < outputs, 0.0).to(tl.float32)[None, :]
    tl.store(y + row * outputs + col[None, :], result, (row < rows) & (col < outputs)[None, :])


_kernels = differentiable("quantized_linear_triton", forward)
